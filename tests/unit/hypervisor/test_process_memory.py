"""Reading another process's memory: many stretches at once, and what there is when that may not be."""

from __future__ import annotations

import ctypes
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cloudlet.errors import FailedError
from cloudlet.hypervisor.qemu.process_memory import ProcessMemory

PAGES = 4096
PAGE = 4096

_CHILD = """
import ctypes, mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]))
for at in range(0, len(memory), 4096):
    memory[at : at + 4] = (at // 4096).to_bytes(4, "little")
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process and the address of its numbered pages."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CHILD, str(PAGES * PAGE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        yield process, int(process.stdout.readline())
        process.kill()


def numbers_at(memory: ProcessMemory, address: int, runs: list[tuple[int, int]]) -> list[int]:
    stretches = np.array([(address + first * PAGE, count * PAGE) for first, count in runs], np.uint64)
    rows = np.empty((sum(count for _, count in runs), PAGE), np.uint8)
    memory.read(stretches.reshape(-1, 2), rows)
    assert not rows[:, 4:].any()
    return rows[:, :4].copy().view("<u4").ravel().tolist()


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 2500])
def test_any_number_of_stretches(child: tuple[subprocess.Popen[bytes], int], count: int) -> None:
    process, address = child
    rng = random.Random(count)
    runs = [(rng.randrange(PAGES - 3), rng.randrange(1, 4)) for _ in range(count)]
    with ProcessMemory(process.pid) as memory:
        expected = [number for first, length in runs for number in range(first, first + length)]
        assert numbers_at(memory, address, runs) == expected


def test_there_is_no_memory_at_an_address(child: tuple[subprocess.Popen[bytes], int]) -> None:
    process, address = child
    with ProcessMemory(process.pid) as memory:
        for runs in ([(-address // PAGE + 1, 1)], [(0, 1), (-address // PAGE + 1, 1)]):
            with pytest.raises(FailedError, match="cannot read the memory"):
                numbers_at(memory, address, runs)
        assert numbers_at(memory, address, [(7, 1)]) == [7]


def test_a_process_that_ends(child: tuple[subprocess.Popen[bytes], int]) -> None:
    process, address = child
    with ProcessMemory(process.pid) as memory:
        process.kill()
        process.wait()
        with pytest.raises(FailedError, match="cannot read the memory"):
            numbers_at(memory, address, [(0, 1)])
    with pytest.raises(ProcessLookupError):
        ProcessMemory(process.pid)


def test_nothing_stays_open(child: tuple[subprocess.Popen[bytes], int]) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    memory = ProcessMemory(child[0].pid)
    memory.close()
    memory.close()
    assert sorted(Path("/proc/self/fd").iterdir()) == before


_FILTERED = """
import ctypes, errno, os, struct, sys
sys.path[:0] = sys.argv[3:]
from tests.unit.hypervisor.test_process_memory import ProcessMemory, forbid, numbers_at
forbid()
libc = ctypes.CDLL(None, use_errno=True)
assert libc.process_vm_readv(os.getpid(), None, 0, None, 0, 0) == -1
assert ctypes.get_errno() == errno.EPERM
with ProcessMemory(int(sys.argv[1])) as memory:
    for turn in range(2):
        print(numbers_at(memory, int(sys.argv[2]), [(5, 2), (9, 1), (4095, 1)]))
    try:
        numbers_at(memory, 0, [(1, 1)])
    except Exception as error:
        print(error)
"""


def forbid() -> None:
    """Have the kernel refuse ``process_vm_readv`` to this process, as a service's filter may."""
    number = {"x86_64": 310, "aarch64": 270}[os.uname().machine]
    steps = ((0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | 1), (0x06, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("<H6xQ", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, program, 0, 0) == 0


def test_where_a_filter_keeps_the_call_from_us(child: tuple[subprocess.Popen[bytes], int]) -> None:
    process, address = child
    result = subprocess.run(
        [sys.executable, "-c", _FILTERED, str(process.pid), str(address)],
        capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert result.stdout.splitlines()[:2] == ["[5, 6, 9, 4095]"] * 2, result.stderr
    assert "cannot read the memory" in result.stdout
