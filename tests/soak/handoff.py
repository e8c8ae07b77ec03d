"""The fault matrix of the hand-off, all of it and both ways, and its model in large numbers.

The matrix (``tests/service/handoff_faults.py``) is on the fake driver, with real processes; the
model (``tests/unit/control/handoff_model.py``) plans faults message by message.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import requests

from cloudlet.api.identity import hash_of
from tests.service.conftest import PASSWORD, make
from tests.service.handoff_faults import CELLS, FAULTS, STEPS, Fault, Step, run_cell
from tests.service.handoff_world import Worlds

if TYPE_CHECKING:
    from tests.soak.__main__ import Soak

MODEL_RUNS = 2000
_ROOT = Path(__file__).parents[2]
_MODEL = "tests/unit/control/test_handoff_model.py"

Way = tuple[Step, Fault, int]
"""A cell of the matrix, and which of the two sites is the source."""


def fault_matrix(soak: Soak) -> None:
    """Each step with each fault, from either site to the other; a row for each step."""
    with tempfile.TemporaryDirectory(prefix="cloudlet-soak-handoff-") as temporary:
        folder = Path(temporary)
        with Worlds(folder / "worlds", make(folder / "made"), hash_of(PASSWORD)) as worlds:
            for step in STEPS:
                _every_fault(soak, worlds, step)


def _every_fault(soak: Soak, worlds: Worlds, step: Step) -> None:
    dice = soak.dice(f"handoff {step.name}")
    ways = [(one, fault, source) for one, fault in CELLS for source in (0, 1) if one is step]
    dice.shuffle(ways)

    def tries(count: int) -> Iterator[str]:
        yield from _in_turn(worlds, ways[:count], dice)

    soak.row(
        f"hand-off at `{step.name}`: {len(ways) // 2} of {len(FAULTS)} faults, both ways",
        "one copy, none lost, both sites agree", len(ways), tries,
    )  # fmt: skip


def model(soak: Soak) -> None:
    """What fails is planned message by message, by hypothesis."""

    def tries(count: int) -> Iterator[str]:
        seed = soak.dice("handoff model").randrange(1 << 32)
        command = [sys.executable, "-m", "pytest", "-q", "--hypothesis-seed", str(seed), _MODEL]
        environment = {**os.environ, "CLOUDLET_MODEL_RUNS": str(count)}
        done = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, check=False, env=environment
        )
        if done.returncode:
            yield f"seed {seed}: {done.stdout[-3000:]}"

    soak.row("hand-offs of the model, up to three faults in each", "one copy, none lost", MODEL_RUNS, tries)


def _in_turn(worlds: Worlds, ways: list[Way], dice: random.Random) -> Iterator[str]:
    """Play cells; of those that are left the next is one from where the instance is, if there is any."""
    left = list(ways)
    while left:
        step, fault, source = next((way for way in left if way[2] == worlds.at()), left[0])
        left.remove((step, fault, source))
        name = f"{fault.name} at {step.name}, from site {'ab'[source]}"
        try:
            problems = run_cell(worlds.get(), step, fault, source, dice)
        except (AssertionError, OSError, requests.RequestException) as error:
            problems = [repr(error)]
        yield from (f"{name}: {problem}" for problem in problems)
        if problems:
            try:
                worlds.forget()
            except AssertionError as error:
                yield f"{name}: what was left could not be ended: {error}"
