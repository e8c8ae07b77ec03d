"""The model of ``handoff_model.py``: hypothesis plans what fails, an observer says whether all held."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cloudlet.control.ownership import Ownership
from cloudlet.control.site import Site
from cloudlet.hypervisor.driver import RunState
from cloudlet.settings import Settings
from tests.service.conftest import make
from tests.unit.control.handoff_model import FAULTS, MESSAGES, Fault, World

RUNS = int(os.environ.get("CLOUDLET_MODEL_RUNS", "15"))
PLANS = st.lists(
    st.builds(Fault, st.sampled_from(MESSAGES), st.integers(1, 3), st.sampled_from(FAULTS)), max_size=3
)
KILLS_SOURCE = {"source killed", "source machine killed"}
KILLS_TARGET = {"target killed", "target killed after", "target machine killed"}
PAGES = st.integers(512, 1023)


class HandoffMachine(RuleBasedStateMachine):
    """One machine, two sites."""

    make_world: ClassVar[object]

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.world = self.stack.enter_context(world())
        self.counted = 0
        self.twice = False

    def teardown(self) -> None:
        self.stack.close()

    @precondition(lambda self: self.world.lives())
    @rule()
    def count(self) -> None:
        self.counted += 1
        assert self.world.count() == self.counted

    @precondition(lambda self: self.world.lives())
    @rule(space=st.sampled_from(["ram", "disk"]), page=PAGES, seed=st.integers(0, 9))
    def write(self, space: str, page: int, seed: int) -> None:
        self.world.write(space, page, seed)

    @precondition(lambda self: not self.world.lives())
    @rule()
    def start_again(self) -> None:
        self.world.start()
        self.counted = 0

    @precondition(lambda self: self.world.lives())
    @rule(plan=PLANS, full=st.booleans())
    def hand_off(self, plan: list[Fault], full: bool) -> None:
        outcome = self.world.hand_off(plan, full=full)
        kinds = {fault.kind for fault in outcome.happened}
        self.twice |= outcome.ran_twice
        assert not outcome.ran_twice, outcome
        # One of the two has it, and both know which.
        assert (outcome.departure, outcome.arrival) in (
            (Ownership.COMPLETED, Ownership.RUNNING),
            (Ownership.REVERTED, Ownership.DROPPED),
        ), outcome
        if not kinds & (KILLS_SOURCE | KILLS_TARGET):
            assert self.world.lives(), outcome
        if outcome.departure is Ownership.REVERTED and not kinds & KILLS_SOURCE:
            assert self.world.lives(), outcome
        if outcome.departure is Ownership.COMPLETED and not kinds & KILLS_TARGET:
            assert self.world.lives(), outcome
        if not kinds:
            assert outcome.departure is Ownership.COMPLETED, outcome
        if self.world.lives():
            assert self.world.machine and self.world.machine.state() is RunState.RUNNING, outcome

    @invariant()
    def counts_on(self) -> None:
        assert not self.twice


_SHARED: dict[str, object] = {}


@pytest.fixture(scope="module", autouse=True)
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A base of fake machines for all runs."""
    made = make(tmp_path_factory.mktemp("made"))
    site = Site.open(Settings(made.cache, made.cache / "state", made.keys, hypervisor="fake"))
    found = site.bases.get(made.base_id)
    with found.pages() as pages:
        _SHARED.update(base=found.image(), pages=pages, index=found.index())
        yield


class world:  # noqa: N801 (a context)
    """A world in a folder of its own."""

    def __enter__(self) -> World:
        self._folder = tempfile.TemporaryDirectory()
        self._world = World(
            Path(self._folder.name),
            _SHARED["base"],
            _SHARED["pages"],
            _SHARED["index"],  # type: ignore[arg-type]
        )
        return self._world

    def __exit__(self, *_: object) -> None:
        self._world.close()
        self._folder.cleanup()


def test_one_copy_runs_whatever_fails() -> None:
    settings_ = settings(
        max_examples=RUNS, stateful_step_count=6, deadline=None, print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        # To find a shorter way to a failure takes longer than to understand it: it is a few steps.
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )  # fmt: skip
    run_state_machine_as_test(HandoffMachine, settings=settings_)


def test_nothing_fails() -> None:
    with world() as one:
        for number in range(1, 4):
            one.write("ram", 600 + number, number)
            one.write("disk", 700, number)
            outcome = one.hand_off([], full=True)
            assert outcome.arrival is Ownership.RUNNING, outcome
            assert one.count() == number and one.epoch == number + 1
