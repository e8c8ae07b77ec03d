"""What becomes of an instance when something goes wrong on its way from one state to the next."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cloudlet.errors import ConflictError
from cloudlet.hypervisor.records import records
from cloudlet.service.options import Options
from cloudlet.service.work import operation
from cloudlet.store import tables
from cloudlet.store.rows import INSTANCES, OVERLAYS, FileState, InstanceState
from tests.service.conftest import Caller, Made, Running, end_machines, nothing_runs, serving
from tests.service.test_everyday import ask, count


def test_who_suspends_twice_loses_nothing(call: Caller, made: Made) -> None:
    instance = call.start(call.publish(made.overlay))
    path = f"/v1/instances/{instance['id']}"
    before = count(instance)
    first, second = call.post(f"{path}/suspend"), call.post(f"{path}/suspend")
    cancelled = call("DELETE", f"/v1/operations/{second['operation']['id']}")
    assert cancelled.status_code in (202, 409)
    call.ended(first["operation"])
    call.ended(second["operation"])
    assert call.instance(instance["id"])["state"] == "suspended"
    call.done(call.post(f"{path}/resume"))
    assert count(call.instance(instance["id"])) == before + 1


def test_a_suspend_that_fails_changes_nothing(call: Caller, made: Made, running: Running) -> None:
    instance = call.start(call.publish(made.overlay))
    # A file in the place of the folder: nothing can be written there.
    folder = running.site.instances.suspended_file(instance["id"]).parent
    folder.touch()
    ended = call.ended(call.post(f"/v1/instances/{instance['id']}/suspend")["operation"])
    folder.unlink()
    assert [step["state"] for step in ended["steps"]] == ["failed", "pending"]
    after = call.instance(instance["id"])
    assert (ended["state"], after["state"]) == ("failed", "active")
    assert after["endpoints"] == instance["endpoints"]
    assert ask(instance["endpoints"][0]["url"]) == b"hello\n"


def test_a_first_step_that_fails_says_why(call: Caller, made: Made, running: Running) -> None:
    app = call.publish(made.overlay)
    running.site.options.machine.keepers_dir.touch()
    answer = call.post("/v1/instances", {"instance": {"app_id": app["id"]}})
    ended = call.ended(answer["operation"])
    running.site.options.machine.keepers_dir.unlink()
    assert [step["state"] for step in ended["steps"]] == ["failed", "pending"]
    failed = call.instance(answer["operation"]["resources"]["instance"])
    assert failed["state"] == "failed"
    assert "keepers" in failed["error"]["detail"]
    assert call.get("/v1/cloudlets/self")["cloudlet"]["used"]["instances"] == 0


def test_a_delete_is_not_taken_back_and_may_be_asked_for_again(call: Caller, made: Made) -> None:
    instance = call.start(call.publish(made.overlay))
    path = f"/v1/instances/{instance['id']}"
    first = call.delete(path)["operation"]
    again = call("DELETE", path)
    assert again.status_code in (202, 404)
    if again.status_code == 202:
        assert again.json()["operation"]["id"] == first["id"]
    assert call("DELETE", f"/v1/operations/{first['id']}").status_code == 409
    assert call.ended(first)["state"] == "succeeded"


def test_keepers_that_the_system_ended_are_noticed(options: Options, made: Made) -> None:
    """As at the shutdown of a machine: SIGTERM to all."""
    with serving(options) as running:
        instance = running.call.start(running.call.publish(made.overlay))
        ((_, record),) = records(options.machine.instances_dir)
    assert record.machine
    keeper = int(Path(f"/proc/{record.machine.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(keeper, signal.SIGTERM)
    assert record.machine.wait(10)
    with serving(options) as running:
        running.call.wait_event("instance.ended", instance["id"])
        after = running.call.instance(instance["id"])
        assert (after["state"], after["endpoints"]) == ("failed", [])
        running.call.done(running.call.delete(f"/v1/instances/{instance['id']}"))
    nothing_runs(options.machine)


def test_a_restart_that_was_due_is_made_once(options: Options, made: Made) -> None:
    with serving(options) as running:
        app = running.call.publish(made.overlay)
        running.call.patch(f"/v1/apps/{app['id']}", {"app": {"restart": True}})
        instance = running.call.start(app)
        ((_, record),) = records(options.machine.instances_dir)
    assert record.machine
    os.kill(record.machine.pid, signal.SIGKILL)
    with serving(options) as running:
        call = running.call
        call.wait_event("instance.ended", instance["id"])
        for operation in call.get("/v1/operations?kind=instance.restart")["operations"]:
            assert call.ended(operation)["state"] == "succeeded"
        kinds = [event["kind"] for event in call.events() if event["noun"] == "operation"]
        assert kinds.count("operation.succeeded") == 2, "of the start and of the restart"
    end_machines(options.machine)


def test_the_same_key_for_another_instance_is_another_request(call: Caller, made: Made) -> None:
    app = call.publish(made.overlay)
    saved = []
    for _ in range(2):
        path = f"/v1/instances/{call.start(app)['id']}/overlay"
        answer = call("POST", path, {"overlay": {"name": "s"}}, headers={"Idempotency-Key": "k"})
        saved.append(answer.status_code)
    assert saved == [202, 409]


def test_an_idle_site_writes_nothing(running: Running) -> None:
    call = running.call
    call.post("/v1/webhooks", {"webhook": {"url": "http://127.0.0.1:9/", "kinds": ["none"]}})
    call.post("/v1/overlays", {"overlay": {"name": "o"}})
    time.sleep(0.5)
    written = threading.Event()
    running.site.database.when_committed(written.set)
    assert not written.wait(1.0), "somebody writes, though nothing happens"


def test_a_machine_that_ends_as_it_becomes_active_is_not_missed(running: Running, made: Made) -> None:
    call = running.call
    instance = call.start(call.publish(made.overlay))
    ((_, record),) = records(running.site.options.machine.instances_dir)
    running.site.database.write(
        lambda connection: INSTANCES.update(connection, instance["id"], state=InstanceState.SYNTHESISING)
    )
    assert record.machine
    os.kill(record.machine.pid, signal.SIGKILL)
    for _ in range(400):
        status = running.site.keeping.status(instance["id"])
        if status and status.state == "ended":
            break
        time.sleep(0.02)
    active = InstanceState.ACTIVE
    running.site.database.write(lambda connection: INSTANCES.update(connection, instance["id"], state=active))
    running.site.keeping.look_again(instance["id"])
    assert call.instance(instance["id"])["state"] == "failed"


def test_what_was_begun_before_is_done_before(running: Running, made: Made) -> None:
    """As when a process was killed amid an operation, and the user has asked for the next one meanwhile."""
    site, call = running.site, running.call
    instance = call.start(call.publish(made.overlay))
    row = site.database.read(lambda connection: INSTANCES.get(connection, instance["id"]))
    lost = operation("instance.suspend", row, {"instance": row.id}, paused=False)
    site.database.write(lambda connection: site.work.add(connection, lost))
    saved = call.post(f"/v1/instances/{row.id}/overlay", {"overlay": {"name": "late"}})
    ended = call.ended(saved["operation"])
    assert (ended["state"], call.ended({"id": lost.id})["state"]) == ("failed", "succeeded")
    assert call.instance(row.id)["state"] == "suspended"
    call.done(call.post(f"/v1/instances/{row.id}/resume"))
    assert call.instance(row.id)["state"] == "active"


def test_an_operation_ends_though_its_overlay_was_deleted(running: Running, made: Made) -> None:
    site, call = running.site, running.call
    instance = call.start(call.publish(made.overlay))
    with stopped(site.options.machine.keepers_dir / instance["id"]):
        saved = call.post(f"/v1/instances/{instance['id']}/overlay", {"overlay": {"name": "gone"}})
        overlay = saved["operation"]["resources"]["overlay"]
        assert call("DELETE", f"/v1/overlays/{overlay}").status_code == 204
    assert call.ended(saved["operation"])["state"] == "failed"
    assert call.instance(instance["id"])["state"] == "active"


@contextmanager
def stopped(folder: Path) -> Iterator[None]:
    """A keeper that stands still in the context."""
    (pid,) = keepers_in(folder)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def keepers_in(folder: Path) -> list[int]:
    """The process that holds the lock of a keeper's folder."""
    inode = (folder / "lock").stat().st_ino
    lines = Path("/proc/locks").read_text().splitlines()
    return [int(line.split()[4]) for line in lines if line.split()[5].endswith(f":{inode}")]


