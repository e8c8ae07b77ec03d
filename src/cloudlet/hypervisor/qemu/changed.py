"""Which pages a private instance has changed, and their bytes, read from outside.

Source: Linux ``Documentation/admin-guide/mm/pagemap.rst``. A page of a private mapping that was written
is anonymous: present or swapped, and no longer the file's. That may count pages that equal the base
again, never one too few. Reading needs the same user or CAP_SYS_PTRACE; the machine must be paused.
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cloudlet.errors import FailedError, RefusedError
from cloudlet.model import PAGE_BYTES
from cloudlet.sparse import write_at

_PRESENT, _SWAPPED, _OF_FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)
_BUFFER_PAGES = 512
"""Pages that are read before they are written: 2 MiB."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """Where a process has mapped the RAM of its machine."""

    pid: int
    address: int
    pages: int


def find_mapping(pid: int, ram: Path, ram_bytes: int) -> Mapping:
    """The mapping of the RAM file, which is known by its device and inode number.

    :raises RefusedError: this process may not look.
    """
    try:
        status = ram.stat()
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except PermissionError as error:
        raise _refused() from error
    file = (f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", str(status.st_ino))
    for line in lines:
        fields = line.split(None, 5)
        if tuple(fields[3:5]) == file:
            start, end = (int(address, 16) for address in fields[0].split("-"))
            if end - start >= ram_bytes and int(fields[2], 16) == 0:
                return Mapping(pid, start, ram_bytes // PAGE_BYTES)
    raise FailedError(f"process {pid} has no mapping of the base's RAM")


def private_pages(mapping: Mapping) -> np.ndarray[Any, Any]:
    """Numbers of the pages that are no longer the base's, in order."""
    try:
        with Path(f"/proc/{mapping.pid}/pagemap").open("rb", buffering=0) as file:
            raw = os.pread(file.fileno(), mapping.pages * 8, mapping.address // PAGE_BYTES * 8)
    except PermissionError as error:
        raise _refused() from error
    entries = np.frombuffer(raw, np.uint64)
    if len(entries) != mapping.pages:
        raise FailedError(f"the page map of process {mapping.pid} ends early")
    private = ((entries & (_PRESENT | _SWAPPED)) != 0) & ((entries & _OF_FILE) == 0)
    return np.flatnonzero(private).astype(np.uint32)


def read_pages(mapping: Mapping, numbers: np.ndarray[Any, Any], target: int) -> None:
    """Copy pages, in the order of ``numbers`` (sorted), to the file ``target`` from its beginning.

    The machine is paused meanwhile: one buffer is written to the file while the next one is filled, and
    pages of zeros, which a guest that cleans what it frees has many of, become holes.
    """
    os.ftruncate(target, len(numbers) * PAGE_BYTES)
    buffers = [memoryview(bytearray(_BUFFER_PAGES * PAGE_BYTES)) for _ in range(2)]
    with (
        Path(f"/proc/{mapping.pid}/mem").open("rb", buffering=0) as memory,
        ThreadPoolExecutor(1, thread_name_prefix="spool") as writer,
    ):
        written: list[Future[None]] = []
        for turn, at in enumerate(range(0, len(numbers), _BUFFER_PAGES)):
            if turn > 1:
                written[turn - 2].result()
            batch = numbers[at : at + _BUFFER_PAGES]
            room = buffers[turn % 2][: len(batch) * PAGE_BYTES]
            _fill(memory.fileno(), mapping, batch, room)
            written.append(writer.submit(_write_filled, target, room, at * PAGE_BYTES))
        for future in written[-2:]:
            future.result()


def _fill(memory: int, mapping: Mapping, numbers: np.ndarray[Any, Any], room: memoryview) -> None:
    breaks = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    for first, after in pairwise(breaks):
        part = room[first * PAGE_BYTES : after * PAGE_BYTES]
        address = mapping.address + int(numbers[first]) * PAGE_BYTES
        if os.preadv(memory, [part], address) != len(part):
            raise FailedError(f"cannot read the memory of process {mapping.pid} at {address:#x}")


def _write_filled(target: int, room: memoryview, offset: int) -> None:
    filled = np.frombuffer(room, np.uint64).reshape(-1, PAGE_BYTES // 8).any(axis=1)
    edges = np.flatnonzero(np.diff(filled, prepend=False, append=False)).tolist()
    for first, after in zip(edges[::2], edges[1::2], strict=True):
        write_at(target, room[first * PAGE_BYTES : after * PAGE_BYTES], offset + first * PAGE_BYTES)


def check_access(pid: int) -> None:
    """Whether this process may read the memory of ``pid``; said at start rather than at capture.

    :raises RefusedError: it may not.
    """
    try:
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise _refused() from error
        raise FailedError(f"process {pid} is gone") from error


def _refused() -> RefusedError:
    return RefusedError(
        "the memory of the machine may not be read",
        hint="run as root, or as the machine's user with: sysctl kernel.yama.ptrace_scope=0",
    )
