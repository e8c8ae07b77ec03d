"""Users follow an instance that is handed off: its events, its place, its address; in Python and by hand."""

from __future__ import annotations

import http.client
import json
import queue
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import requests
from sqlalchemy.engine import Connection

from cloudlet.api.service import build, server_of, tell_url
from cloudlet.client import Endpoint, Proxy, connect
from cloudlet.client.resources import Event
from cloudlet.errors import ConflictError, FailedError, NotFoundError, RefusedError, UsageError
from cloudlet.service.options import Listening, Options
from cloudlet.service.site import ServedSite
from cloudlet.store import journal
from cloudlet.store.rows import INSTANCES, InstanceState
from tests.service.certificates import certificate
from tests.service.conftest import PASSWORD, Made, Running, options_in, serving
from tests.service.two_sites import PeerSite, two_sites

DEADLINE = 60.0
WEB = 8080
"""The port of the guest's web server."""


@pytest.fixture(scope="module")
def sites(
    made: Made, hashed: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PeerSite, PeerSite]]:
    """Two sites that show the way for longer than a test takes."""
    peers = {"grace_seconds": 600}
    with two_sites(tmp_path_factory.mktemp("sites"), made, hashed, peers=peers) as both:
        for site in both:
            site.call.publish(made.overlay)
        yield both


def started(site: PeerSite, **more: Any) -> dict[str, Any]:
    """An instance of mia's."""
    mia = site.call.as_("mia")
    return mia.start(mia.get("/v1/apps")["apps"][0], **more)


def hand_off(site: PeerSite, instance: dict[str, Any]) -> dict[str, Any]:
    """Have mia's instance handed off to the peer; what it is here then."""
    mia = site.call.as_("mia")
    wanted = {"handoff": {"instance_id": instance["id"], "peer_id": site.peer_id}}
    mia.done(mia.post("/v1/handoffs", wanted))
    return mia.instance(instance["id"])


def delete(site: PeerSite, instance: dict[str, Any]) -> None:
    site.call.done(site.call.delete(f"/v1/instances/{instance['id']}"))


def mia_at(site: PeerSite) -> Proxy:
    return connect(site.call.url, user="mia", password=PASSWORD)


def page(host: str, port: int) -> str:
    with urllib.request.urlopen(f"http://{host}:{port}/", timeout=DEADLINE) as answer:
        return str(answer.read().decode())


def address(instance: dict[str, Any]) -> tuple[str, int]:
    """Where its web server is reached."""
    (endpoint,) = instance["endpoints"]
    return endpoint["host"], endpoint["port"]


def refused(place: tuple[str, int]) -> None:
    """Wait until nobody listens there."""
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            socket.create_connection(place, timeout=DEADLINE).close()
        except ConnectionRefusedError:
            return
        except ConnectionResetError:
            pass  # it is just being closed
        assert time.monotonic() < deadline, f"{place} is still there"
        time.sleep(0.05)


@dataclass
class Follower:
    """Somebody who follows an instance in a thread."""

    events: Iterator[Event]
    seen: list[Event] = field(default_factory=list)
    error: Exception | None = None
    _came: queue.Queue[Event | None] = field(default_factory=queue.Queue)

    def run(self) -> None:
        try:
            for event in self.events:
                self._came.put(event)
        except Exception as error:
            self.error = error
        self._came.put(None)

    def wait(self, kind: str) -> Event:
        """The next event of a kind."""
        while event := self._came.get(timeout=DEADLINE):
            self.seen.append(event)
            if event.kind == kind:
                return event
        raise AssertionError(f"no {kind} came, but {self.error}")

    def rest(self) -> list[Event]:
        """All events, when there are no more."""
        while event := self._came.get(timeout=DEADLINE):
            self.seen.append(event)
        if self.error:
            raise self.error
        return self.seen


@contextmanager
def following(events: Iterator[Event]) -> Iterator[Follower]:
    follower = Follower(events)
    thread = threading.Thread(target=follower.run)
    thread.start()
    yield follower
    thread.join(DEADLINE)
    assert not thread.is_alive()


