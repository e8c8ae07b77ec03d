"""Applying an overlay: every page that it brings, built from the base and handed to a sink.

One pass over the stream, in file order. A page reaches the sink only after the digest of its
frame, the frame's structure and the page's place in the map were checked; on any error the sink
has seen nothing but such pages, and its ``finish`` is not called. Memory: the map, the device state,
one frame, and the literals that later pages may refer to: 64 MiB at most (touched as they come), or
none where the caller gives a file to keep them in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cloudlet.errors import CorruptError
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.base import BasePages, read_rows
from cloudlet.overlay.frames import FrameKind, Unpacker
from cloudlet.overlay.known import Pages
from cloudlet.overlay.limits import FRAME_PAGES, WINDOW_LITERALS
from cloudlet.overlay.pagemap import Coverage, PageMap
from cloudlet.overlay.pages import Numbers, PageBatch, Positions, Rows, Space
from cloudlet.overlay.payload import Operation, PagePayload
from cloudlet.overlay.reader import Frame, OverlayReader, Progress
from cloudlet.sparse import write_at


class Sink(Protocol):
    """Where the pages go: an incoming stream and a disk image, a file, a table of digests."""

    def begin(self, pages: PageMap) -> None:
        """The pages that will come, each exactly once; all others are the base's."""

    def pages(self, batch: PageBatch) -> None:
        """Some of the pages; the batch is lent until this returns."""

    def finish(self, device_state: bytes) -> None:
        """All pages have come and the whole file is verified."""


def apply(
    reader: OverlayReader,
    base: BasePages,
    sink: Sink,
    progress: Progress | None = None,
    *,
    spool_fd: int | None = None,
) -> None:
    """Build all pages of an overlay. ``progress`` gets bytes read and the size of the file.

    :param spool_fd: an empty temporary file for literals, 64 MiB at most: for one of several transfers at
        a time, which then costs a few MiB of memory; a little slower than memory.
    :raises MismatchError: the overlay is for another base; nothing was read beyond the root.
    :raises IntegrityError: the stream is truncated or corrupt.
    """
    reader.root.check_base(base.identity, base.machine, base.device_sections)
    window = min(reader.root.totals.literals, WINDOW_LITERALS)
    literals = LiteralRing(window) if spool_fd is None else LiteralSpool(window, spool_fd)
    room: Rows = np.empty((FRAME_PAGES, PAGE_BYTES), np.uint8)
    device_state = b""
    for step in _steps(reader, progress):
        match step:
            case PageMap():
                sink.begin(step)
            case PagePayload():
                literals.add(step.first_literal, step.literals)
                sink.pages(PageBatch(step.space, step.numbers, build(step, base, literals, room)))
            case bytes():
                device_state = step
    sink.finish(device_state)


def verify_only(reader: OverlayReader, progress: Progress | None = None) -> None:
    """Check all that can be checked without the base: everything but the base's own bytes.

    :raises IntegrityError: the stream is truncated or corrupt.
    """
    for _ in _steps(reader, progress):
        pass


class Literals(Protocol):
    """The literals that a page may still refer to, by number."""

    def add(self, first: int, rows: Rows) -> None:
        """Keep literals; at most the window's length at a time. Each is copied once here."""

    def take(self, literals: Numbers, rows: Rows, positions: Positions) -> None:
        """Put literal ``literals[i]`` into ``rows[positions[i]]``."""

    def take_span(self, start: int, room: memoryview) -> None:
        """Fill ``room`` with the literals' bytes from ``start`` on, counted from the first literal of all."""


class LiteralRing:
    """Literals in memory, which is taken as they come."""

    def __init__(self, window: int) -> None:
        self._rows: Rows = np.empty((window, PAGE_BYTES), np.uint8)

    def add(self, first: int, rows: Rows) -> None:
        at = first % len(self._rows) if len(self._rows) else 0
        fits = min(len(rows), len(self._rows) - at)
        self._rows[at : at + fits] = rows[:fits]
        self._rows[: len(rows) - fits] = rows[fits:]

    def take(self, literals: Numbers, rows: Rows, positions: Positions) -> None:
        rows[positions] = self._rows[literals % np.uint32(len(self._rows))]

    def take_span(self, start: int, room: memoryview) -> None:
        kept = self._rows.reshape(-1).data
        at = start % len(kept)
        fits = min(len(room), len(kept) - at)
        room[:fits] = kept[at : at + fits]
        room[fits:] = kept[: len(room) - fits]


