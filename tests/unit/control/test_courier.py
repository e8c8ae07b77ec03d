"""Records on their way: what is overtaken, refused or lost comes again, and silence is not waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from cloudlet.control.courier import Courier, PeerState
from cloudlet.errors import ConflictError, FailedError, UnreachableError

PATIENCE = 1.0


class Target:
    """A peer that counts lines as records, and at which a test decides what becomes of them."""

    def __init__(self) -> None:
        self.count = 0
        self.calls: list[int] = []
        self.says: Callable[[int], PeerState | None] = lambda _: None
        """What it answers to records from a number on, which are not loaded then; None: they are."""
        self.asked = 0
        self.knows = True
        """Whether it says what it is."""
        self.cut = threading.Event()
        self._lock = threading.Lock()

    def records(self, first: int, body: bytes) -> PeerState:
        with self._lock:
            self.calls.append(first)
        if said := self.says(first):
            return said
        with self._lock:
            if self.count >= first:
                self.count = max(self.count, first + len(body.splitlines()))
            return PeerState("receiving", self.count)

    def state(self, wait: float = 0.0) -> PeerState:
        self.asked += 1
        if not self.knows:
            self.hang()
        return PeerState("receiving", self.count)

    def hang(self) -> None:
        """Answer nothing."""
        self.cut.wait(60.0)
        raise UnreachableError("the connection was ended here")

    def close(self) -> None:
        self.cut.set()

    def commit(self, epoch: int) -> PeerState:
        raise AssertionError

    def drop(self) -> PeerState:
        raise AssertionError

    def wanted(self, after: int, wait: float) -> PeerState:
        raise AssertionError


@pytest.fixture
def target() -> Target:
    return Target()


@pytest.fixture
def stopped() -> threading.Event:
    return threading.Event()


@pytest.fixture
def courier(target: Target, stopped: threading.Event) -> Courier:
    return Courier(target, stopped, patience=PATIENCE)


@pytest.fixture
def clock() -> Iterator[Callable[[], float]]:
    """Seconds since the test began."""
    began = time.monotonic()
    yield lambda: time.monotonic() - began


def put(courier: Courier) -> None:
    record: Future[bytes] = Future()
    record.set_result(b"a record\n")
    courier.put(record, 9)


def wait_for(until: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not until():
        assert time.monotonic() < ends
        time.sleep(0.005)


def two_batches(courier: Courier, target: Target) -> None:
    """Have two batches on their way, of one record each."""
    put(courier)
    wait_for(lambda: target.calls == [0])
    put(courier)
    wait_for(lambda: 1 in target.calls)


def test_a_batch_that_has_overtaken_the_one_before_it_is_sent_again(target: Target, courier: Courier) -> None:
    came = threading.Event()

    def say(first: int) -> None:
        if first == 0:
            came.wait(20.0)

    target.says = say
    courier.patience = 20.0
    with courier:
        two_batches(courier, target)
        time.sleep(1.0)
        assert 2 <= target.calls.count(1) <= 6, "again and again, and not all the time"
        came.set()
        assert courier.flush().records == 2
    assert target.calls.count(0) == 1


def test_a_batch_that_was_loaded_already_is_done(target: Target, courier: Courier) -> None:
    lost = [UnreachableError("the answer was lost")]

    def say(first: int) -> PeerState | None:
        if first == 1 and lost:
            target.count = 2
            raise lost.pop()
        return None

    target.says = say
    with courier:
        two_batches(courier, target)
        assert courier.flush().records == 2
    assert target.calls == [0, 1, 1]


def test_a_peer_that_answers_and_takes_nothing_is_given_up(
    target: Target, courier: Courier, clock: Callable[[], float]
) -> None:
    target.says = lambda _: PeerState("receiving", 0)
    with pytest.raises(FailedError, match="has 0 records, and takes no more"), courier:
        put(courier)
        courier.flush()
    assert PATIENCE < clock() < PATIENCE + 3
    assert len(target.calls) < 10


def test_a_silent_peer_holds_up_nobody_for_longer_than_patience(
    target: Target, courier: Courier, clock: Callable[[], float]
) -> None:
    target.knows, target.says = False, lambda _: target.hang()
    with pytest.raises(FailedError, match="does not answer") as caught, courier:
        two_batches(courier, target)
        courier.flush()
    assert isinstance(caught.value.__cause__, UnreachableError)
    assert clock() < PATIENCE + 3
    assert target.cut.is_set()
    assert courier.heard < 0


def test_a_peer_that_loads_is_waited_for(target: Target, courier: Courier) -> None:
    loaded = threading.Event()

    def say(first: int) -> None:
        loaded.wait(20.0)

    target.says = say
    with courier:
        put(courier)
        threading.Timer(3 * PATIENCE, loaded.set).start()
        assert courier.flush().records == 1
    assert target.asked
    assert not target.cut.is_set()


def test_a_peer_that_answers_soon_is_asked_nothing_else(target: Target, courier: Courier) -> None:
    with courier:
        for _ in range(20):
            put(courier)
            courier.flush()
        time.sleep(PATIENCE)
        put(courier)
        courier.flush()
    assert target.asked == 0


def test_who_stops_it_does_not_wait_for_answers(
    target: Target, courier: Courier, stopped: threading.Event, clock: Callable[[], float]
) -> None:
    courier.patience = 60.0
    target.says = lambda _: target.hang()
    with pytest.raises(FailedError, match="cancelled"), courier:
        two_batches(courier, target)
        stopped.set()
        courier.flush()
    assert clock() < 3
    assert target.cut.is_set()


def test_who_fails_does_not_wait_for_answers(
    target: Target, courier: Courier, clock: Callable[[], float]
) -> None:
    courier.patience = 60.0
    target.says = lambda _: target.hang()
    with pytest.raises(OSError, match="no room"), courier:
        two_batches(courier, target)
        raise OSError("no room")
    assert clock() < 3


def test_one_that_cannot_be_cut_is_not_waited_for(
    target: Target, courier: Courier, stopped: threading.Event, clock: Callable[[], float]
) -> None:
    """It is still connecting."""
    connected = threading.Event()
    target.says = lambda _: connected.wait(20.0) and None
    try:
        with courier:
            two_batches(courier, target)
            stopped.set()
        assert clock() < 5
    finally:
        connected.set()


def test_one_that_persists_gives_up_for_nothing(target: Target, courier: Courier) -> None:
    refusals = [ConflictError("not now")] * 4

    def say(first: int) -> None:
        if refusals:
            raise refusals.pop()

    target.says = say
    with courier:
        courier.persist()
        put(courier)
        wait_for(lambda: courier.trouble is not None)
        assert str(courier.trouble) == "not now"
        assert courier.flush().records == 1
        assert courier.trouble is None


def test_one_that_has_given_up_cannot_persist(target: Target, courier: Courier) -> None:
    def say(first: int) -> None:
        raise ConflictError("not now")

    target.says = say
    with courier:
        put(courier)
        with pytest.raises(ConflictError):
            courier.flush()
        with pytest.raises(ConflictError):
            courier.persist()
        assert not courier.persists