def told(events: Sequence[Event]) -> list[tuple[str, int, str]]:
    return [(event.site, event.number, event.kind) for event in events]


def written(site: PeerSite, instance: dict[str, Any], after: int = 0) -> list[tuple[str, int, str]]:
    """What a site's journal has of an instance."""
    events = site.call.events(resource_id=instance["id"])
    return [(site.call.url, one["number"], one["kind"]) for one in events if one["number"] > after]


def test_events_are_followed_there_and_back(sites: tuple[PeerSite, PeerSite]) -> None:
    a, b = sites
    instance = started(a)
    began = a.call.get("/v1/events")["last"]
    with mia_at(a) as site, following(site.follow_instance(instance["id"])) as follower:
        hand_off(a, instance)
        follower.wait("instance.arrived")
        hand_off(b, instance)
        back = follower.wait("instance.arrived")
        delete(a, instance)
        seen = told(follower.rest())
    assert back.site == a.call.url
    here, there = written(a, instance, began), written(b, instance)
    turn = next(number for _, number, kind in here if kind == "instance.arrived")
    left, came = ([one for one in here if (one[1] < turn) is before] for before in (True, False))
    assert seen == [*left, *there, *came]
    assert [kind.removeprefix("instance.") for _, _, kind in seen] == [
        "moving", "moved", "arrived", "moving", "moved", "arrived", "deleting", "deleted",
    ]  # fmt: skip


def test_a_follower_who_was_cut_off_goes_on_with_the_last_event(sites: tuple[PeerSite, PeerSite]) -> None:
    a, b = sites
    instance = started(a)
    hand_off(a, instance)
    delete(b, instance)
    with mia_at(a) as site:
        everything = list(site.follow_instance(instance["id"], after=0))
        assert told(everything) == written(a, instance) + written(b, instance)
        for at, event in enumerate(everything[:-1], start=1):
            with site.elsewhere(event.site) as there:
                again = list(there.follow_instance(instance["id"], after=event.number))
            assert told(again) == told(everything[at:])
        with site.elsewhere(b.call.url) as there, pytest.raises(NotFoundError, match="has ended"):
            list(there.follow_instance(instance["id"], after=everything[-1].number))
        with pytest.raises(NotFoundError):
            site.follow_instance(instance["id"])
    delete(a, instance)


def test_who_follows_from_now_on_begins_where_the_instance_is(sites: tuple[PeerSite, PeerSite]) -> None:
    a, b = sites
    instance = started(a)
    hand_off(a, instance)
    with mia_at(a) as site:
        events = site.follow_instance(instance["id"])
        b.call.post(f"/v1/instances/{instance['id']}/pause")  # after that began, before anything is asked for
        delete(b, instance)
        assert [event.kind for event in events] == [
            "instance.paused",
            "instance.deleting",
            "instance.deleted",
        ]
    delete(a, instance)


def test_an_instance_is_located_wherever_it_is(sites: tuple[PeerSite, PeerSite]) -> None:
    a, b = sites
    instance = started(a)
    with mia_at(a) as site:
        assert site.locate_instance(instance["id"]).site is site
        hand_off(a, instance)
        found = site.locate_instance(instance["id"])
        with found.site:
            assert (found.site.place, found.instance.state, found.instance.epoch) == (b.call.url, "active", 2)
            assert found.site.pause_instance(found.instance).state == "paused"
            assert found.site.resume_instance(found.instance).state == "active"
        hand_off(b, instance)
        assert site.locate_instance(instance["id"]).site is site
        with mia_at(b) as other, (found := other.locate_instance(instance["id"])).site as there:
            assert (there.place, found.instance.epoch) == (a.call.url, 3)
        delete(a, instance)
        with pytest.raises(NotFoundError):
            site.locate_instance(instance["id"])
        with mia_at(b) as other, pytest.raises(NotFoundError):
            other.locate_instance(instance["id"])
    delete(b, instance)


