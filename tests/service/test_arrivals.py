"""What a site makes of an offer: which it refuses, and what becomes of the row of one that was here."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cloudlet.errors import CloudletError, ConflictError, NotFoundError
from cloudlet.hypervisor.records import records
from cloudlet.keeper.correspondence import HttpPeer, connector
from cloudlet.store.keyring import KeyRing
from tests.service.conftest import Made
from tests.service.test_handoffs import ask, create, offer_of, wait_gone, wait_state
from tests.service.two_sites import PeerSite, add_peer, peer_site


@dataclass
class Sites:
    """Three sites that are each other's peers; only the first has the app."""

    here: PeerSite
    there: PeerSite
    third: PeerSite
    app: dict[str, Any]
    ids: dict[int, str]
    """By what is a site here, its id."""

    def id_of(self, site: PeerSite) -> str:
        return self.ids[id(site)]

    def hand_off(self, instance_id: str, source: PeerSite, target: PeerSite) -> str:
        """Have an instance handed off; the hand-off."""
        wanted = {"instance_id": instance_id, "peer_id": self.id_of(target)}
        done = source.call.done(source.call.post("/v1/handoffs", {"handoff": wanted}))
        return str(done["resources"]["handoff"])

    @contextmanager
    def speaking(self, source: PeerSite, target: PeerSite, handoff: str) -> Iterator[HttpPeer]:
        """A site, as another one speaks to it."""
        peer = HttpPeer.of(self._whom(source, target), handoff, KeyRing(source.settings.keys_dir))
        try:
            yield peer
        finally:
            peer.close()

    def has(self, asker: PeerSite, asked: PeerSite, handoff: str) -> bool | None:
        """Whether a site answers its peer that an instance is there by a hand-off."""
        connect = connector(self._whom(asker, asked), KeyRing(asker.settings.keys_dir))
        with connect() as line:
            answer = line.request("GET", f"/v1/peer/handoffs/{handoff}", timeout=20)
        here: bool | None = answer.json["handoff"]["here"]
        return here

    def _whom(self, source: PeerSite, target: PeerSite) -> dict[str, str]:
        known = source.call.get(f"/v1/peers/{self.id_of(target)}")["peer"]
        return {"own_id": self.id_of(source), **{name: known[name] for name in ("id", "url", "public_key")}}