def test_a_renewed_lease_is_not_ended_by_what_was_read_before(running: Running, made: Made) -> None:
    site, call = running.site, running.call
    instance = call.start(call.publish(made.overlay), lease_seconds=1)
    call.wait_event("instance.expired", instance["id"])
    stale = site.database.read(lambda connection: INSTANCES.get(connection, instance["id"]))
    call.patch(f"/v1/instances/{stale.id}", {"instance": {"lease_seconds": 600}})
    with pytest.raises(ConflictError):
        site.instances.delete(stale, only_if={"state": stale.state, "expires_at": stale.expires_at})
    assert call.instance(stale.id)["state"] == "active"


def test_a_killed_keeper_is_followed_by_another_where_the_app_wants_it(running: Running, made: Made) -> None:
    site, call = running.site, running.call
    app = call.publish(made.overlay)
    call.patch(f"/v1/apps/{app['id']}", {"app": {"restart": True}})
    instance = call.start(app)
    for pid in keepers_in(site.options.machine.keepers_dir / instance["id"]):
        os.kill(pid, signal.SIGKILL)
    call.wait_event("instance.ended", instance["id"])
    deadline = time.monotonic() + 30
    while call.instance(instance["id"])["state"] != "active":
        assert time.monotonic() < deadline, call.instance(instance["id"])
        time.sleep(0.1)