@pytest.mark.slow
def test_the_source_is_not_needed_once_the_instance_has_left(made: Made, hashed: str, tmp_path: Path) -> None:
    with two_sites(tmp_path, made, hashed) as (a, b):
        a.call.publish(made.overlay)
        instance = started(a)
        with mia_at(a) as site:
            port = Endpoint(site, instance["id"], WEB)
            with following(site.follow_instance(instance["id"])) as follower:
                hand_off(a, instance)
                follower.wait("instance.arrived")
                port.call(page)
                while port.address == address(instance):  # in the grace time either leads there
                    refused(address(instance))
                    port.call(page)
                a.end()
                b.call.post(f"/v1/instances/{instance['id']}/pause")
                follower.wait("instance.paused")
                b.call.post(f"/v1/instances/{instance['id']}/resume")
                assert port.call(page) == page(*port.address)
                port.close()
                delete(b, instance)
                assert told(follower.rest())[-1][2] == "instance.deleted"


@pytest.mark.slow
def test_a_site_that_is_started_anew_is_asked_again(made: Made, hashed: str, tmp_path: Path) -> None:
    with two_sites(tmp_path, made, hashed) as (a, b):
        a.call.publish(made.overlay)
        instance = started(a)
        with mia_at(a) as site, following(site.follow_instance(instance["id"], after=0)) as follower:
            follower.wait("instance.active")
            a.end()
            a.start()
            hand_off(a, instance)
            follower.wait("instance.arrived")
            b.end(9)
            b.start()
            delete(b, instance)
            seen = told(follower.rest())
        assert seen == written(a, instance) + written(b, instance)


def test_during_the_grace_time_the_old_address_leads_to_the_new_place(
    sites: tuple[PeerSite, PeerSite],
) -> None:
    a, b = sites
    instance = started(a)
    hand_off(a, instance)
    moved = b.call.instance(instance["id"])
    assert address(moved) != address(instance)
    assert page(*address(instance)) == page(*address(moved))
    delete(b, instance)
    with pytest.raises(OSError):  # it is the machine at the other site that has answered
        page(*address(instance))
    delete(a, instance)


def test_after_the_grace_time_a_call_goes_on_at_the_new_address(
    made: Made, hashed: str, tmp_path: Path
) -> None:
    with two_sites(tmp_path, made, hashed, peers={"grace_seconds": 1}) as (a, b):
        a.call.publish(made.overlay)
        instance = started(a)
        with mia_at(a) as site, Endpoint(site, instance["id"], WEB) as port:
            assert port.address == address(instance)
            before = port.call(page)
            hand_off(a, instance)
            refused(address(instance))
            assert port.call(page) == before
            assert port.address == address(b.call.instance(instance["id"]))
            hand_off(b, instance)
            refused(port.address)
            assert (
                port.call(lambda host, port: requests.get(f"http://{host}:{port}/", timeout=9).text) == before
            )
            assert port.address == address(a.call.instance(instance["id"]))


@pytest.mark.slow
def test_threads_call_through_hand_offs(made: Made, hashed: str, tmp_path: Path) -> None:
    with two_sites(tmp_path, made, hashed, peers={"grace_seconds": 0}) as (a, b):
        a.call.publish(made.overlay)
        instance = started(a)
        done, counts, failures = threading.Event(), [0, 0, 0], list[Exception]()

        def use(which: int) -> None:
            try:
                while not done.is_set():
                    assert port.call(page)
                    counts[which] += 1
            except Exception as error:
                failures.append(error)

        with mia_at(a) as site, Endpoint(site, instance["id"], WEB) as port:
            threads = [threading.Thread(target=use, args=(which,)) for which in range(len(counts))]
            for thread in threads:
                thread.start()
            hand_off(a, instance)
            hand_off(b, instance)
            hand_off(a, instance)
            refused(address(instance))
            done.set()
            for thread in threads:
                thread.join(DEADLINE)
            assert port.call(page)
            assert port.address == address(b.call.instance(instance["id"]))
        assert failures == []
        assert all(counts)


