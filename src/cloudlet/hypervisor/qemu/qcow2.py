"""The instance's disk: a qcow2 file over the base's disk, written while its blocks arrive.

Format: QEMU's ``docs/interop/qcow2.txt``, version 3, with clusters of one block (4096 bytes), so that a
changed block costs one cluster. What QEMU reads when it starts (the header) depends only on the size of
the disk; QEMU reads all other tables when the incoming stream has ended. So QEMU can be started on an
empty file, the overlay's map then says which blocks will come, their tables are written at once, and
each block goes straight to its place, in any order. The name of the backing file is not in the file:
QEMU is given the base's disk as a descriptor. Where nobody knows which blocks will come, their places are
given out as they come, and the tables are written at the end (:class:`GrowingQcow2`).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudlet.errors import CorruptError
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.known import ZEROS
from cloudlet.overlay.pages import Numbers, Rows, zero_rows
from cloudlet.sparse import write_at, write_rows

_CLUSTER_BITS = 12
_PER_TABLE = PAGE_BYTES // 8
_COUNT_ORDER = 4
_COUNTS_PER_BLOCK = PAGE_BYTES // 2
_COPIED, _COMPRESSED, _ZERO = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1)
_OFFSET = np.uint64(0x00FF_FFFF_FFFF_FE00)
_HEADER_BYTES = 104


class _NewFile:
    """A new qcow2 file for a disk of ``disk_bytes``; all blocks are the backing file's at first.

    It begins with the header, the root table and the reference count table, both as large as the disk can
    ever need. What follows is for its writer to say.
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
        header = struct.pack(
            ">4sIQIIQIIQQIIQQQQII",
            b"QFI\xfb", 3, 0, 0, _CLUSTER_BITS, disk_bytes, 0, self._root_entries, self._root_at * PAGE_BYTES,
            self._counts_at * PAGE_BYTES, self._count_clusters, 0, 0, 0, 0, 0, _COUNT_ORDER, _HEADER_BYTES,
        )  # fmt: skip
        self._put(0, header)
        os.ftruncate(self.descriptor, self._free_at * PAGE_BYTES)

    def close(self) -> None:
        """Close the file. Can be called again."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _put_root(self, tables: Numbers, at: int) -> None:
        """Write the root: which tables there are, one after the other from a cluster on."""
        root = np.zeros(self._root_entries, np.uint64)
        root[tables] = (np.arange(len(tables), dtype=np.uint64) + at) * PAGE_BYTES | _COPIED
        self._put(self._root_at, root)

    def _put_counts(self, at: int, others: int) -> int:
        """Write the reference counts from a cluster on; how many clusters they take.

        :param others: the clusters of the file besides these, each of which is used once.
        """
        count_blocks = 1
        while (others + count_blocks) > count_blocks * _COUNTS_PER_BLOCK:
            count_blocks += 1
        total = others + count_blocks
        os.ftruncate(self.descriptor, total * PAGE_BYTES)
        self._put(at, np.ones(total, ">u2"))
        self._put(self._counts_at, (np.arange(count_blocks) + at) * PAGE_BYTES)
        return count_blocks

    def _put(self, cluster: int, content: bytes | np.ndarray[Any, Any]) -> None:
        raw = (
            content
            if isinstance(content, bytes)
            else content.astype(content.dtype.newbyteorder(">")).tobytes()
        )
        write_at(self.descriptor, memoryview(raw), cluster * PAGE_BYTES)


class Qcow2Writer(_NewFile):
    """A file whose blocks are announced. Behind the beginning: reference count blocks, tables, blocks."""

    def __init__(self, path: Path, disk_bytes: int) -> None:
        super().__init__(path, disk_bytes)
        self._blocks: Numbers = np.empty(0, np.uint32)

    def announce(self, blocks: Numbers) -> None:
        """Write the tables for the ``blocks`` (numbers in order) that will be written."""
        self._blocks = blocks
        tables = np.unique(blocks // _PER_TABLE)
        tables_at = self._free_at + self._put_counts(self._free_at, self._free_at + len(tables) + len(blocks))
        self._first_data = tables_at + len(tables)
        entries = np.zeros(len(tables) * _PER_TABLE, np.uint64)
        where = np.searchsorted(tables, blocks // _PER_TABLE) * _PER_TABLE + blocks % _PER_TABLE
        entries[where] = (np.arange(len(blocks), dtype=np.uint64) + self._first_data) * PAGE_BYTES | _COPIED
        self._put(tables_at, entries)
        self._put_root(tables, tables_at)

    def write(self, blocks: Numbers, data: Rows) -> None:
        """Write announced blocks (n) with their bytes (n, 4096)."""
        write_rows(self.descriptor, self.places(blocks), data)

    def places(self, blocks: Numbers) -> NDArray[np.int64]:
        """In which clusters of the file announced blocks are."""
        return self._first_data + np.searchsorted(self._blocks, blocks)

    def block_at(self, clusters: np.ndarray[Any, Any]) -> Numbers:
        """Which announced blocks are in these clusters; clusters of tables are passed over."""
        return np.asarray(self._blocks[clusters[clusters >= self._first_data] - self._first_data], np.uint32)


class GrowingQcow2(_NewFile):
    """A file whose blocks come in any order, again and again. Behind the beginning: blocks, tables, counts.

    Memory: 4 KiB for each 2 MiB of the disk of which a block has come.
    """

    def __init__(self, path: Path, disk_bytes: int) -> None:
        super().__init__(path, disk_bytes)
        self._tables: dict[int, NDArray[np.uint64]] = {}
        self._next = self._free_at

    def write(self, blocks: Numbers, data: Rows) -> None:
        """Write blocks (n) with their bytes (n, 4096); of one that comes again the last content counts."""
        zeros = zero_rows(np.ascontiguousarray(data))
        places = np.empty(len(blocks), np.int64)
        for number in np.unique(blocks // _PER_TABLE).tolist():
            here = np.flatnonzero(blocks // _PER_TABLE == number)
            table = self._tables.setdefault(number, np.zeros(_PER_TABLE, np.uint64))
            places[here] = self._places_in(table, blocks[here] % _PER_TABLE, zeros[here])
        placed = places != ZEROS
        write_rows(self.descriptor, places[placed], data[placed])

    def finish(self) -> None:
        """Write the tables: nothing comes any more."""
        numbers = np.array(sorted(self._tables), np.uint32)
        if numbers.size:
            self._put(self._next, np.concatenate([self._tables[number] for number in numbers.tolist()]))
        self._put_root(numbers, self._next)
        counts_at = self._next + numbers.size
        self._put_counts(counts_at, counts_at)

    def _places_in(
        self, table: NDArray[np.uint64], entries: Numbers, zeros: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """The clusters of a table's blocks, given out to those that have none; zeros need none."""
        empty = np.unique(entries[~zeros & (table[entries] & _OFFSET == 0)])
        table[empty] = (np.arange(empty.size, dtype=np.uint64) + self._next) * PAGE_BYTES | _COPIED
        self._next += empty.size
        table[entries[zeros & (table[entries] & _OFFSET == 0)]] = _ZERO
        offsets = (table[entries] & _OFFSET).astype(np.int64)
        return np.where(offsets == 0, ZEROS, offsets // PAGE_BYTES)


Held = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Numbers of blocks, in order, and where in the file each is, in bytes (or `ZEROS`)."""


def held_blocks(path: Path, disk_bytes: int, *, settled: bool = True) -> Held:
    """Which blocks an instance's qcow2 file holds.

    The tables are read here and not by a tool: QEMU could have written anything there, and a tool would
    follow a name of another file, or run for ever.

    :param settled: the machine is paused, so its tables are written. While it runs they may be behind, or
        be written just now: what cannot be is passed over.
    :raises CorruptError: the file is not what :class:`Qcow2Writer` made and QEMU filled.
    """
    with path.open("rb") as file:
        root = _read_root(file.fileno(), disk_bytes)
        blocks, entries = _read_tables(file.fileno(), root, settled=settled)
        size = os.fstat(file.fileno()).st_size
    zero = (entries & _ZERO) != 0
    offsets = np.where(zero, ZEROS, entries & _OFFSET).astype(np.int64)
    possible = ((entries & _COMPRESSED) == 0) & (offsets <= size) & (blocks < _clusters(disk_bytes))
    if int(np.count_nonzero(~zero)) > _clusters(size) or (settled and not possible.all()):
        raise _changed("its blocks cannot be where it says")
    return blocks[possible], offsets[possible]


def _read_root(descriptor: int, disk_bytes: int) -> NDArray[np.uint64]:
    head = os.pread(descriptor, _HEADER_BYTES, 0)
    if len(head) < _HEADER_BYTES:
        raise _changed("it is cut")
    magic, version, backing, _, bits, size, crypt, entries, at = struct.unpack_from(">4sIQIIQIIQ", head)
    (incompatible,) = struct.unpack_from(">Q", head, 72)
    wanted = (b"QFI\xfb", 3, 0, _CLUSTER_BITS, disk_bytes, 0, _times(_clusters(disk_bytes), _PER_TABLE), 0)
    if (magic, version, backing, bits, size, crypt, entries, incompatible) != wanted:
        raise _changed("its header was changed")
    root = _read_table(descriptor, at, entries) if at <= int(_OFFSET) else None
    if root is None:
        raise _changed("it ends before its tables")
    return root


def _read_tables(
    descriptor: int, root: NDArray[np.uint64], *, settled: bool
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The blocks that are mapped, in order, and their entries."""
    blocks, entries = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for number in np.flatnonzero(root & _OFFSET).tolist():
        table = _read_table(descriptor, int(root[number] & _OFFSET), _PER_TABLE)
        if table is None:
            if settled:
                raise _changed("it ends before its tables")
            continue
        held = np.flatnonzero(table)
        blocks.append(held + number * _PER_TABLE)
        entries.append(table[held])
    return np.concatenate(blocks), np.concatenate(entries)


def _read_table(descriptor: int, offset: int, entries: int) -> NDArray[np.uint64] | None:
    """A table, or None where the file ends before."""
    raw = os.pread(descriptor, entries * 8, offset)
    return np.frombuffer(raw, ">u8").astype(np.uint64) if len(raw) == entries * 8 else None


def _changed(how: str) -> CorruptError:
    return CorruptError(f"the instance's disk is not as it was made: {how}", hint="stop the instance")


def _clusters(size: int) -> int:
    """Clusters that hold ``size`` bytes."""
    return _times(size, PAGE_BYTES)


def _times(amount: int, portion: int) -> int:
    """How often ``portion`` has to be taken to cover ``amount``."""
    return (amount + portion - 1) // portion
