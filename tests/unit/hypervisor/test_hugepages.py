"""QEMU gets no huge pages, and nobody else loses theirs."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cloudlet.hypervisor.qemu.hugepages import known_here, without_hugepages
from cloudlet.hypervisor.qemu.launch import confinement

pytestmark = [
    pytest.mark.skipif(not known_here(), reason="no filter for this processor"),
    pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages"),
]

ASK = """
import mmap
memory = mmap.mmap(-1, 4 << 20)
memory.madvise(mmap.MADV_HUGEPAGE)
memory.madvise(mmap.MADV_SEQUENTIAL)
print([line.split()[1:] for line in open("/proc/self/smaps") if line.startswith("VmFlags:")])
print([line for line in open("/proc/self/status") if line.startswith("Seccomp:")])
"""


def run(*command: str) -> str:
    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    with without_hugepages(start) as child:
        out, _ = child.communicate(timeout=20)
    assert child.returncode == 0, out
    return out


def has_huge_pages() -> bool:
    """Whether this very thread is given them."""
    with mmap.mmap(-1, 4 << 20) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        lines = Path("/proc/thread-self/smaps").read_text().splitlines()
    # Others of this process's mappings may have asked for them long ago.
    ours = False
    for line in lines:
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            ours = int(found[1], 16) <= address < int(found[2], 16)
        elif ours and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the mapping is not there")


def seccomp(status: Path) -> str:
    return next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("Seccomp:"))


def test_the_child_is_told_that_it_has_them_and_has_none() -> None:
    flags, filtered = run(sys.executable, "-I", "-S", "-c", ASK).splitlines()
    assert "'hg'" not in flags
    assert "'sr'" in flags, "other advice does not reach the kernel either"
    assert "\\t2" in filtered


@pytest.mark.parametrize("uid", [None, 400123])
def test_it_is_inherited_through_what_confines(uid: int | None) -> None:
    if uid is not None and os.geteuid() != 0:
        pytest.skip("takes root")
    lines = dict(
        line.split(":", 1) for line in run(*confinement(uid), "cat", "/proc/self/status").splitlines()
    )
    assert lines["Seccomp"].strip() == "2"
    assert lines["Uid"].split()[0] == str(os.getuid() if uid is None else uid)


def test_this_process_goes_on_as_before() -> None:
    before = seccomp(Path("/proc/self/status"))
    threads = threading.active_count()
    run("true")
    assert has_huge_pages()
    assert seccomp(Path("/proc/self/status")) == before
    assert threading.active_count() == threads


def test_the_thread_that_starts_is_filtered_itself() -> None:
    assert not without_hugepages(has_huge_pages)
    assert without_hugepages(lambda: seccomp(Path("/proc/thread-self/status"))) == "2"


def test_an_error_is_passed_on() -> None:
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        without_hugepages(lambda: subprocess.Popen(["/nowhere"]))