def test_a_call_repeats_what_was_cut_and_nothing_else(sites: tuple[PeerSite, PeerSite]) -> None:
    a, _ = sites
    instance = started(a)
    with mia_at(a) as site, Endpoint(site, instance["id"], WEB) as port:
        calls = []

        def fails(error: Exception, times: int) -> Any:
            def function(host: str, port: int) -> int:
                calls.append((host, port))
                if len(calls) <= times:
                    raise error
                return len(calls)

            calls.clear()
            return function

        for error in (
            ConnectionResetError(), TimeoutError(), OSError(113, "no route"), http.client.IncompleteRead(b""),
            requests.ConnectionError(), requests.exceptions.ChunkedEncodingError(),
        ):  # fmt: skip
            assert port.call(fails(error, 2)) == 3, error
            assert set(calls) == {address(instance)}
        for error in (
            requests.HTTPError("404"), ValueError("mine"), NotFoundError("mine"),
            urllib.error.HTTPError("", 404, "", {}, None),  # type: ignore[arg-type]
        ):  # fmt: skip
            with pytest.raises(type(error)):
                port.call(fails(error, 1))
            assert len(calls) == 1, error
        with pytest.raises(ConnectionResetError):
            port.call(fails(ConnectionResetError(), 1000), deadline_seconds=0)
        assert len(calls) == 1
        with pytest.raises(NotFoundError, match="no port 81"):
            Endpoint(site, instance["id"], 81)
        site.wait_for_operation(site.suspend_instance(instance["id"]))
        with pytest.raises(ConflictError, match="suspended"):
            Endpoint(site, instance["id"], WEB)
        with pytest.raises(OSError):
            port.call(page, deadline_seconds=0.3)
        site.wait_for_operation(site.resume_instance(instance["id"]))  # type: ignore[arg-type]
        assert port.call(page)
        delete(a, instance)
        with pytest.raises(NotFoundError):
            port.call(page)


def test_what_cannot_be_done_here_any_more_says_where_the_instance_is(
    sites: tuple[PeerSite, PeerSite],
) -> None:
    a, b = sites
    instance = started(a)
    hand_off(a, instance)
    path, mia = f"/v1/instances/{instance['id']}", a.call.as_("mia")
    for method, where, body in (
        ("POST", f"{path}/pause", None),
        ("POST", f"{path}/resume", None),
        ("POST", f"{path}/suspend", None),
        ("POST", f"{path}/overlay", {"overlay": {"name": "mine"}}),
        ("GET", f"{path}/console-log", None),
        ("PATCH", path, {"instance": {"lease_seconds": 60}}),
        ("PATCH", path, {"instance": {"name": "other"}}),
        ("POST", "/v1/handoffs", {"handoff": {"instance_id": instance["id"], "peer_id": a.peer_id}}),
    ):
        answer = mia(method, where, body)
        assert answer.status_code == 409, (method, where)
        assert f"it is at {b.call.url}" in answer.json()["errors"][0]["detail"], (method, where)
    assert mia.instance(instance["id"])["name"] == b.call.instance(instance["id"])["name"] == "hello"
    delete(a, instance)
    delete(b, instance)


def test_deleting_it_where_it_has_left_forgets_it_there_only(sites: tuple[PeerSite, PeerSite]) -> None:
    a, b = sites
    instance = started(a)
    left = hand_off(a, instance)
    moved = next(event for event in reversed(a.call.events()) if event["kind"] == "instance.moved")
    delete(a, instance)
    assert a.call("GET", f"/v1/instances/{instance['id']}").status_code == 404
    assert not (a.settings.keepers_dir / instance["id"]).exists()
    refused(address(instance))
    assert page(*address(b.call.instance(instance["id"])))
    last = a.call.events(resource_id=instance["id"])[-1]
    assert (last["kind"], last["detail"]["moved_to"]) == ("instance.deleted", left["moved_to"])
    with (
        mia_at(a) as site,
        following(site.follow_instance(instance["id"], after=moved["number"])) as follower,
    ):
        assert follower.wait("instance.arrived").site == b.call.url
        hand_off(b, instance)
        assert follower.wait("instance.arrived").site == a.call.url
        assert page(*address(a.call.instance(instance["id"])))
        delete(a, instance)
        assert follower.rest()[-1].kind == "instance.deleted"
    delete(b, instance)


