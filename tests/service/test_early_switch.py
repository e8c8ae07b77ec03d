"""The early switch between two sites that are served: a guest changes more memory than the link carries."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cloudlet.control.ownership import Ownership, read_record
from cloudlet.hypervisor.records import Record, records
from cloudlet.hypervisor.records import read_record as read_machine
from cloudlet.keeper.control import read_status
from tests.cli.conftest import Hello, publish
from tests.conftest import KEPT
from tests.service.busy import RECIPE, TERMS, TURNS, begin, cold, turn
from tests.service.conftest import Made
from tests.service.two_sites import PeerSite, two_sites

pytestmark = pytest.mark.qemu

PATIENCE = 25


@pytest.fixture(scope="module")
def busy(quick_base_id: str, tmp_path_factory: pytest.TempPathFactory) -> Hello:
    return publish(quick_base_id, tmp_path_factory.mktemp("busy"), RECIPE, "--no-profile")


@pytest.fixture(scope="module")
def sites(
    busy: Hello, hashed: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PeerSite, PeerSite]]:
    made = Made(KEPT / "cache", busy.keys, busy.base_id, busy.path)
    machine = {"hypervisor": "qemu", "accelerator": "tcg", "cache_dir": KEPT / "cache"}
    peers = {"patience_seconds": PATIENCE, "grace_seconds": 2}
    folder = tmp_path_factory.mktemp("sites")
    with two_sites(folder, made, hashed, DEFAULT=machine, peers=peers) as both:
        for site in both:
            site.call.publish(busy.path, name="busy")
        yield both


class Moving:
    """One busy instance on its way, with an early switch."""

    def __init__(self, here: PeerSite, there: PeerSite, **terms: Any) -> None:
        self.here, self.there = here, there
        app = here.call.get("/v1/apps?name=busy")["apps"][0]
        self.instance = here.call.start(app)
        self.id = self.instance["id"]
        self.cold = cold(self.instance)
        begin(self.instance)
        wait(lambda: turn(self.instance) > TURNS)
        wanted = {"instance_id": self.id, "peer_id": here.peer_id, **TERMS, **terms}
        self.operation = here.call.post("/v1/handoffs", {"handoff": wanted})["operation"]
        self.handoff = self.operation["resources"]["handoff"]

    def row(self, site: PeerSite) -> dict[str, Any]:
        handoff: dict[str, Any] = site.call.get(f"/v1/handoffs/{self.handoff}")["handoff"]
        return handoff

    def decided(self, site: PeerSite) -> Ownership | None:
        record = read_record(site.settings.keepers_dir / self.id)
        return record.state if record and record.handoff == self.handoff else None

    def wait_serving(self) -> None:
        wait(lambda: self.decided(self.here) is Ownership.SERVING)

    def wait_state(self, site: PeerSite, state: str) -> None:
        wait(lambda: self.row(site)["state"] == state)

    def check_goes_on(self, site: PeerSite, epoch: int) -> None:
        """It runs there, with all its memory."""
        instance = site.call.instance(self.id)
        assert (instance["state"], instance["epoch"]) == ("active", epoch)
        before = turn(instance)
        assert before > TURNS
        wait(lambda: turn(instance) > before)
        assert cold(instance) == self.cold

    def delete(self, site: PeerSite) -> None:
        site.call.done(site.call.delete(f"/v1/instances/{self.id}"))


def wait(until: Callable[[], object], seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < ends, "it does not come to that"
        time.sleep(0.02)


@contextmanager
def writing_nothing_else(site: PeerSite) -> Iterator[None]:
    """Keep the site from writing into its database, as a slow disk would."""
    with closing(sqlite3.connect(site.settings.state_dir / "site.sqlite", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield


def record_of(site: PeerSite, instance_id: str) -> Record:
    """What the hypervisor says of an instance's machine."""
    status = read_status(site.settings.keepers_dir / instance_id)
    assert status
    record = read_machine(Path(status.folder))
    assert record
    return record


def keeper_of(site: PeerSite, instance_id: str) -> int:
    owner = record_of(site, instance_id).owner
    assert owner
    return owner.pid


