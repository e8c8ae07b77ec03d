"""What a reader refuses: every cut and every flipped byte, and what a forger could build."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest

from cloudlet.errors import (
    CorruptError,
    IntegrityError,
    LimitError,
    MismatchError,
    SignatureError,
    TruncatedError,
    VersionError,
)
from cloudlet.overlay.apply import apply, verify_only
from cloudlet.overlay.frames import FrameKind
from cloudlet.overlay.pages import Space
from cloudlet.overlay.reader import OverlayReader

from .forge import Forged
from .world import Key, Rebuilt, Ring, World, page, unsigned

KEY, OTHER = Key(1, "publisher"), Key(2, "stranger")
RING = Ring([KEY])


@pytest.fixture(scope="module")
def signed(world: World) -> bytes:
    ram = {i: page(i + 1) for i in range(6)}
    return world.create(ram, {3: page(50)}, sign=KEY.sign)[0]


def refuse(world: World, data: bytes, error: type[Exception] = IntegrityError) -> pytest.ExceptionInfo:
    """Neither applied nor verified without the base; and a sink sees no page that is not right."""
    sink = Rebuilt(world)
    with pytest.raises(error) as info:
        apply(OverlayReader(io.BytesIO(data), allow_unsigned=True), world.base, sink)
    assert sink.device is None
    if not isinstance(info.value, MismatchError):
        with pytest.raises(error):
            verify_only(OverlayReader(io.BytesIO(data), allow_unsigned=True))
    return info


def test_it_tells_what_the_file_is(world: World, signed: bytes) -> None:
    reader = OverlayReader(io.BytesIO(signed), RING.verify)
    assert reader.signed_by == "publisher"
    assert reader.root.app.name == "hello"
    assert len(reader.identity) == 64
    verify_only(reader)
    assert reader.offset == len(signed)
    assert unsigned(world.create()[0]).signed_by is None


def test_the_parts_come_once(small: bytes) -> None:
    reader = unsigned(small)
    list(reader.parts())
    with pytest.raises(ValueError, match="only once"):
        list(reader.parts())


def test_any_cut_is_found(world: World, signed: bytes) -> None:
    for size in range(len(signed)):
        sink = Rebuilt(world)
        with pytest.raises(TruncatedError):
            apply(OverlayReader(io.BytesIO(signed[:size]), RING.verify), world.base, sink)
        assert sink.device is None


def only_right(sink: Rebuilt, good: Rebuilt) -> None:
    """What a sink has seen before an error is what it would have seen without."""
    assert sink.device is None
    for space, came in sink.came.items():
        assert came == good.came[space][: len(came)]
        if came:
            seen, expected = (s.ram if space is Space.RAM else s.disk for s in (sink, good))
            assert (seen[came] == expected[came]).all()


def test_any_flipped_byte_is_found(world: World, signed: bytes) -> None:
    good, began = world.apply(signed), 0
    for at in range(len(signed)):
        for flip in (0x01, 0x80, 0xFF):
            bad = bytearray(signed)
            bad[at] ^= flip
            sink = Rebuilt(world)
            with pytest.raises(IntegrityError):
                apply(OverlayReader(io.BytesIO(bad), RING.verify), world.base, sink)
            only_right(sink, good)
            began += bool(sink.announced)
    assert began > 100, "many are found only when pages have come"


def test_any_flipped_byte_of_an_unsigned_file_is_found(world: World, small: bytes) -> None:
    for at in range(len(small)):
        bad = bytearray(small)
        bad[at] ^= 1 << at % 8
        refuse(world, bytes(bad))


def test_a_byte_more_is_found(world: World, small: bytes) -> None:
    assert "goes on" in str(refuse(world, small + b"\0", CorruptError).value)


def test_signatures(world: World, signed: bytes, small: bytes) -> None:
    with pytest.raises(SignatureError, match="not signed"):
        OverlayReader(io.BytesIO(small), RING.verify)
    with pytest.raises(SignatureError, match="no keys"):
        OverlayReader(io.BytesIO(signed))
    for allow_unsigned in (False, True):
        with pytest.raises(SignatureError, match="not trusted"):
            OverlayReader(io.BytesIO(signed), Ring([OTHER]).verify, allow_unsigned=allow_unsigned)
        forged, _ = world.create(sign=lambda message: (KEY.id, OTHER.sign(message)[1]))
        with pytest.raises(SignatureError, match="does not match"):
            OverlayReader(io.BytesIO(forged), RING.verify, allow_unsigned=allow_unsigned)
    assert unsigned(signed).signed_by is None


def test_another_version(signed: bytes) -> None:
    with pytest.raises(VersionError):
        OverlayReader(io.BytesIO(signed[:8] + b"\x01\x00" + signed[10:]), RING.verify)


def test_another_base_is_refused_before_any_frame(world: World, small: bytes) -> None:
    from dataclasses import replace

    reader = unsigned(small)
    head = reader.offset
    with pytest.raises(MismatchError):
        apply(reader, replace(world.base, identity="cd" * 32), Rebuilt(world))
    assert reader.offset == head


def test_the_message_says_what_and_where(world: World, small: bytes) -> None:
    reader = unsigned(small)
    list(reader.parts())
    last = reader.root.totals.frames - 1
    bad = bytearray(small)
    bad[-1] ^= 1
    message = str(refuse(world, bytes(bad)).value)
    assert f"frame {last} (offset " in message
    message = str(refuse(world, small[:-1], TruncatedError).value)
    assert f"offset {len(small) - 1}" in message


def change(small: bytes, edit: Callable[[Forged], None]) -> bytes:
    forged = Forged.of(small)
    edit(forged)
    return forged.data()


def pages_of(forged: Forged, kind: FrameKind) -> int:
    """The last frame of a kind."""
    return max(at for at, (entry, _) in enumerate(forged.frames) if entry.kind is kind)


def test_moved_frames_are_found(world: World, small: bytes) -> None:
    """Frames moved within the bytes of the file, the root left as it is."""
    reader = unsigned(small)
    forged = Forged.of(small)
    head = reader.header.parts_start
    body = small[head:]
    chunk = len(body) - sum(len(blob) for _, blob in forged.frames)
    cut = sum(len(blob) for _, blob in forged.frames[:3])
    blobs = [blob for _, blob in forged.frames]
    table = body[cut : cut + chunk]
    assert b"".join(blobs[:3]) + table + b"".join(blobs[3:]) == body
    for order in ([0, 1, 2, 4, 3], [0, 1, 2, 3, 3], [0, 1, 2, 3], [0, 1, 2, 4], [1, 0, 2, 3, 4]):
        moved = [blobs[at] for at in order]
        refuse(world, small[:head] + b"".join(moved[:3]) + table + b"".join(moved[3:]))
    refuse(world, small[:head] + b"".join(blobs[:3]) + table[48:] + table[:48] + b"".join(blobs[3:]))


def test_frames_in_another_order_with_a_root_that_says_so(world: World, small: bytes) -> None:
    """A forged root cannot make a page refer to a literal that has not come."""

    def swap(forged: Forged) -> None:
        forged.frames[-1], forged.frames[-2] = forged.frames[-2], forged.frames[-1]

    assert "literal" in str(refuse(world, change(small, swap), CorruptError).value)


def test_a_repeated_frame_with_a_root_that_says_so(world: World, small: bytes) -> None:
    def repeat(forged: Forged) -> None:
        forged.frames.append(forged.frames[-1])

    refuse(world, change(small, repeat), CorruptError)


def test_a_dropped_frame_with_a_root_that_says_so(world: World, small: bytes) -> None:
    refuse(world, change(small, lambda forged: forged.frames.pop()), CorruptError)


def test_pages_that_do_not_come(world: World, small: bytes) -> None:
    """Map and totals promise a page more than the frames bring."""
    forged = Forged.of(small)
    with pytest.raises(CorruptError, match="pages in all"):
        unsigned(forged.data(totals={"ram_pages": 9}))


def renumber(small: bytes, kind: FrameKind, numbers: list[int]) -> bytes:
    forged = Forged.of(small)
    at = pages_of(forged, kind)
    raw = forged.raw(at)
    count = forged.frames[at][0].pages
    new = np.diff(np.array(numbers, np.uint32), prepend=np.uint32(0))
    assert len(numbers) == count
    raw[8 : 8 + 4 * count] = new.tobytes()
    forged.set_raw(at, raw)
    return forged.data()


@pytest.mark.parametrize("bad", [81, 71, 95, 96, 2**32 - 1])
def test_pages_twice_or_outside_the_map_or_the_machine(world: World, small: bytes, bad: int) -> None:
    forged = Forged.of(small)
    count = forged.frames[pages_of(forged, FrameKind.RAM)][0].pages
    good = [0, 1, 3, 4, 80, 81, 90, 91]
    assert len(good) == count
    assert renumber(small, FrameKind.RAM, good) == small
    refuse(world, renumber(small, FrameKind.RAM, [bad, *good[1:]]), CorruptError)


def test_references_outside(world: World, small: bytes) -> None:
    forged = Forged.of(small)
    at = pages_of(forged, FrameKind.RAM)
    entry = forged.frames[at][0]
    for reference in range(entry.references):
        for value in (100_000, 2**32 - 1):
            forged = Forged.of(small)
            raw = forged.raw(at)
            struct.pack_into("<I", raw, 8 + 5 * entry.pages + 4 * reference, value)
            forged.set_raw(at, raw)
            assert "outside" in str(refuse(world, forged.data(), CorruptError).value)


@pytest.mark.parametrize("kind", [FrameKind.RAM, FrameKind.DISK])
def test_an_xor_without_a_literal(world: World, small: bytes, kind: FrameKind) -> None:
    """Any page that needs no literal calls itself an XOR; all digests and sums are right."""
    forged = Forged.of(small)
    at = pages_of(forged, kind)
    entry, codes = forged.frames[at][0], 8 + 4 * forged.frames[at][0].pages
    others = [n for n in range(entry.pages) if forged.raw(at)[codes + n] < 5]
    assert others
    for position in others:
        forged = Forged.of(small)
        raw = forged.raw(at)
        raw[codes + position] = 6
        forged.set_raw(at, raw)
        assert "literals and has" in str(refuse(world, forged.data(), CorruptError).value)


def test_a_wrong_count_of_literals_before(world: World, small: bytes) -> None:
    forged = Forged.of(small)
    raw = forged.raw(4)
    raw[0] += 1
    forged.set_raw(4, raw)
    assert "begins with literal" in str(refuse(world, forged.data(), CorruptError).value)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_a_frame_that_expands_beyond_its_declared_size(world: World, small: bytes, at: int) -> None:
    from cloudlet.overlay.frames import Packer

    forged = Forged.of(small)
    bomb = Packer(3).pack(FrameKind.DEVICE, bytes(64 << 20))[1]
    forged.set_blob(at, bomb)
    refuse(world, forged.data(), CorruptError)


def test_declared_sizes_beyond_the_limits(world: World, small: bytes) -> None:
    forged = Forged.of(small)
    forged.set_raw(1, bytes((4 << 20) + 1))
    refuse(world, forged.data(), LimitError)


def test_a_map_that_is_wrong(world: World, small: bytes) -> None:
    forged = Forged.of(small)
    raw = forged.raw(0)
    raw[16] += 1
    forged.set_raw(0, raw)
    refuse(world, forged.data(), CorruptError)


def test_a_map_that_calls_other_pages_hot(world: World, small: bytes) -> None:
    """Pages 2 and 70 are hot; the map's last run says 71 or 80 instead, or the root has no hot frame."""
    last_run = 4 + 8  # Before the frames of two pages.
    for page_number, why in ((71, "hot that does not come"), (80, "that the map says is cold")):
        forged = Forged.of(small)
        raw = forged.raw(0)
        assert struct.unpack_from("<IIHH", raw, len(raw) - last_run) == (70, 1, 0, 0)
        struct.pack_into("<I", raw, len(raw) - last_run, page_number)
        forged.set_raw(0, raw)
        assert why in str(refuse(world, forged.data(), CorruptError).value)
    assert "0 hot pages, which do not fit" in str(refuse(world, Forged.of(small).data(hot=0)).value)


def test_a_map_that_names_a_hot_frame_that_is_not(world: World, small: bytes) -> None:
    """There is one, of two pages: frame 1 is none, and a page less or more is no list."""
    for frames in (b"\0\0\1\0", b"\0\0", b"\0\0\0\0\0\0"):
        forged = Forged.of(small)
        forged.set_raw(0, forged.raw(0)[:-4] + frames)
        assert "hot" in str(refuse(world, forged.data(), CorruptError).value)


def test_frames_of_the_wrong_kind(world: World, small: bytes) -> None:
    """A disk frame that calls itself RAM brings pages that are not in RAM's map."""
    from dataclasses import replace

    forged = Forged.of(small)
    at = pages_of(forged, FrameKind.DISK)
    entry, blob = forged.frames[at]
    forged.frames[at] = (replace(entry, kind=FrameKind.RAM), blob)
    refuse(world, forged.data(totals={"ram_pages": 8, "disk_pages": 5}), CorruptError)
