"""A site that is being emptied: nothing new begins, what is there goes on, and every process knows it."""

from __future__ import annotations

import threading

import pytest
import requests

from cloudlet.service import capacity, shutdown
from cloudlet.service.capacity import SHUTDOWN
from cloudlet.service.options import Options
from cloudlet.store import facts
from cloudlet.store.database import Database
from cloudlet.store.rows import CloudletState, Owned
from tests.service.conftest import Caller, Made, nothing_runs, serving

SELF = "/v1/cloudlets/self"
DRAINING = {"cloudlet": {"state": "draining"}}
UP = {"cloudlet": {"state": "up"}}


def refused(answer: requests.Response) -> None:
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["Retry-After"]) > 0
    (error,) = answer.json()["errors"]
    assert error["code"] == "cloudlet.instance.draining"
    assert "being emptied" in error["detail"]
    assert "another site" in error["detail"]


def test_what_is_there_goes_on_and_nothing_new_begins(call: Caller, made: Made) -> None:
    app = call.publish(made.overlay)
    instance, sleeps = call.start(app, lease_seconds=600), call.start(app)
    call.done(call.post(f"/v1/instances/{sleeps['id']}/suspend"))
    begun = call(
        "POST", "/v1/instances", {"instance": {"app_id": app["id"]}}, headers={"Idempotency-Key": "k"}
    )
    call.done(begun.json())

    assert call.patch(SELF, DRAINING)["cloudlet"]["state"] == "draining"
    assert call.as_("rita").get(SELF)["cloudlet"]["state"] == "draining"
    refused(call("POST", "/v1/instances", {"instance": {"app_id": app["id"]}}))
    refused(call("POST", f"/v1/instances/{sleeps['id']}/resume"))
    assert call.instance(sleeps["id"])["state"] == "suspended"
    again = call(
        "POST", "/v1/instances", {"instance": {"app_id": app["id"]}}, headers={"Idempotency-Key": "k"}
    )
    assert again.json()["operation"]["id"] == begun.json()["operation"]["id"], "it is nothing new"

    path = f"/v1/instances/{instance['id']}"
    assert call.patch(path, {"instance": {"lease_seconds": 900}})["instance"]["lease_seconds"] == 900
    assert call.post(f"{path}/pause")["instance"]["state"] == "paused"
    assert call.post(f"{path}/resume")["instance"]["state"] == "active"
    call.done(call.post(f"{path}/overlay", {"overlay": {"name": "saved"}}))
    call.done(call.post(f"/v1/apps/{app['id']}/prestage"))
    call.done(call.post(f"{path}/suspend"))
    call.done(call.delete(path))
    assert call("GET", "/healthcheck").status_code == 204

    assert call.patch(SELF, UP)["cloudlet"]["state"] == "up"
    call.done(call.post(f"/v1/instances/{sleeps['id']}/resume"))
    call.start(app)


def test_a_change_is_an_event_and_a_figure(call: Caller) -> None:
    for body in (UP, DRAINING, DRAINING, UP, UP):
        call.patch(SELF, body)
    site = call.get(SELF)["cloudlet"]["id"]
    events = [event for event in call.events() if event["noun"] == "cloudlet"]
    assert [event["kind"] for event in events] == ["cloudlet.draining", "cloudlet.up"]
    assert {(event["resource_id"], event["user_id"]) for event in events} == {(site, "root")}
    for state, other in (("draining", "up"), ("up", "draining")):
        call.patch(SELF, {"cloudlet": {"state": state}})
        figures = call("GET", "/metrics").text
        assert f'cloudlet_state{{state="{state}"}} 1.0' in figures
        assert f'cloudlet_state{{state="{other}"}} 0.0' in figures


