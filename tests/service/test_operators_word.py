"""What an operator may say of a hand-off where one end is gone for good, and what becomes of it then."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

import pytest

from cloudlet.control.ownership import RECORD
from cloudlet.keeper.folder import is_kept
from tests.service.conftest import Made
from tests.service.handoff_faults import STEPS, Cell
from tests.service.handoff_world import SOON, World, wait_for, world
from tests.service.two_sites import PeerSite

_STEPS = {step.name: step for step in STEPS}


@pytest.fixture(scope="module")
def two(made: Made, hashed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("word"), made, hashed) as both:
        yield both


@pytest.fixture
def held(two: World) -> Iterator[Cell]:
    """A hand-off whose commit does not come to its target; nothing is left of it afterwards."""
    cell = Cell(two, _STEPS["committed"], 0, random.Random(7))
    cell.hold()
    yield cell
    cell.towards.open()
    for gate in (cell.towards, cell.back):
        gate.mend()
    two.lost()


def resolve(cell: Cell, site: PeerSite, action: str) -> int:
    """Say a word of it; the status of the answer."""
    body = {"resolve": {"action": action}}
    return site.call("POST", f"/v1/handoffs/{cell.view.handoff}/resolve", body).status_code


def wait_state(cell: Cell, site: PeerSite, state: str) -> None:
    path = f"/v1/handoffs/{cell.view.handoff}"
    wait_for(lambda: site.call.get(path)["handoff"]["state"] == state, SOON, f"it does not become {state}")


def part(cell: Cell) -> None:
    """Nothing comes from one site to the other any more, and the source's keeper is gone."""
    for gate in (cell.towards, cell.back):
        gate.cut()
    os.kill(cell.keeper(0), signal.SIGKILL)
    wait_for(lambda: not is_kept(cell.folders[0]), SOON, "the keeper goes on")


def check_nowhere(cell: Cell) -> None:
    """It has failed at the source, and nothing of it is at the target."""
    path = f"/v1/instances/{cell.instance_id}"
    wait_for(lambda: cell.source.call.get(path)["instance"]["state"] == "failed", SOON, "it has not failed")
    wait_for(lambda: cell.target.call("GET", path).status_code == 404, SOON, "it is at the target still")
    wait_for(lambda: cell.world.guests() == [], SOON, "a machine is left")


def test_both_operators_may_end_it_while_the_other_site_is_silent(held: Cell) -> None:
    part(held)
    wait_state(held, held.source, "in_doubt")
    assert resolve(held, held.source, "give_up") == 409, "nothing of it has run at the target"
    assert resolve(held, held.source, "resume_as_of_switch") == 409
    assert resolve(held, held.source, "keep") == 200
    wait_state(held, held.source, "reverted")
    wait_state(held, held.target, "in_doubt")
    assert resolve(held, held.target, "give_back") == 200
    wait_state(held, held.target, "reverted")
    check_nowhere(held)
    assert resolve(held, held.target, "give_back") == 409, "it is decided"


def test_what_was_written_down_and_cannot_be_read_is_decided_by_an_operator(held: Cell) -> None:
    part(held)
    (held.folders[0] / RECORD).write_bytes(b'{"handoff": ')
    held.source.end(signal.SIGKILL)
    held.source.start()
    assert resolve(held, held.source, "keep") == 200
    wait_state(held, held.source, "reverted")
    for gate in (held.towards, held.back):
        gate.mend()
    # The target hears of it, and gives it up by itself.
    wait_state(held, held.target, "reverted")
    check_nowhere(held)


def test_what_was_given_away_is_not_given_back(held: Cell) -> None:
    assert resolve(held, held.target, "give_back") == 409
    held.towards.open()
    wait_state(held, held.target, "completed")
    wait_state(held, held.source, "completed")
    assert resolve(held, held.target, "give_back") == 409


def test_a_peer_that_is_somewhere_else_since_is_asked_there(held: Cell) -> None:
    """Who waits for its answer hears of the new address, and nobody has to decide anything."""
    wait_state(held, held.source, "switching")
    held.towards.cut()
    path = f"/v1/peers/{held.source.peer_id}"
    before = held.source.call.get(path)["peer"]["url"]
    try:
        moved = {"peer": {"url": f"https://127.0.0.1:{held.towards.target[1]}"}}
        assert held.source.call("PATCH", path, moved).status_code == 200
        for site in (held.source, held.target):
            wait_state(held, site, "completed")
        assert held.source.call.get(f"/v1/instances/{held.instance_id}")["instance"]["state"] == "moved"
    finally:
        held.towards.open()
        held.towards.mend()
        assert held.source.call("PATCH", path, {"peer": {"url": before}}).status_code == 200