def test_deleting_it_where_it_has_left_works_without_its_keeper(
    made: Made, hashed: str, tmp_path: Path
) -> None:
    with two_sites(tmp_path, made, hashed, peers={"grace_seconds": 0}) as (a, b):
        a.call.publish(made.overlay)
        instance = started(a)
        hand_off(a, instance)
        refused(address(instance))
        a.end()
        a.start()
        delete(a, instance)
        assert a.call.get("/v1/instances")["instances"] == []
        assert page(*address(b.call.instance(instance["id"])))


@pytest.mark.parametrize("listen", ["127.0.0.1:0", pytest.param("0.0.0.0:0", marks=pytest.mark.slow)])
def test_where_the_api_listens_is_what_users_are_told(
    listen: str, made: Made, hashed: str, tmp_path: Path
) -> None:
    with two_sites(tmp_path, made, hashed, api={"listen": listen}) as (a, b):
        a.call.publish(made.overlay)
        instance = started(a)
        port = b.call.url.rpartition(":")[2]
        assert hand_off(a, instance)["moved_to"]["url"] == f"http://127.0.0.1:{port}"
        with mia_at(a) as site, (found := site.locate_instance(instance["id"])).site:
            assert found.instance.state == "active"


def test_a_url_that_is_configured_is_told_before_that(made: Made, hashed: str, tmp_path: Path) -> None:
    api = {"public_url": "https://edge.example.org/cloudlet/"}
    with two_sites(tmp_path, made, hashed, api=api) as (a, _):
        a.call.publish(made.overlay)
        instance = started(a)
        assert hand_off(a, instance)["moved_to"]["url"] == "https://edge.example.org/cloudlet"


@pytest.mark.parametrize(
    ("listening", "peers", "told"),
    [
        (Listening(path=Path("api.sock")), "https://edge.example.org:8791", ""),
        (Listening(host="127.0.0.1", port=0), "", "http://127.0.0.1:{port}"),
        (Listening(host="::1", port=0), "", "http://[::1]:{port}"),
        (Listening(host="0.0.0.0", port=0), "", ""),
        (
            Listening(host="0.0.0.0", port=0),
            "https://edge.example.org:8791",
            "http://edge.example.org:{port}",
        ),
        (Listening(host="::", port=0), "https://[2001:db8::1]:8791", "http://[2001:db8::1]:{port}"),
    ],
)
def test_what_a_site_knows_of_its_url(
    listening: Listening, peers: str, told: str, options: Options, tmp_path: Path
) -> None:
    if listening.path:
        listening = Listening(path=tmp_path / listening.path)
    options = replace(options, listening=listening, auth_strategy="noauth")
    with closing(ServedSite.open(options)) as site:
        site.peers.url = peers
        server = server_of(options, build(site))
        tell_url(site, server)
        port = server.where.rpartition(":")[2]
        server.stop()
        assert site.api_url == told.format(port=port)


def say_moved(running: Running, instance_id: str, url: str, epoch: int) -> None:
    """Have a site say that an instance of mia's is elsewhere."""
    where = {"cloudlet_id": "elsewhere", "url": url, "endpoints": [], "events_after": 0}

    def write(connection: Connection) -> None:
        moved = {"state": InstanceState.MOVED, "moved_to": where, "epoch": epoch}
        row = INSTANCES.update(connection, instance_id, **moved)
        journal.emit(connection, "instance", "moved", row, moved_to=where)

    running.site.database.write(write)


@pytest.fixture
def instance_at(running: Running, made: Made) -> Iterator[str]:
    """An instance of mia's at a site of this process."""
    running.call.publish(made.overlay)
    mia = running.call.as_("mia")
    yield mia.start(mia.get("/v1/apps")["apps"][0])["id"]


def test_a_site_that_does_not_say_where_it_is_cannot_be_asked(running: Running, instance_at: str) -> None:
    say_moved(running, instance_at, "", 1)
    with connect(running.call.url, user="mia", password=PASSWORD) as site:
        with pytest.raises(FailedError, match="the cloudlet elsewhere"):
            site.locate_instance(instance_at)
        with following(site.follow_instance(instance_at, after=0)) as follower:
            assert follower.wait("instance.moved").detail["moved_to"]["url"] == ""
            with pytest.raises(FailedError, match="does not say where its API is"):
                follower.rest()
        with pytest.raises(ConflictError, match="it is at the cloudlet elsewhere"):
            site.pause_instance(instance_at)