@pytest.mark.parametrize(
    "body",
    [
        None,
        {},
        {"cloudlet": {}},
        {"cloudlet": {"state": "down"}},
        {"cloudlet": {"state": "DRAINING"}},
        {"cloudlet": {"state": None}},
        {"cloudlet": {"state": True}},
        {"cloudlet": {"state": "up", "name": "x"}},
    ],
    ids=str,
)
def test_what_is_no_state(body: object, call: Caller) -> None:
    answer = call("PATCH", SELF, body)
    assert answer.status_code == 400
    assert answer.json()["errors"][0]["code"] == "cloudlet.site.invalid"
    assert call.get(SELF)["cloudlet"]["state"] == "up"


def test_it_is_for_the_operator(call: Caller) -> None:
    for user in ("paula", "mia", "rita"):
        assert call.as_(user)("PATCH", SELF, DRAINING).status_code == 403
    assert call.get(SELF)["cloudlet"]["state"] == "up"


def test_it_stays_so_over_restarts_and_is_known_to_every_process(options: Options, made: Made) -> None:
    with serving(options) as running:
        app = running.call.publish(made.overlay)
        kept = running.call.start(app)
        # As another process of the site does it.
        other = Database(options.database_url)
        by = Owned(id=running.site.id, project_id="shop", user_id="root")
        other.write(lambda connection: capacity.become(connection, CloudletState.DRAINING, by))
        other.close()
        refused(running.call("POST", "/v1/instances", {"instance": {"app_id": app["id"]}}))
    with serving(options) as running:
        call = running.call
        assert call.get(SELF)["cloudlet"]["state"] == "draining"
        assert call.instance(kept["id"])["state"] == "active"
        refused(call("POST", "/v1/instances", {"instance": {"app_id": app["id"]}}))
        call.done(call.delete(f"/v1/instances/{kept['id']}"))
    nothing_runs(options.machine)


def test_none_is_admitted_once_it_was_said(call: Caller, made: Made) -> None:
    """Users who ask and ask, while the operator drains: what the site lists then is all there ever is."""
    app = call.publish(made.overlay)
    ended = threading.Event()
    admitted: list[str] = []

    def ask() -> None:
        mine = call.as_("mia")
        while not ended.is_set():
            answer = mine("POST", "/v1/instances", {"instance": {"app_id": app["id"]}})
            if answer.status_code == 202:
                admitted.append(answer.json()["operation"]["resources"]["instance"])
            else:
                refused(answer)

    users = [threading.Thread(target=ask) for _ in range(4)]
    for thread in users:
        thread.start()
    while len(admitted) < 3:
        ended.wait(0.01)
    call.patch(SELF, DRAINING)
    there = {row["id"] for row in call.get("/v1/instances")["instances"]}
    ended.wait(0.5)
    ended.set()
    for thread in users:
        thread.join(60)
    assert set(admitted) == there
    for one in admitted:
        call.done(call.delete(f"/v1/instances/{one}"))


def test_a_shutdown_of_the_machine_changes_nothing_of_it(options: Options, made: Made) -> None:
    """What runs there goes on behind it, and the site is still to be emptied."""
    with serving(options) as running:
        call = running.call
        instance = call.start(call.publish(made.overlay))
        shutdown.ask(running.site.database)
        call.wait_event("instance.suspended", instance["id"])
        assert call.get(SELF)["cloudlet"]["state"] == "draining"
        call.patch(SELF, DRAINING)
        for operation in call.get("/v1/operations")["operations"]:
            call.ended(operation)
    database = Database(options.database_url)
    database.write(lambda connection: facts.write(connection, SHUTDOWN, "heard in another boot"))
    database.close()
    with serving(options) as running:
        call = running.call
        (resumed,) = call.get("/v1/operations?kind=instance.resume")["operations"]
        call.done({"operation": resumed})
        assert call.instance(instance["id"])["state"] == "active"
        assert call.get(SELF)["cloudlet"]["state"] == "draining"
        call.done(call.delete(f"/v1/instances/{instance['id']}"))
        assert [event["kind"] for event in call.events(kind="cloudlet")] == ["cloudlet.draining"]
    nothing_runs(options.machine)
