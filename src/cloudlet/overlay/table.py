"""Entering an overlay anywhere: where a frame is, which frame brings a literal or a page, and what a
frame says.

For a reader that fetches frames by range: it has the root, gets the index chunks that it needs
(their places are known from the root) and then any frame. Memory: some 350 bytes for each frame whose
table has come.
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


@dataclass(frozen=True, slots=True)
class _Group:
    """Frames that one table lists, and of each what stands before it in the file: bytes, pages, literals."""

    entries: tuple[FrameEntry, ...]
    offsets: list[int]
    pages: list[int]
    literals: list[int]

    @classmethod
    def of(cls, entries: tuple[FrameEntry, ...], offset: int, page: int, literal: int) -> _Group:
        return cls(
            entries,
            list(accumulate((entry.size for entry in entries), initial=offset)),
            list(accumulate((entry.pages for entry in entries), initial=page)),
            list(accumulate((entry.literals for entry in entries), initial=literal)),
        )


class FrameTable:
    """The frames known so far: at first those of the root, then those of each added chunk."""

    def __init__(self, header: Header, root: Root) -> None:
        self.root = root
        self._unpacker = Unpacker()
        listed = _Group.of(root.listed_frames, header.parts_start, 0, 0)
        self._groups = {0: listed}
        # What stands before each group: the listed frames are group 0, those of chunk c group c + 1.
        self._chunk_places: list[Place] = []
        self._firsts, self._first_pages, self._first_literals = [0], [0], [0]
        offset, number = listed.offsets[-1], len(listed.entries)
        page, literal = listed.pages[-1], listed.literals[-1]
        for chunk in root.chunks:
            self._chunk_places.append(Place(offset, chunk.table_bytes))
            self._firsts.append(number)
            self._first_pages.append(page)
            self._first_literals.append(literal)
            offset += chunk.table_bytes + chunk.size
            number, page, literal = number + chunk.frames, page + chunk.pages, literal + chunk.literals

    def __len__(self) -> int:
        return self.root.totals.frames

    def chunk_place(self, chunk: int) -> Place:
        """Where index chunk ``chunk`` is."""
        return self._chunk_places[chunk]

    def add_chunk(self, chunk: int, table: bytes) -> None:
        """Learn the frames of a chunk.

        :raises CorruptError: these are not the bytes that the root pins.
        """
        group, place = chunk + 1, self._chunk_places[chunk]
        entries = unpack_chunk(self.root.chunks[chunk], table, self._firsts[group], f"index chunk {chunk}")
        self._groups[group] = _Group.of(
            entries, place.offset + place.size, self._first_pages[group], self._first_literals[group]
        )

    def has_chunk(self, chunk: int) -> bool:
        """Whether the frames of a chunk are known."""
        return chunk + 1 in self._groups

    def chunk_of(self, frame: int) -> int | None:
        """The chunk that lists a frame; ``None`` when the root does."""
        return _chunk(self._firsts, frame, len(self), "frame")

    def chunk_of_literal(self, literal: int) -> int | None:
        """The chunk that lists the frame of a literal; ``None`` when the root does."""
        return _chunk(self._first_literals, literal, self.root.totals.literals, "literal")

    def chunk_of_page(self, nth: int) -> int | None:
        """The chunk that lists the frame of the page that comes ``nth`` in the file, counted from 0;
        ``None`` when the root does.
        """
        return _chunk(self._first_pages, nth, self.root.totals.pages, "page")

    def entry(self, frame: int) -> FrameEntry:
        """What is known of a frame.

        :raises KeyError: its chunk (:meth:`chunk_of`) has not been added.
        """
        group, at = self._find(frame)
        return group.entries[at]

    def place(self, frame: int) -> Place:
        """Where a frame is; errors as :meth:`entry`."""
        group, at = self._find(frame)
        return Place(group.offsets[at], group.entries[at].size)

    def pages_before(self, frame: int) -> int:
        """How many pages come in the frames before a frame; errors as :meth:`entry`."""
        group, at = self._find(frame)
        return group.pages[at]

    def frame_of_literal(self, literal: int) -> int:
        """The frame that brings a literal; errors as :meth:`entry`."""
        group = _group(self.chunk_of_literal(literal))
        return self._firsts[group] + bisect_right(self._groups[group].literals, literal) - 1

    def frame_of_page(self, nth: int) -> int:
        """The frame that brings the page that comes ``nth`` in the file; errors as :meth:`entry`."""
        group = _group(self.chunk_of_page(nth))
        return self._firsts[group] + bisect_right(self._groups[group].pages, nth) - 1

    def unpack(self, frame: int, blob: bytes) -> memoryview:
        """The content of a frame, verified; lent until the next frame is unpacked or decoded.

        :raises CorruptError: these are not the bytes of this frame, or they do not decompress.
        """
        entry, where = self.entry(frame), f"frame {frame}"
        check_frame(entry, blob, where)
        return self._unpacker.unpack(entry, blob, where)

    def decode(self, frame: int, blob: bytes) -> PagePayload:
        """The payload of a frame of pages, verified; its operations, references and literals are lent as
        those of :meth:`unpack`.

        :raises CorruptError: these are not the bytes of this frame, or it is not well formed.
        """
        group, at = self._find(frame)
        entry, where = group.entries[at], f"frame {frame}"
        if not entry.kind.is_pages:
            raise CorruptError(f"{where} brings no pages")
        payload = PagePayload.decode(entry, self.unpack(frame, blob), self.root.machine, where)
        if payload.first_literal != group.literals[at]:
            raise CorruptError(
                f"{where} begins with literal {payload.first_literal}, not {group.literals[at]}"
            )
        return payload

    def _find(self, frame: int) -> tuple[_Group, int]:
        group = _group(self.chunk_of(frame))
        return self._groups[group], frame - self._firsts[group]


def _group(chunk: int | None) -> int:
    return 0 if chunk is None else chunk + 1


def _chunk(firsts: list[int], number: int, count: int, what: str) -> int | None:
    """The chunk in which the thing ``number`` of ``count`` is, by the first one of each group."""
    if not 0 <= number < count:
        raise IndexError(f"{what} {number} of {count}")
    group = bisect_right(firsts, number) - 1
    return group - 1 if group else None
