"""What a hand-off knows of pages that were named: a digest of each, and one of all of them, the *root*.

Both ends keep such a table (``docs/formats/handoff.md``, Equal before commit). The source sees by it which
pages have changed since it sent them, without a copy of what it sent; in the end equal roots show that the
target has the same machine. A digest is xxh3-128 with a seed that only the two ends know.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from cloudlet.model import PAGE_BYTES, Machine
from cloudlet.overlay.pages import Numbers, Rows, Space

_CONTEXT = b"cloudlet handoff 1"
_LEAF_PAGES = 64
_FIRST_ROOM = 1024

Digests = NDArray[np.uint64]
"""Digests of pages, shape ``(n, 2)``: their 16 bytes in the order that xxHash calls canonical."""

_Slots = NDArray[np.uint32]
_Word = TypeVar("_Word", np.uint32, np.uint64)


class DigestTable:
    """The digests of the pages that were named, of both spaces.

    Memory: 20 bytes per page where pages are named together, 276 where each stands alone, and while it grows
    once more that; and 4 bytes of the directory for each 64 pages of the machine, touched as pages are named.
    """

    def __init__(self, machine: Machine, seed: int) -> None:
        """No page has been named.

        :param seed: 64 bits.
        """
        self._seed = seed
        self._spaces = {
            Space.RAM: _SpaceTable(machine.ram_pages),
            Space.DISK: _SpaceTable(machine.disk_blocks),
        }

    def digests(self, rows: Rows) -> Digests:
        """The digests of pages. Some 10 ms for 100 MiB."""
        content, seed = rows.reshape(-1).data, self._seed
        joined = b"".join(
            [xxh3_128_digest(content[at : at + PAGE_BYTES], seed) for at in range(0, rows.size, PAGE_BYTES)]
        )
        return np.frombuffer(joined, np.uint64).reshape(-1, 2)

    def knows(self, space: Space, numbers: Numbers) -> NDArray[np.bool_]:
        """Which pages have been named."""
        return np.asarray(self._spaces[space].slots(numbers) != 0)

    def changed(self, space: Space, numbers: Numbers, digests: Digests) -> NDArray[np.bool_]:
        """Which pages were never named, or had another digest when they were named last."""
        table = self._spaces[space]
        slots = table.slots(numbers)
        return np.asarray((slots == 0) | (table.digests[slots] != digests).any(axis=1))

    def put(self, space: Space, numbers: Numbers, digests: Digests) -> None:
        """Name pages, with what they are now. The numbers increase strictly."""
        table = self._spaces[space]
        slots = table.slots_made(numbers)
        table.digests[slots] = digests

    def root(self, identity: bytes, device_state: bytes) -> bytes:
        """The digest of the whole machine, 32 bytes, given what both ends hold (64 bytes)."""
        root = blake3(_CONTEXT + identity)
        for space in (Space.RAM, Space.DISK):
            numbers, digests = self._spaces[space].in_order()
            root.update(numbers.size.to_bytes(8, "little"))
            root.update(numbers.astype("<u4", copy=False).view(np.uint8).data)
            root.update(digests.view(np.uint8).data)
        root.update(blake3(device_state).digest())
        return root.digest()


class _SpaceTable:
    """The digests of one space: a directory names the leaf of each 64 pages, a leaf the slot of each page.

    Leaf 0 and slot 0 are of pages that were never named.
    """

    def __init__(self, pages: int) -> None:
        self.digests: Digests = np.zeros((_FIRST_ROOM, 2), np.uint64)
        self._directory: _Slots = np.zeros(-(-pages // _LEAF_PAGES), np.uint32)
        self._leaves: _Slots = np.zeros((_FIRST_ROOM // _LEAF_PAGES, _LEAF_PAGES), np.uint32)
        self._parts: _Slots = np.zeros(len(self._leaves), np.uint32)
        """Which 64 pages a leaf is of."""
        self._next_leaf = self._next_slot = 1

    def slots(self, numbers: Numbers) -> _Slots:
        """Where the digests of pages are; 0 where there is none."""
        found: _Slots = self._leaves[self._directory[numbers // _LEAF_PAGES], numbers % _LEAF_PAGES]
        return found

    def slots_made(self, numbers: Numbers) -> _Slots:
        """Where the digests of pages are, with new slots for those that have none."""
        slots = self.slots(numbers)
        new = slots == 0
        wanted = int(np.count_nonzero(new))
        if wanted:
            self._make_leaves(np.unique(numbers[new] // _LEAF_PAGES))
            self.digests = _with_room(self.digests, self._next_slot + wanted)
            slots[new] = self._next_slot + np.arange(wanted)
            self._next_slot += wanted
            self._leaves[self._directory[numbers // _LEAF_PAGES], numbers % _LEAF_PAGES] = slots
        return slots

    def in_order(self) -> tuple[Numbers, Digests]:
        """All pages that were named, by number, and their digests."""
        leaves = 1 + np.argsort(self._parts[1 : self._next_leaf])
        slots = self._leaves[leaves].reshape(-1)
        firsts = self._parts[leaves, np.newaxis] * np.uint32(_LEAF_PAGES)
        numbers = firsts + np.arange(_LEAF_PAGES, dtype=np.uint32)
        named = slots != 0
        return numbers.reshape(-1)[named], self.digests[slots[named]]

    def _make_leaves(self, parts: _Slots) -> None:
        """Have a leaf for each of these 64 pages."""
        parts = parts[self._directory[parts] == 0]
        first, after = self._next_leaf, self._next_leaf + parts.size
        self._leaves = _with_room(self._leaves, after)
        self._parts = _with_room(self._parts, after)
        self._directory[parts] = np.arange(first, after)
        self._parts[first:after] = parts
        self._next_leaf = after


def _with_room(rows: NDArray[_Word], wanted: int) -> NDArray[_Word]:
    """The same array, or one of at least so many rows that begins with it; those beyond are zero."""
    if wanted <= len(rows):
        return rows
    larger = np.zeros((max(wanted, 2 * len(rows)), *rows.shape[1:]), rows.dtype)
    larger[: len(rows)] = rows
    return larger