@pytest.fixture(scope="module")
def sites(made: Made, hashed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    folder = tmp_path_factory.mktemp("sites")
    quick = {"grace_seconds": 1}
    with (
        peer_site(folder / "a", made, hashed, peers=quick) as here,
        peer_site(folder / "b", made, hashed, peers=quick) as there,
        peer_site(folder / "c", made, hashed, peers=quick) as third,
    ):
        three = (here, there, third)
        for site in three:
            for other in three:
                if other is not site:
                    add_peer(site, other)
        ids = {id(site): site.call.get("/v1/cloudlets/self")["cloudlet"]["id"] for site in three}
        yield Sites(here, there, third, here.call.publish(made.overlay), ids)


@pytest.fixture
def instance(sites: Sites) -> Iterator[dict[str, Any]]:
    """An instance at the first site; it is gone from all in the end."""
    started = sites.here.call.start(sites.app, lease_seconds=3600)
    yield started
    for site in (sites.here, sites.there, sites.third):
        if site.call("GET", f"/v1/instances/{started['id']}").status_code == 200:
            site.call.done(site.call.delete(f"/v1/instances/{started['id']}"))


def change(site: PeerSite, statement: str, *values: Any) -> None:
    """Write into a site's database what it does not write itself."""
    place = site.settings.state_dir / "site.sqlite"
    with closing(sqlite3.connect(place, timeout=30, isolation_level=None)) as database:
        assert database.execute(statement, values).rowcount == 1


def test_another_peer_does_not_take_an_instance_over(sites: Sites, instance: dict[str, Any]) -> None:
    sites.hand_off(instance["id"], sites.here, sites.there)
    offer = offer_of(sites.there, sites.there.call.instance(instance["id"]))
    offer["instance"]["epoch"] = 7
    with sites.speaking(sites.third, sites.here, offer["id"]) as peer:
        with pytest.raises(ConflictError, match="is at the cloudlet"):
            peer.offer(offer)
        assert sites.here.call.instance(instance["id"])["state"] == "moved"
        assert sites.here.call("GET", f"/v1/handoffs/{offer['id']}").status_code == 404
        # Where the one that has it says nothing, it may have gone on from there.
        path = f"/v1/peers/{sites.id_of(sites.there)}"
        sites.here.call.patch(path, {"peer": {"state": "blocked"}})
        try:
            assert peer.offer(offer).state == "preparing"
            peer.drop()
        finally:
            sites.here.call.patch(path, {"peer": {"state": "trusted"}})
    assert sites.here.call.instance(instance["id"])["state"] == "moved"


def test_it_comes_back_by_another_way(sites: Sites, instance: dict[str, Any]) -> None:
    assert ask(instance, "/counter") == "1"
    first = sites.hand_off(instance["id"], sites.here, sites.there)
    assert sites.has(sites.here, sites.there, first) is True
    sites.hand_off(instance["id"], sites.there, sites.third)
    assert sites.has(sites.here, sites.there, first) is False
    sites.hand_off(instance["id"], sites.third, sites.here)
    back = sites.here.call.instance(instance["id"])
    assert (back["state"], back["epoch"]) == ("active", 4)
    assert ask(back, "/counter") == "2"


@pytest.mark.parametrize("column", ["memory_bytes", "disk_bytes", "cpus", "base_identity"])
def test_it_comes_back_as_the_machine_that_it_was(
    sites: Sites, instance: dict[str, Any], column: str
) -> None:
    sites.hand_off(instance["id"], sites.here, sites.there)
    other = "'0'" if column == "base_identity" else f"{column} + 1"
    change(sites.here, f"UPDATE instances SET {column} = {other} WHERE id = ?", instance["id"])
    offer = offer_of(sites.there, sites.there.call.instance(instance["id"]))
    refused = pytest.raises(CloudletError, match="was another machine there")
    with sites.speaking(sites.there, sites.here, offer["id"]) as peer, refused:
        peer.offer(offer)
    assert sites.here.call.instance(instance["id"])["state"] == "moved"


def test_what_is_offered_has_to_make_sense(sites: Sites, instance: dict[str, Any]) -> None:
    sites.hand_off(instance["id"], sites.here, sites.there)
    offer = offer_of(sites.there, sites.there.call.instance(instance["id"]))
    with sites.speaking(sites.there, sites.here, offer["id"]) as peer:
        for wrong, why in (
            ({"epoch": (1 << 31) - 2}, "cannot be in 2147483646 by now"),
            ({"cpus": 64}, "has 64 CPUs"),
            ({"created_at": "2024-13-45T99:99:99+00:00"}, "created_at"),
        ):
            with pytest.raises(CloudletError, match=why):
                peer.offer({**offer, "instance": {**offer["instance"], **wrong}})
        assert peer.offer(offer).state == "preparing"
        peer.drop()


def test_an_offer_does_not_take_a_hand_off_that_leaves(sites: Sites, instance: dict[str, Any]) -> None:
    for page in range(600, 700):
        ask(instance, f"/write?space=ram&page={page}&seed={page}")
    offer = offer_of(sites.here, instance)
    sites.here.peer_id = sites.id_of(sites.there)
    operation = create(sites.here, instance, bandwidth_mbit=0.5, deadline_seconds=600)
    wait_state(sites.here, operation, "copying")
    leaving = operation["resources"]["handoff"]
    refused = pytest.raises(ConflictError, match="leaves there")
    with sites.speaking(sites.there, sites.here, leaving) as peer, refused:
        peer.offer({**offer, "id": leaving})
    assert sites.here.call.get(f"/v1/handoffs/{leaving}")["handoff"]["state"] == "copying"
    assert sites.here.call.instance(instance["id"])["state"] == "moving"
    sites.here.call.delete(f"/v1/handoffs/{leaving}")
    assert sites.here.call.ended(operation)["state"] == "cancelled"
    wait_gone(sites.there.call, instance["id"])


def test_a_private_overlay_is_used_for_its_owner(sites: Sites, made: Made) -> None:
    """And for an instance that was here with it: a public app may stand on a private overlay."""
    home, away = sites.third, sites.there
    paula, mia = home.call.as_("paula"), home.call.as_("mia")
    app = private_app(home, made)
    mine, hers = mia.start(app), paula.start(app)
    for one in (mine, hers):
        sites.hand_off(one["id"], home, away)
    offers = [offer_of(away, away.call.instance(one["id"])) for one in (mine, hers)]
    foreign = {**offers[0]["instance"], "id": str(uuid.uuid4())}
    owned = {**offers[1]["instance"], "id": str(uuid.uuid4())}
    with image_of(home, offers[0]["instance"]["overlay"], made):
        for wanted, may in ((offers[0]["instance"], True), (owned, True), (foreign, False)):
            offer = {**offers[0], "id": str(uuid.uuid4()), "needs": "overlay", "instance": wanted}
            with sites.speaking(away, home, offer["id"]) as peer:
                if may:
                    assert peer.offer(offer).state in ("preparing", "dropped")
                    peer.drop()
                else:
                    with pytest.raises(NotFoundError, match="neither there nor can be fetched"):
                        peer.offer(offer)
    for one in (mine, hers):
        for site in (away, home):
            site.call.done(site.call.delete(f"/v1/instances/{one['id']}"))


def private_app(site: PeerSite, made: Made) -> dict[str, Any]:
    """A public app of Paula's, on an overlay that is hers alone."""
    paula = site.call.as_("paula")
    overlay = paula.post("/v1/overlays", {"overlay": {"name": "secret", "public": False}})["overlay"]
    assert paula("PUT", f"/v1/overlays/{overlay['id']}/file", data=made.overlay.read_bytes()).ok
    app = {"name": "secret", "version": "1", "public": True, "components": [{"overlay_id": overlay["id"]}]}
    return dict(paula.post("/v1/apps", {"app": app})["app"])


@contextmanager
def image_of(site: PeerSite, overlay: str, made: Made) -> Iterator[None]:
    """Have an image of an overlay at a site, for who looks whether there is one: fake machines have none."""
    folder: Path = site.settings.images_dir / overlay
    folder.mkdir(parents=True)
    document = folder / "image.json"
    document.write_text(json.dumps({"app": "secret", "version": "1", "base": made.base_id}))
    try:
        yield
    finally:
        document.unlink(missing_ok=True)
        folder.rmdir()


def test_what_was_lost_here_is_known_still_if_it_does_not_come(
    sites: Sites, instance: dict[str, Any]
) -> None:
    """An instance that was lost on its way here, is offered once more, and stays where it is after all."""
    came = sites.hand_off(instance["id"], sites.here, sites.there)
    offer = offer_of(sites.there, sites.there.call.instance(instance["id"]))
    change(sites.there, "UPDATE handoffs SET state = 'lost' WHERE id = ?", came)
    for _, record in records(sites.there.settings.instances_dir):
        assert record.machine
        os.kill(record.machine.pid, signal.SIGKILL)
    wait_instance(sites.there, instance["id"], "failed")
    offer["instance"]["epoch"] = 3
    with sites.speaking(sites.here, sites.there, offer["id"]) as peer:
        assert peer.offer(offer).state == "preparing"
        assert sites.there.call.instance(instance["id"])["state"] == "moving"
        peer.drop()
    wait_instance(sites.there, instance["id"], "failed")


def wait_instance(site: PeerSite, instance_id: str, state: str) -> None:
    deadline = time.monotonic() + 30
    while (found := site.call.instance(instance_id))["state"] != state:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