def test_bytes_that_had_their_name_and_no_row_get_one(running: Running, made: Made) -> None:
    """As a crash between the two leaves them."""
    site, call = running.site, running.call
    app = call.publish(made.overlay)
    overlay_id = app["components"][0]["overlay_id"]
    overlay = site.database.read(lambda connection: OVERLAYS.get(connection, overlay_id))
    assert overlay.digest

    def crash(connection: Connection) -> None:
        connection.execute(sa.delete(tables.blob_references))
        connection.execute(sa.delete(tables.blobs))
        OVERLAYS.update(connection, overlay_id, state=FileState.VERIFYING)

    site.database.write(crash)
    site.blobs.reap()
    site.overlays.finish(overlay_id, site.blobs.staging("not-here"))
    assert site.blobs.holders(overlay.digest) == [f"overlay:{overlay_id}"]
    assert site.blobs.reap() == []
    assert call("GET", f"/v1/overlays/{overlay_id}/file").status_code == 200


def test_a_deletion_waits_for_nobody_who_takes_long(options: Options, made: Made) -> None:
    """All threads are taken by a save that does not end; an instance that waits behind it is deleted."""
    with serving(replace(options, workers=1)) as running:
        call = running.call
        app = call.publish(made.overlay)
        slow = call.start(app)
        with stopped(options.machine.keepers_dir / slow["id"]):
            saved = call.post(f"/v1/instances/{slow['id']}/overlay", {"overlay": {"name": "s"}})
            waits = call.post("/v1/instances", {"instance": {"app_id": app["id"]}})["operation"]
            call.done(call.delete(f"/v1/instances/{waits['resources']['instance']}"))
            assert call.get(f"/v1/operations/{saved['operation']['id']}")["operation"]["state"] == "running"
            assert call.ended(waits)["state"] == "cancelled"
        call.done(saved)
        call.done(call.delete(f"/v1/instances/{slow['id']}"))
    nothing_runs(options.machine)
