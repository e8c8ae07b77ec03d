"""The target's end: records in any order and again, and an end that cannot be written down."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloudlet.control import arrival as module
from cloudlet.control import filling
from cloudlet.control.arrival import Arrival
from cloudlet.control.courier import Courier, PeerState
from cloudlet.control.filling import EarlyArrival, WantedPages
from cloudlet.control.ownership import Ownership, OwnershipFile, Record
from cloudlet.errors import CorruptError, FailedError
from cloudlet.overlay.pages import PageBatch, Space
from cloudlet.overlay.records import Record as Sent
from cloudlet.overlay.records import missing_record
from cloudlet.overlay.rounds import RoundReader
from tests.unit.overlay.moving import SEED, Held, Source
from tests.unit.overlay.test_rounds_early import EarlySource, started
from tests.unit.overlay.world import DEVICE, MACHINE, World, page


class File(OwnershipFile):
    """A record on a disk that may be full."""

    full = False

    def become(self, state: Ownership, **changes: Any) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().become(state, **changes)


class Machine:
    """A machine that is being filled; and itself its instance."""

    def __init__(self) -> None:
        self.loaded: list[bytes] = []
        self.refusals: list[Exception] = []
        self.lacks: list[int] = []
        self.completed = 0
        self.instance = self

    def load(self, device_state: bytes) -> None:
        self.loaded.append(device_state)
        if self.refusals:
            raise self.refusals.pop(0)

    def wait(self, timeout: float) -> bool:
        return False

    def pages(self, batch: PageBatch) -> None:
        pass

    def lack(self, numbers: np.ndarray) -> None:
        self.lacks += numbers.tolist()

    def complete(self) -> None:
        self.completed += 1


@pytest.fixture(scope="module")
def held() -> Iterator[Held]:
    world = World()
    yield Held(world)
    world.close()


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path, Record("handoff", "instance", 3, Ownership.RECEIVING))


@pytest.fixture
def arrival(file: File, machine: Machine, held: Held) -> Arrival:
    return Arrival(file, machine, RoundReader(held.known, SEED, machine.pages))


@pytest.fixture
def early(file: File, machine: Machine, held: Held) -> EarlyArrival:
    wanted = WantedPages(MACHINE)
    return EarlyArrival(file, machine, RoundReader(held.known, SEED, machine.pages), wanted)


def sent(held: Held) -> list[Sent]:
    """The records of a machine of which a page has changed."""
    source = Source(held)
    source.change(Space.RAM, 10, page(1))
    source.round()
    return source.end()


def encoded(records: Sequence[Sent]) -> bytes:
    return b"".join(record.encode() for record in records)


def wait_for(until: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not until():
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_all_that_comes_is_loaded(arrival: Arrival, machine: Machine, held: Held) -> None:
    records = sent(held)
    arrival.records(0, encoded(records))
    assert (arrival.state, arrival.count) == (Ownership.LOADED, len(records))
    assert machine.loaded == [DEVICE]


def test_an_end_that_could_not_be_written_down_is_when_it_comes_again(
    arrival: Arrival, file: File, machine: Machine, held: Held
) -> None:
    records = sent(held)
    last = len(records) - 1
    file.full = True
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            arrival.records(0, encoded(records))
        assert (arrival.state, arrival.count) == (Ownership.RECEIVING, last)
    file.full = False
    arrival.records(last, encoded(records[last:]))
    assert (arrival.state, arrival.count) == (Ownership.LOADED, last + 1)
    assert machine.loaded == [DEVICE], "once"


@pytest.mark.parametrize("refusal", [FailedError("QEMU refused it"), OSError(errno.EIO, "QEMU refused it")])
def test_what_was_refused_at_the_end_stays_refused_for_that_reason(
    arrival: Arrival, file: File, machine: Machine, held: Held, refusal: Exception
) -> None:
    records = sent(held)
    machine.refusals = [refusal]
    file.full = True
    with pytest.raises(OSError, match="No space"):
        arrival.records(0, encoded(records))
    assert arrival.state is Ownership.RECEIVING
    file.full = False
    with pytest.raises(FailedError, match="refused it"):
        arrival.records(0, encoded(records))
    assert arrival.state is Ownership.DROPPED
    assert "refused it" in arrival.reason
    assert machine.loaded == [DEVICE], "once"


def test_no_pages_are_left_for_later_where_that_was_not_agreed(
    arrival: Arrival, machine: Machine, held: Held
) -> None:
    source = started(held)
    source.leave()
    with pytest.raises(CorruptError, match="leaves pages for later, which was not agreed"):
        arrival.records(0, encoded(source.records))
    with pytest.raises(CorruptError, match="not agreed"):
        arrival.records(arrival.count, encoded([missing_record(np.array([3], np.uint32), MACHINE)]))
    assert arrival.state is Ownership.RECEIVING
    assert machine.loaded == []


def test_records_that_come_too_early_are_answered_with_what_has_come(
    arrival: Arrival, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TURN_SECONDS", 0.05)
    records = sent(held)
    arrival.records(1, encoded(records[1:]))
    assert (arrival.state, arrival.count) == (Ownership.RECEIVING, 0)
    arrival.records(0, encoded(records[:1]))
    arrival.records(1, encoded(records[1:]))
    assert arrival.state is Ownership.LOADED


class Link:
    """The way to an arrival, on which the first batch takes its time."""

    def __init__(self, arrival: Arrival) -> None:
        self.came = threading.Event()
        self.answers: list[int] = []
        self._arrival = arrival

    def records(self, first: int, body: bytes) -> PeerState:
        if first == 0:
            self.came.wait(20.0)
        self._arrival.records(first, body)
        if first:
            self.answers.append(self._arrival.count)
        return PeerState(self._arrival.state, self._arrival.count)

    def state(self, wait: float = 0.0) -> PeerState:
        return PeerState(self._arrival.state, self._arrival.count)

    def close(self) -> None:
        pass


def test_what_has_overtaken_what_was_before_it_ends_nothing(
    arrival: Arrival, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TURN_SECONDS", 0.05)
    link = Link(arrival)
    with Courier(link, threading.Event(), patience=20.0) as courier:
        for number, record in enumerate(sent(held)):
            packed: Future[bytes] = Future()
            packed.set_result(record.encode())
            courier.put(packed, 1)
            if number == 0:
                time.sleep(0.1)
        wait_for(lambda: link.answers[:2] == [0, 0])
        link.came.set()
        assert courier.flush().state == Ownership.LOADED


def test_an_early_end_is_written_down_as_soon_as_there_is_room(
    early: EarlyArrival, file: File, machine: Machine, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "_LOOK_SECONDS", 0.01)
    source = started(held)
    source.leave()
    file.full = True
    early.records(0, encoded(source.records))
    wait_for(lambda: machine.loaded == [DEVICE])
    time.sleep(0.1)
    assert early.state is Ownership.RECEIVING
    file.full = False
    wait_for(lambda: early.state is Ownership.LOADED)
    assert machine.lacks == source.left.numbers.tolist()


def test_an_early_one_is_complete_with_its_last_page_only(
    early: EarlyArrival, machine: Machine, held: Held
) -> None:
    source: EarlySource = started(held)
    source.leave()
    early.records(0, encoded(source.records))
    wait_for(lambda: early.state is Ownership.LOADED)
    assert machine.completed == 0
    before = early.count
    for number in source.left.numbers.tolist():
        source.bring(number)
    source.last()
    early.records(before, encoded(source.records[before:]))
    assert machine.completed == 1
    assert not early.takes_records