def machine_of(site: PeerSite, instance_id: str) -> int:
    machine = record_of(site, instance_id).machine
    assert machine
    return machine.pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_it_goes_on_there_and_its_memory_follows(sites: tuple[PeerSite, PeerSite]) -> None:
    here, there = sites
    moving = Moving(here, there, bandwidth_mbit=12)
    moving.wait_serving()
    wait(lambda: there.call.instance(moving.id)["state"] == "active")
    wait(lambda: (moving.row(here)["forecast"] or {}).get("can_be_lost"))
    assert moving.row(here)["state"] == moving.row(there)["state"] == "serving"
    assert turn(moving.instance) > TURNS, "the old address leads there"
    onward = {"instance_id": moving.id, "peer_id": there.peer_id}
    ended = there.call.ended(there.call.post("/v1/handoffs", {"handoff": onward})["operation"])
    assert ended["state"] == "failed", "it is not whole yet"
    here.call.done({"operation": moving.operation})
    row = moving.row(here)
    assert (row["state"], moving.row(there)["state"]) == ("completed", "completed")
    statistics = row["statistics"]
    assert statistics["early"]
    assert statistics["missing_pages"] > 1000
    assert statistics["serving_seconds"] > statistics["pause_seconds"]
    # The first round alone takes longer than the deadline: what it had not sent went over after the switch.
    assert statistics["rounds"] == 1
    assert statistics["seconds"] < statistics["serving_seconds"]
    assert here.call.instance(moving.id)["state"] == "moved"
    moving.check_goes_on(there, epoch=2)
    # It is a machine like any other now: it can be handed on, and kept in a file.
    there.hand_off(there.call.instance(moving.id), verify="full", overlay="overlay")
    moving.check_goes_on(here, epoch=3)
    moving.delete(here)


@pytest.mark.slow
def test_it_can_be_kept_in_a_file_afterwards(sites: tuple[PeerSite, PeerSite]) -> None:
    here, there = sites
    moving = Moving(here, there)
    here.call.done({"operation": moving.operation})
    there.call.done(there.call.post(f"/v1/instances/{moving.id}/suspend"))
    there.call.done(there.call.post(f"/v1/instances/{moving.id}/resume"))
    moving.check_goes_on(there, epoch=2)
    moving.delete(there)


def test_what_is_lost_there_is_resumed_here_as_of_the_switch(sites: tuple[PeerSite, PeerSite]) -> None:
    here, there = sites
    moving = Moving(here, there)
    moving.wait_serving()
    resolve = f"/v1/handoffs/{moving.handoff}/resolve"
    early = here.call("POST", resolve, {"resolve": {"action": "resume_as_of_switch"}})
    assert early.status_code == 409, "it runs at the target"
    kill(keeper_of(there, moving.id))
    moving.wait_state(there, "lost")
    moving.wait_state(here, "in_doubt")
    wait(lambda: there.call.instance(moving.id)["state"] == "failed")
    wait(lambda: moving.row(here)["error"])
    here.call.post(resolve, {"resolve": {"action": "resume_as_of_switch"}})
    moving.wait_state(here, "reverted")
    moving.check_goes_on(here, epoch=3)
    # That it was lost there is no obstacle to its going there now.
    here.hand_off(here.call.instance(moving.id), overlay="overlay", deadline_seconds=5)
    moving.check_goes_on(there, epoch=4)
    moving.delete(there)


@pytest.mark.slow
def test_what_is_lost_before_its_row_said_that_it_ran_has_failed_there(
    sites: tuple[PeerSite, PeerSite],
) -> None:
    here, there = sites
    moving = Moving(here, there)
    wait(lambda: moving.decided(here) is Ownership.SWITCHING)
    with writing_nothing_else(there):
        moving.wait_serving()
        wait(lambda: moving.decided(there) is Ownership.FILLING)
        assert moving.row(there)["state"] == "copying"
        kill(keeper_of(there, moving.id))
    moving.wait_state(there, "lost")
    moving.wait_state(here, "in_doubt")
    wait(lambda: there.call.instance(moving.id)["state"] == "failed")
    assert there.call.instance(moving.id)["epoch"] == 2
    resolve = {"resolve": {"action": "resume_as_of_switch"}}
    here.call.post(f"/v1/handoffs/{moving.handoff}/resolve", resolve)
    moving.wait_state(here, "reverted")
    moving.delete(here)
    moving.delete(there)


