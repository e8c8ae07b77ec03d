"""Rounds of a hand-off: whatever changes at the source, the target has it or knows that it has not."""

from __future__ import annotations

import re
from dataclasses import replace
from io import BytesIO
from tempfile import TemporaryFile

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudlet.errors import CorruptError, IntegrityError, LimitError, TruncatedError
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.digests import DigestTable
from cloudlet.overlay.frames import FrameEntry, FrameKind, Packer
from cloudlet.overlay.limits import DEVICE_BYTES, FRAME_PAGES, WINDOW_LITERALS
from cloudlet.overlay.pages import Rows, Space
from cloudlet.overlay.payload import Operation, PagePayload
from cloudlet.overlay.records import Record, RecordKind, RoundEnd, Same, of_frame, read_record
from cloudlet.overlay.rounds import FRAME_PAGES_SENT, RoundWriter

from .moving import SEED, Held, Pages, Source, Target
from .world import BUFFER, CONTENT, DEVICE, MACHINE, World, noise, page

ZERO = np.zeros(4096, np.uint8)
LAYER_RAM: Pages = {0: page(1), 1: page(2), 2: ZERO, 7: page(3), 70: page(1005), 95: page(4)}
LAYER_DISK: Pages = {3: page(5), 20: ZERO, 63: page(6)}


def bodies(records: list[Record], kind: RecordKind) -> list[bytes]:
    return [record.body for record in records if record.kind is kind]


def kinds(records: list[Record]) -> list[RecordKind]:
    return [record.kind for record in records]


# Whole hand-offs

