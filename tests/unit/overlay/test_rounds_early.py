"""An early switch: pages that come after the end prove nothing but what is said of them, and then all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudlet.errors import CorruptError, LimitError
from cloudlet.overlay.frames import FrameKind, Packer
from cloudlet.overlay.pages import Space
from cloudlet.overlay.records import Record, RecordKind, missing_record, of_frame
from cloudlet.overlay.rounds import Ended, Left

from .moving import Held, Source, Target
from .world import DEVICE, MACHINE, World, noise, page

_changes = st.lists(st.tuples(st.integers(0, 95), st.integers(0, 6)), max_size=30)


class EarlySource(Source):
    """A source that leaves what has changed for later."""

    def __init__(self, held: Held) -> None:
        super().__init__(held, leaves=True)
        self.left = Left.of(())

    def glance(self) -> None:
        numbers = np.array(sorted(self.touched[Space.RAM]), np.uint32)
        self.writer.count(Space.RAM, numbers, self.pages[Space.RAM][numbers])

    def leave(self) -> list[Record]:
        """The last round, to the first END."""
        before = len(self.records)
        disk = np.array(sorted(self.touched[Space.DISK]), np.uint32)
        if disk.size:
            self.writer.look(Space.DISK, disk, self.pages[Space.DISK][disk])
        numbers = np.array(sorted(self.touched[Space.RAM]), np.uint32)
        self.left = Left.of([self.writer.leave(numbers, self.pages[Space.RAM][numbers])])
        self.rounds += 1
        ending = self.writer.end_round(self.rounds)
        self.drain()
        self.records += ending
        if self.left.numbers.size:
            self.records.append(self.writer.missing_record(self.left))
        self.end()
        return self.records[before:]

    def bring(self, *numbers: int) -> list[Record]:
        before = len(self.records)
        pages = np.array(numbers, np.uint32)
        self.writer.bring(pages, self.pages[Space.RAM][pages])
        self.drain()
        return self.records[before:]

    def last(self) -> Record:
        self.records.append(self.writer.end_record(DEVICE))
        return self.records[-1]


def started(held: Held) -> EarlySource:
    """A source of which pages 10 and 11 were sent, and 11 to 13 have changed since."""
    source = EarlySource(held)
    source.change(Space.RAM, 10, page(1))
    source.change(Space.RAM, 11, page(2))
    source.change(Space.DISK, 5, page(3))
    source.round()
    for number in (11, 12, 13):
        source.change(Space.RAM, number, page(20 + number))
    source.change(Space.DISK, 6, page(4))
    return source


@pytest.fixture
def held(world: World) -> Held:
    return Held(world)


def taken(target: Target, records: list[Record]) -> list[Ended]:
    return [ended for record in records if (ended := target.reader.take(record))]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(_changes, min_size=1, max_size=4), late=_changes, order=st.randoms())
def test_the_target_has_all_in_the_end(world: World, rounds: list, late: list, order: object) -> None:
    with Held(world) as held:
        source, target = EarlySource(held), Target(held)
        for changes in rounds:
            for number, seed in changes:
                source.change(Space.RAM, number, noise(1, seed=seed)[0])
            source.round()
        for number, seed in late:
            source.change(Space.RAM, number, noise(1, seed=seed + 50)[0])
        source.leave()
        [first] = taken(target, source.records)
        missing = first.missing.tolist()
        assert missing == source.left.numbers.tolist()
        different = np.flatnonzero((target.pages[Space.RAM] != source.pages[Space.RAM]).any(axis=1))
        assert different.tolist() == missing, "all others are there, and proven"
        if missing:
            order.shuffle(missing)
            for number in missing:
                assert taken(target, source.bring(number)) == []
            [whole] = taken(target, [source.last()])
            assert whole.missing.size == 0
        assert target.equals(source)


def test_what_changed_lately_is_told_from_what_changed_before(held: Held) -> None:
    source = started(held)
    source.glance()
    source.change(Space.RAM, 12, page(99))
    source.change(Space.RAM, 14, page(98))
    source.leave()
    assert source.left.lately.tolist() == [12, 14]
    assert source.left.before.tolist() == [11, 13]
    assert source.left.numbers.tolist() == [11, 12, 13, 14]


def test_what_is_emptier_goes_first_of_what_changed_before(held: Held) -> None:
    source = started(held)
    for number, filled in ((15, 64), (16, 8)):
        row = np.zeros(4096, np.uint8)
        row[:filled] = 7
        source.change(Space.RAM, number, row)
    source.change(Space.RAM, 9, noise(1, seed=78)[0])
    source.glance()
    source.change(Space.RAM, 60, noise(1, seed=77)[0])
    source.leave()
    turn = source.left.in_turn().tolist()
    assert (turn[0], turn[-1]) == (60, 9)
    assert turn.index(16) < turn.index(15)
    assert sorted(turn) == source.left.numbers.tolist()


def test_a_page_that_is_as_the_target_holds_it_is_not_missing(held: Held) -> None:
    source, target = started(held), Target(held)
    source.change(Space.RAM, 20, held.pages[Space.RAM][20])
    source.leave()
    [ended] = taken(target, source.records)
    assert 20 not in ended.missing


def test_the_first_end_proves_what_is_not_missing(held: Held) -> None:
    source, target = started(held), Target(held)
    source.leave()
    others = [record for record in source.records if record.kind is not RecordKind.PAGES]
    with pytest.raises(CorruptError, match="differs from the machine at the source"):
        taken(target, others)


def test_the_second_end_proves_all(held: Held) -> None:
    source, target = started(held), Target(held)
    source.leave()
    taken(target, source.records)
    source.pages[Space.RAM][12][0] ^= 1
    wrong = source.bring(11, 12, 13)
    source.pages[Space.RAM][12][0] ^= 1
    source.writer.bring(np.array([12], np.uint32), source.pages[Space.RAM][12:13])
    taken(target, wrong)
    with pytest.raises(CorruptError, match="differs"):
        target.reader.take(source.last())


def test_it_does_not_end_while_pages_are_missing(held: Held) -> None:
    source, target = started(held), Target(held)
    source.leave()
    taken(target, source.records)
    taken(target, source.bring(11, 13))
    with pytest.raises(CorruptError, match="1 pages have not come"):
        target.reader.take(source.last())


def test_only_missing_pages_come_after_the_end_and_each_once(held: Held) -> None:
    source, target = started(held), Target(held)
    source.leave()
    taken(target, source.records)
    literal = target.reader.records
    for numbers in ((10,), (11, 14)):
        with pytest.raises(CorruptError, match="brings a page that is not missing"):
            taken(target, copies(held, *numbers))
    taken(target, source.bring(11))
    with pytest.raises(CorruptError, match="not missing"):
        taken(target, source.bring(11))
    assert target.reader.records == literal + 1


def copies(held: Held, *numbers: int) -> list[Record]:
    """A record of these pages as another source would send it that begins with the same literal."""
    source = started(held)
    source.leave()
    return source.bring(*numbers)


def test_nothing_of_the_disk_comes_after_the_end(held: Held) -> None:
    source, target = started(held), Target(held)
    source.leave()
    taken(target, source.records)
    disk = np.array([7], np.uint32)
    source.writer.look(Space.DISK, disk, page(60).reshape(1, -1))
    source.writer.end_round(9)
    source.drain()
    with pytest.raises(CorruptError, match="not missing"):
        target.reader.take(source.records[-1])


@pytest.mark.parametrize("kind", [RecordKind.SAME, RecordKind.ROUND, RecordKind.DEVICE, RecordKind.MISSING])
def test_nothing_else_comes_after_the_end(held: Held, kind: RecordKind) -> None:
    source, target = started(held), Target(held)
    source.change(Space.RAM, 30, held.pages[Space.RAM][30])
    source.leave()
    taken(target, source.records)
    [record, *_] = [record for record in source.records if record.kind is kind]
    with pytest.raises(CorruptError, match="comes after the last round"):
        target.reader.take(record)


def test_nothing_comes_after_the_second_end(held: Held) -> None:
    source, target = started(held), Target(held)
    source.leave()
    taken(target, [*source.records])
    taken(target, [*source.bring(11, 12, 13), source.last()])
    for record in source.records[-2:]:
        with pytest.raises(CorruptError, match="comes after"):
            target.reader.take(record)


def test_pages_do_not_follow_what_says_that_they_are_missing(held: Held) -> None:
    source, target = started(held), Target(held)
    source.leave()
    at = [record.kind for record in source.records].index(RecordKind.MISSING)
    taken(target, source.records[: at + 1])
    for record in (source.records[at], source.records[0]):
        with pytest.raises(CorruptError, match="comes after"):
            target.reader.take(record)


def test_the_whole_machine_cannot_be_compared_while_pages_are_missing(held: Held) -> None:
    source, target = started(held), Target(held)
    source.leave()
    full = source.writer.end_record(DEVICE, b"\1" * 32)
    with pytest.raises(CorruptError, match="whole machine of which pages are missing"):
        taken(target, [*source.records[:-1], full])


def bitmap(*pages: int, size: int = MACHINE.ram_pages) -> bytes:
    bits = np.zeros(size, np.bool_)
    bits[list(pages)] = True
    return np.packbits(bits, bitorder="little").tobytes()


@pytest.mark.parametrize(
    "raw",
    [
        bitmap(),
        bitmap(1)[:-1],
        bitmap(1) + b"\0",
        bitmap(MACHINE.ram_pages + 8, size=MACHINE.ram_pages + 16),
    ],
    ids=["none", "short", "long", "beyond"],
)
def test_missing_pages_that_cannot_be_are_refused(held: Held, raw: bytes) -> None:
    record = of_frame(RecordKind.MISSING, *Packer(1).pack(FrameKind.MAP, raw))
    with pytest.raises(CorruptError, match="record 0 names missing pages"):
        Target(held).reader.take(record)


def test_a_list_of_missing_pages_that_was_changed_is_found(held: Held) -> None:
    record = missing_record(np.array([3, 90], np.uint32), MACHINE)
    for at in range(len(record.body)):
        damaged = bytearray(record.body)
        damaged[at] ^= 0x10
        with pytest.raises((CorruptError, LimitError)):
            Target(held).reader.take(Record(RecordKind.MISSING, bytes(damaged)))
