"""Hand-offs at the command line, of users and operators who think in names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cloudlet.client import connect
from cloudlet.client.faults import CancelledError
from tests.service.conftest import PASSWORD, Made
from tests.service.test_cli import Users, _environment  # noqa: F401 (a fixture)
from tests.service.two_sites import PeerSite, two_sites

Sites = tuple[PeerSite, PeerSite]
DEADLINE = 60
SLOWLY = ("--bandwidth", "0.5", "--deadline", "600")
"""Terms on which what :func:`started` starts is on its way for long."""


@pytest.fixture(scope="module")
def sites(made: Made, hashed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    with two_sites(tmp_path_factory.mktemp("sites"), made, hashed) as (here, there):
        here.call.patch(f"/v1/peers/{here.peer_id}", {"peer": {"name": "east"}})
        there.call.patch(f"/v1/peers/{there.peer_id}", {"peer": {"name": "home"}})
        here.call.publish(made.overlay)
        yield here, there


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch, sites: Sites) -> Users:
    return Users(monkeypatch, sites[0].call.url)


def started(users: Users, name: str) -> Any:
    """An instance of mia's, most of whose memory is its own."""
    instance = users.json("mia", "instance", "create", "hello", "--name", name, "--lease", "3600")
    for page in range(600, 900):
        url = f"{instance['endpoint']}/write?space=ram&page={page}&seed={page}"
        urllib.request.urlopen(url, timeout=20).close()
    return instance


@contextmanager
def waiting(site: PeerSite, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A command of mia's that hands off and waits, and the id of the hand-off as soon as it copies."""
    command = [sys.executable, "-W", "ignore", "-m", "cloudlet.cli.app", "--site", site.call.url]
    process = subprocess.Popen(
        [*command, "--user", "mia", "handoff", "create", *arguments],
        env={**os.environ, "CLOUDLET_PASSWORD": PASSWORD},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + DEADLINE
        while not (found := site.call.get("/v1/handoffs?state=copying")["handoffs"]):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process, found[0]["id"]
    finally:
        process.kill()
        process.communicate()


def test_a_user_names_what_goes_where(sites: Sites, users: Users) -> None:
    here, there = sites
    instance = started(users, "mine")
    nowhere = users("mia", "handoff", "create", "mine", "nowhere")
    assert (nowhere.status, nowhere.out) == (3, "")
    assert "there is no peer nowhere" in nowhere.err
    for who in ("rita", "mia"):
        refused = users(who, "peer", "show", "east")
        assert (refused.status, refused.out) == (4, "")
        assert refused.err.startswith(f"cloudlet: {who} may not do cloudlet:peers:list (")
    assert (
        "rita may not do cloudlet:handoffs:create (" in users("rita", "handoff", "create", "mine", "east").err
    )
    assert users.json("mia", "handoff", "list", "--instance", "mine") == []

    gone = users.json("mia", "handoff", "create", "mine", "east")
    assert (gone["state"], gone["instance"], gone["instance_id"]) == ("completed", "mine", instance["id"])
    assert gone["peer"] == gone["peer_id"] == here.peer_id, "who may not list peers knows no more of them"
    for named in ("mine", instance["id"]):
        (row,) = users.json("root", "handoff", "list", "--instance", named)
        assert list(row)[:4] == ["id", "instance_id", "direction", "peer_id"], "as ever"
        assert (row["instance"], row["peer"], row["peer_id"]) == ("mine", "east", here.peer_id)
    shown = users.json("root", "handoff", "show", gone["id"])
    assert (shown["instance"], shown["peer"]) == ("mine", "east")
    (line,) = (
        line for line in users("root", "handoff", "list").out.splitlines() if f" {gone['id']} " in line
    )
    assert [cell.strip() for cell in line.split("|")[2:5]] == ["mine", "out", "east"]
    only = users("root", "handoff", "list", "-c", "instance_id", "-c", "peer_id")
    assert instance["id"] in only.out, "a column that is asked for is there"
    assert users("mia", "handoff", "list", "--instance", "nothing").status == 3

    forgotten = users("mia", "instance", "delete", "mine")
    assert (forgotten.status, forgotten.err) == (
        0, f"instance mine is forgotten here; it goes on at {there.call.url}\n",
    )  # fmt: skip
    (row,) = users.json("mia", "handoff", "list", "--instance", instance["id"])
    assert row["instance"] == instance["id"], "it has no name here any more"
    at_east = Users(users.monkeypatch, there.call.url)
    assert at_east("mia", "instance", "delete", "mine").err == "instance mine is ended\n"


def test_by_the_id_of_the_peer_and_with_the_sdk(sites: Sites, users: Users) -> None:
    here, there = sites
    instance = started(users, "back")
    assert users("mia", "handoff", "create", "back", here.peer_id).status == 0
    with connect(there.call.url, user="mia", password=PASSWORD) as site:
        assert site.wait_for_operation(site.hand_off(instance["id"], "home")).state == "succeeded"
        last = users("mia", "instance", "delete", "back", "--no-wait")
        assert last.err == "instance back is being ended\n"
        site.wait_for_operation(site.delete_instance(instance["id"]))


def test_who_waits_is_told_that_it_was_cancelled(sites: Sites, users: Users) -> None:
    here, _ = sites
    started(users, "stays")
    with waiting(here, "stays", "east", *SLOWLY) as (process, handoff):
        cancelled = users.json("mia", "handoff", "cancel", handoff)
        assert (cancelled["id"], cancelled["state"], cancelled["instance"]) == (handoff, "reverted", "stays")
        out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (1, "")
    assert err == f"cloudlet: hand-off {handoff} was cancelled: stays stays here\n"
    assert users.json("mia", "instance", "show", "stays")["state"] == "active"
    with connect(here.call.url, user="mia", password=PASSWORD) as site:
        begun = site.hand_off(site.find_instance("stays"), "east", bandwidth_mbit=0.5, deadline_seconds=600)
        site.cancel_operation(begun)
        with pytest.raises(CancelledError):
            site.wait_for_operation(begun)
    assert users("mia", "instance", "delete", "stays").status == 0


def test_who_waits_is_told_that_it_may_go_on_without_the_site(sites: Sites, users: Users) -> None:
    here, _ = sites
    started(users, "alone")
    with waiting(here, "alone", "east", *SLOWLY) as (process, handoff):
        here.end(signal.SIGKILL)
        out, err = process.communicate(timeout=DEADLINE)
    here.start()
    assert (process.returncode, out) == (1, "")
    assert err.endswith("; the hand-off may go on: cloudlet handoff list)\n"), err
    assert json.loads(users("mia", "handoff", "cancel", handoff, "-f", "json").out)["state"] == "reverted"
    assert users("mia", "instance", "delete", "alone").status == 0
