"""The machine is shut down: what runs is suspended before, and goes on when the site is started again."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from cloudlet.hypervisor.records import records
from cloudlet.service import shutdown
from cloudlet.store.database import Database
from cloudlet.store.rows import INSTANCES, Instance, InstanceState
from tests.service.conftest import DEADLINE, Caller, Made
from tests.service.served import served, settings_file


def manage(settings: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("cloudlet-manage")), "--config-file", str(settings), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE)


def test_suspended_before_and_resumed_after(tmp_path: Path, made: Made, hashed: str) -> None:
    settings = settings_file(tmp_path, made, hashed)
    with served(settings) as server:
        call = server.call
        app = call.publish(made.overlay)
        active, paused = call.start(app), call.start(app)
        call.post(f"/v1/instances/{paused['id']}/pause")
        done = manage(settings, "suspend")
        assert (done.returncode, done.stderr) == (0, "2 instances are suspended\n"), done
        assert {one["state"] for one in call.get("/v1/instances")["instances"]} == {"suspended"}
        refused = call("POST", "/v1/instances", {"instance": {"app_id": app["id"]}})
        assert refused.status_code == 503, "what comes now would be lost"
    assert records(tmp_path / "state" / "instances") == []
    with served(settings) as server:
        assert server.call.instance(active["id"])["state"] == "suspended", (
            "only the service was started again"
        )
    another_boot(tmp_path / "state" / "site.sqlite")
    with served(settings) as server:
        call = server.call
        call.wait_event("operation.succeeded", resumed(call, active["id"]))
        back = call.instance(active["id"])
        assert back["state"] == "active"
        assert requests.get(back["endpoints"][0]["url"], timeout=10).text == "hello\n"
        assert call.instance(paused["id"])["state"] == "suspended"
        call.done(call.post(f"/v1/instances/{paused['id']}/resume"))
        for instance in (active, paused):
            call.done(call.delete(f"/v1/instances/{instance['id']}"))
    assert manage(settings, "suspend").returncode == 0, "nothing runs"


def test_what_is_on_its_way_between_sites_is_waited_for(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'site.sqlite'}")
    database.create()
    about = {"base_identity": "b" * 64, "memory_bytes": 1 << 20, "disk_bytes": 1 << 30, "cpus": 1}
    moving = Instance(project_id="p", user_id="u", name="i", state=InstanceState.MOVING, **about)  # type: ignore[arg-type]
    database.write(lambda connection: INSTANCES.insert(connection, moving))
    assert [one.id for one in shutdown.still_running(database)] == [moving.id]
    database.close()


def another_boot(database: Path) -> None:
    """As it is when the machine was started again."""
    with sqlite3.connect(database) as connection:
        done = connection.execute("UPDATE facts SET value = 'heard another' WHERE name = 'shutdown'")
        assert done.rowcount == 1
    connection.close()


@pytest.mark.slow
def test_it_is_taken_back(tmp_path: Path, made: Made, hashed: str) -> None:
    settings = settings_file(tmp_path, made, hashed)
    with served(settings) as server:
        call = server.call
        app = call.publish(made.overlay)
        instance = call.start(app)
        assert manage(settings, "suspend").returncode == 0
        assert manage(settings, "suspend", "--off").returncode == 0
        call.wait_event("operation.succeeded", resumed(call, instance["id"]))
        assert call.instance(instance["id"])["state"] == "active"
        another = call.start(app)
        for one in (instance, another):
            call.done(call.delete(f"/v1/instances/{one['id']}"))


def resumed(call: Caller, instance_id: str) -> str:
    """The operation that resumes an instance."""
    deadline = time.monotonic() + DEADLINE
    while True:
        operations = call.get("/v1/operations?kind=instance.resume")["operations"]
        found = [one["id"] for one in operations if one["resources"]["instance"] == instance_id]
        if found:
            return str(found[0])
        assert time.monotonic() < deadline, "it is not resumed"
        time.sleep(0.1)


def test_nobody_serves(tmp_path: Path, made: Made, hashed: str) -> None:
    """That is said, and the next start finds all as it was."""
    settings = settings_file(tmp_path, made, hashed)
    with served(settings) as server:
        instance = server.call.start(server.call.publish(made.overlay))
    done = manage(settings, "suspend", "--timeout", "1")
    assert done.returncode == 1
    assert "1 instance still runs" in done.stderr
    assert "is the service running?" in done.stderr
    with served(settings) as server:
        assert server.call.instance(instance["id"])["state"] == "active"
        server.call.done(server.call.delete(f"/v1/instances/{instance['id']}"))
