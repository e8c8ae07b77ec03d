"""Pages that a target lacks: what it asks for goes first, each once, and the end is the last."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest

from cloudlet.control import serving as module
from cloudlet.control.courier import Courier, PeerState
from cloudlet.control.serving import Serving
from cloudlet.errors import (
    ConflictError,
    CorruptError,
    FailedError,
    NotFoundError,
    RefusedError,
    UnreachableError,
)
from cloudlet.overlay.pages import Numbers
from cloudlet.overlay.rounds import Left

PAGES = 400


class Target:
    """A target that takes records slowly enough to be heard, and asks for what it is told to ask for."""

    def __init__(self) -> None:
        self.taken: list[int | str] = []
        self.asks: list[object] = []
        self.state_now = "filling"
        self.silent = False
        self.refusals: list[Exception] = []
        """What comes of the next records instead."""
        self.held = threading.Event()
        """Cleared: no records are answered."""
        self.held.set()
        self.waits: list[float] = []
        self._count = 0
        self._turn = threading.Condition()

    def records(self, first: int, body: bytes) -> PeerState:
        if self.silent:
            raise UnreachableError("it does not answer")
        if self.refusals:
            raise self.refusals.pop(0)
        self.held.wait(10.0)
        with self._turn:
            self._turn.wait_for(lambda: self._count == first, 10.0)
            for line in body.splitlines():
                self.taken += json.loads(line)
                self._count += 1
            self._turn.notify_all()
        time.sleep(0.002)
        return PeerState(self.state_now, self._count)

    def wanted(self, after: int, wait: float) -> PeerState:
        time.sleep(0.005)
        self.waits.append(wait)
        said, self.asks = self.asks, []
        told = {"wanted": said, "wanted_after": after + len(said)}
        return PeerState(self.state_now, self._count, told=told)

    def state(self, wait: float = 0.0) -> PeerState:
        return PeerState(self.state_now)

    def commit(self, epoch: int) -> PeerState:
        raise AssertionError

    def drop(self) -> PeerState:
        raise AssertionError

    def close(self) -> None:
        self.held.set()


@pytest.fixture
def target() -> Target:
    return Target()


@pytest.fixture
def courier(target: Target) -> Iterator[Courier]:
    stopped = threading.Event()
    with Courier(target, stopped, patience=0.5) as courier:
        yield courier
        stopped.set()


def left(lately: list[int], before: list[int], filled: list[int] | None = None) -> Left:
    alike = np.ones(len(lately), np.intp)
    words = np.array(filled or [1] * len(before), np.intp)
    return Left(np.array(lately, np.uint32), np.array(before, np.uint32), alike, words)


def serving(target: Target, courier: Courier, pages: Left, failing: list[BaseException] = []) -> Serving:  # noqa: B006
    def put(what: list[int | str]) -> None:
        record: Future[bytes] = Future()
        record.set_result(json.dumps(what).encode() + b"\n")
        courier.put(record, 4096 * len(what))

    def bring(numbers: Numbers) -> None:
        assert 0 < numbers.size <= 8
        assert (numbers[1:] > numbers[:-1]).all()
        if failing:
            raise failing.pop(0)
        put(numbers.tolist())

    return Serving(target, courier, pages, bring, lambda: put(["end"]))


def wait_for_end(target: Target) -> None:
    ends = time.monotonic() + 20
    while "end" not in target.taken:
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_each_page_comes_once_and_the_end_is_last(target: Target, courier: Courier) -> None:
    with serving(target, courier, left([5, 3], list(range(10, PAGES)))) as run:
        wait_for_end(target)
        assert (run.missing, run.error) == (0, None)
    assert sorted(target.taken[:-1]) == [3, 5, *range(10, PAGES)]
    assert target.taken[-1] == "end"


def test_what_changed_lately_and_what_is_emptier_goes_first(target: Target, courier: Courier) -> None:
    pages = left([70, 71, 72, 73, 74, 75, 76, 77], list(range(16)), list(range(16, 0, -1)))
    with serving(target, courier, pages):
        wait_for_end(target)
    turn = [*range(70, 78), *range(15, -1, -1)]
    records = [sorted(turn[at : at + 4]) for at in range(0, len(turn), 4)]
    assert target.taken == [*(page for record in records for page in record), "end"]


def test_what_is_waited_for_comes_before_its_turn(target: Target, courier: Courier) -> None:
    target.asks = [PAGES - 1]
    with serving(target, courier, left([], list(range(PAGES)))) as run:
        wait_for_end(target)
        assert run.asked == 1
    place = target.taken.index(PAGES - 1)
    assert place < PAGES // 2
    around = set(range((PAGES - 1) // 16 * 16, PAGES))
    assert around <= set(target.taken[: PAGES // 2 + 32]), "what lies around it, too"


@pytest.mark.parametrize("asks", [[-1, 10**12, 5000], ["x", None, 1.5, [3]], "many"])
def test_what_cannot_be_asked_for_is_passed_over(target: Target, courier: Courier, asks: object) -> None:
    target.asks = asks  # type: ignore[assignment]
    with serving(target, courier, left([], list(range(100)))) as run:
        wait_for_end(target)
        assert run.error is None
    assert target.taken == [*range(100), "end"]


def test_a_target_that_does_not_answer_is_an_error_in_the_end(target: Target, courier: Courier) -> None:
    target.silent = True
    with serving(target, courier, left([], list(range(100)))) as run:
        ends = time.monotonic() + 20
        while not run.error:
            assert time.monotonic() < ends
            time.sleep(0.01)
    assert isinstance(run.error, FailedError)


def test_what_the_target_says_is_heard(target: Target, courier: Courier) -> None:
    target.state_now = "loaded"
    with serving(target, courier, left([], list(range(100)))) as run:
        answer = run.hear(10.0)
        assert answer
        assert answer.state == "loaded"


def troubles_until_end(run: Serving, target: Target) -> set[str]:
    """What it says meanwhile of why it does not get on."""
    seen, ends = set(), time.monotonic() + 20
    while "end" not in target.taken:
        assert time.monotonic() < ends
        seen.add(str(run.trouble or ""))
        time.sleep(0.002)
    return seen - {""}


def wait_until_well(run: Serving) -> None:
    ends = time.monotonic() + 20
    while run.trouble:
        assert time.monotonic() < ends
        time.sleep(0.005)


@pytest.mark.parametrize(
    "refusal",
    [RefusedError("no"), NotFoundError("no"), ConflictError("no"), FailedError("no"), OSError("no"),
     MemoryError("no")],
    ids=lambda refusal: type(refusal).__name__,
)  # fmt: skip
def test_what_is_refused_is_sent_again_once_nobody_can_go_back(
    target: Target, courier: Courier, refusal: Exception
) -> None:
    courier.persist()
    target.refusals = [refusal] * 3
    with serving(target, courier, left([], list(range(100)))) as run:
        assert troubles_until_end(run, target) == {str(refusal)}
        wait_until_well(run)
    assert target.taken == [*range(100), "end"]


def test_what_is_damaged_again_and_again_is_sent_again_too(target: Target, courier: Courier) -> None:
    courier.persist()
    target.refusals = [CorruptError("damaged", hint="")] * 5
    with serving(target, courier, left([], list(range(20)))) as run:
        assert troubles_until_end(run, target) == {"damaged"}
    assert target.taken == [*range(20), "end"]


def test_a_refusal_is_the_end_before_that(target: Target, courier: Courier) -> None:
    target.refusals = [RefusedError("no")]
    with serving(target, courier, left([], list(range(100)))) as run:
        ends = time.monotonic() + 20
        while not run.error:
            assert time.monotonic() < ends
            time.sleep(0.005)
        assert str(run.error) == "no"
    with pytest.raises(RefusedError):
        courier.persist()


@pytest.mark.parametrize("error", [MemoryError("no room"), OSError("no room"), FailedError("no room")])
def test_pages_that_could_not_be_read_are_brought_when_they_can(
    target: Target, courier: Courier, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.05)
    courier.persist()
    with serving(target, courier, left([3], list(range(10, 60))), [error, error]) as run:
        assert troubles_until_end(run, target) == {"no room"}
        wait_until_well(run)
        assert run.missing == 0
    assert sorted(target.taken[:-1]) == [3, *range(10, 60)]
    assert target.taken[-1] == "end"


@pytest.mark.parametrize("error", [MemoryError("no room"), OSError("no room")])
def test_that_they_cannot_be_read_is_told(target: Target, courier: Courier, error: BaseException) -> None:
    with serving(target, courier, left([3], []), [error]) as run:
        ends = time.monotonic() + 20
        while not run.error:
            assert time.monotonic() < ends
            time.sleep(0.005)
        assert run.error is error


def test_a_target_that_asks_for_ever_more_takes_no_memory(target: Target, courier: Courier) -> None:
    courier.patience = 60.0
    target.held.clear()
    with serving(target, courier, left([], list(range(100)))) as run:
        for turn in range(20):
            target.asks = [*range(-5, 100), *range(turn * 10_000, (turn + 1) * 10_000)] * 2
            ends = time.monotonic() + 20
            while target.asks:
                assert time.monotonic() < ends
                time.sleep(0.002)
        assert len(run._wanted) <= 100
        target.held.set()
        wait_for_end(target)
        assert len(run._near) <= 100
    assert sorted(target.taken[:-1]) == list(range(100))


def test_a_target_whose_machine_stands_still_is_asked_more_often(target: Target, courier: Courier) -> None:
    courier.patience = 60.0
    target.held.clear()
    with serving(target, courier, left([], list(range(100)))) as run:
        run.hear(10.0)
        assert set(target.waits) == {2}
        run.hurries = False
        ends = time.monotonic() + 20
        while 10 not in target.waits:
            assert time.monotonic() < ends
            time.sleep(0.005)
        target.held.set()
        wait_for_end(target)