def test_sites_that_send_one_back_and_forth_are_found_out(running: Running, instance_at: str) -> None:
    with connect(running.call.url, user="mia", password=PASSWORD) as site:
        say_moved(running, instance_at, running.call.url, 2)
        with pytest.raises(FailedError, match="each site says"):
            site.locate_instance(instance_at)
        with pytest.raises(FailedError, match="each site says"):
            list(site.follow_instance(instance_at, after=0))


def test_where_an_instance_is_said_to_be_is_asked_with_care(
    running: Running, instance_at: str, made: Made, hashed: str, tmp_path: Path
) -> None:
    with connect(running.call.url, user="mia", password=PASSWORD) as site:
        say_moved(running, instance_at, "unix:/run/cloudlet/api.sock", 1)
        with pytest.raises(UsageError, match="is not a site"):
            site.locate_instance(instance_at)
        with serving(options_in(tmp_path / "other", made, hashed)) as other:
            say_moved(running, instance_at, other.call.url, 1)
            with pytest.raises(NotFoundError):
                site.locate_instance(instance_at)
            with connect(other.call.url) as nobody, pytest.raises(RefusedError):
                nobody.get_instance(instance_at)


def cli(site: PeerSite, *arguments: str) -> list[str]:
    """A command line of mia's."""
    return [
        sys.executable, "-W", "ignore", "-m", "cloudlet.cli.app", "--site", site.call.url, "--user", "mia",
        "--password-file", str(site.folder / "password"), *arguments,
    ]  # fmt: skip


def test_the_command_line_follows_too(sites: tuple[PeerSite, PeerSite]) -> None:
    a, b = sites
    (a.folder / "password").write_text(PASSWORD)
    instance = started(a, name="followed")
    command = cli(a, "instance", "follow", "followed", "-f", "json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        lines = (json.loads(line) for line in process.stdout)
        first = next(lines)
        assert (first["state"], first["site"]) == ("active", a.call.url)
        assert first["endpoints"] == [
            {"name": "web", "url": "http://{}:{}".format(*address(instance)), "guest_port": WEB}
        ]
        hand_off(a, instance)
        second = next(lines)
        moved = b.call.instance(instance["id"])
        assert (second["state"], second["site"]) == ("moved", b.call.url)
        assert second["endpoints"][0]["url"] == "http://{}:{}".format(*address(moved))
        b.call.post(f"/v1/instances/{instance['id']}/pause")  # which is no change of where it is
        delete(b, instance)
        rest = list(lines)
        assert [(one["state"], one["site"], one["endpoints"]) for one in rest] == [
            ("deleting", b.call.url, []),
            ("deleted", b.call.url, []),
        ]
        assert process.wait(DEADLINE) == 0, process.stderr.read()
    shown = subprocess.run(
        cli(a, "instance", "show", instance["id"]), capture_output=True, text=True, timeout=DEADLINE
    )
    assert f"it is at {b.call.url} now" in shown.stderr
    assert "moved" in shown.stdout
    paused = subprocess.run(
        cli(a, "instance", "pause", instance["id"]), capture_output=True, text=True, timeout=DEADLINE
    )
    assert paused.returncode == 5
    assert f"is moved: it is at {b.call.url}" in paused.stderr
    delete(a, instance)


def test_an_encrypted_way_is_not_left(options: Options, tmp_path: Path) -> None:
    files = certificate(tmp_path / "tls")
    with (
        serving(replace(options, tls=files)) as running,
        connect(running.call.url, user="mia", password=PASSWORD, verify=str(files[0])) as site,
    ):
        with pytest.raises(RefusedError, match="not encrypted"):
            site.elsewhere("http://127.0.0.1:1")
        with site.elsewhere(running.call.url) as again:
            assert again.get_cloudlet().id == site.get_cloudlet().id
