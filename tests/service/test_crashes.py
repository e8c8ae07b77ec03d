"""The server is killed at every step of every kind of operation; the machines and the next server go on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from cloudlet.hypervisor.records import records
from cloudlet.service.flows import FLOWS
from cloudlet.service.options import Options
from cloudlet.store.bases import BaseStore
from cloudlet.store.exchange import export_base
from tests.service.conftest import Made, Running, serving
from tests.service.crashes import MOMENTS, SCENARIOS, check_after, create, dying, play

SEED = 20240605
# All of them are in the soak.
SAMPLE = random.Random(SEED).sample(MOMENTS, 4)


def test_every_kind_of_operation_is_tried() -> None:
    elsewhere = {"base.import", "base.fetch", "handoff.send", "handoff.receive"}
    assert SCENARIOS.keys() | elsewhere == FLOWS.keys()


@pytest.mark.parametrize(("kind", "step", "state"), SAMPLE)
def test_killed_at_a_step(
    kind: str, step: str, state: str, options: Options, made: Made, hashed: str, tmp_path: Path
) -> None:
    with dying(tmp_path, made, hashed, kind, step, state) as (process, call):
        play(SCENARIOS[kind], call, made, options)
        assert process.wait(20) == -signal.SIGKILL, "it was not killed at this moment"
    found = check_after(options)
    assert found["states"][kind] == "succeeded", "it did not go on"


def test_killed_while_a_base_is_imported(options: Options, made: Made, hashed: str, tmp_path: Path) -> None:
    export_base(BaseStore(made.cache / "bases").get(made.base_id), tmp_path / "base")
    with dying(tmp_path, made, hashed, "base.import", "import", "succeeded") as (process, call):
        row = call.post("/v1/bases", {"base": {"name": "fake-base"}})["base"]
        call("PUT", f"/v1/bases/{row['id']}/file", data=(tmp_path / "base").read_bytes())
        assert process.wait(20) == -signal.SIGKILL
    assert check_after(options)["states"]["base.import"] == "succeeded"


@pytest.mark.slow
def test_killed_at_random_moments_under_load(
    options: Options, made: Made, hashed: str, tmp_path: Path
) -> None:
    dice = random.Random(SEED)
    for _ in range(2):
        with dying(tmp_path, made, hashed) as (process, call):
            users = [
                threading.Thread(target=play, args=(create, call.as_("root"), made, options))
                for _ in range(4)
            ]
            for user in users:
                user.start()
            time.sleep(dice.uniform(0.2, 2.0))
            process.kill()
            for user in users:
                user.join(60)
    check_after(options)


def test_machines_go_on_while_nobody_serves(
    options: Options, made: Made, hashed: str, tmp_path: Path
) -> None:
    with dying(tmp_path, made, hashed) as (_, call):
        app = call.publish(made.overlay)
        goes_on, ends = call.start(app), call.start(app)
    machines = {record.endpoints[0].host_port: record for _, record in records(options.machine.instances_dir)}
    doomed = machines[ends["endpoints"][0]["port"]].machine
    assert doomed
    os.kill(doomed.pid, signal.SIGKILL)
    with serving(options) as running:
        running.call.wait_event("instance.ended", ends["id"])
        assert running.call.instance(ends["id"])["state"] == "failed"
        again = running.call.instance(goes_on["id"])
        assert (again["state"], again["endpoints"]) == ("active", goes_on["endpoints"])
        assert running.call.post(f"/v1/instances/{again['id']}/pause")["instance"]["state"] == "paused"
    assert check_after(options)["instances"] == {ends["id"]: "failed", goes_on["id"]: "paused"}


def test_an_operation_that_is_cancelled_is_undone(running: Running, made: Made) -> None:
    call = running.call
    app = call.publish(made.overlay)
    for _ in range(4):
        answer = call.post("/v1/instances", {"instance": {"app_id": app["id"]}})
        cancelled = call("DELETE", f"/v1/operations/{answer['operation']['id']}")
        ended = call.ended(answer["operation"])
        if cancelled.status_code == 409:
            assert ended["state"] == "succeeded"
            continue
        instance = call.instance(answer["operation"]["resources"]["instance"])
        if ended["state"] == "cancelled":
            assert instance["state"] == "failed"
            assert instance["error"]["detail"].startswith("cancelled")
            assert instance["endpoints"] == []


def test_a_copy_of_the_database_taken_amid_writing_recovers(
    options: Options, made: Made, hashed: str, tmp_path: Path
) -> None:
    """As a backup of a running machine has it: the file and its WAL, of one moment."""
    database = tmp_path / "state" / "site.sqlite"
    copy = tmp_path / "copy"
    copy.mkdir()
    with dying(tmp_path, made, hashed) as (process, call):
        users = [
            threading.Thread(target=play, args=(create, call.as_("root"), made, options)) for _ in range(4)
        ]
        for user in users:
            user.start()
        time.sleep(random.Random(SEED).uniform(0.5, 1.5))
        process.send_signal(signal.SIGSTOP)
        for file in database.parent.glob("site.sqlite*"):
            if not file.name.endswith("-shm"):  # it is made anew
                shutil.copy(file, copy)
        assert (copy / "site.sqlite-wal").stat().st_size > 0, "nothing was being written"
        process.kill()
        process.send_signal(signal.SIGCONT)
        for user in users:
            user.join(60)
    for file in database.parent.glob("site.sqlite*"):
        file.unlink()
    for file in copy.iterdir():
        file.rename(database.parent / file.name)
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    check_after(options)
