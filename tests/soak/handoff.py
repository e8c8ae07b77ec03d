"""The fault matrix of the hand-off, all of it and both ways, and its model in large numbers.

The matrix (``tests/service/handoff_faults.py``) is on the fake driver, with real processes; that of the early
switch (``tests/service/early_faults.py``) has real machines, too; the
model (``tests/unit/control/handoff_model.py``) plans faults message by message.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import requests

from cloudlet.api.identity import hash_of
from tests.cli.conftest import write_recipe
from tests.service import busy
from tests.service.conftest import PASSWORD, Made, make
from tests.service.early_faults import EARLY_CELLS, EARLY_STEPS, EarlyWorld, run_early_cell
from tests.service.handoff_faults import CELLS, FAULTS, STEPS, Fault, Step, run_cell
from tests.service.handoff_world import World, Worlds

if TYPE_CHECKING:
    from tests.soak.__main__ import Soak

MODEL_RUNS = 2000
_BATCH = 50
"""Runs of one process; as many run side by side as there are processors."""
_ROOT = Path(__file__).parents[2]
_MODEL = "tests/unit/control/test_handoff_model.py"

Way = tuple[Step, Fault, int | None]
"""A cell of the matrix, and which of the two sites is the source; None: where the instance is."""
Run = Callable[[World, Step, Fault, int, random.Random], list[str]]
"""What plays a cell; what was not as it has to be."""


def fault_matrix(soak: Soak) -> None:
    """Each step with each fault, from either site to the other; a row for each step."""
    with tempfile.TemporaryDirectory(prefix="cloudlet-soak-handoff-") as temporary:
        folder = Path(temporary)
        with Worlds(folder / "worlds", make(folder / "made"), hash_of(PASSWORD)) as worlds:
            for step in STEPS:
                ways = [(one, fault, source) for one, fault in CELLS for source in (0, 1) if one is step]
                name = f"hand-off at `{step.name}`: {len(ways) // 2} of {len(FAULTS)} faults, both ways"
                _every_fault(soak, worlds, name, "one copy, none lost, both sites agree", ways, run_cell)


def early_fault_matrix(soak: Soak) -> None:
    """Each step of an early switch with each fault, from wherever the instance is; a row for each step."""
    with tempfile.TemporaryDirectory(prefix="cloudlet-soak-early-") as temporary:
        folder = Path(temporary)
        overlay, recipe = folder / "busy.overlay", write_recipe(folder / "recipe", busy.RECIPE)
        command = ["overlay", "create", soak.base_id, "--recipe", recipe, "-o", overlay, "--no-profile"]
        assert soak.cloudlet("-q", *command).status == 0
        made = Made(soak.settings.cache_dir, soak.settings.keys_dir, soak.base_id, overlay)
        with Worlds(folder / "worlds", made, hash_of(PASSWORD), EarlyWorld) as worlds:
            for step in EARLY_STEPS:
                ways = [(one, fault, None) for one, fault in EARLY_CELLS if one is step]
                name = f"early switch at `{step.name}`: {len(ways)} of {len(FAULTS)} faults"
                expected = "one copy, lost only where the protocol says so, both sites agree"
                _every_fault(soak, worlds, name, expected, ways, run_early_cell)


def _every_fault(soak: Soak, worlds: Worlds, name: str, expected: str, ways: list[Way], run: Run) -> None:
    dice = soak.dice(f"handoff {name}")
    dice.shuffle(ways)

    def tries(count: int) -> Iterator[str]:
        yield from _in_turn(worlds, ways[:count], dice, run)

    soak.row(name, expected, len(ways), tries)


def model(soak: Soak) -> None:
    """What fails is planned message by message, by hypothesis."""

    def tries(count: int) -> Iterator[str]:
        dice = soak.dice("handoff model")
        batches = [min(_BATCH, count - at) for at in range(0, count, _BATCH)]
        seeds = [dice.randrange(1 << 32) for _ in batches]
        with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
            yield from filter(None, workers.map(_model_runs, batches, seeds))

    soak.row("hand-offs of the model, up to three faults in each", "one copy, none lost", MODEL_RUNS, tries)


def _model_runs(count: int, seed: int) -> str:
    """So many runs of the model; what was not as it has to be."""
    options = ["-q", "-p", "no:cacheprovider", "--timeout", "0", "--hypothesis-seed", str(seed)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, _MODEL], cwd=_ROOT, capture_output=True, text=True,
        check=False, env={**os.environ, "CLOUDLET_MODEL_RUNS": str(count)},
    )  # fmt: skip
    return f"seed {seed}: {done.stdout[-3000:]}" if done.returncode else ""


def _in_turn(worlds: Worlds, ways: list[Way], dice: random.Random, run: Run) -> Iterator[str]:
    """Play cells; of those that are left the next is one from where the instance is, if there is any."""
    left = list(ways)
    while left:
        chosen = next((way for way in left if way[2] in (None, worlds.at())), left[0])
        left.remove(chosen)
        step, fault, which = chosen
        source = which if which is not None else worlds.at() or 0
        name = f"{fault.name} at {step.name}, from site {'ab'[source]}"
        try:
            problems = run(worlds.get(), step, fault, source, dice)
        except (AssertionError, OSError, requests.RequestException) as error:
            problems = [repr(error)]
        yield from (f"{name}: {problem}" for problem in problems)
        if problems:
            try:
                worlds.forget()
            except AssertionError as error:
                yield f"{name}: what was left could not be ended: {error}"