_numbers = {Space.RAM: st.integers(0, 95), Space.DISK: st.integers(0, 63)}
_places = st.sampled_from(Space).flatmap(lambda space: st.tuples(st.just(space), _numbers[space]))
_contents = st.one_of(
    st.just("zero"),
    st.just("held"),  # back to what both ends hold
    st.tuples(st.just("other"), _places),  # what they hold elsewhere
    st.integers(0, 5),  # few, so that content comes again
    st.tuples(st.just("content"), st.integers(0, 4)),
)
_rounds = st.lists(
    st.tuples(
        st.lists(st.tuples(_places, _contents), max_size=30),
        st.sets(_places, max_size=4),  # torn
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=_rounds, layered=st.booleans(), spans=st.booleans(), spooled=st.booleans())
def test_the_target_has_what_the_source_has(
    world: World, rounds: list, layered: bool, spans: bool, spooled: bool
) -> None:
    with Held(world, *((LAYER_RAM, LAYER_DISK) if layered else ())) as held, TemporaryFile() as spool:
        source = Source(held, spans=spans, window=FRAME_PAGES_SENT)
        target = Target(held, spool_fd=spool.fileno() if spooled else None)
        for changes, torn in rounds:
            for (space, number), content in changes:
                source.change(space, number, made(held, space, number, content))
            assert target.take(source.round(torn)) is None
        assert target.take(source.round()) is None
        assert target.equals(source)
        ended = target.take(source.end()[target.reader.records :])
        assert ended and ended.device_state == DEVICE
        assert ended.full == bytes(32)
        sent = sum(source.writer.operations.values())
        assert (sent, source.writer.looked >= sent) == (source.writer.changed, True)


def made(held: Held, space: Space, number: int, content: object) -> Rows:
    match content:
        case "zero":
            return ZERO
        case "held":
            return held.pages[space][number]
        case "other", (other, at):
            return held.pages[other][at]
        case "content", int(at):
            return [*CONTENT, *BUFFER][at]
    return noise(1, seed=content)[0]


def moved(held: Held, **options: object) -> Source:
    """A hand-off with every kind of record, and every operation that it may have."""
    source = Source(held, **options)
    for number, row in enumerate([*CONTENT, *BUFFER, page(1), page(1), page(1050), page(2001), ZERO]):
        source.change(Space.RAM, 10 + number, row)
    source.change(Space.DISK, 5, page(7))
    source.change(Space.DISK, 6, held.pages[Space.DISK][6])
    source.change(Space.RAM, 40, held.pages[Space.RAM][40])
    source.round()
    source.change(Space.RAM, 40, page(8))
    source.change(Space.DISK, 5, held.pages[Space.DISK][5])
    source.change(Space.RAM, 41, held.pages[Space.RAM][41])
    source.round()
    source.end()
    return source


@pytest.fixture
def held(world: World) -> Held:
    return Held(world)


def test_what_becomes_of_pages(held: Held) -> None:
    source = moved(held, spans=True)
    counts = {operation: count for operation, count in source.writer.operations.items() if count}
    assert counts == {
        Operation.ZERO: 1,
        Operation.BASE_RAM: 1,
        Operation.BASE_DISK: 2,
        Operation.EARLIER: 1,
        Operation.SPAN: 2,
        Operation.LITERAL: 6,
    }
    assert (source.writer.looked, source.writer.changed) == (13 + 14, 13)
    target = Target(held)
    assert target.take(source.records)
    assert target.equals(source)


def test_the_order_of_records(held: Held) -> None:
    one = [RecordKind.PAGES, RecordKind.PAGES, RecordKind.SAME, RecordKind.SAME, RecordKind.ROUND]
    two = [RecordKind.PAGES, RecordKind.PAGES, RecordKind.SAME, RecordKind.ROUND]
    assert kinds(moved(held).records) == [*one, *two, RecordKind.DEVICE, RecordKind.END]


def test_spans_are_only_looked_for_when_asked(held: Held) -> None:
    assert moved(held).writer.operations[Operation.SPAN] == 0


def test_pages_that_both_ends_hold_are_named_and_not_sent(held: Held) -> None:
    source, target = Source(held), Target(held)
    for number in (3, 4, 5, 9, 70):
        source.change(Space.RAM, number, held.pages[Space.RAM][number])
    records = source.round()
    assert kinds(records) == [RecordKind.SAME, RecordKind.ROUND]
    assert Same.decode(records[0].body, MACHINE, "").runs.tolist() == [[3, 3], [9, 1], [70, 1]]
    assert target.take([*records, *source.end()[2:]])
    assert target.loaded == []


def test_what_was_sent_is_not_sent_again(held: Held) -> None:
    source = Source(held)
    source.change(Space.RAM, 3, page(1))
    source.change(Space.RAM, 4, held.pages[Space.RAM][4])
    source.round()
    assert kinds(source.round()) == [RecordKind.ROUND]


def test_a_round_says_what_it_was(held: Held) -> None:
    times = iter([1000, 1500, 4000])
    source = Source(held, clock=lambda: next(times))
    source.change(Space.RAM, 3, page(1))
    source.change(Space.DISK, 4, held.pages[Space.DISK][4])
    first, second = source.round()[-1], source.round()[-1]
    assert RoundEnd.decode(first.body, "") == RoundEnd(1, looked=2, sent=1, nanoseconds=500)
    assert RoundEnd.decode(second.body, "") == RoundEnd(2, looked=2, sent=0, nanoseconds=2500)


def test_counting_sends_nothing_and_changes_nothing(held: Held) -> None:
    source = Source(held)
    numbers = np.array([3, 4], np.uint32)
    rows = np.stack([page(1), held.pages[Space.RAM][4]])
    for _ in range(2):
        assert source.writer.count(Space.RAM, numbers, rows) == 1
    assert source.writer.payloads() == []
    assert source.writer.look(Space.RAM, numbers, rows) == 1
    assert source.writer.count(Space.RAM, numbers, rows) == 0
    assert kinds(source.writer.end_round(1)) == [RecordKind.SAME, RecordKind.ROUND]


def test_a_page_that_changes_within_a_round_is_sent_as_it_became(held: Held) -> None:
    source, target = Source(held), Target(held)
    everything = np.arange(96, dtype=np.uint32)
    source.writer.look(Space.RAM, everything, held.pages[Space.RAM])
    for turn in range(3):
        numbers = everything[turn::2]
        source.pages[Space.RAM][numbers] = noise(numbers.size, seed=turn)
        source.writer.look(Space.RAM, numbers, source.pages[Space.RAM][numbers])
        source.pages[Space.RAM][95] = held.pages[Space.RAM][95]
        source.writer.look(Space.RAM, everything[95:], source.pages[Space.RAM][95:])
    ending = source.writer.end_round(1)
    source.drain()
    source.records += ending
    assert RecordKind.SAME not in kinds(source.records)
    assert target.take(source.end())
    assert target.equals(source)


def test_few_changed_pages_share_a_record(held: Held) -> None:
    """One page in eight changes, and they are looked at eight at a time."""
    source = Source(held)
    rows = held.pages[Space.RAM].copy()
    for at in range(0, 96, 8):
        rows[at] = page(at)
        numbers = np.arange(at, at + 8, dtype=np.uint32)
        assert source.writer.look(Space.RAM, numbers, rows[at : at + 8]) == 1
    source.writer.end_round(1)
    assert [payload.numbers.size for payload in source.writer.payloads()] == [12]


@pytest.mark.parametrize("numbers", [[2, 1], [1, 1], list(range(FRAME_PAGES + 1))])
def test_pages_are_looked_at_in_order_and_not_too_many_at_a_time(held: Held, numbers: list[int]) -> None:
    rows = np.zeros((len(numbers), PAGE_BYTES), np.uint8)
    for way in (RoundWriter.look, RoundWriter.count):
        with pytest.raises(ValueError, match="in order"):
            way(Source(held).writer, Space.RAM, np.array(numbers, np.uint32), rows)


def test_a_window_that_is_small_is_kept(held: Held) -> None:
    """Content that comes again is a reference while it is in the window, and sent again after."""
    source, target = Source(held, window=FRAME_PAGES_SENT), Target(held)
    for turn in range(12):
        for first, pages, seed in ((0, 20, turn), (40, 20, turn - 1), (80, 5, turn - 6)):
            for at, row in enumerate(noise(pages, seed=max(0, seed))):
                source.change(Space.RAM, first + at, row)
        target.take(source.round())
        assert target.equals(source)
    # The round before is always there, that six rounds ago never; in the first rounds both are the first.
    assert source.writer.operations[Operation.EARLIER] == 25 + 10 * 20
    assert source.writer.operations[Operation.LITERAL] == 12 * 20 + 5 * 5
    assert target.take(source.end()[target.reader.records :])


@pytest.mark.parametrize("spooled", [False, True])
def test_references_reach_over_the_end_of_what_the_target_keeps(spooled: bool) -> None:
    """More literals than the window has: the last of them are found again, the first are sent again."""
    pages = WINDOW_LITERALS + 4 * FRAME_PAGES
    world = World(replace(MACHINE, memory_bytes=(pages + 1024) * PAGE_BYTES))
    try:
        with TemporaryFile() as spool:
            held = Held(world)
            source, target = Source(held), Target(held, spool_fd=spool.fileno() if spooled else None)
            for number in range(pages):
                source.change(Space.RAM, number, page(10_000 + number))
            target.take(source.round())
            source.touched[Space.RAM].clear()
            for at in range(256):
                source.change(Space.RAM, pages + at, page(10_000 + at))
                source.change(Space.RAM, pages + 512 + at, page(10_000 + pages - FRAME_PAGES - 17 * at))
            target.take(source.round())
            assert source.writer.operations[Operation.EARLIER] == 256
            assert source.writer.operations[Operation.LITERAL] == pages + 256
            assert target.take(source.end()[target.reader.records :])
            assert target.equals(source)
    finally:
        world.close()


# Records that are damaged, in another order, or of another hand-off


def test_a_stream_is_read_as_it_was_written(held: Held) -> None:
    records = moved(held).records
    stream = BytesIO(b"".join(record.encode() for record in records))
    assert [read_record(stream, number) for number in range(len(records))] == records
    assert read_record(stream, len(records)) is None


def test_a_stream_may_come_in_any_pieces(held: Held) -> None:
    class OneByOne(BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 1))

    records = moved(held).records
    stream = OneByOne(b"".join(record.encode() for record in records))
    assert [read_record(stream, number) for number in range(len(records))] == records


