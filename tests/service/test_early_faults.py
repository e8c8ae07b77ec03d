"""A sample of the fault matrix of the early switch (``early_faults.py``); the soak has all of it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.cli.conftest import publish
from tests.conftest import KEPT
from tests.service import busy
from tests.service.conftest import Made
from tests.service.early_faults import (
    EARLY_CELLS,
    SERVING,
    EarlyWorld,
    MachineObserver,
    machines_below,
    run_early_cell,
)
from tests.service.handoff_faults import Fault, Step
from tests.service.handoff_world import SOON, Worlds, wait_for

pytestmark = pytest.mark.qemu
SEED = int(os.environ.get("CLOUDLET_FAULTS_SEED", "4"))
COUNT = int(os.environ.get("CLOUDLET_EARLY_FAULTS", "1"))


def sample() -> list[tuple[Step, Fault]]:
    """Some cells while pages are missing, the first of which an operator has to end."""
    serving = [cell for cell in EARLY_CELLS if cell[0] is SERVING]
    shuffled = random.Random(SEED).sample(serving, len(serving))
    return sorted(shuffled, key=lambda cell: cell[1].kills != "target")[:COUNT]


@pytest.fixture(scope="module")
def worlds(quick_base_id: str, hashed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    if os.geteuid() != 0:
        pytest.skip("only root can make a small file system")
    app = publish(quick_base_id, tmp_path_factory.mktemp("busy"), busy.RECIPE, "--no-profile")
    made = Made(KEPT / "cache", app.keys, app.base_id, app.path)
    with Worlds(tmp_path_factory.mktemp("early-faults"), made, hashed, EarlyWorld) as found:
        yield found


@pytest.mark.parametrize(("step", "fault"), sample(), ids=lambda value: value.name.replace(" ", "-"))
def test_one_copy_lives_or_all_say_that_it_is_lost(worlds: Worlds, step: Step, fault: Fault) -> None:
    here = worlds.get()
    try:
        assert run_early_cell(here, step, fault, worlds.at() or 0, random.Random(SEED)) == []
    except BaseException:
        worlds.forget()
        raise


def test_who_watches_sees_two_that_run(worlds: Worlds) -> None:
    here = worlds.get()
    site = here.sites[0]
    first = here.bring_to(0)
    second = site.call.start(site.call.get("/v1/apps?name=hello")["apps"][0])
    busy.begin(second)
    observer = MachineObserver(here.folder)
    site.call.post(f"/v1/instances/{first['id']}/pause")
    for _ in range(10):
        observer.look(machines_below(here.folder))
    assert (observer.ran_twice, observer.looks) == (False, 10)
    site.call.post(f"/v1/instances/{first['id']}/resume")

    def seen() -> bool:
        observer.look(machines_below(here.folder))
        return observer.ran_twice

    wait_for(seen, SOON, "two that run are not seen")
    site.call.done(site.call.delete(f"/v1/instances/{second['id']}"))
