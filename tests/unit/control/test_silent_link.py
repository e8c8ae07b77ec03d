"""A link on which nothing comes any more, and nobody says so, when the machine has been stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudlet.control.courier import PeerState
from cloudlet.control.handoff import Departure
from cloudlet.control.ownership import Ownership
from cloudlet.control.site import Site
from cloudlet.errors import FailedError, UnreachableError
from cloudlet.hypervisor.driver import RunState
from cloudlet.hypervisor.fake.instance import FakeInstance
from cloudlet.settings import Settings
from tests.service.conftest import Made, make
from tests.unit.control import handoff_model
from tests.unit.control.handoff_model import Wire, World

PATIENCE = 1.0
"""Of the model's terms."""


class SilentWire(Wire):
    """Nothing is answered while the source stands still, until it cuts the connections."""

    last: SilentWire
    on_silence: Callable[[], None]

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self.asked: list[str] = []
        """While nothing is answered."""
        self.silent_at = 0.0
        self.on_silence = lambda: None
        self._cut = threading.Event()
        SilentWire.last = self

    def close(self) -> None:
        self._cut.set()

    def _carry(self, message: str, *deliver: Any) -> PeerState:
        record = self._source.record()
        if message == "ask" or not record or record.state is not Ownership.SWITCHING:
            return super()._carry(message, *deliver)
        self.silent_at = self.silent_at or time.monotonic()
        self.asked.append(message)
        self.on_silence()
        self._cut.wait(60.0)
        raise UnreachableError("the connection was ended here")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def two(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(handoff_model, "Wire", SilentWire)
    site = Site.open(Settings(made.cache, made.cache / "state", made.keys, hypervisor="fake"))
    base = site.bases.get(made.base_id)
    (tmp_path / "world").mkdir()
    with base.pages() as pages:
        world = World(tmp_path / "world", base.image(), pages, base.index())
        try:
            yield world
        finally:
            world.close()


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When a machine was told to go on."""
    times: list[float] = []
    does = FakeInstance.resume

    def resume(self: FakeInstance) -> None:
        times.append(time.monotonic())
        does(self)

    monkeypatch.setattr(FakeInstance, "resume", resume)
    return times


def stays(world: World) -> None:
    """Hand it off: it stays, and goes on."""
    assert world.count() == 1
    outcome = world.hand_off([])
    assert (outcome.departure, outcome.arrival) == (Ownership.REVERTED, Ownership.DROPPED), outcome
    assert world.machine
    assert world.machine.state() is RunState.RUNNING
    assert world.count() == 2


def test_the_machine_goes_on_when_it_has_stood_still_for_so_long(two: World, resumed: list[float]) -> None:
    stays(two)
    wire = SilentWire.last
    assert wire.silent_at
    assert resumed[-1] - wire.silent_at < PATIENCE + 3
    assert "drop" not in wire.asked, "who does not answer is not asked before the machine goes on"


@pytest.mark.parametrize("how", ["cancel", "fail"])
def test_nor_is_a_silent_target_asked_where_something_else_ends_it(
    two: World, resumed: list[float], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    departs = World._departure

    def depart(self: World, source: Any, wire: SilentWire, number: int, *, full: bool) -> Departure:
        departure = departs(self, source, wire, number, full=full)
        if how == "cancel":
            wire.on_silence = departure.cancel
        return departure

    if how == "fail":

        def fail(self: Departure, sender: Any) -> None:
            self._stop(sender)
            raise FailedError("the memory cannot be read")

        monkeypatch.setattr(Departure, "_switch", fail)
    monkeypatch.setattr(World, "_departure", depart)
    stays(two)
    assert "drop" not in SilentWire.last.asked
    if how == "cancel":
        assert resumed[-1] - SilentWire.last.silent_at < 3
