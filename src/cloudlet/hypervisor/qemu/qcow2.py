"""The instance's disk: a qcow2 file over the base's disk, written while its blocks arrive.

Format: QEMU's ``docs/interop/qcow2.txt``, version 3, with clusters of one block (4096 bytes), so that a
changed block costs one cluster. What QEMU reads when it starts (the header) depends only on the size of
the disk; QEMU reads all other tables when the incoming stream has ended. So QEMU can be started on an
empty file, the overlay's map then says which blocks will come, their tables are written at once, and
each block goes straight to its place, in any order. The name of the backing file is not in the file:
QEMU is given the base's disk as a descriptor.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from cloudlet.errors import CorruptError
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.pages import Numbers, Rows
from cloudlet.sparse import write_at, write_rows

_CLUSTER_BITS = 12
_PER_TABLE = PAGE_BYTES // 8
_COUNT_ORDER = 4
_COUNTS_PER_BLOCK = PAGE_BYTES // 2
_COPIED, _COMPRESSED, _ZERO = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1)
_OFFSET = np.uint64(0x00FF_FFFF_FFFF_FE00)
_HEADER_BYTES = 104


class Qcow2Writer:
    """A new qcow2 file for a disk of ``disk_bytes``; all blocks are the backing file's at first.

    Clusters: header, root table, reference count table (both as large as the disk can ever need),
    reference count blocks, tables, blocks.
    """

    def __init__(self, path: Path, disk_bytes: int) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        blocks = _clusters(disk_bytes)
        self._root_entries = _times(blocks, _PER_TABLE)
        self._root_at = 1
        self._counts_at = self._root_at + _clusters(self._root_entries * 8)
        # Count blocks count themselves, too: one in each of them.
        count_blocks = _times(blocks + self._root_entries + self._counts_at, _COUNTS_PER_BLOCK - 1) + 1
        self._count_clusters = _clusters(count_blocks * 8)
        self._free_at = self._counts_at + self._count_clusters
        self._blocks: Numbers = np.empty(0, np.uint32)
        header = struct.pack(
            ">4sIQIIQIIQQIIQQQQII",
            b"QFI\xfb", 3, 0, 0, _CLUSTER_BITS, disk_bytes, 0, self._root_entries, self._root_at * PAGE_BYTES,
            self._counts_at * PAGE_BYTES, self._count_clusters, 0, 0, 0, 0, 0, _COUNT_ORDER, _HEADER_BYTES,
        )  # fmt: skip
        self._put(0, header)
        os.ftruncate(self.descriptor, self._free_at * PAGE_BYTES)

    def announce(self, blocks: Numbers) -> None:
        """Write the tables for the ``blocks`` (numbers in order) that will be written."""
        self._blocks = blocks
        tables = np.unique(blocks // _PER_TABLE)
        fixed = self._free_at + len(tables) + len(blocks)
        count_blocks = 1
        while (fixed + count_blocks) > count_blocks * _COUNTS_PER_BLOCK:
            count_blocks += 1
        tables_at = self._free_at + count_blocks
        self._first_data = tables_at + len(tables)
        total = fixed + count_blocks
        os.ftruncate(self.descriptor, total * PAGE_BYTES)
        self._put(self._free_at, np.ones(total, ">u2"))
        self._put(self._counts_at, (np.arange(count_blocks) + self._free_at) * PAGE_BYTES)
        entries = np.zeros(len(tables) * _PER_TABLE, np.uint64)
        where = np.searchsorted(tables, blocks // _PER_TABLE) * _PER_TABLE + blocks % _PER_TABLE
        entries[where] = (np.arange(len(blocks), dtype=np.uint64) + self._first_data) * PAGE_BYTES | _COPIED
        self._put(tables_at, entries)
        root = np.zeros(self._root_entries, np.uint64)
        root[tables] = (np.arange(len(tables), dtype=np.uint64) + tables_at) * PAGE_BYTES | _COPIED
        self._put(self._root_at, root)

    def write(self, blocks: Numbers, data: Rows) -> None:
        """Write announced blocks (n) with their bytes (n, 4096)."""
        write_rows(self.descriptor, self.places(blocks), data)

    def places(self, blocks: Numbers) -> np.ndarray[Any, np.dtype[np.int64]]:
        """In which clusters of the file announced blocks are."""
        return self._first_data + np.searchsorted(self._blocks, blocks)

    def block_at(self, clusters: np.ndarray[Any, Any]) -> Numbers:
        """Which announced blocks are in these clusters; clusters of tables are passed over."""
        return np.asarray(self._blocks[clusters[clusters >= self._first_data] - self._first_data], np.uint32)

    def close(self) -> None:
        """Close the file. Can be called again."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _put(self, cluster: int, content: bytes | np.ndarray[Any, Any]) -> None:
        raw = (
            content
            if isinstance(content, bytes)
            else content.astype(content.dtype.newbyteorder(">")).tobytes()
        )
        write_at(self.descriptor, memoryview(raw), cluster * PAGE_BYTES)