@pytest.mark.slow
def test_what_is_given_up_is_lost(sites: tuple[PeerSite, PeerSite]) -> None:
    here, there = sites
    moving = Moving(here, there)
    moving.wait_serving()
    kill(machine_of(there, moving.id))
    moving.wait_state(here, "in_doubt")
    here.call.post(f"/v1/handoffs/{moving.handoff}/resolve", {"resolve": {"action": "give_up"}})
    moving.wait_state(here, "lost")
    assert here.call.instance(moving.id)["state"] == "moved"
    wait(lambda: records(here.settings.instances_dir) == [])
    moving.delete(there)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["machine", "keeper"])
def test_a_source_that_dies_before_the_last_page_loses_the_instance(
    sites: tuple[PeerSite, PeerSite], killed: str
) -> None:
    here, there = sites
    moving = Moving(here, there)
    moving.wait_serving()
    kill(machine_of(here, moving.id) if killed == "machine" else keeper_of(here, moving.id))
    moving.wait_state(there, "lost")
    moving.wait_state(here, "lost")
    wait(lambda: there.call.instance(moving.id)["state"] == "failed")
    error = there.call.instance(moving.id)["error"]
    assert "lost" in str(error), error
    moving.delete(there)


@pytest.mark.slow
def test_sites_that_are_killed_lose_nothing(sites: tuple[PeerSite, PeerSite]) -> None:
    here, there = sites
    moving = Moving(here, there)
    moving.wait_serving()
    for site in (there, here):
        site.end(signal.SIGKILL)
    for site in (there, here):
        site.start()
    moving.wait_state(here, "completed")
    moving.wait_state(there, "completed")
    moving.check_goes_on(there, epoch=2)
    moving.delete(there)


def test_who_may_switch_early(sites: tuple[PeerSite, PeerSite]) -> None:
    here, there = sites
    user = here.call.as_("mia")
    app = here.call.get("/v1/apps?name=busy")["apps"][0]
    instance = user.start(app)
    wanted = {"instance_id": instance["id"], "peer_id": here.peer_id, "switch": "early"}
    refused = user("POST", "/v1/handoffs", {"handoff": wanted})
    assert refused.status_code == 409
    assert "policy" in refused.json()["errors"][0]["detail"]
    both = here.call("POST", "/v1/handoffs", {"handoff": {**wanted, "verify": "full"}})
    assert both.status_code == 400
    here.call.patch(f"/v1/apps/{app['id']}", {"app": {"handoff": {"early": True}}})
    user.done(user.post("/v1/handoffs", {"handoff": {**wanted, "overlay": "overlay"}}))
    assert here.call.get(f"/v1/apps/{app['id']}")["app"]["handoff"] == {"early": True}
    # Where it came, its app is not known, but what that allows.
    back = {**wanted, "peer_id": there.peer_id, "overlay": "overlay"}
    there.call.as_("mia").done(there.call.as_("mia").post("/v1/handoffs", {"handoff": back}))
    assert here.call.instance(instance["id"])["state"] == "active"


def test_a_site_that_cannot_switch_early_refuses(made: Made, hashed: str, tmp_path: Path) -> None:
    """Fake machines cannot run before all of their memory is there."""
    with two_sites(tmp_path, made, hashed) as (here, there):
        instance = here.call.start(here.call.publish(made.overlay))
        wanted = {"instance_id": instance["id"], "peer_id": here.peer_id, "switch": "early"}
        ended = here.call.ended(here.call.post("/v1/handoffs", {"handoff": wanted})["operation"])
        assert ended["state"] == "failed"
        assert "cannot switch early" in str(ended["error"])
        assert here.call.instance(instance["id"])["state"] == "active"
        assert there.call.get("/v1/instances")["instances"] == []
