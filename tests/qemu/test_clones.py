"""Two instances of one overlay at once: they do not see each other, and are not each other."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cloudlet.control.site import Site
from cloudlet.control.synthesis import Request, synthesise
from cloudlet.hypervisor.qemu.instance import QemuInstance
from cloudlet.store.bases import Base
from cloudlet.transfer.source import open_source
from tests.qemu import guest
from tests.qemu.conftest import Warm

pytestmark = pytest.mark.qemu

BASES = ("quick_base", pytest.param("debian_base", marks=pytest.mark.slow))
"""Fixtures of bases that give clones an identity; each guest has what it has of host keys and the like."""

_IDENTITY = """
hostname
cat /etc/hostname /etc/machine-id 2>/dev/null || true
cat /etc/ssh/ssh_host_*_key.pub 2>/dev/null || true
"""
_NOTICED = "dmesg | grep -c 'crng reseeded due to virtual machine fork'"
_RANDOM = "head -c 32 /dev/urandom | od -A n -t x1"


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> Base:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Base)
    return found


@pytest.fixture
def overlay(site: Site, base: Base, tmp_path: Path) -> Path:
    """An overlay of the base as it runs, with a machine id."""
    path = tmp_path / "clone.overlay"
    with guest.resumed(site, base) as instance:
        guest.shell(
            instance, "[ -s /etc/machine-id ] || tr -d - < /proc/sys/kernel/random/uuid > /etc/machine-id"
        )
        guest.pack(base, instance.capture(), path)
    return path


@pytest.fixture
def pair(site: Site, warm: Warm, warm_base: Base) -> Iterator[tuple[QemuInstance, QemuInstance]]:
    """Two clones of the warm guest, at once."""
    with (
        guest.clone_of(site, warm_base, warm.overlay) as one,
        guest.clone_of(site, warm_base, warm.overlay) as other,
    ):
        yield one, other


def test_each_clone_has_an_identity_of_its_own(site: Site, base: Base, overlay: Path) -> None:
    with ExitStack() as stack:
        lines = []
        generations = set()
        for _ in range(2):
            source = stack.enter_context(open_source(str(overlay), None))
            made = stack.enter_context(synthesise(site, source, Request(allow_unsigned=True)))
            assert made.renewed
            instance = made.instance
            assert isinstance(instance, QemuInstance)
            lines.append(guest.shell(instance, _IDENTITY).splitlines())
            assert lines[-1][0].endswith(instance.id)
            generations.add(instance.monitor.execute("query-vm-generation-id")["guid"])
        ours, theirs = lines
        assert len(ours) == len(theirs) >= 3, "hostname, its file, and a machine id at least"
        assert set(ours) & set(theirs) == set()
        assert len(generations) == 2


def test_the_kernel_knows_that_it_is_a_copy_and_draws_other_numbers(
    site: Site, base: Base, overlay: Path
) -> None:
    with guest.clone_of(site, base, overlay) as one, guest.clone_of(site, base, overlay) as other:
        # Nobody has mixed anything into these guests: it is the generation ID alone that tells the kernel.
        drawn = [guest.shell(clone, _RANDOM) for clone in (one, other)]
        assert drawn[0] != drawn[1]
        assert len(drawn[0].split()) == 32
        # Once when the base was resumed to make the overlay, once now.
        assert [guest.shell(clone, _NOTICED) for clone in (one, other)] == ["2", "2"]


def test_what_one_clone_changes_the_other_does_not_see(
    site: Site, warm: Warm, warm_base: Base, pair: tuple[QemuInstance, QemuInstance]
) -> None:
    one, other = pair
    change = """
    dd if=/dev/urandom of=/root/known bs=1M count=8 conv=notrunc 2>/dev/null
    dd if=/dev/urandom of=/run/known bs=1M count=24 conv=notrunc 2>/dev/null
    sync; echo 3 > /proc/sys/vm/drop_caches
    """
    guest.shell(one, change)
    for path, known in (("/root/known", warm.on_disk), ("/run/known", warm.in_memory)):
        assert guest.shell(one, f"sha256sum < {path}").split()[0] != known
        assert (
            guest.shell(other, f"echo 3 > /proc/sys/vm/drop_caches; sha256sum < {path}").split()[0] == known
        )
    with guest.clone_of(site, warm_base, warm.overlay) as later:
        for path, known in (("/root/known", warm.on_disk), ("/run/known", warm.in_memory)):
            assert guest.shell(later, f"sha256sum < {path}").split()[0] == known
    site.bases.verify(warm_base)


def test_clones_share_one_ram_that_not_even_root_can_write(
    warm_base: Base, pair: tuple[QemuInstance, QemuInstance]
) -> None:
    files = []
    for instance in pair:
        assert instance.record.machine
        files.append(Path(f"/proc/{instance.record.machine.pid}/fd/{instance.record.ram_descriptor}"))
    assert files[0].stat().st_ino == files[1].stat().st_ino, "the second took the first one's"
    descriptor = os.open(files[0], os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        assert size == warm_base.machine.memory_bytes
        for attempt in (
            lambda: os.pwrite(descriptor, b"x", 0),
            lambda: os.ftruncate(descriptor, size - 4096),
            lambda: os.posix_fallocate(descriptor, size, 4096),
            lambda: _punch_hole(descriptor),  # what QEMU does for a balloon
            lambda: mmap.mmap(descriptor, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
            lambda: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, 0),
        ):
            with pytest.raises(PermissionError):
                attempt()
        with pytest.raises(OSError):
            os.open(files[0], os.O_RDWR | os.O_TRUNC | os.O_CLOEXEC)
        assert os.pread(descriptor, size, 0) == warm_base.image().ram.read_bytes()
    finally:
        os.close(descriptor)


def _punch_hole(descriptor: int) -> None:
    keep_size_and_punch_hole = 0x01 | 0x02  # linux/falloc.h
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    if libc.fallocate(descriptor, keep_size_and_punch_hole, 0, 4096):
        raise OSError(ctypes.get_errno(), "fallocate")