ZEROS = -1
"""Stands for the place of a block that is in no file and reads as zeros."""


def held_blocks(
    path: Path, disk_bytes: int
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Which blocks an instance's qcow2 file holds, in order, and where in the file, in bytes (or `ZEROS`).

    The machine is paused, so its tables are written. They are read here and not by a tool: QEMU could have
    written anything there, and a tool would follow a name of another file, or run for ever.

    :raises CorruptError: the file is not what :class:`Qcow2Writer` made and QEMU filled.
    """
    with path.open("rb") as file:
        root = _read_root(file.fileno(), disk_bytes)
        blocks, entries = _read_tables(file.fileno(), root)
        size = os.fstat(file.fileno()).st_size
    zero = (entries & _ZERO) != 0
    offsets = np.where(zero, ZEROS, entries & _OFFSET).astype(np.int64)
    if (entries & _COMPRESSED).any() or int(np.count_nonzero(~zero)) > _clusters(size):
        raise _changed("its blocks cannot be where it says")
    if len(offsets) and int(offsets.max()) > size:
        raise _changed("it ends before its blocks")
    return blocks, offsets


def _read_root(descriptor: int, disk_bytes: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    head = os.pread(descriptor, _HEADER_BYTES, 0)
    if len(head) < _HEADER_BYTES:
        raise _changed("it is cut")
    magic, version, backing, _, bits, size, crypt, entries, at = struct.unpack_from(">4sIQIIQIIQ", head)
    (incompatible,) = struct.unpack_from(">Q", head, 72)
    wanted = (b"QFI\xfb", 3, 0, _CLUSTER_BITS, disk_bytes, 0, _times(_clusters(disk_bytes), _PER_TABLE), 0)
    if (magic, version, backing, bits, size, crypt, entries, incompatible) != wanted:
        raise _changed("its header was changed")
    return _read_table(descriptor, at, entries)


def _read_tables(
    descriptor: int, root: np.ndarray[Any, np.dtype[np.uint64]]
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.uint64]]]:
    """The blocks that are mapped, in order, and their entries."""
    blocks, entries = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for number in np.flatnonzero(root & _OFFSET).tolist():
        table = _read_table(descriptor, int(root[number] & _OFFSET), _PER_TABLE)
        held = np.flatnonzero(table)
        blocks.append(held + number * _PER_TABLE)
        entries.append(table[held])
    return np.concatenate(blocks), np.concatenate(entries)


def _read_table(descriptor: int, offset: int, entries: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    raw = os.pread(descriptor, entries * 8, offset)
    if len(raw) != entries * 8:
        raise _changed("it ends before its tables")
    return np.frombuffer(raw, ">u8").astype(np.uint64)


def _changed(how: str) -> CorruptError:
    return CorruptError(f"the instance's disk is not as it was made: {how}", hint="stop the instance")


def _clusters(size: int) -> int:
    """Clusters that hold ``size`` bytes."""
    return _times(size, PAGE_BYTES)


def _times(amount: int, portion: int) -> int:
    """How often ``portion`` has to be taken to cover ``amount``."""
    return (amount + portion - 1) // portion
