"""Where a page's content is found in the base: an index from digests to RAM pages and disk blocks.

Built once per base and kept as a file beside it, which is mapped: loading costs nothing, a lookup
touches a few pages. The pages of an app's layer are indexed in memory, for one hand-off. An index is a
hint. Who uses it compares the bytes, so that a stale, damaged or deliberately capped index makes an
overlay larger and never wrong.

File: magic, base identity (32 bytes), number of entries, then the columns: the digests' first and
last eight bytes (sorted by the first), page numbers, spaces. 21 bytes per entry, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol, Self

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cloudlet.errors import CorruptError, MismatchError
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.base import BasePages
from cloudlet.overlay.known import ZEROS, KnownPages, Pages
from cloudlet.overlay.pages import Numbers, Rows, Runs, Space, zero_rows

_HEAD = struct.Struct("<8s32sQ")
_MAGIC = b"CLOINDX1"
_BATCH_PAGES = 1024
_DIGEST_BYTES = 16
MOST_ENTRIES = 8 << 20
"""Distinct pages that an index holds: 32 GiB of content, 168 MiB of file."""


@dataclass(frozen=True, slots=True)
class Found:
    """Answers to a lookup, one per digest; where ``hit`` is false the others mean nothing."""

    hit: NDArray[np.bool_]
    space: NDArray[np.uint8]
    page: Numbers


class Lookup(Protocol):
    """What says where content may be found."""

    def lookup(self, digests: bytes) -> Found:
        """Look up digests of 16 bytes each, one after the other."""


@dataclass(frozen=True, slots=True)
class PageIndex:
    """The columns of the index, in memory or in a mapped file."""

    base: str
    _high: NDArray[np.uint64]
    _low: NDArray[np.uint64]
    _page: Numbers
    _space: NDArray[np.uint8]

    def __len__(self) -> int:
        return self._high.size

    @classmethod
    def build(
        cls,
        base: BasePages,
        disk_runs: Runs,
        most: int = MOST_ENTRIES,
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Index the base's RAM and those runs of disk blocks that hold data.

        Zero pages are left out; of equal pages the first is kept, RAM before disk. Memory: up to 60
        bytes per entry while building. Costs about 4 us of CPU per page.
        """
        todo = [(Space.RAM, 0, base.machine.ram_pages)]
        todo += [
            (Space.DISK, int(start), int(start + length)) for start, length in disk_runs.astype(np.int64)
        ]
        total = sum(stop - start for _, start, stop in todo)

        def batches() -> Iterator[tuple[Space, Numbers]]:
            done = 0
            for space, start, stop in todo:
                for at in range(start, stop, _BATCH_PAGES):
                    numbers = np.arange(at, min(at + _BATCH_PAGES, stop), dtype=np.uint32)
                    yield space, numbers
                    done += numbers.size
                    if progress is not None:
                        progress(done, total)

        return cls.of_pages(base.identity, base, batches(), most)

    @classmethod
    def of_pages(
        cls, base: str, pages: Pages, batches: Iterable[tuple[Space, Numbers]], most: int = MOST_ENTRIES
    ) -> Self:
        """Index some pages, of which a batch at a time is read; otherwise as :meth:`build`."""
        digests: list[bytes] = []
        numbers_kept: list[Numbers] = []
        spaces: list[NDArray[np.uint8]] = []
        taken = 0
        for space, numbers in batches:
            rows = pages.read(space, numbers)
            kept = np.flatnonzero(~zero_rows(rows))[: most - taken]
            digests.append(digest_rows(rows, kept))
            numbers_kept.append(numbers[kept])
            spaces.append(np.full(kept.size, space, np.uint8))
            taken += kept.size
        keys = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        digests.clear()
        high, first = np.unique(keys[:, 0], return_index=True)
        none32, none8 = np.empty(0, np.uint32), np.empty(0, np.uint8)
        page, space_column = np.concatenate([none32, *numbers_kept]), np.concatenate([none8, *spaces])
        return cls(base, high, keys[first, 1], page[first], space_column[first])

    def save(self, file: BinaryIO) -> None:
        """Write the index; the stream needs no seeking."""
        file.write(_HEAD.pack(_MAGIC, bytes.fromhex(self.base), len(self)))
        for column, kind in (
            (self._high, "<u8"),
            (self._low, "<u8"),
            (self._page, "<u4"),
            (self._space, "u1"),
        ):
            file.write(column.astype(kind, copy=False).data)

    @classmethod
    def load(cls, descriptor: int, base: str) -> Self:
        """Map an index file; the descriptor may be closed afterwards.

        :raises CorruptError: it is not an index or not of its size.
        :raises MismatchError: it is the index of another base.
        """
        try:
            data = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
            magic, identity, count = _HEAD.unpack_from(data)
        except (ValueError, OSError, struct.error) as error:
            raise CorruptError(f"the page index cannot be read: {error}") from error
        if magic != _MAGIC or len(data) != _HEAD.size + 21 * count:
            raise CorruptError("the page index is not an index, or is cut")
        if identity.hex() != base:
            raise MismatchError(f"the page index is of base {identity.hex()}, not {base}")
        at = _HEAD.size
        return cls(
            base,
            np.frombuffer(data, "<u8", count, at),
            np.frombuffer(data, "<u8", count, at + 8 * count),
            np.frombuffer(data, "<u4", count, at + 16 * count),
            np.frombuffer(data, "u1", count, at + 20 * count),
        )

    def lookup(self, digests: bytes) -> Found:
        """Look up digests of 16 bytes each, one after the other."""
        keys = np.frombuffer(digests, "<u8").reshape(-1, 2)
        if not len(self):
            nothing = np.zeros(len(keys), np.uint8)
            return Found(nothing.astype(np.bool_), nothing, nothing.astype(np.uint32))
        at = np.searchsorted(self._high, keys[:, 0])
        at[at == len(self)] = 0
        hit = (self._high[at] == keys[:, 0]) & (self._low[at] == keys[:, 1])
        return Found(hit, self._space[at], self._page[at])


class JoinedIndex:
    """Several indexes as one; the first that knows a digest answers."""

    def __init__(self, indexes: Sequence[Lookup]) -> None:
        """:param indexes: at least one."""
        self._first, *self._others = indexes

    def lookup(self, digests: bytes) -> Found:
        """Look up digests of 16 bytes each, one after the other."""
        found = self._first.lookup(digests)
        for index in self._others:
            other = index.lookup(digests)
            found = Found(
                found.hit | other.hit,
                np.where(found.hit, found.space, other.space),
                np.where(found.hit, found.page, other.page),
            )
        return found


def index_of_layer(known: KnownPages) -> Lookup:
    """An index of the layer's own pages: to be joined before the base's, some of whose pages it replaces.

    In memory, 21 bytes per page.
    """

    def batches() -> Iterator[tuple[Space, Numbers]]:
        for space, held in (known.layer or {}).items():
            numbers = held.numbers[held.offsets != ZEROS]
            for at in range(0, numbers.size, _BATCH_PAGES):
                yield space, numbers[at : at + _BATCH_PAGES]

    return PageIndex.of_pages(known.base.identity, known, batches())


def digest_rows(rows: Rows, positions: Iterable[int]) -> bytes:
    """The digests (BLAKE3, first 128 bits) of some rows, one after the other."""
    content = rows.data.cast("B")
    return b"".join(
        blake3(content[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]).digest(length=_DIGEST_BYTES)
        for at in positions
    )
