from __future__ import annotations

import io
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from cloudlet.errors import CorruptError, LimitError
from cloudlet.overlay.frames import (
    FrameEntry,
    FrameKind,
    Packer,
    Unpacker,
    check_frame,
    pack_chunk,
    payload_bytes,
    unpack_chunk,
    zstd,
)

DIGEST = b"d" * 32


@st.composite
def page_entries(draw: st.DrawFn) -> FrameEntry:
    pages = draw(st.integers(1, 512))
    literals = draw(st.integers(0, pages))
    references = draw(st.integers(0, pages - literals))
    kind = draw(st.sampled_from([FrameKind.RAM, FrameKind.DISK]))
    raw = payload_bytes(pages, references, literals)
    return FrameEntry(
        kind,
        draw(st.integers(1, 4 << 20)),
        raw,
        pages,
        literals,
        draw(st.binary(min_size=32, max_size=32)),
    )


@given(st.lists(page_entries(), min_size=1, max_size=5))
def test_a_chunk_reads_as_it_was_written(entries: list[FrameEntry]) -> None:
    chunk, table = pack_chunk(entries)
    assert unpack_chunk(chunk, table, 0, "chunk") == tuple(entries)
    assert [FrameEntry.from_json(e.to_json(), "x") for e in entries] == entries


GOOD = FrameEntry(FrameKind.RAM, 100, payload_bytes(10, 4, 5), 10, 5, DIGEST)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"kind": 0}, CorruptError),
        ({"kind": 5}, CorruptError),
        ({"kind": 1}, CorruptError),
        ({"size": 0}, LimitError),
        ({"size": (4 << 20) + 1}, LimitError),
        ({"raw_size": 0}, LimitError),
        ({"raw_size": (4 << 20) + 1}, LimitError),
        ({"pages": 0}, LimitError),
        ({"pages": 513}, LimitError),
        ({"literals": 11}, CorruptError),
        ({"raw_size": payload_bytes(10, 6, 5)}, CorruptError),
        ({"raw_size": payload_bytes(10, 4, 5) + 1}, CorruptError),
        ({"raw_size": 7}, CorruptError),
    ],
)
def test_an_entry_is_checked(changes: dict[str, int], error: type[Exception]) -> None:
    bad = replace(GOOD, **changes)
    with pytest.raises(error, match="frame 3"):
        FrameEntry.unpack(bad.pack(), "frame 3")
    with pytest.raises(error, match="frame 3"):
        FrameEntry.from_json(bad.to_json(), "frame 3")


def test_a_chunk_is_pinned_and_adds_up() -> None:
    chunk, table = pack_chunk([GOOD, GOOD])
    with pytest.raises(CorruptError, match="digest"):
        unpack_chunk(chunk, table[:-1] + b"x", 0, "chunk 0")
    with pytest.raises(CorruptError, match="add up"):
        unpack_chunk(replace(chunk, pages=21), table, 0, "chunk 0")
    reserved = table[:1] + b"\x01" + table[2:]
    with pytest.raises(CorruptError, match="reserved"):
        unpack_chunk(replace(chunk, digest=blake3(reserved).digest()), reserved, 0, "chunk 0")
    device, table = pack_chunk([FrameEntry(FrameKind.DEVICE, 5, 5, 0, 0, DIGEST)])
    with pytest.raises(CorruptError, match="brings no pages"):
        unpack_chunk(device, table, 0, "chunk 0")


@pytest.mark.parametrize("size", [1, 4096, 128 << 10, (128 << 10) + 1, 2 << 20, 4 << 20])
def test_a_frame_unpacks_to_what_was_packed(size: int) -> None:
    raw = np.random.default_rng(1).integers(0, 9, size, np.uint8).tobytes()
    entry, blob = Packer(3).pack(FrameKind.DEVICE, raw)
    check_frame(entry, blob, "frame")
    assert Unpacker().unpack(entry, blob, "frame") == raw


def frame(raw: bytes) -> tuple[FrameEntry, bytes]:
    return Packer(3).pack(FrameKind.DEVICE, raw)


def stream(raw: bytes, options: dict[int, int] | None = None) -> bytes:
    """A Zstandard frame that does not say its size."""
    out = io.BytesIO()
    with zstd.open(out, "wb", options=options) as file:
        file.write(raw)
    return out.getvalue()


@pytest.mark.parametrize(
    "blob",
    [
        pytest.param(frame(b"x" * 1001)[1], id="larger"),
        pytest.param(frame(b"x" * 999)[1], id="smaller"),
        pytest.param(frame(b"x" * 1000)[1] + b"\0", id="trailing"),
        pytest.param(frame(b"x" * 1000)[1] * 2, id="two frames"),
        pytest.param(frame(b"x" * 1000)[1][:-1], id="cut"),
        pytest.param(stream(b"x" * 1000), id="size unknown"),
        pytest.param(b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd", id="skippable"),
        pytest.param(b"nothing like it", id="noise"),
        pytest.param(b"", id="empty"),
    ],
)
def test_only_one_frame_of_the_declared_size_unpacks(blob: bytes) -> None:
    entry = replace(frame(b"x" * 1000)[0], size=len(blob))
    with pytest.raises(CorruptError, match="frame 9"):
        Unpacker().unpack(entry, blob, "frame 9")


def test_a_frame_that_lies_about_its_size_costs_no_more_than_it_declares() -> None:
    """A bomb: the Zstandard header says 1000 bytes, the blocks hold 64 MiB."""
    honest = frame(bytes(64 << 20))[1]
    header = zstd.get_frame_info(honest)
    assert header.decompressed_size == 64 << 20
    field = (64 << 20).to_bytes(4, "little")
    assert honest.count(field) == 1
    bomb = honest.replace(field, (1000).to_bytes(4, "little"))
    assert zstd.get_frame_info(bomb).decompressed_size == 1000
    entry = replace(frame(b"x" * 1000)[0], size=len(bomb))
    unpacker = Unpacker()
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError):
            unpacker.unpack(entry, bomb, "frame 1")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_frame_with_a_huge_window_is_refused() -> None:
    options = {
        int(zstd.CompressionParameter.window_log): 27,
        int(zstd.CompressionParameter.content_size_flag): 1,
    }
    compressor = zstd.ZstdCompressor(options=options)
    raw = bytes(64 << 20)
    blob = compressor.compress(raw, zstd.ZstdCompressor.FLUSH_FRAME)
    entry = replace(frame(b"x")[0], size=len(blob), raw_size=64 << 20)
    with pytest.raises(CorruptError):
        Unpacker().unpack(entry, blob, "frame 1")
