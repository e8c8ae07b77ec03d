"""The source's end while it waits: for a target that loads, and for one that lacks pages."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloudlet.control import handoff as module
from cloudlet.control.courier import PeerState
from cloudlet.control.handoff import Departure, Progress
from cloudlet.control.ownership import Ownership, OwnershipFile, Record
from cloudlet.control.pace import Terms
from cloudlet.control.sending import Parcel
from cloudlet.errors import FailedError, RefusedError, UnreachableError


class Standing:
    """A machine that stands still."""

    def wait(self, timeout: float) -> bool:
        return False


class Serving:
    """Pages that are brought, and what the target says meanwhile."""

    def __init__(self, *says: str | None) -> None:
        self.says = list(says)
        self.asked, self.missing = 0, 3
        self.error: BaseException | None = None
        self.trouble: BaseException | None = None

    def hear(self, timeout: float) -> PeerState | None:
        time.sleep(timeout)
        said = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        return PeerState(said) if said else None


class Courier:
    heard = float("-inf")


@pytest.fixture
def told() -> list[Progress]:
    return []


@pytest.fixture
def departure_in(tmp_path: Path, told: list[Progress]) -> Callable[[Ownership], Departure]:
    def make(state: Ownership) -> Departure:
        file = OwnershipFile(tmp_path, Record("handoff", "instance", 3, state, early=True))
        machine: Any = Standing()
        parcel = Parcel(machine, machine, machine, 0, with_layer=False)
        return Departure(file, machine, Terms(), parcel, told.append)

    return make


def serve(departure: Departure, serving: Serving) -> None:
    departure._serving = serving
    departure.conclude()


def test_what_keeps_the_pages_up_is_told(
    departure_in: Callable[[Ownership], Departure], told: list[Progress]
) -> None:
    serving = Serving("filling", "filling", "filling", "running")
    serving.trouble = RefusedError("the peer says: it is another's")
    serve(departure_in(Ownership.SERVING), serving)
    shown = [progress for progress in told if progress.state is Ownership.SERVING]
    assert shown[-1].error == "the peer says: it is another's"
    assert not shown[-1].in_doubt, "they are sent again"
    assert told[-1].state is Ownership.COMPLETED


@pytest.mark.parametrize("trouble", [MemoryError(), OSError(12, "Cannot allocate memory")])
def test_what_this_end_lacks_is_told_too(
    departure_in: Callable[[Ownership], Departure], told: list[Progress], trouble: BaseException
) -> None:
    serving = Serving("filling", "filling", "filling", "running")
    serving.trouble = trouble
    serve(departure_in(Ownership.SERVING), serving)
    assert any("memory" in progress.error and "defect" not in progress.error for progress in told)


def test_a_target_that_knew_nothing_for_a_moment_is_believed_again(
    departure_in: Callable[[Ownership], Departure], told: list[Progress]
) -> None:
    says = ("unknown", "unknown", "unknown", "filling", "filling", "filling", "running")
    serve(departure_in(Ownership.SERVING), Serving(*says))
    shown = [(progress.error, progress.in_doubt) for progress in told if progress.state is Ownership.SERVING]
    assert ("it is gone at the target", True) in shown
    assert shown[-1] == ("", False)


def test_a_target_that_falls_silent_while_it_loads_is_not_waited_for(
    departure_in: Callable[[Ownership], Departure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STANDING_SECONDS", 0.3)
    departure, courier, began = departure_in(Ownership.SWITCHING), Courier(), time.monotonic()
    with pytest.raises(FailedError, match="does not answer") as caught:
        departure._loaded(Serving("receiving", "receiving", None), courier)
    assert isinstance(caught.value.__cause__, UnreachableError)
    assert courier.heard > began
    assert time.monotonic() - began < 5


def test_a_target_that_loads_for_ever_is_not_waited_for(
    departure_in: Callable[[Ownership], Departure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOADING_SECONDS", 0.6)
    departure = departure_in(Ownership.SWITCHING)
    with pytest.raises(FailedError, match="has not loaded the machine in") as caught:
        departure._loaded(Serving("receiving"), Courier())
    assert caught.value.__cause__ is None, "it answers: it is told to give the copy up"


def test_a_target_that_has_loaded_is_heard(departure_in: Callable[[Ownership], Departure]) -> None:
    departure = departure_in(Ownership.SWITCHING)
    assert departure._loaded(Serving("receiving", None, "loaded"), Courier()).state == "loaded"
