"""A sample of the fault matrix of the hand-off (``handoff_faults.py``); the soak has all of it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.service.conftest import Made
from tests.service.handoff_faults import CELLS, NAMES, Fault, Step, World, run_cell, world

SEED = int(os.environ.get("CLOUDLET_FAULTS_SEED", "19"))
COUNT = int(os.environ.get("CLOUDLET_FAULTS", "12"))


def sample() -> list[tuple[Step, Fault]]:
    """Some cells, of each step at least one."""
    dice = random.Random(SEED)
    shuffled = dice.sample(CELLS, len(CELLS))
    firsts = [next(cell for cell in shuffled if cell[0].name == name) for name in NAMES]
    return (firsts + [cell for cell in shuffled if cell not in firsts])[:COUNT]


class Worlds:
    """The two sites; others where something was not as it had to be."""

    def __init__(self, factory: pytest.TempPathFactory, made: Made, hashed: str) -> None:
        self._factory, self._made, self._hashed = factory, made, hashed
        self._stack = ExitStack()
        self._world: World | None = None

    def get(self) -> World:
        if not self._world:
            folder = self._factory.mktemp("faults")
            self._world = self._stack.enter_context(world(folder, self._made, self._hashed))
        return self._world

    def forget(self) -> None:
        self._world = None
        self._stack.close()


@pytest.fixture(scope="module")
def worlds(made: Made, hashed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    if os.geteuid() != 0:
        pytest.skip("only root can make a small file system")
    found = Worlds(tmp_path_factory, made, hashed)
    yield found
    found.forget()


@pytest.mark.parametrize(("step", "fault"), sample(), ids=lambda value: value.name.replace(" ", "-"))
def test_one_copy_lives_whatever_fails(worlds: Worlds, step: Step, fault: Fault) -> None:
    here = worlds.get()
    dice = random.Random(f"{SEED} {step.name} {fault.name}")
    try:
        assert run_cell(here, step, fault, dice.randrange(2), dice) == []
    except BaseException:
        worlds.forget()
        raise
