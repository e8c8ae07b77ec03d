"""A page that the host has swapped out is captured all the same.

It needs root and swap: where the machine has none, a swap file in a temporary folder is used, and where
that may not be (in most containers), the test fails and says so.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from cloudlet.control.site import Site
from cloudlet.hypervisor.qemu.changed import Mapping, find_mapping
from cloudlet.hypervisor.qemu.instance import QemuInstance
from cloudlet.model import MEBIBYTE, PAGE_BYTES
from cloudlet.store.bases import Base
from tests.qemu import guest

pytestmark = pytest.mark.qemu

_PROCESS_MADVISE, _MADV_PAGEOUT = 440, 21  # x86-64's number; linux/mman.h
_SWAPPED = np.uint64(1 << 62)  # Documentation/admin-guide/mm/pagemap.rst
_KNOWN_MIB = 16


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@pytest.fixture
def swap() -> Iterator[None]:
    """Some swap for as long as the test runs."""
    if len(Path("/proc/swaps").read_text().splitlines()) > 1:
        yield
        return
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        file = Path(folder) / "swap"
        with file.open("wb") as room:
            file.chmod(0o600)
            for _ in range(128):
                room.write(bytes(MEBIBYTE))
        subprocess.run(["mkswap", "-q", file], check=True, capture_output=True)
        made = subprocess.run(["swapon", file], check=False, capture_output=True, text=True)
        if made.returncode:
            pytest.fail(f"this test needs swap, or the right to add a file as swap: {made.stderr.strip()}")
        try:
            yield
        finally:
            subprocess.run(["swapoff", file], check=True)


def page_out(mapping: Mapping) -> None:
    """Have the kernel swap out what it can of a mapping of another process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with ExitStack() as stack:
        process = os.pidfd_open(mapping.pid)
        stack.callback(os.close, process)
        vector = _Vector(mapping.address, mapping.pages * PAGE_BYTES)
        taken = libc.syscall(_PROCESS_MADVISE, process, ctypes.byref(vector), 1, _MADV_PAGEOUT, 0)
        assert taken == vector.length, os.strerror(ctypes.get_errno())


def swapped_pages(mapping: Mapping) -> set[int]:
    with Path(f"/proc/{mapping.pid}/pagemap").open("rb", buffering=0) as file:
        raw = os.pread(file.fileno(), mapping.pages * 8, mapping.address // PAGE_BYTES * 8)
    return set(np.flatnonzero(np.frombuffer(raw, np.uint64) & _SWAPPED).tolist())


def mapping_of(instance: QemuInstance) -> Mapping:
    process = instance.record.machine
    assert process
    ram = Path(f"/proc/{process.pid}/fd/{instance.record.ram_descriptor}")
    return find_mapping(process.pid, ram, instance.machine.memory_bytes)


def test_swapped_pages_are_captured(swap: None, site: Site, quick_base: Base) -> None:
    with guest.resumed(site, quick_base) as instance:
        guest.shell(instance, f"dd if=/dev/urandom of=/run/known bs=1M count={_KNOWN_MIB} 2>/dev/null")
        instance.pause()
        mapping = mapping_of(instance)
        page_out(mapping)
        out = swapped_pages(mapping)
        assert len(out) > _KNOWN_MIB * MEBIBYTE // PAGE_BYTES // 2, f"the host swapped {len(out)} pages only"
        capture = instance.capture()
        truth = guest.memory_of(instance)
        rebuilt = guest.base_memory(quick_base)
        # Pages that the guest changed and that were on the swap when the capture began.
        assert len(out & set(guest.differing(rebuilt, truth))) > len(out) // 2
        rebuilt[capture.ram.numbers] = capture.ram.data
        assert guest.differing(rebuilt, truth) == []