class LiteralSpool:
    """Literals in a file."""

    def __init__(self, window: int, descriptor: int) -> None:
        self._window = window
        self._descriptor = descriptor

    def add(self, first: int, rows: Rows) -> None:
        at = first % self._window if self._window else 0
        fits = min(len(rows), self._window - at)
        write_at(self._descriptor, rows[:fits].reshape(-1).data, at * PAGE_BYTES)
        write_at(self._descriptor, rows[fits:].reshape(-1).data, 0)

    def take(self, literals: Numbers, rows: Rows, positions: Positions) -> None:
        places = literals % np.uint32(self._window)
        if read_rows(self._descriptor, places, rows, positions) is not None:
            raise CorruptError("the spool of literals ends early")

    def take_span(self, start: int, room: memoryview) -> None:
        at = start % (self._window * PAGE_BYTES)
        fits = min(len(room), self._window * PAGE_BYTES - at)
        read = os.preadv(self._descriptor, [room[:fits]], at) + os.preadv(self._descriptor, [room[fits:]], 0)
        if read != len(room):
            raise CorruptError("the spool of literals ends early")


def build(payload: PagePayload, base: Pages, literals: Literals, room: Rows) -> Rows:
    """The contents of a frame's pages, in ``room``; only literals are handed on as they were decompressed.

    ``literals`` holds all that the pages refer to, the frame's own among them.
    """
    by_operation = payload.by_operation()
    if by_operation.keys() == {Operation.LITERAL}:
        return payload.literals
    rows = room[: payload.numbers.size]
    for operation, (positions, references) in by_operation.items():
        match operation:
            case Operation.ZERO:
                rows[positions] = 0
            case Operation.BASE_RAM:
                base.read_into(Space.RAM, references, rows, positions)
            case Operation.BASE_DISK:
                base.read_into(Space.DISK, references, rows, positions)
            case Operation.EARLIER:
                literals.take(references, rows, positions)
            case Operation.SPAN:
                take_spans(payload.span_starts(references), literals, rows, positions)
            case Operation.LITERAL:
                rows[positions] = payload.literals_of(operation)
            case Operation.XOR:
                base.read_into(payload.space, payload.numbers[positions], rows, positions)
                rows[positions] ^= payload.literals_of(operation)
    return rows


def take_spans(starts: NDArray[np.int64], literals: Literals, rows: Rows, positions: Positions) -> None:
    """Fill ``rows[positions[i]]`` with the 4096 bytes from ``starts[i]`` on, in the sequence of all literals.

    There is at least one; neighbours that continue each other are one copy.
    """
    room = rows.data.cast("B")
    breaks = np.flatnonzero((np.diff(positions) != 1) | (np.diff(starts) != PAGE_BYTES)) + 1
    for first, after in pairwise([0, *breaks.tolist(), positions.size]):
        at = int(positions[first]) * PAGE_BYTES
        literals.take_span(int(starts[first]), room[at : at + (after - first) * PAGE_BYTES])


def _steps(reader: OverlayReader, progress: Progress | None) -> Iterator[PageMap | PagePayload | bytes]:
    """The map, each frame of pages, and when all has come and is complete, the device state."""
    root, size = reader.root, reader.header.file_bytes
    raw_map: list[bytes] = []
    raw_device: list[bytes] = []
    coverage: dict[Space, Coverage] = {}
    literal = 0
    unpacker = Unpacker()
    for part in reader.parts():
        if isinstance(part, Frame):
            raw = unpacker.unpack(part.entry, part.blob, part.where)
            match part.entry.kind:
                case FrameKind.MAP:
                    raw_map.append(bytes(raw))
                    if len(raw_map) == len(root.map_frames):
                        page_map = PageMap.decode(b"".join(raw_map), root)
                        raw_map.clear()
                        coverage = {space: Coverage(page_map, space) for space in Space}
                        yield page_map
                case FrameKind.DEVICE:
                    raw_device.append(bytes(raw))
                case _:
                    payload = PagePayload.decode(part.entry, raw, root.machine, part.where)
                    if payload.first_literal != literal:
                        at = payload.first_literal
                        raise CorruptError(f"{part.where} begins with literal {at}, not {literal}")
                    hot = part.number < len(root.listed_frames)
                    coverage[payload.space].claim(payload.numbers, part.where, hot=hot)
                    literal += part.entry.literals
                    yield payload
        if progress is not None:
            progress(reader.offset, size)
    for counted in coverage.values():
        counted.check_complete()
    yield b"".join(raw_device)
