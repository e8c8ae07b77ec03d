"""A day at a site: publish, start, use, pause, save, suspend, delete, over HTTP."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from pathlib import Path

import pytest

from cloudlet.hypervisor.records import records
from tests.service.conftest import Caller, Made, Running

pytestmark = pytest.mark.usefixtures("running")


def ask(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10.0) as answer:
        return bytes(answer.read())


def count(instance: dict[str, object]) -> int:
    """What the counter in the guest's memory says, which counts each question."""
    endpoint = instance["endpoints"][0]["url"]  # type: ignore[index]
    return int(ask(f"{endpoint}/cgi-bin/counter"))


def test_a_user_gets_an_app(call: Caller, made: Made) -> None:
    app = call.as_("paula").publish(made.overlay)
    mia = call.as_("mia")
    assert [found["name"] for found in mia.get("/v1/apps")["apps"]] == ["hello"]
    instance = mia.start(app, metadata={"purpose": "test"})
    assert instance["state"] == "active"
    assert instance["name"] == "hello"
    assert instance["metadata"] == {"purpose": "test"}
    assert {"root", "answering", "ready"} <= instance["timings"].keys()
    assert ask(instance["endpoints"][0]["url"]) == b"hello\n"
    log = mia("GET", f"/v1/instances/{instance['id']}/console-log")
    assert log.headers["Content-Type"].startswith("text/plain")
    assert "generation" in log.text
    mia.done(mia.delete(f"/v1/instances/{instance['id']}"))
    assert mia("GET", f"/v1/instances/{instance['id']}").status_code == 404
    kinds = [event["kind"] for event in mia.events() if event["resource_id"] == instance["id"]]
    assert kinds == ["instance.requested", "instance.active", "instance.deleting", "instance.deleted"]


def test_a_paused_instance_stands_still(call: Caller, made: Made) -> None:
    instance = call.start(call.publish(made.overlay))
    path = f"/v1/instances/{instance['id']}"
    assert call.post(f"{path}/pause")["instance"]["state"] == "paused"
    again = call("POST", f"{path}/pause")
    assert again.status_code == 409
    assert again.json()["errors"][0]["code"] == "cloudlet.instance.conflict"
    assert call.post(f"{path}/resume")["instance"]["state"] == "active"
    assert ask(instance["endpoints"][0]["url"]) == b"hello\n"


def test_what_is_saved_goes_on_where_it_was(call: Caller, made: Made) -> None:
    mia = call.as_("mia")
    instance = mia.start(call.publish(made.overlay))
    before = [count(instance) for _ in range(3)][-1]
    done = mia.done(mia.post(f"/v1/instances/{instance['id']}/overlay", {"overlay": {"name": "mine"}}))
    assert count(instance) == before + 1, "the instance did not go on"
    mia.done(mia.delete(f"/v1/instances/{instance['id']}"))
    saved = mia.get(f"/v1/overlays/{done['resources']['overlay']}")["overlay"]
    assert saved["state"] == "active"
    assert saved["public"] is False
    assert saved["description"]["app"]["name"] == "hello"
    started = mia.done(mia.post("/v1/instances", {"instance": {"overlay_id": saved["id"]}}))
    again = mia.instance(started["resources"]["instance"])
    assert count(again) == before + 1
    assert call.as_("max")("GET", f"/v1/overlays/{saved['id']}").status_code == 404


def test_a_suspended_instance_takes_no_memory_and_comes_back(call: Caller, made: Made) -> None:
    instance = call.start(call.publish(made.overlay))
    path = f"/v1/instances/{instance['id']}"
    before = count(instance)
    call.done(call.post(f"{path}/suspend"))
    suspended = call.instance(instance["id"])
    assert (suspended["state"], suspended["endpoints"]) == ("suspended", [])
    assert call.get("/v1/cloudlets/self")["cloudlet"]["used"]["memory_bytes"] == 0
    call.done(call.post(f"{path}/resume"))
    again = call.instance(instance["id"])
    assert again["state"] == "active"
    assert count(again) == before + 1


def test_a_machine_that_dies_is_noticed_at_once(call: Caller, made: Made, running: Running) -> None:
    instance = call.start(call.publish(made.overlay))
    began = time.monotonic()
    _kill_machine(running)
    event = call.wait_event("instance.ended", instance["id"])
    assert time.monotonic() - began < 10
    assert "ended by itself" in event["detail"]["error"]["message"]
    failed = call.instance(instance["id"])
    assert (failed["state"], failed["endpoints"]) == ("failed", [])
    assert failed["error"]["code"] == "cloudlet.instance.failed"


