"""The base's RAM as a sealed memory file: nobody can change it, and siblings share one."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloudlet.errors import NotFoundError
from cloudlet.hypervisor.qemu.memory import is_sealed, writable_ram
from cloudlet.hypervisor.records import ProcessId
from tests.unit.hypervisor.sealed import sealed_ram

BASE = "ab" * 32
SIZE = 3 << 20


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    """RAM with a page at its beginning, one before its end, and a hole of more than a chunk."""
    path = tmp_path / "ram"
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.write(b"first page".ljust(4096, b"."))
        file.seek(SIZE - 4096)
        file.write(b"last page".ljust(4096, b"."))
    return path


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def holder(descriptor: int) -> Iterator[ProcessId]:
    """Another process that holds the descriptor under the same number."""
    command = [sys.executable, "-I", "-S", "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[descriptor]
    ) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            yield ProcessId.of(process.pid)
        finally:
            process.kill()


def test_it_is_the_files_content(ram: Path) -> None:
    with closing(sealed_ram(BASE, ram, [])) as sealed:
        assert os.pread(sealed, SIZE + 1, 0) == ram.read_bytes()
        assert os.fstat(sealed).st_blocks * 512 <= 2 << 20, "the hole was filled"


def test_nobody_can_change_it(ram: Path) -> None:
    with closing(sealed_ram(BASE, ram, [])) as sealed:
        assert is_sealed(sealed)
        for attempt in (
            lambda: os.pwrite(sealed, b"x", 0),
            lambda: os.ftruncate(sealed, 0),
            lambda: os.ftruncate(sealed, 2 * SIZE),
            lambda: mmap.mmap(sealed, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        ):
            with pytest.raises(OSError, match="not permitted") as caught:
                attempt()
            assert caught.value.errno == errno.EPERM
        # Opening it again, as QEMU does, gives no more.
        with closing(os.open(f"/proc/self/fd/{sealed}", os.O_RDWR)) as again:
            with pytest.raises(PermissionError):
                os.pwrite(again, b"x", 0)
            with mmap.mmap(again, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as private:
                private[:5] = b"other"
            assert os.pread(sealed, 5, 0) == b"first"


def test_it_is_taken_from_a_running_sibling(ram: Path) -> None:
    with closing(sealed_ram(BASE, ram, [])) as sealed, holder(sealed) as sibling:
        ram.unlink()
        with closing(sealed_ram(BASE, ram, [(sibling, sealed)])) as taken:
            assert os.fstat(taken).st_ino == os.fstat(sealed).st_ino
            assert is_sealed(taken)


def test_what_a_sibling_holds_is_not_trusted(ram: Path) -> None:
    """Another base's memory, a file that is not sealed, a closed number, a process that is gone."""
    with (
        closing(sealed_ram("cd" * 32, ram, [])) as other,
        closing(os.memfd_create(f"cloudlet-base-{BASE[:32]}", os.MFD_ALLOW_SEALING)) as unsealed,
        holder(other) as one,
        holder(unsealed) as two,
        closing(sealed_ram(BASE, ram, [])) as real,
    ):
        gone = ProcessId(one.pid, one.start_time - 1)
        siblings = [(one, other), (two, unsealed), (one, 99), (gone, real)]
        with closing(sealed_ram(BASE, ram, siblings)) as made:
            assert os.fstat(made).st_ino not in {os.fstat(file).st_ino for file in (other, unsealed, real)}
            assert os.pread(made, 10, 0) == b"first page"


def test_memory_for_a_machine_that_boots_can_be_written() -> None:
    with closing(writable_ram(SIZE, "name")) as descriptor:
        assert os.fstat(descriptor).st_size == SIZE
        assert not is_sealed(descriptor)
        assert os.pwrite(descriptor, b"x", SIZE - 1) == 1


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="RAM is missing"):
        sealed_ram(BASE, tmp_path / "none", [])