def test_a_record_that_is_cut_is_found(held: Held) -> None:
    for number, record in enumerate(moved(held).records):
        whole = record.encode()
        for cut in {*range(1, 16), len(whole) // 2, len(whole) - 1}:
            with pytest.raises(TruncatedError, match=f"^record {number} is cut"):
                read_record(BytesIO(whole[:cut]), number)


@pytest.mark.parametrize(
    ("head", "error"),
    [
        (b"\x00\0\0\0\0\0\0\0", CorruptError),
        (b"\x07\0\0\0\0\0\0\0", CorruptError),
        (b"\x05\0\1\0\0\0\0\0", CorruptError),
        (b"\x01\0\0\0\x31\0\x40\0", LimitError),
        (b"\x02\0\0\0\xff\xff\xff\xff", LimitError),
    ],
)
def test_a_head_that_cannot_be_is_refused(head: bytes, error: type[IntegrityError]) -> None:
    with pytest.raises(error, match="record 12 "):
        read_record(BytesIO(head + bytes(100)), 12)


def replayed(held: Held, source: Source, blob: bytes) -> bool:
    """Whether the target takes a stream for the whole machine; if so, it is the source's."""
    target, stream = Target(held), BytesIO(blob)
    try:
        while (record := read_record(stream, target.reader.records)) is not None:
            if ended := target.reader.take(record):
                assert target.equals(source)
                assert ended.device_state == DEVICE
                return True
    except IntegrityError as error:
        assert re.match(rf"record {target.reader.records}\b|the copy differs", str(error))
    return False


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_flipped_bit_makes_another_machine(world: World, data: st.DataObject) -> None:
    held = Held(world)
    source = moved(held)
    heads_and_bodies = [record.encode() for record in source.records]
    which = data.draw(st.integers(0, len(source.records) - 1))
    blob = bytearray(heads_and_bodies[which])
    bit = data.draw(st.integers(0, 8 * len(blob) - 1))
    blob[bit // 8] ^= 1 << bit % 8
    heads_and_bodies[which] = bytes(blob)
    taken = replayed(held, source, b"".join(heads_and_bodies))
    match source.records[which].kind:
        case RecordKind.PAGES | RecordKind.DEVICE:
            assert not taken
        case RecordKind.ROUND:  # what it was like is told and not proven
            assert taken == (bit >= 8 * 12)
        case RecordKind.END:  # the full digest is for whoever has asked for it
            assert taken == (bit >= 8 * 40)


def test_no_order_but_the_right_one_makes_another_machine(held: Held) -> None:
    source = moved(held)
    blobs = [record.encode() for record in source.records]
    assert replayed(held, source, b"".join(blobs))
    needless = []
    for at in range(len(blobs)):
        without = blobs[:at] + blobs[at + 1 :]
        if replayed(held, source, b"".join(without)):
            needless.append(at)
        for to in range(len(blobs)):
            replayed(held, source, b"".join([*without[:to], blobs[at], *without[to:]]))
            replayed(held, source, b"".join([*blobs[:to], blobs[at], *blobs[to:]]))
    # The only page that it names is sent later; and what the last round was like.
    assert needless == [2, 8]


def test_pages_of_frames_come_once_and_in_order(held: Held) -> None:
    source, target = moved(held), Target(held)
    frames = [record for record in source.records if record.kind is RecordKind.PAGES]
    target.take(frames[:1])
    with pytest.raises(CorruptError, match=r"^record 1 begins with literal 0, not 1"):
        target.take(frames[:1])
    with pytest.raises(CorruptError, match=r"^record 1 begins with literal"):
        target.take(frames[2:3])


def test_a_record_that_was_refused_can_come_again(held: Held) -> None:
    source, target = moved(held), Target(held)
    for record in source.records[:-1]:
        if record.kind is not RecordKind.ROUND:
            flipped = record.body[:-1] + bytes([record.body[-1] ^ 0x80])
            with pytest.raises(IntegrityError):
                target.take([Record(record.kind, flipped)])
        target.take([record])
    assert target.take(source.records[-1:])
    assert target.equals(source)


def test_a_sink_that_fails_leaves_the_page_to_be_loaded(held: Held) -> None:
    """What was refused counts as not loaded: nothing is taken for equal that the machine does not have."""
    source, target = moved(held), Target(held)
    again = Same.of(Space.RAM, np.array([10], np.uint32))
    for record in [*source.records[:2], *(same.encode() for same in again)]:
        target.full = True
        with pytest.raises(OSError, match="no room"):
            target.take([record])
        target.full = False
        target.take([record])
    assert (target.pages[Space.RAM][10] == held.pages[Space.RAM][10]).all()
    assert (target.pages[Space.RAM][11] == source.pages[Space.RAM][11]).all()


def test_the_records_of_another_hand_off_are_not_taken_for_equal(held: Held) -> None:
    target = Target(held, seed=SEED + 1)
    with pytest.raises(CorruptError, match="the copy differs from the machine at the source"):
        target.take(moved(held).records)


def test_what_the_target_holds_must_be_what_the_source_thinks(world: World, held: Held) -> None:
    source = moved(held)
    with Held(world, LAYER_RAM, LAYER_DISK) as layered, pytest.raises(CorruptError, match="copy differs"):
        Target(layered).take(source.records)
    other = Held(world)
    other.known = replace(held.known, base=replace(world.base, identity="ac" * 32))
    with pytest.raises(CorruptError, match="copy differs"):
        Target(other).take(source.records)


def test_a_page_that_the_source_has_not_sent_is_found(held: Held) -> None:
    source = moved(held)
    literals = source.writer.operations[Operation.LITERAL]
    as_held = next(Same.of(Space.RAM, np.array([50], np.uint32))).encode()
    for stray in (as_held, frame([10], [Operation.ZERO], first=literals)):
        with pytest.raises(CorruptError, match="copy differs"):
            Target(held).take([*source.records[:-2], stray, *source.records[-2:]])


def test_another_root_is_refused_and_the_right_one_still_taken(held: Held) -> None:
    source, target = moved(held), Target(held)
    target.take(source.records[:-1])
    end = source.records[-1]
    with pytest.raises(CorruptError, match="the copy differs"):
        target.take([Record(RecordKind.END, bytes(32) + end.body[32:])])
    assert target.take([Record(RecordKind.END, end.body[:32] + b"\x07" * 32)]).full == b"\x07" * 32  # type: ignore[union-attr]


def test_nothing_comes_after_the_end_and_no_page_after_the_devices(held: Held) -> None:
    source, target = moved(held), Target(held)
    target.take(source.records[:-1])
    for record in source.records[:-2]:
        with pytest.raises(CorruptError, match=f"{record.kind.name} and comes after the last round"):
            target.take([record])
    assert target.take(source.records[-1:])
    for record in source.records:
        with pytest.raises(CorruptError, match="comes after the last round"):
            target.take([record])


def test_the_full_digest_is_handed_on(held: Held) -> None:
    source, target = Source(held), Target(held)
    source.round()
    end = source.writer.end_record(DEVICE, b"\x33" * 32)
    ended = target.take([*source.records, *source.writer.device_records(DEVICE), end])
    assert ended and ended.full == b"\x33" * 32


# Pages that are as both ends hold them, after they were something else


def test_a_page_that_was_sent_can_be_named_as_the_same(held: Held) -> None:
    source, target = Source(held), Target(held)
    for number in (10, 11, 12):
        source.change(Space.RAM, number, page(number))
    target.take(source.round())
    target.loaded.clear()
    target.take(same.encode() for same in Same.of(Space.RAM, np.array([9, 10, 12, 13], np.uint32)))
    assert target.loaded == [(Space.RAM, 10), (Space.RAM, 12)]
    expected = held.pages[Space.RAM].copy()
    expected[11] = page(11)
    assert (target.pages[Space.RAM] == expected).all()
    table = DigestTable(MACHINE, SEED)
    numbers = np.arange(9, 14, dtype=np.uint32)
    table.put(Space.RAM, numbers, table.digests(expected[9:14]))
    assert target.take([Record(RecordKind.END, table.root(held.known.identity, b"") + bytes(32))])


def test_many_pages_that_are_the_same_take_several_records() -> None:
    world = World(replace(MACHINE, memory_bytes=40_000 * PAGE_BYTES))
    try:
        held = Held(world)
        source, target = Source(held), Target(held)
        source.touched[Space.RAM] = set(range(40_000))
        records = source.round()
        assert kinds(records) == [RecordKind.SAME] * 3 + [RecordKind.ROUND]
        assert target.take(source.end())
        with pytest.raises(LimitError, match=r"^record 0 names 16385 pages; 16384 are allowed"):
            Target(held).take([Same(Space.RAM, np.array([[0, 16_385]], np.uint32)).encode()])
    finally:
        world.close()


@pytest.mark.parametrize(
    "body",
    [
        "",
        "03000000",
        "03000000 01000000",
        "03000000 01000000 02000000 00",
        "05000000 01000000 02000000",
        "03000100 01000000 02000000",
        "03000000 01000000 00000000",  # an empty run
        "03000000 01000000 02000000 03000000 01000000",  # two that touch
        "03000000 05000000 02000000 01000000 01000000",  # not in order
        "03000000 05000000 02000000 06000000 01000000",  # a page twice
        "03000000 5f000000 02000000",  # beyond RAM
        "04000000 40000000 01000000",  # beyond the disk
        "03000000 ffffffff ffffffff",
    ],
)
def test_runs_that_cannot_be_are_refused(held: Held, body: str) -> None:
    target = Target(held)
    with pytest.raises(CorruptError, match=r"^record 0 "):
        target.take([Record(RecordKind.SAME, bytes.fromhex(body))])
    assert target.reader.records == 0


# Frames as an attacker or a defect would make them


def frame(
    numbers: list[int],
    operations: list[Operation],
    references: list[int] | None = None,
    first: int = 0,
    kind: FrameKind = FrameKind.RAM,
) -> Record:
    """A PAGES record with every digest right."""
    literals = sum(operation >= Operation.LITERAL for operation in operations)
    payload = PagePayload(
        Space(kind),
        first,
        np.array(numbers, np.uint32),
        np.array(operations, np.uint8),
        np.array(references or [], np.uint32),
        noise(literals),
    )
    packed = Packer(1).pack(kind, payload.encode().data, len(numbers), literals)
    return of_frame(RecordKind.PAGES, *packed)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (frame([3], [Operation.XOR]), "holds an XOR"),
        (frame([3, 4, 5], [Operation.LITERAL, Operation.XOR, Operation.ZERO]), "holds an XOR"),
        (frame([4, 3], [Operation.ZERO] * 2), "not in order"),
        (frame([4, 4], [Operation.ZERO] * 2), "not in order"),
        (frame([96], [Operation.ZERO]), "beyond the machine"),
        (frame([64], [Operation.ZERO], kind=FrameKind.DISK), "beyond the machine"),
        (frame([3], [Operation.LITERAL], first=1), "begins with literal 1, not 0"),
        (frame([3], [Operation.EARLIER], [0]), "refers to EARLIER"),
        (frame([3], [Operation.SPAN], [4096]), "refers to SPAN"),
        (frame([3], [Operation.BASE_RAM], [96]), "refers to BASE_RAM"),
        (frame([3], [Operation.BASE_DISK], [64]), "refers to BASE_DISK"),
        (of_frame(RecordKind.PAGES, *Packer(1).pack(FrameKind.DEVICE, b"x")), "frame of kind DEVICE"),
        (of_frame(RecordKind.PAGES, *Packer(1).pack(FrameKind.MAP, b"x")), "frame of kind MAP"),
        (of_frame(RecordKind.DEVICE, *Packer(1).pack(FrameKind.MAP, b"x")), "frame of kind MAP"),
        (replace(frame([3], [Operation.ZERO]), kind=RecordKind.DEVICE), "frame of kind RAM"),
        (Record(RecordKind.PAGES, b""), "has 0 bytes"),
        (Record(RecordKind.DEVICE, bytes(47)), "has 47 bytes"),
        (Record(RecordKind.PAGES, bytes(48)), "unknown kind 0"),
        (Record(RecordKind.ROUND, bytes(19)), "has 19 bytes"),
        (Record(RecordKind.ROUND, bytes(21)), "has 21 bytes"),
        (RoundEnd(2, 0, 0, 0).encode(), "ends round 2, not 1"),
        (RoundEnd(0, 0, 0, 0).encode(), "ends round 0, not 1"),
        (Record(RecordKind.END, bytes(32)), "has 32 bytes"),
    ],
)
def test_a_record_that_breaks_a_rule_is_refused(held: Held, record: Record, message: str) -> None:
    target = Target(held)
    with pytest.raises(CorruptError, match=f"^record 0 .*{message}"):
        target.take([record])
    assert (target.loaded, target.reader.records) == ([], 0)
    assert target.take(moved(held).records)


@pytest.mark.parametrize("raw_size", [4096, (4 << 20) + 1])
def test_a_bomb_is_refused(held: Held, raw_size: int) -> None:
    """A frame that grows to more than it declares, or declares more than a frame may have."""
    _, blob = Packer(19).pack(FrameKind.DEVICE, bytes(64 << 20))
    entry = FrameEntry(FrameKind.DEVICE, len(blob), raw_size, 0, 0, blake3(blob).digest())
    with pytest.raises(IntegrityError, match=r"^record 0 "):
        Target(held).take([of_frame(RecordKind.DEVICE, entry, blob)])


def test_there_is_a_limit_for_device_state(held: Held) -> None:
    source, target = Source(held), Target(held)
    most = noise(DEVICE_BYTES // PAGE_BYTES).tobytes()
    records = source.writer.device_records(most)
    assert target.take(records) is None
    more = source.writer.device_records(b"x")
    with pytest.raises(LimitError, match=f"^record {len(records)} brings more device state"):
        target.take(more)
    ended = target.take([source.writer.end_record(most)])
    assert ended and ended.device_state == most
    with pytest.raises(LimitError, match="the device has"):
        source.writer.device_records(most + b"x")
