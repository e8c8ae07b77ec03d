"""A sample of the fault matrix of the hand-off (``handoff_faults.py``); the soak has all of it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cloudlet.control.site import Site
from cloudlet.hypervisor.driver import Instance
from cloudlet.hypervisor.fake.driver import FakeHypervisor
from cloudlet.model import PublishedPort
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import PageSource, runs_of
from cloudlet.settings import Settings
from tests.service.conftest import Made
from tests.service.handoff_faults import CELLS, NAMES, Fault, Step, run_cell
from tests.service.handoff_world import Worlds
from tests.service.watching import Observer, User, guests_below

SEED = int(os.environ.get("CLOUDLET_FAULTS_SEED", "4"))
COUNT = int(os.environ.get("CLOUDLET_FAULTS", "4"))

FOUND = (("preparing", "target's clock ahead"), ("running", "disk full at source"))
"""Cells of what was wrong once."""


def sample() -> list[tuple[Step, Fault]]:
    """Some cells, of each step at least one."""
    dice = random.Random(SEED)
    shuffled = dice.sample(CELLS, len(CELLS))
    firsts = [next(cell for cell in shuffled if cell[0].name == name) for name in NAMES]
    found = [cell for cell in CELLS if (cell[0].name, cell[1].name) in FOUND]
    chosen = dict.fromkeys((cell[0].name, cell[1].name) for cell in (*found, *firsts, *shuffled))
    return [cell for cell in CELLS if (cell[0].name, cell[1].name) in list(chosen)[:COUNT]]


@pytest.fixture(scope="module")
def worlds(made: Made, hashed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    if os.geteuid() != 0:
        pytest.skip("only root can make a small file system")
    with Worlds(tmp_path_factory.mktemp("faults"), made, hashed) as found:
        yield found


@contextmanager
def machines(folder: Path, made: Made, count: int) -> Iterator[list[Instance]]:
    """So many fake machines of one base, below a folder; they run."""
    site = Site.open(Settings(made.cache, folder / "state", made.keys, hypervisor="fake"))
    base = site.bases.get(made.base_id).image()
    nothing = runs_of(PageSource.empty().numbers)
    with ExitStack() as stack:
        found = []
        for number in range(count):
            place = folder / str(number)
            hypervisor = FakeHypervisor(Settings(place, place, place, hypervisor="fake"))
            incoming = hypervisor.resume(base, [PublishedPort(8080)])
            stack.callback(incoming.abort)
            incoming.begin(PageMap(nothing, nothing))
            incoming.finish(base.device_state.read_bytes())
            found.append(incoming.instance)
        yield found


def test_who_watches_sees_two_that_run(made: Made, tmp_path: Path) -> None:
    with machines(tmp_path, made, 2) as (first, second):
        guests = guests_below(tmp_path)
        assert {guest.folder for guest in guests} == {first.directory, second.directory}
        assert guests_below(tmp_path / "0") == [guest for guest in guests if guest.folder == first.directory]
        second.pause()
        observer = Observer(tmp_path, guests_below)
        observer.look(guests)
        assert not observer.ran_twice
        second.resume()
        observer.look(guests)
        assert observer.ran_twice


def test_a_user_notices_a_copy_and_what_was_lost(made: Made, tmp_path: Path) -> None:
    with machines(tmp_path, made, 1):
        (guest,) = guests_below(tmp_path)
        user = User(tmp_path)
        user.begin()
        assert user.counts_on(guest)
        assert (user.problems, user.verify(guest)) == ([], [])
        (space, page), _ = user.written.popitem()
        user.written[space, page] = -1
        assert user.verify(guest) == [f"page {page} of the {space} is not as it was written"]
        user.counted += 3
        user.counts_on(guest)
        assert "the guest counted" in user.problems[0]


@pytest.mark.parametrize(("step", "fault"), sample(), ids=lambda value: value.name.replace(" ", "-"))
def test_one_copy_lives_whatever_fails(worlds: Worlds, step: Step, fault: Fault) -> None:
    here = worlds.get()
    dice = random.Random(f"{SEED} {step.name} {fault.name}")
    try:
        assert run_cell(here, step, fault, dice.randrange(2), dice) == []
    except BaseException:
        worlds.forget()
        raise
