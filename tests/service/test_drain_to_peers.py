"""A site is emptied into its peers: all go that find a place, none is ended, and each is reported."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.service.conftest import Caller, Made
from tests.service.test_cli import Users, _environment  # noqa: F401 (a fixture)
from tests.service.two_sites import PeerSite, add_peer, peer_site, two_sites

SELF = "/v1/cloudlets/self"
DRAIN = f"{SELF}/drain"
UP, DRAINING = ({"cloudlet": {"state": state}} for state in ("up", "draining"))
MISSING = "00000000-0000-4000-8000-000000000000"


@dataclass
class Sites:
    """A site, two others that it may hand instances to, and an app that is at the first."""

    here: PeerSite
    east: PeerSite
    west: PeerSite
    app: dict[str, Any]
    east_id: str
    west_id: str

    @property
    def call(self) -> Caller:
        return self.here.call

    def start(self, *names: str, **more: Any) -> list[str]:
        """Instances of the app; their ids."""
        begun = [
            self.call.post("/v1/instances", {"instance": {"app_id": self.app["id"], "name": name, **more}})
            for name in names
        ]
        return [self.call.done(one)["resources"]["instance"] for one in begun]

    def drained(self, **wanted: Any) -> dict[str, Any]:
        """Drain, and wait for the end; what became of each instance, by its id."""
        return report(self.call.done(self.call.post(DRAIN, {"drain": wanted})))


def report(operation: dict[str, Any]) -> dict[str, Any]:
    assert operation["output"]["ended"]
    return {entry["id"]: entry for entry in operation["output"]["instances"]}


def answers(instance: dict[str, Any]) -> None:
    """An instance runs where it says."""
    assert instance["state"] == "active", instance
    assert requests.get(instance["endpoints"][0]["url"], timeout=10).text == "hello\n"


def delete_all(call: Caller) -> None:
    rows = call.get("/v1/instances?limit=1000")["instances"]
    begun = [call.delete(f"/v1/instances/{row['id']}") for row in rows]
    for operation in begun:
        call.done(operation)


@pytest.fixture(scope="module")
def all_sites(made: Made, hashed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    folder = tmp_path_factory.mktemp("sites")
    with (
        peer_site(folder / "here", made, hashed, peers={"grace_seconds": 0}) as here,
        peer_site(folder / "east", made, hashed, limits={"instances": 2}) as east,
        peer_site(folder / "west", made, hashed) as west,
    ):
        ids = []
        for name, other in (("east", east), ("west", west)):
            ids.append(add_peer(here, other))
            here.call.patch(f"/v1/peers/{ids[-1]}", {"peer": {"name": name}})
            add_peer(other, here)
        yield Sites(here, east, west, here.call.publish(made.overlay), *ids)


@pytest.fixture
def sites(all_sites: Sites) -> Iterator[Sites]:
    """Three sites that run nothing and admit all; only the first has the app."""
    yield all_sites
    for site in (all_sites.here, all_sites.east, all_sites.west):
        if site.process.poll() is not None:
            site.start()
        for operation in site.call.get("/v1/operations?limit=1000")["operations"]:
            site.call.ended(operation)
        site.call.patch(SELF, UP)
        delete_all(site.call)
    for site in (all_sites.east, all_sites.west):
        for noun in ("apps", "overlays"):
            for row in site.call.get(f"/v1/{noun}")[noun]:
                site.call.delete(f"/v1/{noun}/{row['id']}")


def test_all_go_and_are_spread(sites: Sites) -> None:
    ids = sites.start("a", "b", "c", lease_seconds=600)
    sites.call.post(f"/v1/instances/{ids[2]}/pause")
    begun = sites.call.post(DRAIN, {"drain": {}})["operation"]
    assert (begun["kind"], begun["resources"]["cloudlet"]) == (
        "cloudlet.drain",
        sites.call.get(SELF)["cloudlet"]["id"],
    )
    refused = sites.call("POST", "/v1/instances", {"instance": {"app_id": sites.app["id"]}})
    assert refused.json()["errors"][0]["code"] == "cloudlet.instance.draining"
    found = report(sites.call.done({"operation": begun}))
    assert {entry["result"] for entry in found.values()} == {"handed_off"}
    assert {entry["name"] for entry in found.values()} == {"a", "b", "c"}
    assert found[ids[0]]["peer"] != found[ids[1]]["peer"]
    there = {"east": sites.east, "west": sites.west}
    for one in ids:
        entry = found[one]
        assert entry["peer_id"] == {"east": sites.east_id, "west": sites.west_id}[entry["peer"]]
        instance = there[entry["peer"]].call.instance(one)
        assert instance["epoch"] == 2
        if one == ids[2]:
            assert instance["state"] == "paused"
        else:
            answers(instance)
        assert sites.call.instance(one)["moved_to"]["cloudlet_id"] == entry["peer_id"]
    assert sites.call.get(SELF)["cloudlet"]["used"]["instances"] == 0
    assert sites.call.get(SELF)["cloudlet"]["state"] == "draining"
    event = sites.call.events(kind="cloudlet.drained")[-1]
    assert event["detail"]["operation_id"] == begun["id"]
    assert {one["id"]: one["result"] for one in event["detail"]["instances"]} == dict.fromkeys(
        ids, "handed_off"
    )


def test_no_room_at_the_first_peer(sites: Sites, made: Made) -> None:
    app = sites.east.call.publish(made.overlay)
    for _ in range(2):
        sites.east.call.start(app)
    ids = sites.start("a", "b", "c")
    found = sites.drained()
    assert {found[one]["result"] for one in ids} == {"handed_off"}
    assert {found[one]["peer"] for one in ids} == {"west"}
    refusals = [found[one]["attempts"].get(sites.east_id) for one in ids]
    assert any(refusals), "east was never asked"
    for attempt in filter(None, refusals):
        assert attempt["final"]
        assert "the site is full" in attempt["reason"]
    for one in ids:
        answers(sites.west.call.instance(one))


def test_what_finds_no_place_stays_and_runs(sites: Sites) -> None:
    """Both peers refuse it: its app is to be started again there if it ends, and they have no overlay."""
    sites.call.patch(f"/v1/apps/{sites.app['id']}", {"app": {"restart": True}})
    (stays,) = sites.start("stays")
    sites.call.patch(f"/v1/apps/{sites.app['id']}", {"app": {"restart": False}})
    goes, sleeps = sites.start("goes", "sleeps")
    sites.call.done(sites.call.post(f"/v1/instances/{sleeps}/suspend"))
    sites.west.call.patch(SELF, DRAINING)
    found = sites.drained()
    assert (found[goes]["result"], found[goes]["peer"]) == ("handed_off", "east")
    assert (found[sleeps]["result"], found[sleeps]["state"]) == ("not_running", "suspended")
    assert found[sleeps]["reason"] == "suspended"
    assert (found[stays]["result"], found[stays]["state"], found[stays]["peer_id"]) == (
        "stays",
        "active",
        None,
    )
    assert "west refuses: " in found[stays]["reason"]
    assert "east refuses: the overlay" in found[stays]["reason"]
    answers(sites.call.instance(stays))
    answers(sites.east.call.instance(goes))
    assert sites.call.instance(sleeps)["state"] == "suspended"
    again = sites.drained()
    assert (again[goes]["result"], again[goes]["state"]) == ("not_running", "moved")
    assert again[goes]["reason"] == "moved to east"
    assert again[stays]["result"] == "stays"


def test_no_time_at_all(sites: Sites) -> None:
    (one,) = sites.start("a")
    found = sites.drained(deadline_seconds=0)
    assert (found[one]["result"], found[one]["reason"]) == ("stays", "the deadline has passed")
    answers(sites.call.instance(one))
    assert sites.call.get(f"/v1/handoffs?instance_id={one}")["handoffs"] == []
    assert sites.call.get(SELF)["cloudlet"]["state"] == "draining"


def test_a_peer_that_is_down(sites: Sites) -> None:
    ids = sites.start("a", "b")
    sites.west.end()
    found = sites.drained(peers=[sites.west_id])
    assert {found[one]["result"] for one in ids} == {"stays"}
    assert all("west: it does not answer" in found[one]["reason"] for one in ids)
    for one in ids:
        answers(sites.call.instance(one))
    found = sites.drained()
    assert {(found[one]["result"], found[one]["peer"]) for one in ids} == {("handed_off", "east")}


def test_one_that_is_still_coming(sites: Sites) -> None:
    begun = sites.call.post("/v1/instances", {"instance": {"app_id": sites.app["id"]}})
    one = begun["operation"]["resources"]["instance"]
    found = sites.drained(peers=[sites.west_id])
    assert (found[one]["result"], found[one]["peer"]) == ("handed_off", "west")
    sites.call.done(begun)
    answers(sites.west.call.instance(one))


@pytest.mark.slow
def test_a_peer_that_dies_meanwhile(sites: Sites) -> None:
    """Whatever had been decided by then: each runs at one site in the end, and at no other."""
    ids = sites.start(*"abcd")
    seen = sites.call.events()[-1]["number"]
    begun = sites.call.post(DRAIN, {"drain": {"deadline_seconds": 40}})["operation"]
    query = {"after": seen, "wait": 30, "kind": "handoff.copying"}
    sites.call.get("/v1/events", params=query)
    sites.west.end(signal.SIGKILL)
    found = report(sites.call.done({"operation": begun}))
    assert {found[one]["result"] for one in ids} <= {"handed_off", "stays", "in_doubt"}
    assert [found[one]["peer"] for one in ids].count("east") == 2, "it has room for two"
    sites.west.start()
    for operation in sites.call.get("/v1/operations?limit=1000")["operations"]:
        sites.call.ended(operation)
    for one in ids:
        running = []
        for site in (sites.here, sites.east, sites.west):
            answer = site.call("GET", f"/v1/instances/{one}")
            if answer.status_code == 200 and answer.json()["instance"]["state"] != "moved":
                running.append(answer.json()["instance"])
        assert [instance["state"] for instance in running] == ["active"], (found[one], running)
        answers(running[0])
        if found[one]["result"] == "stays":
            assert sites.call.instance(one)["state"] == "active"


@pytest.mark.slow
def test_one_that_is_blocked_and_only_one_that_is_named(sites: Sites) -> None:
    (one,) = sites.start("a")
    sites.call.patch(f"/v1/peers/{sites.east_id}", {"peer": {"state": "blocked"}})
    found = sites.drained(peers=[sites.east_id])
    assert (found[one]["result"], found[one]["reason"]) == (
        "stays",
        "its peers are blocked: east (cloudlet peer set east --trust)",
    )
    sites.call.patch(f"/v1/peers/{sites.east_id}", {"peer": {"state": "trusted"}})
    found = sites.drained(peers=[sites.east_id])
    assert (found[one]["result"], found[one]["peer"]) == ("handed_off", "east")


@contextmanager
def still(site: PeerSite) -> Iterator[None]:
    """A site that answers nothing, within the context."""
    site.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        site.process.send_signal(signal.SIGCONT)


def begun_to_move(sites: Sites) -> dict[str, Any]:
    """A drain of many instances to the west, which has just begun."""
    seen = sites.call.events()[-1]["number"]
    begun = sites.call.post(DRAIN, {"drain": {"peers": [sites.west_id]}})["operation"]
    query = {"after": seen, "wait": 30, "kind": "instance.moving"}
    assert sites.call.get("/v1/events", params=query)["events"]
    return dict(begun)


def test_one_that_is_cancelled(sites: Sites) -> None:
    ids = sites.start(*"abcdefghij")
    begun = begun_to_move(sites)
    with still(sites.west):
        conflict = sites.call("POST", DRAIN, {"drain": {}})
        assert (conflict.status_code, conflict.json()["errors"][0]["code"]) == (
            409,
            "cloudlet.site.conflict",
        )
        assert begun["id"] in conflict.text
        sites.call.delete(f"/v1/operations/{begun['id']}")
    ended = sites.call.ended(begun)
    assert ended["state"] == "cancelled"
    found = report(ended)
    assert "stays" in {found[one]["result"] for one in ids}
    for one in ids:
        if found[one]["result"] == "stays":
            assert (found[one]["state"], found[one]["reason"]) == ("active", "the drain was cancelled")
            answers(sites.call.instance(one))
            assert sites.west.call("GET", f"/v1/instances/{one}").status_code == 404
        else:
            assert found[one]["result"] == "handed_off"
            answers(sites.west.call.instance(one))
    assert sites.call.get(SELF)["cloudlet"]["state"] == "draining"
    assert sites.call.events(kind="cloudlet.drained")[-1]["detail"]["operation_id"] == begun["id"]


@pytest.mark.slow
def test_a_site_that_is_up_again_hands_nothing_more_off(sites: Sites) -> None:
    ids = sites.start(*"abcdefghij")
    begun = begun_to_move(sites)
    with still(sites.west):
        assert sites.call.patch(SELF, UP)["cloudlet"]["state"] == "up"
    assert sites.call.ended(begun)["state"] == "cancelled"
    there = {row["id"] for row in sites.west.call.get("/v1/instances")["instances"]}
    assert there < set(ids)
    sites.call.start(sites.app)


def test_killed_in_the_middle(sites: Sites) -> None:
    ids = sites.start(*"abcdefghij")
    begun = begun_to_move(sites)
    with still(sites.west):
        sites.here.end(signal.SIGKILL)
        sites.here.start()
        assert sites.call.get(f"/v1/operations/{begun['id']}")["operation"]["state"] == "running"
    found = report(sites.call.done({"operation": begun}))
    for one in ids:
        assert found[one]["result"] == "handed_off", found[one]
        instance = sites.west.call.instance(one)
        assert instance["epoch"] == 2
        answers(instance)
        done = sites.call.get(f"/v1/handoffs?instance_id={one}&state=completed")["handoffs"]
        assert [handoff["id"] for handoff in done] == [found[one]["handoff_id"]]
    drained = sites.call.events(kind="cloudlet.drained")
    assert [event["detail"]["operation_id"] for event in drained].count(begun["id"]) == 1


@pytest.mark.slow
def test_two_sites_empty_into_each_other(made: Made, hashed: str, tmp_path: Path) -> None:
    """What came from a site goes back there when its peer is emptied; neither takes it while it drains."""
    with two_sites(tmp_path, made, hashed) as (first, second):
        instance = first.call.start(first.call.publish(made.overlay), lease_seconds=600)
        there = report(first.call.done(first.call.post(DRAIN, {"drain": {}})))
        assert there[instance["id"]]["result"] == "handed_off"
        stays = report(second.call.done(second.call.post(DRAIN, {"drain": {}})))
        assert stays[instance["id"]]["result"] == "stays"
        assert "the site is being emptied" in stays[instance["id"]]["reason"]
        first.call.patch(SELF, UP)
        back = report(second.call.done(second.call.post(DRAIN, {"drain": {}})))
        assert back[instance["id"]]["result"] == "handed_off"
        answers(first.call.instance(instance["id"]))
        assert first.call.instance(instance["id"])["epoch"] == 3


def test_who_may_and_what_is_understood(sites: Sites) -> None:
    for user in ("paula", "mia", "rita"):
        assert sites.call.as_(user)("POST", DRAIN, {"drain": {}}).status_code == 403
    for body, status in (
        (None, 400),
        ({}, 400),
        ({"drain": {"deadline_seconds": -1}}, 400),
        ({"drain": {"deadline_seconds": 1e9}}, 400),
        ({"drain": {"deadline_seconds": "soon"}}, 400),
        ({"drain": {"pause_seconds": 0}}, 400),
        ({"drain": {"peers": []}}, 400),
        ({"drain": {"peers": ["east"]}}, 400),
        ({"drain": {"peers": None}}, 400),
        ({"drain": {"more": 1}}, 400),
        ({"drain": {"peers": [MISSING]}}, 404),
    ):
        assert sites.call("POST", DRAIN, body).status_code == status, body
    assert sites.call.get(SELF)["cloudlet"]["state"] == "up"
    once, again = (
        sites.call("POST", DRAIN, {"drain": {}}, headers={"Idempotency-Key": "drain"}) for _ in range(2)
    )
    assert (once.status_code, again.status_code) == (202, 202)
    assert once.json()["operation"]["id"] == again.json()["operation"]["id"]
    assert sites.call.done(once.json())["output"]["ended"]


def test_an_operator_at_the_command_line(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    users = Users(monkeypatch, sites.call.url)
    ids = sites.start("hello", "second")
    late = users("root", "drain", "--deadline", "0", "-f", "json")
    assert late.status == 6
    assert {row["id"]: (row["result"], row["reason"]) for row in json.loads(late.out)} == dict.fromkeys(
        ids, ("stays", "the deadline has passed")
    )
    assert late.err.endswith("instances that found no place, and stay: 2\n")
    assert "hello: stays: the deadline has passed\n" in late.err
    assert users("paula", "drain").status == 4
    assert users("root", "drain", "--to", "nowhere").status == 3
    done = users("root", "drain", "--to", "west", "--deadline", "60")
    assert done.status == 0, done.err
    assert "hello: runs at west\n" in done.err
    for name in ("hello", "second"):
        (line,) = (line for line in done.out.splitlines() if f" {name} " in line)
        assert "handed_off" in line
        assert "west" in line
    empty = users("root", "drain", "-f", "json")
    assert (empty.status, empty.err.splitlines()[-1]) == (0, "nothing runs here")
    assert {row["id"]: (row["result"], row["reason"][:5]) for row in json.loads(empty.out)} == dict.fromkeys(
        ids, ("not_running", "moved")
    )
    refused = users("paula", "drain", "--to", "west")
    assert "paula may not do cloudlet:peers:list (" in refused.err
    begun = users.json("root", "--quiet", "drain", "--no-wait")
    assert [row["kind"] for row in begun] == ["cloudlet.drain"]
    assert users("root", "operation", "show", begun[0]["id"], "--wait").status == 0
    kept = users("root", "drain", "--no-handoff", "-f", "value", "-c", "state")
    assert (kept.out, kept.err) == ("draining\n", "the site admits no more instances; still there: 0\n")
    back = users("root", "drain", "--off", "-f", "value", "-c", "state")
    assert (back.out, back.err) == ("up\n", "the site admits instances\n")
