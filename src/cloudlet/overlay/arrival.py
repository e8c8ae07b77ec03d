"""An overlay that arrives in any order: each page is built as soon as its frame, and the literals that it
refers to, are here.

:func:`~cloudlet.overlay.apply.apply` goes through a stream; an :class:`Arrival` is handed parts. Who has
no reason for another order hands them in file order (:meth:`Arrival.next_part`), where no page ever waits.
When a guest waits for a page, :meth:`Arrival.needed` says which parts to get first. It fetches nothing,
writes no page anywhere and belongs to one thread at a time.

Every check of ``apply`` is made here too, part by part, and what was built before an error stands.

Memory: the map's 12 bytes for each run, one byte for each page that comes and one for each literal, 6
bytes for each hot page, 12 for each page that waits, 350 for each frame whose table has come, and what
one call gives out. The literals themselves are in the caller's file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.apply import LiteralSpool, build, take_spans
from cloudlet.overlay.base import BasePages
from cloudlet.overlay.frames import FrameKind, check_frame
from cloudlet.overlay.header import Header
from cloudlet.overlay.limits import FRAME_PAGES
from cloudlet.overlay.pagemap import Coverage, PageMap
from cloudlet.overlay.pages import PageBatch, Rows, Space
from cloudlet.overlay.plan import FrameOrder
from cloudlet.overlay.root import Root
from cloudlet.overlay.table import FrameTable, Place
from cloudlet.overlay.waiting import Waiting

MOST_WAITING = 16_384
"""Pages that may wait for literals before :meth:`Arrival.needed` leaves it to the order, in which none waits.
They may all come true with one literal: 64 MiB in one call. Measured: up to 3,100 when pages are asked for at
random."""


class PartKind(StrEnum):
    """What a part of the file is."""

    FRAME = "frame"
    CHUNK = "chunk"


@dataclass(frozen=True, slots=True)
class Part:
    """A frame or an index chunk, by its number among its kind, and its place in the file."""

    kind: PartKind
    number: int
    place: Place


class Arrival:
    """An overlay's parts, taken in any order; gives the pages that can be built with each."""

    def __init__(self, header: Header, root: Root, base: BasePages, literals: int) -> None:
        """Nothing has been taken yet.

        :param literals: the descriptor of an empty temporary file. Literals are kept in it, each at its place
            in the sequence: 4096 bytes for each of ``root.totals.literals``.
        :raises MismatchError: the overlay is for another base.
        """
        root.check_base(base.identity, base.machine, base.device_sections)
        self.page_map: PageMap | None = None
        """Known once all map frames were taken."""
        self.device_state: bytes | None = None
        """Known once all device frames were taken."""
        self.pages_missing = root.totals.pages
        """Pages of the map that have not been built."""
        self._root = root
        self._base = base
        self._table = FrameTable(header, root)
        self._listed = len(root.listed_frames)
        self._first_hot = self._listed - len(root.hot_frames)
        self._taken = bytearray(root.totals.frames)
        self._raw: dict[int, bytes] = {}
        self._before_map: list[tuple[int, bytes]] = []
        self._coverage: dict[Space, Coverage] = {}
        self._order: FrameOrder | None = None
        self._as_expected = True
        self._literals = LiteralSpool(root.totals.literals, literals)
        self._here: NDArray[np.bool_] = np.zeros(root.totals.literals, np.bool_)
        self._waiting = {space: Waiting() for space in Space}
        self._room: Rows = np.empty((FRAME_PAGES, PAGE_BYTES), np.uint8)

    @property
    def hot_here(self) -> bool:
        """Whether the hot prefix has been taken, all of it."""
        return self._taken.find(0, 0, self._listed) < 0

    @property
    def complete(self) -> bool:
        """Whether every part was taken and every page built."""
        return not self.pages_missing and self.next_part() is None

    def next_part(self) -> Part | None:
        """The first part in file order that has not been taken; ``None`` when all were."""
        frame = self._taken.find(0)
        if frame < 0:
            return None
        return self._unknown_chunk(self._table.chunk_of(frame)) or self._frame(frame)

    def take(self, part: Part, blob: bytes) -> list[PageBatch]:
        """Take the bytes of a part that :meth:`next_part` or :meth:`needed` named.

        :returns: all pages that can be built now and could not before: those of this frame, and those of
            others that waited for its literals. They are lent until the next call. A part that was taken
            before gives none, and an index chunk never does.
        :raises IntegrityError: the part is corrupt, or contradicts another. Nothing more may be asked then.
        """
        number = part.number
        if part.kind is PartKind.CHUNK:
            self._table.add_chunk(number, blob)
            return []
        if self._taken[number]:
            return []
        entry = self._table.entry(number)
        batches: list[PageBatch] = []
        if not entry.kind.is_pages:
            self._raw[number] = bytes(self._table.unpack(number, blob))
            batches = self._join(entry.kind)
        elif self._coverage:
            batches = self._take_pages(number, blob)
        else:
            # Whether its pages are to come is known with the map; in file order that is here.
            check_frame(entry, blob, f"frame {number}")
            self._before_map.append((number, blob))
        self._taken[number] = True
        return batches

    def needed(self, space: Space, page: int) -> list[Part]:
        """The parts to fetch now so that a page can be built; once they were taken, ask again.

        An index chunk where it must tell more; else the frame that is expected to bring the page, which for a
        hot page is the one that the map names; else, when that is here, those of the literals that the page
        waits for. At most six parts until it is built.

        Empty when the page is built or not in the map, and when there is nothing better than to go on in
        file order: the map is not here, the frame that it names was taken and did not bring the page, the
        cold frames are not in the expected order, or very many pages wait.
        """
        order, rank = self._order, self._rank(space, page)
        if order is None or rank is None or self._waiting_pages > MOST_WAITING:
            return []
        coverage = self._coverage[space]
        if coverage.has_come(rank):
            missing = [x for x in sorted(self._waiting[space].literals_of(page)) if not self._here[x]]
            return list(dict.fromkeys(map(self._part_of_literal, missing)))
        if coverage.is_hot(rank):
            frame = self._first_hot + order.hot_frame(space, rank)
            return [] if self._taken[frame] else [self._frame(frame)]
        return [self._part_of_page(order.nth(space, rank))] if self._as_expected else []

    def is_built(self, space: Space, page: int) -> bool:
        """Whether a page is there: built, or the base's."""
        rank = self._rank(space, page)
        if rank is None:
            return bool(self._coverage)
        return self._coverage[space].has_come(rank) and not self._waiting[space].literals_of(page)

    def part_of_frame(self, number: int) -> Part | None:
        """What to take next for a frame of this number; ``None`` when it was taken."""
        if self._taken[number]:
            return None
        return self._unknown_chunk(self._table.chunk_of(number)) or self._frame(number)

    @property
    def _waiting_pages(self) -> int:
        return sum(len(waiting) for waiting in self._waiting.values())

    def _rank(self, space: Space, page: int) -> int | None:
        return self._coverage[space].rank(page) if self._coverage else None

    def _unknown_chunk(self, chunk: int | None) -> Part | None:
        """The chunk, if it must be taken before its frames are known."""
        if chunk is None or self._table.has_chunk(chunk):
            return None
        return Part(PartKind.CHUNK, chunk, self._table.chunk_place(chunk))

    def _frame(self, number: int) -> Part:
        return Part(PartKind.FRAME, number, self._table.place(number))

    def _part_of_page(self, nth: int) -> Part:
        chunk = self._unknown_chunk(self._table.chunk_of_page(nth))
        return chunk or self._frame(self._table.frame_of_page(nth))

    def _part_of_literal(self, literal: int) -> Part:
        chunk = self._unknown_chunk(self._table.chunk_of_literal(literal))
        return chunk or self._frame(self._table.frame_of_literal(literal))

    def _join(self, kind: FrameKind) -> list[PageBatch]:
        """Map or device state, when the last of its frames has come."""
        maps = len(self._root.map_frames)
        numbers = range(maps) if kind is FrameKind.MAP else range(maps, maps + len(self._root.device_frames))
        if any(number not in self._raw for number in numbers):
            return []
        content = b"".join(self._raw.pop(number) for number in numbers)
        if kind is FrameKind.DEVICE:
            self.device_state = content
            return []
        self.page_map = PageMap.decode(content, self._root)
        self._coverage = {space: Coverage(self.page_map, space) for space in Space}
        self._order = FrameOrder(self.page_map, self._coverage)
        frames, self._before_map = self._before_map, []
        # Each is decoded into the same room, so these are copied.
        return [
            PageBatch(batch.space, batch.numbers, batch.data.copy())
            for number, blob in frames
            for batch in self._take_pages(number, blob)
        ]

    def _take_pages(self, number: int, blob: bytes) -> list[PageBatch]:
        payload = self._table.decode(number, blob)
        hot = number < self._listed
        ranks = self._coverage[payload.space].claim(payload.numbers, f"frame {number}", hot=hot)
        if not hot:
            assert self._order is not None
            # As many different cold pages as from the first to the last: it is these and no others.
            first, last = (self._order.nth(payload.space, int(rank)) for rank in (ranks.min(), ranks.max()))
            before = self._table.pages_before(number)
            self._as_expected &= (first, last) == (before, before + ranks.size - 1)
        self._literals.add(payload.first_literal, payload.literals)
        self._here[payload.first_literal : payload.first_literal + len(payload.literals)] = True
        payload = self._waiting[payload.space].hold_back(payload, self._here)
        batches = list(self._build_waiting())
        if payload.numbers.size:
            rows = build(payload, self._base, self._literals, self._room)
            batches.append(PageBatch(payload.space, payload.numbers, rows))
        self.pages_missing -= sum(batch.numbers.size for batch in batches)
        return batches

    def _build_waiting(self) -> Iterator[PageBatch]:
        """The pages that waited and need not any more."""
        for space, waiting in self._waiting.items():
            numbers, starts = waiting.release(self._here)
            for at in range(0, numbers.size, FRAME_PAGES):
                some = slice(at, at + FRAME_PAGES)
                rows: Rows = np.empty((numbers[some].size, PAGE_BYTES), np.uint8)
                take_spans(starts[some], self._literals, rows, np.arange(len(rows)))
                yield PageBatch(space, numbers[some], rows)
