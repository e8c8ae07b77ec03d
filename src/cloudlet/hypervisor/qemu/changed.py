"""Which pages a private instance has changed, and their bytes, read from outside.

Source: Linux ``Documentation/admin-guide/mm/pagemap.rst``. A page of a private mapping that was written
is anonymous: present or swapped, and no longer the file's. That may count pages that equal the base
again, never one too few. Reading needs the same user or CAP_SYS_PTRACE. What is read of a machine that
runs may be torn.
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloudlet.errors import FailedError, RefusedError
from cloudlet.hypervisor.qemu.process_memory import ProcessMemory
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.pages import Numbers, Rows, runs_of, zero_rows
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


def private_pages(mapping: Mapping) -> Numbers:
    """Numbers of the pages that are no longer the base's, in order."""
    entries = _page_map(mapping)
    private = ((entries & (_PRESENT | _SWAPPED)) != 0) & ((entries & _OF_FILE) == 0)
    return np.flatnonzero(private).astype(np.uint32)


def mapped_pages(mapping: Mapping) -> Numbers:
    """Numbers of the pages that the process has; the others it would get from the file."""
    return np.flatnonzero(_page_map(mapping) & (_PRESENT | _SWAPPED)).astype(np.uint32)


def read_rows(memory: ProcessMemory, mapping: Mapping, numbers: Numbers, rows: Rows) -> None:
    """Fill ``rows`` with pages, in the order of ``numbers`` (sorted); neighbours are read as one stretch.

    :raises FailedError: the machine is gone.
    """
    stretches = runs_of(numbers).astype(np.uint64) * PAGE_BYTES
    stretches[:, 0] += np.uint64(mapping.address)
    memory.read(stretches, rows)


def read_pages(mapping: Mapping, numbers: Numbers, target: int) -> None:
    """Copy pages, in the order of ``numbers`` (sorted), to the file ``target`` from its beginning.

    The machine is paused meanwhile: one buffer is written to the file while the next one is filled, and
    pages of zeros, which a guest that cleans what it frees has many of, become holes.
    """
    os.ftruncate(target, len(numbers) * PAGE_BYTES)
    buffers = [np.empty((_BUFFER_PAGES, PAGE_BYTES), np.uint8) for _ in range(2)]
    with (
        open_memory(mapping.pid) as memory,
        ThreadPoolExecutor(1, thread_name_prefix="spool") as writer,
    ):
        written: list[Future[None]] = []
        for turn, at in enumerate(range(0, len(numbers), _BUFFER_PAGES)):
            if turn > 1:
                written[turn - 2].result()
            batch = numbers[at : at + _BUFFER_PAGES]
            rows = buffers[turn % 2][: len(batch)]
            read_rows(memory, mapping, batch, rows)
            written.append(writer.submit(_write_filled, target, rows, at * PAGE_BYTES))
        for future in written[-2:]:
            future.result()


def open_memory(pid: int) -> ProcessMemory:
    """The memory of a process.

    :raises RefusedError: this process may not look.
    """
    try:
        return ProcessMemory(pid)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise _refused() from error
        raise FailedError(f"process {pid} is gone") from error


def check_access(pid: int) -> None:
    """Whether this process may read the memory of ``pid``; said at start rather than at capture.

    :raises RefusedError: it may not.
    """
    open_memory(pid).close()


def _page_map(mapping: Mapping) -> NDArray[np.uint64]:
    try:
        with Path(f"/proc/{mapping.pid}/pagemap").open("rb", buffering=0) as file:
            raw = os.pread(file.fileno(), mapping.pages * 8, mapping.address // PAGE_BYTES * 8)
    except PermissionError as error:
        raise _refused() from error
    except (FileNotFoundError, ProcessLookupError) as error:
        raise FailedError(f"process {mapping.pid} is gone") from error
    entries = np.frombuffer(raw, np.uint64)
    if len(entries) != mapping.pages:
        raise FailedError(f"the page map of process {mapping.pid} ends early")
    return entries


def _write_filled(target: int, rows: Rows, offset: int) -> None:
    room, filled = rows.data.cast("B"), ~zero_rows(rows)
    edges = np.flatnonzero(np.diff(filled, prepend=False, append=False)).tolist()
    for first, after in zip(edges[::2], edges[1::2], strict=True):
        write_at(target, room[first * PAGE_BYTES : after * PAGE_BYTES], offset + first * PAGE_BYTES)


def _refused() -> RefusedError:
    return RefusedError(
        "the memory of the machine may not be read",
        hint="run as root, or as the machine's user with: sysctl kernel.yama.ptrace_scope=0",
    )
