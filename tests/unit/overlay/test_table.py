from __future__ import annotations

import numpy as np
import pytest

from cloudlet.errors import CorruptError
from cloudlet.overlay.pages import Space
from cloudlet.overlay.reader import Chunk, Frame
from cloudlet.overlay.table import FrameTable, Place

from .world import World, page, unsigned


@pytest.fixture
def many(world: World, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Frames of three pages, two hot ones, chunks of four frames; some frames have no literal."""
    monkeypatch.setattr("cloudlet.overlay.plan.FRAME_PAGES_WRITTEN", 3)
    monkeypatch.setattr("cloudlet.overlay.create.CHUNK_FRAMES", 4)
    ram = {i: page(i % 24 + 1) for i in range(64)}
    hot = [(Space.RAM, np.array([40, 3, 30, 31], np.uint32))]
    return world.create(ram, {i: page(90 + i) for i in range(20)}, hot=hot)[0]


def test_every_frame_is_where_the_table_says(world: World, many: bytes) -> None:
    reader = unsigned(many)
    table = FrameTable(reader.header, reader.root)
    frames = [part for part in reader.parts() if isinstance(part, Frame)]
    literal = nth = 0
    for frame in frames:
        chunk = table.chunk_of(frame.number)
        if chunk is not None and not table.has_chunk(chunk):
            where = table.chunk_place(chunk)
            table.add_chunk(chunk, many[where.offset : where.offset + where.size])
        assert table.entry(frame.number) == frame.entry
        place = table.place(frame.number)
        assert many[place.offset : place.offset + place.size] == frame.blob
        assert table.pages_before(frame.number) == nth
        for own in range(frame.entry.pages):
            assert table.chunk_of_page(nth + own) == chunk
            assert table.frame_of_page(nth + own) == frame.number
        nth += frame.entry.pages
        assert len(table.unpack(frame.number, frame.blob)) == frame.entry.raw_size
        if frame.entry.kind.is_pages:
            payload = table.decode(frame.number, frame.blob)
            assert payload.first_literal == literal
            for own in range(frame.entry.literals):
                assert table.chunk_of_literal(literal + own) == chunk
                assert table.frame_of_literal(literal + own) == frame.number
            literal += frame.entry.literals
    assert len(table) == len(frames)
    assert literal == reader.root.totals.literals
    assert nth == reader.root.totals.pages
    last = table.place(len(table) - 1)
    assert last.offset + last.size == len(many)


def test_chunks_are_found_from_the_root_alone(many: bytes) -> None:
    reader = unsigned(many)
    table = FrameTable(reader.header, reader.root)
    at = reader.offset
    for part in reader.parts():
        if isinstance(part, Chunk):
            assert table.chunk_place(part.number) == Place(at, len(part.blob))
        at = reader.offset


def test_what_is_not_there_is_refused(many: bytes) -> None:
    reader = unsigned(many)
    table = FrameTable(reader.header, reader.root)
    with pytest.raises(IndexError):
        table.entry(len(table))
    with pytest.raises(IndexError):
        table.frame_of_literal(reader.root.totals.literals)
    with pytest.raises(IndexError):
        table.frame_of_page(reader.root.totals.pages)
    with pytest.raises(KeyError):
        table.place(len(table) - 1)
    with pytest.raises(KeyError):
        table.frame_of_page(reader.root.totals.pages - 1)
    assert not table.has_chunk(0)
    with pytest.raises(CorruptError):
        table.add_chunk(0, bytes(reader.root.chunks[0].table_bytes))
    hot = len(reader.root.map_frames) + len(reader.root.device_frames)
    with pytest.raises(CorruptError, match="digest"):
        table.decode(hot, b"something else")
    with pytest.raises(CorruptError, match="brings no pages"):
        table.decode(0, b"")
