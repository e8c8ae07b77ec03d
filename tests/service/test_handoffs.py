"""Hand-offs between two served sites, as a user and an operator see them; the fake driver's machines."""

from __future__ import annotations

import base64
import shutil
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloudlet.errors import CloudletError, ConflictError, NotFoundError
from cloudlet.keeper.correspondence import HttpPeer
from cloudlet.keeper.handle import Keepers
from cloudlet.model import Accelerator
from cloudlet.overlay.root import Root
from cloudlet.store.keyring import KeyRing
from tests.service.conftest import Caller, Made, make
from tests.service.two_sites import PeerSite, add_peer, peer_site, two_sites

Sites = tuple[PeerSite, PeerSite]


@pytest.fixture(scope="module")
def sites(made: Made, hashed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    with two_sites(tmp_path_factory.mktemp("sites"), made, hashed) as both:
        yield both


@pytest.fixture
def instance(sites: Sites, made: Made) -> Iterator[dict[str, Any]]:
    """An instance at the first site; it is gone from both in the end."""
    here, there = sites
    apps = here.call.get("/v1/apps")["apps"]
    started = here.call.start(apps[0] if apps else here.call.publish(made.overlay), lease_seconds=3600)
    yield started
    for site in (here, there):
        found = site.call("GET", f"/v1/instances/{started['id']}")
        if found.status_code == 200:
            site.call.done(site.call.delete(f"/v1/instances/{started['id']}"))


def ask(instance: dict[str, Any], path: str) -> str:
    with urllib.request.urlopen(instance["endpoints"][0]["url"] + path, timeout=20) as answer:
        return bytes(answer.read()).decode().strip()


def create(site: PeerSite, instance: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Ask for a hand-off; the operation."""
    wanted = {"instance_id": instance["id"], "peer_id": site.peer_id, **more}
    return dict(site.call.post("/v1/handoffs", {"handoff": wanted})["operation"])


def failed(call: Caller, operation: dict[str, Any]) -> str:
    """Why an operation failed."""
    ended = call.ended(operation)
    assert ended["state"] == "failed", ended
    return str(ended["error"]["detail"])


def test_it_goes_on_where_it_was(sites: Sites, instance: dict[str, Any]) -> None:
    here, there = sites
    assert [ask(instance, "/counter") for _ in range(3)] == ["1", "2", "3"]
    ask(instance, "/write?space=ram&page=700&seed=5")
    operation = here.hand_off(instance, verify="full")
    moved = there.call.instance(instance["id"])
    assert (moved["state"], moved["epoch"], moved["name"]) == ("active", 2, instance["name"])
    assert ask(moved, "/counter") == "4"
    assert 3500 < moved["lease_seconds"] <= 3600 and moved["expires_at"]
    left = here.call.instance(instance["id"])
    assert left["state"] == "moved" and left["endpoints"] == []
    assert left["moved_to"]["endpoints"][0]["url"] == moved["endpoints"][0]["url"]
    assert left["moved_to"]["url"] == there.call.url
    assert ask(instance, "/counter") == "5", "the old address leads there"
    handoff = here.call.get(f"/v1/handoffs/{operation['resources']['handoff']}")["handoff"]
    assert handoff["state"] == "completed" and handoff["statistics"]["pause_seconds"] > 0
    assert there.call.get(f"/v1/handoffs/{handoff['id']}")["handoff"]["direction"] == "in"


def test_a_paused_one_is_paused_there(sites: Sites, instance: dict[str, Any]) -> None:
    here, there = sites
    here.call.post(f"/v1/instances/{instance['id']}/pause")
    here.hand_off(instance)
    assert there.call.instance(instance["id"])["state"] == "paused"
    assert there.call.post(f"/v1/instances/{instance['id']}/resume")["instance"]["state"] == "active"
    assert ask(there.call.instance(instance["id"]), "/counter") == "1"


def test_while_it_moves_nothing_else_is_done_with_it(sites: Sites, instance: dict[str, Any]) -> None:
    here, there = sites
    # 4 MiB at a tenth of a megabit: it is on its way for long.
    for page in range(600, 900):
        ask(instance, f"/write?space=ram&page={page}&seed={page}")
    operation = create(here, instance, bandwidth_mbit=0.5, deadline_seconds=600)
    wait_state(here, operation, "copying")
    assert here.call.instance(instance["id"])["state"] == "moving"
    path = f"/v1/instances/{instance['id']}"
    id_ = operation["resources"]["handoff"]
    again = {"handoff": {"instance_id": instance["id"], "peer_id": here.peer_id}}
    for method, where, body in (
        ("POST", f"{path}/pause", None),
        ("POST", f"{path}/suspend", None),
        ("PATCH", path, {"instance": {"lease_seconds": 60}}),
        ("PATCH", path, {"instance": {"name": "other", "metadata": {"a": "b"}}}),
        ("DELETE", path, None),
        ("POST", "/v1/handoffs", again),
    ):
        answer = here.call(method, where, body)
        assert answer.status_code == 409, answer.text
        assert f"is being handed off already: hand-off {id_} (cloudlet handoff cancel {id_})" in answer.text
    needed = here.call("DELETE", f"/v1/peers/{here.peer_id}")
    assert needed.status_code == 409 and f"(cloudlet handoff cancel {id_})" in needed.text, needed.text
    coming = there.call("POST", f"{path}/pause")
    assert f"is still coming from another site: hand-off {id_}" in coming.text, coming.text
    assert ask(instance, "/counter") == "1", "it goes on answering"
    handoff = here.call.get(f"/v1/handoffs/{operation['resources']['handoff']}")["handoff"]
    assert handoff["forecast"]["bytes"] > 100_000 and handoff["forecast"]["seconds"] > 0
    here.call.delete(f"/v1/handoffs/{handoff['id']}")
    assert here.call.ended(operation)["state"] == "cancelled"
    stays = here.call.instance(instance["id"])
    assert stays["state"] == "active" and stays["endpoints"] == instance["endpoints"]
    assert ask(instance, "/counter") == "2"
    wait_gone(there.call, instance["id"])
    here.hand_off(instance)
    assert ask(there.call.instance(instance["id"]), "/counter") == "3", "it can be handed off again"


def test_refused_before_a_byte_of_it(sites: Sites, instance: dict[str, Any]) -> None:
    here, there = sites
    name = here.call.get(f"/v1/peers/{here.peer_id}")["peer"]["name"]
    said = failed(here.call, create(here, instance, overlay="overlay"))
    assert said.startswith(f"{name} refuses: the overlay ")
    assert said.endswith(
        "of the instance is neither there nor can be fetched "
        "(upload it to the target, or hand the instance off without it)"
    )
    there.call.patch("/v1/cloudlets/self", {"cloudlet": {"state": "draining"}})
    try:
        said = failed(here.call, create(here, instance))
        assert said.startswith(f"{name} refuses: ") and "being emptied" in said
        assert "check the address" not in said, "one remedy: the peer's"
    finally:
        there.call.patch("/v1/cloudlets/self", {"cloudlet": {"state": "up"}})
    handoffs = here.call.get(f"/v1/handoffs?instance_id={instance['id']}")["handoffs"]
    assert [one["state"] for one in handoffs] == ["reverted", "reverted"]
    assert all(one["statistics"] == {} for one in handoffs), "nothing was sent"
    assert here.call.instance(instance["id"])["state"] == "active"
    assert there.call("GET", f"/v1/instances/{instance['id']}").status_code == 404


def test_another_base_and_no_room_are_refused(
    sites: Sites, instance: dict[str, Any], made: Made, hashed: str, tmp_path: Path
) -> None:
    here, _ = sites
    other = make(tmp_path / "other")
    elsewhere = replace(other, cache=tmp_path / "empty")
    with peer_site(tmp_path / "c", elsewhere, hashed) as stranger:
        wanted = {"instance_id": instance["id"], "peer_id": add_peer(here, stranger)}
        add_peer(stranger, here)
        name = here.call.get(f"/v1/peers/{wanted['peer_id']}")["peer"]["name"]
        begun = here.call.post("/v1/handoffs", {"handoff": wanted})["operation"]
        assert failed(here.call, begun) == (
            f"{name} refuses: the base {made.base_id[:16]} of the instance is not there "
            "(have its operator import it)"
        )
        refresh = f"/v1/peers/{wanted['peer_id']}/refresh"
        assert here.call.post(refresh)["peer"]["capabilities"]["bases"] == []
        # As an import does that nobody has told the server of.
        shutil.copytree(other.cache / "bases", elsewhere.cache / "bases", dirs_exist_ok=True)
        assert here.call.post(refresh)["peer"]["capabilities"]["bases"] == [other.base_id]
    with peer_site(tmp_path / "d", made, hashed, limits={"instances": 0}) as full:
        wanted = {"instance_id": instance["id"], "peer_id": add_peer(here, full)}
        add_peer(full, here)
        begun = here.call.post("/v1/handoffs", {"handoff": wanted})["operation"]
        assert "full" in failed(here.call, begun)
    assert ask(instance, "/counter") == "1"


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("accelerator", Accelerator.KVM),
        ("cpu_model", "EPYC-v4"),
        ("machine_type", "pc-q35-9.2"),
        ("layout", 99),
    ],
)
def test_another_machine_is_refused(sites: Sites, instance: dict[str, Any], part: str, value: Any) -> None:
    here, there = sites
    offer = offer_of(here, instance)
    root = Root.decode(base64.b64decode(offer["instance"]["root"]))
    other = replace(root, machine=replace(root.machine, **{part: value}))
    offer["instance"]["root"] = base64.b64encode(other.encode()).decode()
    peer = as_peer(here, offer["id"])
    try:
        with pytest.raises(CloudletError, match=f"{part}: {value}"):
            peer.offer(offer)
        with pytest.raises(NotFoundError):
            peer.records(0, b"")
        assert there.call("GET", f"/v1/instances/{instance['id']}").status_code == 404
        assert there.call("GET", f"/v1/handoffs/{offer['id']}").status_code == 404
        # It was this alone.
        offer["instance"]["root"] = base64.b64encode(root.encode()).decode()
        assert peer.offer(offer).state == "preparing"
        peer.drop()
    finally:
        peer.close()
    wait_gone(there.call, instance["id"])


def test_an_instance_comes_back_as_its_users(sites: Sites, instance: dict[str, Any]) -> None:
    here, there = sites
    here.hand_off(instance)
    offer = offer_of(there, there.call.instance(instance["id"]))
    peer = as_peer(there, offer["id"])
    try:
        with pytest.raises(ConflictError, match="another user's"):
            peer.offer({**offer, "instance": {**offer["instance"], "user_id": "somebody"}})
        assert peer.offer(offer).state == "preparing"
        peer.drop()
    finally:
        peer.close()
    assert here.call.instance(instance["id"])["state"] == "moved"


def offer_of(site: PeerSite, instance: dict[str, Any]) -> dict[str, Any]:
    """What a site would offer of an instance."""
    keepers = Keepers(site.settings, lambda *_: None)
    try:
        about = keepers.ask(instance["id"], "describe")
    finally:
        keepers.close()
    del about["layer"]
    same = {name: instance[name] for name in ("id", "epoch", "name", "project_id", "user_id", "created_at")}
    same["created_at"] = same["created_at"].replace("Z", "+00:00")
    needs = {"needs": "nothing", "seed": "0123456789abcdef"}
    return {"id": str(uuid.uuid4()), **needs, "instance": {**same, "lease": {}, **about}}


def as_peer(site: PeerSite, handoff: str) -> HttpPeer:
    """The other site, as this one speaks to it."""
    peer = site.call.get(f"/v1/peers/{site.peer_id}")["peer"]
    own_id = site.call.get("/v1/cloudlets/self")["cloudlet"]["id"]
    whom = {"own_id": own_id, **{name: peer[name] for name in ("id", "url", "public_key")}}
    return HttpPeer.of(whom, handoff, KeyRing(site.settings.keys_dir))


def test_who_may(sites: Sites, instance: dict[str, Any]) -> None:
    here, _ = sites
    wanted = {"handoff": {"instance_id": instance["id"], "peer_id": here.peer_id}}
    assert here.call.as_("mia")("POST", "/v1/handoffs", wanted).status_code == 404
    assert here.call.as_("rita")("POST", "/v1/handoffs", wanted).status_code == 403
    wanted["handoff"]["peer_id"] = instance["id"]
    assert here.call("POST", "/v1/handoffs", wanted).status_code == 404
    assert here.call("GET", "/v1/handoffs/" + instance["id"]).status_code == 404


def test_who_may_not_list_peers_names_one(sites: Sites) -> None:
    here, there = sites
    mia, name = here.call.as_("mia"), "edge-2"
    here.call.patch(f"/v1/peers/{here.peer_id}", {"peer": {"name": name}})
    app = here.call.get("/v1/apps")["apps"][0]
    instance = mia.start(app)
    assert mia("GET", "/v1/peers").status_code == 403
    wanted = {"instance_id": instance["id"]}
    for more, status, said in (
        ({}, 400, "give peer_id or peer_name"),
        ({"peer_id": here.peer_id, "peer_name": name}, 400, "give peer_id or peer_name"),
        ({"peer_name": "nowhere"}, 404, "there is no peer nowhere"),
        ({"peer_id": instance["id"]}, 404, f"there is no peer {instance['id']}"),
    ):
        answer = mia("POST", "/v1/handoffs", {"handoff": {**wanted, **more}})
        assert (answer.status_code, said in answer.text) == (status, True), answer.text
    body = {"handoff": {**wanted, "peer_name": name}}
    once, again = (mia("POST", "/v1/handoffs", body, headers={"Idempotency-Key": "k"}) for _ in range(2))
    assert (once.status_code, again.status_code) == (202, 202), once.text
    assert once.json()["operation"]["id"] == again.json()["operation"]["id"]
    mia.done(once.json())
    assert mia.instance(instance["id"])["state"] == "moved"
    moved = there.call.as_("mia").instance(instance["id"])
    assert (moved["state"], moved["user_id"]) == ("active", "mia")
    for site in (there, here):
        site.call.done(site.call.delete(f"/v1/instances/{instance['id']}"))


def test_many_at_once_share_the_link(sites: Sites, made: Made) -> None:
    here, there = sites
    app = here.call.get("/v1/apps")["apps"][0]
    instances = [here.call.start(app) for _ in range(6)]
    for number, one in enumerate(instances):
        for _ in range(number + 1):
            ask(one, "/counter")
    operations = [create(here, one) for one in instances]
    for operation in operations:
        here.call.done({"operation": operation})
    for number, one in enumerate(instances):
        moved = there.call.instance(one["id"])
        assert ask(moved, "/counter") == str(number + 2)
        there.call.done(there.call.delete(f"/v1/instances/{one['id']}"))
        here.call.done(here.call.delete(f"/v1/instances/{one['id']}"))


def wait_state(site: PeerSite, operation: dict[str, Any], state: str) -> None:
    deadline = time.monotonic() + 30
    handoff = operation["resources"]["handoff"]
    while (found := site.call.get(f"/v1/handoffs/{handoff}")["handoff"])["state"] != state:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def wait_gone(call: Caller, instance_id: str) -> None:
    deadline = time.monotonic() + 30
    while call("GET", f"/v1/instances/{instance_id}").status_code != 404:
        assert time.monotonic() < deadline
        time.sleep(0.05)
