"""A machine that stays, or has come, goes on at last, also where it could not be told so at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudlet.control.ownership import Ownership
from cloudlet.control.site import Site
from cloudlet.errors import FailedError
from cloudlet.hypervisor.driver import RunState
from cloudlet.hypervisor.fake.instance import FakeInstance
from cloudlet.settings import Settings
from tests.service.conftest import Made, make
from tests.unit.control.handoff_model import Fault, World


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def two(made: Made, tmp_path: Path) -> Iterator[World]:
    site = Site.open(Settings(made.cache, made.cache / "state", made.keys, hypervisor="fake"))
    base = site.bases.get(made.base_id)
    (tmp_path / "world").mkdir()
    with base.pages() as pages:
        world = World(tmp_path / "world", base.image(), pages, base.index())
        try:
            yield world
        finally:
            world.close()


@pytest.fixture(params=["resume", "hold_connections"])
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine that cannot be told to go on, twice: what it was told."""
    told: list[str] = []
    does = getattr(FakeInstance, request.param)

    def fail_twice(self: FakeInstance, *hold: Any) -> None:
        if hold != (True,):
            told.append(request.param)
            if len(told) <= 2:
                raise FailedError("the monitor does not answer")
        does(self, *hold)

    monkeypatch.setattr(FakeInstance, request.param, fail_twice)
    return told


def goes_on(world: World) -> bool:
    assert world.machine
    return world.machine.state() is RunState.RUNNING and world.count() == 2


def test_one_that_has_come(two: World, failing: list[str]) -> None:
    assert two.count() == 1
    failing.clear()
    outcome = two.hand_off([])
    assert (outcome.departure, outcome.arrival) == (Ownership.COMPLETED, Ownership.RUNNING)
    assert len(failing) == 3
    assert goes_on(two)


def test_one_that_stays(two: World, failing: list[str]) -> None:
    assert two.count() == 1
    failing.clear()
    outcome = two.hand_off([Fault("commit", 1, "target machine killed")])
    assert (outcome.departure, outcome.arrival) == (Ownership.REVERTED, Ownership.DROPPED)
    assert len(failing) == 3
    assert goes_on(two)
