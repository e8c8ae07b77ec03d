"""Files with holes: where their data is, how to copy only that, and a digest that does not see holes.

A guest's disk and RAM are mostly holes. The digest is the same whether zeros are written or not: the
file is seen as chunks of 1 MiB, and it is BLAKE3 over the file's size and, for each chunk that is not
all zeros, its number and its own BLAKE3 digest (``docs/formats/base.md``).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cloudlet.model import PAGE_BYTES

CHUNK_BYTES = 1 << 20
_ZEROS = bytes(CHUNK_BYTES)

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def data_ranges(descriptor: int, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Where a file has data, as (offset, length) in bytes; between ``start`` and ``end``, if given."""
    position = start
    while (found := _next_data(descriptor, position)) is not None and (end is None or found < end):
        position = os.lseek(descriptor, found, os.SEEK_HOLE)
        yield found, (position if end is None else min(position, end)) - found


def copy_data(source: int, target: int) -> None:
    """Copy the data of a file to the same places of another that is empty; pages of zeros become holes."""
    for number, chunk in chunks(source):
        for start, end in _filled(chunk):
            write_at(target, chunk[start:end], number * CHUNK_BYTES + start)


def copy_range(source: int, target: int, offset: int, length: int) -> None:
    """Copy a part of a file to the same place of another, zeros too.

    :raises EOFError: the file ends before.
    """
    while length:
        content = os.pread(source, min(length, CHUNK_BYTES), offset)
        if not content:
            raise EOFError(f"a file ends before byte {offset + length}")
        write_at(target, content, offset)
        offset, length = offset + len(content), length - len(content)


def copy_some(source: int, target: int, length: int, at: int, to: int) -> int:
    """Copy at most ``length`` bytes from one place to another; how many, 0 at the source's end.

    By the kernel alone where it can: it cannot between file systems of different kinds.
    """
    try:
        return os.copy_file_range(source, target, length, at, to)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP):
            raise
    content = os.pread(source, min(length, 1 << 20), at)
    write_at(target, content, to)
    return len(content)


def chunks(descriptor: int) -> Iterator[tuple[int, memoryview]]:
    """The chunks of a file that are not all zeros, with their numbers; each is lent until the next."""
    size = os.fstat(descriptor).st_size
    buffer = memoryview(bytearray(CHUNK_BYTES))
    position: int | None = 0
    while position is not None and position < size:
        position = _next_data(descriptor, position)
        if position is None:
            return
        number = position // CHUNK_BYTES
        start = number * CHUNK_BYTES
        chunk = buffer[: _fill(descriptor, buffer[: min(CHUNK_BYTES, size - start)], start)]
        if chunk != _ZEROS[: len(chunk)]:
            yield number, chunk
        position = start + CHUNK_BYTES


def chunk_at(descriptor: int, number: int) -> memoryview:
    """One chunk of a file, zeros or not."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    return buffer[: _fill(descriptor, buffer, number * CHUNK_BYTES)]


class SparseDigest:
    """The digest of chunks that come one by one, in order."""

    def __init__(self, size: int) -> None:
        self._hash = blake3(size.to_bytes(8, "little"))

    def add(self, number: int, chunk: bytes | memoryview) -> None:
        """Add a chunk that is not all zeros."""
        self._hash.update(number.to_bytes(8, "little") + blake3(chunk).digest())

    def hex(self) -> str:
        return self._hash.hexdigest()


def digest_file(descriptor: int, progress: Progress | None = None) -> str:
    """The digest of an open file."""
    size = os.fstat(descriptor).st_size
    digest = SparseDigest(size)
    for number, chunk in chunks(descriptor):
        digest.add(number, chunk)
        if progress:
            progress(min(size, (number + 1) * CHUNK_BYTES), size)
    return digest.hex()


def tail_of(path: Path, size: int = 64 << 10) -> str:
    """The end of a text that another process writes, however long it has become."""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - size))
        return file.read(size).decode(errors="replace").strip()


def write_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """Write all of ``content`` at an offset."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def write_rows(target: int, places: NDArray[np.int64], rows: NDArray[np.uint8]) -> None:
    """Write pages (n, 4096) to their places (n) in a file, in pages; neighbours with one call."""
    if not len(places):
        return
    order = np.argsort(places, kind="stable")
    places, rows = places[order], np.ascontiguousarray(rows[order])
    for first, after in pairwise([0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]):
        write_at(target, rows[first:after].data.cast("B"), int(places[first]) * PAGE_BYTES)


def _filled(chunk: memoryview) -> Iterator[tuple[int, int]]:
    """From and to of the stretches of whole pages that are not all zeros; a last piece of a page is one."""
    whole = len(chunk) // PAGE_BYTES * PAGE_BYTES
    words = np.frombuffer(chunk[:whole], np.uint64).reshape(-1, PAGE_BYTES // 8)
    edges = np.diff(np.bitwise_or.reduce(words, axis=1) != 0, prepend=False, append=False)
    bounds = (np.flatnonzero(edges).reshape(-1, 2) * PAGE_BYTES).tolist()
    yield from ((start, end) for start, end in bounds)
    if whole < len(chunk):
        yield whole, len(chunk)


def _next_data(descriptor: int, position: int) -> int | None:
    try:
        return os.lseek(descriptor, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


def _fill(descriptor: int, room: memoryview, offset: int) -> int:
    filled = 0
    while filled < len(room):
        count = os.preadv(descriptor, [room[filled:]], offset + filled)
        if count == 0:
            break
        filled += count
    return filled
