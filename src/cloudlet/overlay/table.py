"""Entering an overlay anywhere: where a frame is, which frame holds a literal, and what a frame
says.

For a page server that fetches frames by range: it has the root, gets the index chunks that it needs
(their places are known from the root) and then any frame.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from cloudlet.errors import CorruptError
from cloudlet.overlay.frames import FrameEntry, Unpacker, check_frame, unpack_chunk
from cloudlet.overlay.header import Header
from cloudlet.overlay.payload import PagePayload
from cloudlet.overlay.root import Root


@dataclass(frozen=True, slots=True)
class Place:
    """A range of the file, in bytes."""

    offset: int
    size: int


class FrameTable:
    """The frames known so far: at first those of the root, then those of each added chunk."""

    def __init__(self, header: Header, root: Root) -> None:
        self.root = root
        listed = root.listed_frames
        self._chunk_places: list[Place] = []
        self._firsts = [0]
        self._first_literals = [0]
        offset = header.parts_start + sum(entry.size for entry in listed)
        number, literal = len(listed), sum(entry.literals for entry in listed)
        for chunk in root.chunks:
            self._chunk_places.append(Place(offset, chunk.table_bytes))
            self._firsts.append(number)
            self._first_literals.append(literal)
            offset += chunk.table_bytes + chunk.size
            number, literal = number + chunk.frames, literal + chunk.literals
        self._groups: dict[int, tuple[FrameEntry, ...]] = {0: listed}
        self._offsets: dict[int, list[int]] = {0: _offsets(header.parts_start, listed)}

    def __len__(self) -> int:
        return self.root.totals.frames

    def chunk_place(self, chunk: int) -> Place:
        """Where index chunk ``chunk`` is."""
        return self._chunk_places[chunk]

    def add_chunk(self, chunk: int, table: bytes) -> None:
        """Learn the frames of a chunk.

        :raises CorruptError: these are not the bytes that the root pins.
        """
        where = f"index chunk {chunk}"
        entries = unpack_chunk(self.root.chunks[chunk], table, self._firsts[chunk + 1], where)
        place = self._chunk_places[chunk]
        self._groups[chunk + 1] = entries
        self._offsets[chunk + 1] = _offsets(place.offset + place.size, entries)

    def chunk_of(self, frame: int) -> int | None:
        """The chunk that lists a frame; ``None`` when the root does."""
        if not 0 <= frame < len(self):
            raise IndexError(f"frame {frame} of {len(self)}")
        return bisect_right(self._firsts, frame) - 2 if frame >= len(self._groups[0]) else None

    def chunk_of_literal(self, literal: int) -> int | None:
        """The chunk that lists the frame of a literal; ``None`` when the root does."""
        if not 0 <= literal < self.root.totals.literals:
            raise IndexError(f"literal {literal} of {self.root.totals.literals}")
        group = bisect_right(self._first_literals, literal) - 1
        return group - 1 if group else None

    def entry(self, frame: int) -> FrameEntry:
        """What is known of a frame.

        :raises KeyError: its chunk (:meth:`chunk_of`) has not been added.
        """
        group, at = self._find(frame)
        return self._groups[group][at]

    def place(self, frame: int) -> Place:
        """Where a frame is; errors as :meth:`entry`."""
        group, at = self._find(frame)
        return Place(self._offsets[group][at], self._groups[group][at].size)

    def frame_of_literal(self, literal: int) -> int:
        """The frame that brings a literal; errors as :meth:`entry`."""
        chunk = self.chunk_of_literal(literal)
        group = 0 if chunk is None else chunk + 1
        starts = accumulate((e.literals for e in self._groups[group]), initial=self._first_literals[group])
        return self._firsts[group] + bisect_right(list(starts), literal) - 1

    def decode(self, frame: int, blob: bytes) -> PagePayload:
        """The payload of a frame of pages, verified.

        :raises CorruptError: these are not the bytes of this frame, or it is not well formed.
        """
        entry, where = self.entry(frame), f"frame {frame}"
        if not entry.kind.is_pages:
            raise CorruptError(f"{where} brings no pages")
        check_frame(entry, blob, where)
        payload = PagePayload.decode(entry, Unpacker().unpack(entry, blob, where), self.root.machine, where)
        group, at = self._find(frame)
        expected = self._first_literals[group] + sum(e.literals for e in self._groups[group][:at])
        if payload.first_literal != expected:
            raise CorruptError(f"{where} begins with literal {payload.first_literal}, not {expected}")
        return payload

    def _find(self, frame: int) -> tuple[int, int]:
        chunk = self.chunk_of(frame)
        group = 0 if chunk is None else chunk + 1
        return group, frame - self._firsts[group]


def _offsets(start: int, entries: tuple[FrameEntry, ...]) -> list[int]:
    return list(accumulate((entry.size for entry in entries), initial=start))
