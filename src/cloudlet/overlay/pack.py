"""Packing: from the pages that differ to the parts of a file.

Pages are encoded in file order and packed a frame at a time; a frame that turns out large is cut. So which
frame brings a hot page is known at the end, and the map, which says it, is made last, though it stands first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from cloudlet.errors import LimitError
from cloudlet.overlay.base import BasePages
from cloudlet.overlay.encode import PageEncoder
from cloudlet.overlay.frames import FrameEntry, FrameKind, Packer
from cloudlet.overlay.index import PageIndex
from cloudlet.overlay.limits import DEVICE_BYTES, FRAME_BYTES, MAP_BYTES
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import Numbers, PageSource, Positions, Space
from cloudlet.overlay.payload import Operation, PagePayload
from cloudlet.overlay.plan import HOT_LEVEL, FramePlan, Hot
from cloudlet.overlay.reader import Progress
from cloudlet.overlay.root import Totals

FRAME_BYTES_WRITTEN = 96 << 10
"""A frame with more bytes in the file is cut: who waits for a page of it waits 80 ms at 10 Mbit/s, not the
0.2 s of 64 pages that do not compress. Measured: 0.05 % more bytes; with 64 KiB it is 2.4 %, since frames of
that size hold pages that are alike."""

CUT_PAGES = 16
"""Pages that a piece of a frame has at least."""

_Packed = tuple[FrameEntry, Numbers]
"""A frame in the spool, and the pages that it brings."""


@dataclass(frozen=True, slots=True)
class Content:
    """What an overlay is to bring: the rows that differ, of what a capture found, and the device state."""

    sources: Mapping[Space, PageSource]
    changed: Mapping[Space, Positions]
    device_state: bytes

    @property
    def pages(self) -> int:
        return sum(positions.size for positions in self.changed.values())


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a file; the bytes of hot and cold frames are in the spool."""

    maps: Sequence[tuple[FrameEntry, bytes]]
    devices: Sequence[tuple[FrameEntry, bytes]]
    hot: Sequence[FrameEntry]
    cold: Sequence[FrameEntry]
    totals: Totals
    operations: dict[Space, Counter[Operation]]
    """What became of the pages."""


def pack_parts(
    spool: BinaryIO,
    content: Content,
    base: BasePages,
    index: PageIndex,
    level: int,
    hot: Hot,
    most_hot: int,
    progress: Progress | None,
) -> Parts:
    """Encode and pack all pages into the spool, from its start; of the frames at most ``most_hot`` are hot.

    :raises LimitError: more map or device state than the format can hold.
    """
    spool.seek(0)
    spool.truncate()
    plan = FramePlan.make(content.sources, content.changed, hot, most_hot)
    hot_packer = Packer(max(level, HOT_LEVEL))
    devices = pack_whole(hot_packer, FrameKind.DEVICE, content.device_state, DEVICE_BYTES)
    encoder = PageEncoder(base, index)
    operations: dict[Space, Counter[Operation]] = {space: Counter() for space in Space}
    done = 0

    def packed(frames: Iterator[tuple[Space, Positions]], cutter: FrameCutter) -> Iterator[_Packed]:
        nonlocal done
        for space, positions in frames:
            source = content.sources[space]
            rows = np.ascontiguousarray(source.data[positions])
            payload = encoder.encode(space, source.numbers[positions], rows)
            counts = np.bincount(payload.operations, minlength=len(Operation)).tolist()
            operations[space].update(dict(zip(Operation, counts, strict=True)))
            for entry, blob, numbers in cutter.pack(payload):
                spool.write(blob)
                yield entry, numbers
            done += positions.size
            if progress is not None:
                progress(done, content.pages)

    hot_frames = list(packed(iter(plan.hot), FrameCutter(hot_packer, plan.hot_room)))
    cold = [entry for entry, _ in packed(plan.cold_frames(), FrameCutter(Packer(level), plan.cold_room))]
    pages = {space: content.sources[space].numbers[positions] for space, positions in content.changed.items()}
    page_map = PageMap.of(pages, [(entry.kind.space, numbers) for entry, numbers in hot_frames])
    maps = pack_whole(hot_packer, FrameKind.MAP, page_map.encode(), MAP_BYTES)
    totals = Totals(
        device_bytes=len(content.device_state),
        disk_pages=pages[Space.DISK].size,
        frames=len(maps) + len(devices) + len(hot_frames) + len(cold),
        literals=encoder.literals,
        ram_pages=pages[Space.RAM].size,
    )
    return Parts(maps, devices, [entry for entry, _ in hot_frames], cold, totals, operations)


class FrameCutter:
    """Packs payloads, each into one frame or, where that would be large, into several."""

    def __init__(self, packer: Packer, room: int) -> None:
        """:param room: how many frames may be added by cutting; beyond, frames stay whole."""
        self._packer = packer
        self._room = room

    def pack(self, payload: PagePayload) -> Iterator[tuple[FrameEntry, bytes, Numbers]]:
        """The frames of a payload: entry, bytes in the file, and the pages it brings."""
        pages, raw = payload.numbers.size, payload.encode().data
        entry, blob = self._packer.pack(FrameKind(payload.space), raw, pages, len(payload.literals))
        # As many pieces as its size asks for at once: each further cut is one more compression.
        pieces = min(-(-entry.size // FRAME_BYTES_WRITTEN), pages // CUT_PAGES, 1 + self._room)
        if pieces < 2:
            yield entry, blob, payload.numbers
            return
        self._room -= pieces - 1
        for piece in payload.split(pieces):
            yield from self.pack(piece)


def pack_whole(packer: Packer, kind: FrameKind, raw: bytes, most: int) -> list[tuple[FrameEntry, bytes]]:
    """The frames of what is not pages.

    :raises LimitError: it has more than ``most`` bytes.
    """
    if len(raw) > most:
        raise LimitError(f"the {kind.name.lower()} has {len(raw)} bytes; {most} are allowed")
    # Half a frame's limit: what does not compress grows a little.
    piece = FRAME_BYTES // 2
    return [packer.pack(kind, raw[at : at + piece]) for at in range(0, len(raw), piece)]
