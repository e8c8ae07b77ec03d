"""Creating an overlay: compare a capture with its base, encode what differs, write the file.

Two passes over the capture: the first finds the pages that really differ, the second encodes them
in file order. Frames go to a spool, since the root stands before them and needs their digests.
Memory is bounded: one frame, 16,384 literals and their digests, and some twenty bytes per captured page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import BinaryIO

import numpy as np

from cloudlet.errors import LimitError, TruncatedError, UsageError
from cloudlet.model import PAGE_BYTES, Machine
from cloudlet.overlay.base import BasePages
from cloudlet.overlay.frames import compressed_size, pack_chunk
from cloudlet.overlay.header import Header
from cloudlet.overlay.index import PageIndex
from cloudlet.overlay.limits import CHUNK_FRAMES, FRAME_PAGES
from cloudlet.overlay.pack import Content, Parts, pack_parts
from cloudlet.overlay.pages import PageSource, Positions, Space
from cloudlet.overlay.payload import Operation
from cloudlet.overlay.plan import HOT_FRAMES, Hot, changed_positions
from cloudlet.overlay.reader import Progress
from cloudlet.overlay.root import App, DeviceSection, Root, check_machines
from cloudlet.overlay.sign import Sign, write_head

_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Description:
    """What the capture knows besides pages. ``created`` is UTC, as ``2026-11-24T23:00:00Z``."""

    app: App
    created: str
    machine: Machine
    device_sections: tuple[DeviceSection, ...]
    device_state: bytes


@dataclass(slots=True)
class CreateReport:
    """What became of the pages, what the bytes are for, and seconds of wall time by step."""

    identity: str = ""
    base: str = ""
    captured: dict[Space, int] = field(default_factory=dict)
    pages: dict[Space, Counter[Operation]] = field(default_factory=lambda: {s: Counter() for s in Space})
    literal_bytes: int = 0
    """Literals before compression; after it they are within the frames."""
    frame_bytes: int = 0
    map_bytes: int = 0
    device_bytes: int = 0
    index_bytes: int = 0
    head_bytes: int = 0
    """Header, root and signature."""
    file_bytes: int = 0
    hot_frames: int = 0
    hot_bytes: int = 0
    plain_delta_bytes: int | None = None
    """All changed pages and blocks as one stream of zstd -3."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def changed_pages(self) -> int:
        return sum(counter.total() for counter in self.pages.values())


def create(
    out: BinaryIO,
    spool: BinaryIO,
    description: Description,
    ram: PageSource,
    disk: PageSource,
    base: BasePages,
    index: PageIndex,
    *,
    sign: Sign | None = None,
    level: int = 3,
    hot: Hot = (),
    plain_delta: bool = False,
    progress: Progress | None = None,
) -> CreateReport:
    """Write an overlay to ``out`` by way of ``spool``, an empty and seekable temporary file.

    ``progress`` gets pages encoded and pages to encode. The capture must not change meanwhile.

    :raises MismatchError: the capture is of another machine than the base.
    :raises UsageError: the capture's page numbers are not in order, or there is no device state.
    :raises CorruptError: the description holds what a reader would refuse.
    :raises LimitError: more than the format can hold.
    """
    if not description.device_state:
        raise UsageError("a capture without device state cannot become an overlay")
    check_machines(description.machine, base.machine, description.device_sections, base.device_sections)
    report = CreateReport()
    sources = {Space.RAM: ram, Space.DISK: disk}
    with _timed(report, "compare"):
        changed = {space: changed_positions(space, source, base) for space, source in sources.items()}
        report.captured = {space: source.numbers.size for space, source in sources.items()}
    with _timed(report, "encode"):
        content = Content(sources, changed, description.device_state)
        parts, root, tables = _packed(spool, description, content, base, index, level, hot, progress)
        report.pages = parts.operations
    with _timed(report, "write"):
        _write(out, spool, parts, root, tables, sign, report)
    if plain_delta:
        with _timed(report, "plain_delta"):
            report.plain_delta_bytes = compressed_size(_plain_delta(sources, changed))
    return report


def _packed(
    spool: BinaryIO,
    description: Description,
    content: Content,
    base: BasePages,
    index: PageIndex,
    level: int,
    hot: Hot,
    progress: Progress | None,
) -> tuple[Parts, Root, list[bytes]]:
    """The parts of the file, its root, and its index chunks."""
    most = HOT_FRAMES
    while True:
        parts = pack_parts(spool, content, base, index, level, hot, most, progress)
        cold = parts.cold
        chunks = [pack_chunk(cold[at : at + CHUNK_FRAMES]) for at in range(0, len(cold), CHUNK_FRAMES)]
        root = Root(
            description.app,
            base.identity,
            description.created,
            description.device_sections,
            description.machine,
            tuple(entry for entry, _ in parts.maps),
            tuple(entry for entry, _ in parts.devices),
            tuple(parts.hot),
            tuple(chunk for chunk, _ in chunks),
            parts.totals,
        )
        try:
            root.encode()
        except LimitError:
            if not parts.hot:
                raise
            # More than 12 GiB changed, or the app says much of itself: the root has no room for so many.
            most = len(parts.hot) // 2
        else:
            return parts, root, [table for _, table in chunks]


def _write(
    out: BinaryIO,
    spool: BinaryIO,
    parts: Parts,
    root: Root,
    tables: list[bytes],
    sign: Sign | None,
    report: CreateReport,
) -> None:
    root_bytes = root.encode()
    Root.decode(root_bytes)  # What a reader would refuse must not be written.
    header = write_head(out, root_bytes, root.parts_bytes, sign)
    for _, blob in (*parts.maps, *parts.devices):
        out.write(blob)
    spool.seek(0)
    _copy(spool, out, sum(entry.size for entry in parts.hot))
    for chunk, table in zip(root.chunks, tables, strict=True):
        out.write(table)
        _copy(spool, out, chunk.size)
    _account(report, header, root, root_bytes)


def _account(report: CreateReport, header: Header, root: Root, root_bytes: bytes) -> None:
    report.identity = header.identity(root_bytes)
    report.base = root.base
    report.file_bytes = header.file_bytes
    report.head_bytes = header.parts_start
    report.map_bytes = sum(entry.size for entry in root.map_frames)
    report.device_bytes = sum(entry.size for entry in root.device_frames)
    report.index_bytes = sum(chunk.table_bytes for chunk in root.chunks)
    report.frame_bytes = sum(entry.size for entry in root.hot_frames)
    report.frame_bytes += sum(chunk.size for chunk in root.chunks)
    report.literal_bytes = root.totals.literals * PAGE_BYTES
    report.hot_frames = len(root.hot_frames)
    report.hot_bytes = sum(entry.size for entry in root.hot_frames)


def _copy(source: BinaryIO, out: BinaryIO, size: int) -> None:
    while size:
        data = source.read(min(size, _COPY_BYTES))
        if not data:
            raise TruncatedError(f"the spool ends {size} bytes early")
        out.write(data)
        size -= len(data)


def _plain_delta(
    sources: Mapping[Space, PageSource], changed: Mapping[Space, Positions]
) -> Iterator[memoryview]:
    for space in (Space.DISK, Space.RAM):
        for at in range(0, changed[space].size, FRAME_PAGES):
            rows = sources[space].data[changed[space][at : at + FRAME_PAGES]]
            yield np.ascontiguousarray(rows).data


@contextmanager
def _timed(report: CreateReport, step: str) -> Iterator[None]:
    started = perf_counter()
    yield
    report.seconds[step] = perf_counter() - started