def test_an_app_that_wants_it_is_started_again(call: Caller, made: Made, running: Running) -> None:
    app = call.publish(made.overlay)
    assert call.patch(f"/v1/apps/{app['id']}", {"app": {"restart": True}})["app"]["restart"] is True
    instance = call.start(app)
    _kill_machine(running)
    call.wait_event("instance.ended", instance["id"])
    deadline = time.monotonic() + 20
    while (again := call.instance(instance["id"]))["state"] != "active":
        assert time.monotonic() < deadline, again
        time.sleep(0.05)
    assert again["restarts"] == 1
    assert ask(again["endpoints"][0]["url"]) == b"hello\n"


def test_a_keeper_that_is_killed_takes_its_machine_along(call: Caller, made: Made, running: Running) -> None:
    instance = call.start(call.publish(made.overlay))
    settings = running.site.options.machine
    (_, record), *others = records(settings.instances_dir)
    assert others == []
    assert record.machine
    owner = int(Path(f"/proc/{record.machine.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(owner, signal.SIGKILL)
    event = call.wait_event("instance.ended", instance["id"])
    assert "keeper was killed" in event["detail"]["error"]["message"]
    deadline = time.monotonic() + 10
    while record.machine.alive():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_base_that_is_exported_can_be_uploaded(call: Caller, made: Made, tmp_path: Path) -> None:
    from cloudlet.store.bases import BaseStore
    from cloudlet.store.exchange import export_base

    base = BaseStore(made.cache / "bases").get(made.base_id)
    exported = tmp_path / "base"
    export_base(base, exported)
    paula = call.as_("paula")
    row = paula.post("/v1/bases", {"base": {"name": "fake-base"}})["base"]
    done = paula.done(paula("PUT", f"/v1/bases/{row['id']}/file", data=exported.read_bytes()).json())
    assert [step["name"] for step in done["steps"]] == ["import"]
    active = paula.get(f"/v1/bases/{row['id']}")["base"]
    assert (active["state"], active["identity"]) == ("active", made.base_id)
    broken = paula.post("/v1/bases", {"base": {"name": "broken"}})["base"]
    whole = exported.read_bytes()
    damaged = whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:]
    ended = paula.ended(paula("PUT", f"/v1/bases/{broken['id']}/file", data=damaged).json()["operation"])
    assert (ended["state"], ended["error"]["code"]) == ("failed", "cloudlet.operation.corrupt")
    assert paula.get(f"/v1/bases/{broken['id']}")["base"]["state"] == "rejected"


def _kill_machine(running: Running) -> None:
    ((_, record),) = records(running.site.options.machine.instances_dir)
    assert record.machine
    os.kill(record.machine.pid, signal.SIGKILL)


def test_an_app_may_publish_less_and_be_ready_otherwise(call: Caller, made: Made) -> None:
    app = call.publish(made.overlay)
    component = app["components"][0]
    path = f"/v1/apps/{app['id']}"
    ports = [{"port": 8080, "name": "front"}]
    changed = {"components": [{**component, "ports": ports, "readiness": "tcp:8080"}]}
    assert call.patch(path, {"app": changed})["app"]["components"][0]["readiness"] == "tcp:8080"
    instance = call.start(app)
    assert [(one["name"], one["guest_port"]) for one in instance["endpoints"]] == [("front", 8080)]
    call.done(call.delete(f"/v1/instances/{instance['id']}"))
    wanted = {"ports": [{"guest_port": 80}], "app_id": app["id"]}
    assert call("POST", "/v1/instances", {"instance": wanted}).status_code == 400
    nobody = {"components": [{**component, "ports": [], "readiness": "agent"}]}
    call.patch(path, {"app": nobody})
    instance = call.start(app)
    assert instance["endpoints"] == []
    call.done(call.delete(f"/v1/instances/{instance['id']}"))
    for rule in ("serial:x", "http:", "never"):
        refused = call("PATCH", path, {"app": {"components": [{**component, "readiness": rule}]}})
        assert refused.status_code == 400
        assert "readiness" in refused.text
