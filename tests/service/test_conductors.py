"""Several processes of one site: servers that answer, conductors that work, a job board in a real Redis."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from cloudlet.hypervisor.records import records
from cloudlet.keeper.folder import is_kept
from tests.redis import Redis, redis
from tests.service.conftest import DEADLINE, Caller, Made
from tests.service.served import Served, served, settings_file


@dataclass
class Shared:
    """A site whose work is shared."""

    folder: Path
    settings: Path
    board: Redis
    conductors: list[subprocess.Popen[bytes]]

    @property
    def log(self) -> Path:
        return self.folder / "conductors.log"

    def conduct(self) -> subprocess.Popen[bytes]:
        """Start one more conductor."""
        before = self.log.read_text().count("takes jobs") if self.log.exists() else 0
        with self.log.open("ab") as log:
            process = subprocess.Popen(conductor_command(self.settings), stdout=log, stderr=log)
        self.conductors.append(process)
        wait(lambda: self.log.read_text().count("takes jobs") > before, self.log)
        return process

    def keeping_house(self) -> subprocess.Popen[bytes]:
        """The conductor that keeps house."""
        wait(lambda: "keeps house" in self.log.read_text(), self.log)
        return self.conductors[0]

    def is_empty(self) -> bool:
        """Whether no keeper and no machine is left."""
        keepers = [path for path in (self.folder / "state" / "keepers").glob("*") if is_kept(path)]
        return not keepers and not records(self.folder / "state" / "instances")


def conductor_command(settings: Path) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "cloudlet.cli.conductor", "--config-file", str(settings)]


def wait(until: Any, log: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while not until():
        assert time.monotonic() < deadline, log.read_text(errors="replace") if log.exists() else "no log"
        time.sleep(0.05)


@pytest.fixture
def shared(tmp_path: Path, made: Made, hashed: str) -> Iterator[Shared]:
    """A job board, and the settings of a site that has it; at the end no conductor is left."""
    with redis(tmp_path) as board:
        work = {"job_board": board.url, "threads": 4}
        settings = settings_file(tmp_path, made, hashed, work=work, limits={"instances": 6, "cpus": 100})
        found = Shared(tmp_path, settings, board, [])
        try:
            yield found
        finally:
            for process in found.conductors:
                process.kill()
                process.wait()


@contextmanager
def also_served(shared: Shared) -> Iterator[Served]:
    """One more server of the site."""
    other = shared.settings.with_name("other.conf")
    other.write_text(shared.settings.read_text())
    with served(other) as found:
        yield found


def live(call: Caller, app: dict[str, Any], rounds: int, ended: list[str]) -> None:
    """Make instances and delete them; what does not fit is tried again."""
    asked = {"instance": {"app_id": app["id"]}}
    for _ in range(rounds):
        while (answer := call("POST", "/v1/instances", asked)).status_code == 503:
            time.sleep(0.1)
        operation = call.done(answer.json())
        instance = call.instance(operation["resources"]["instance"])
        if instance["state"] == "active":
            assert requests.get(instance["endpoints"][0]["url"], timeout=10).text == "hello\n"
        call.done(call.delete(f"/v1/instances/{instance['id']}"))
        ended.append(instance["state"])


def test_one_of_two_conductors_is_killed_under_load(shared: Shared, made: Made) -> None:
    shared.conduct()
    shared.conduct()
    with served(shared.settings) as first, also_served(shared) as second:
        app = first.call.publish(made.overlay)
        ended: list[str] = []
        callers = [Caller(server.call.url, "mia") for server in (first, second) for _ in range(2)]
        users = [threading.Thread(target=live, args=(caller, app, 5, ended)) for caller in callers]
        for user in users:
            user.start()
        wait(lambda: len(ended) >= 4, shared.log)
        shared.keeping_house().kill()
        most = 0
        while any(user.is_alive() for user in users):
            most = max(most, second.call.get("/v1/cloudlets/self")["cloudlet"]["used"]["instances"])
            time.sleep(0.05)
        assert ended == ["active"] * 20
        assert most <= 6
        numbers = [event["number"] for event in second.call.events()]
        assert numbers == list(range(1, len(numbers) + 1))
        operations = second.call.get("/v1/operations?limit=1000")["operations"]
        assert {operation["state"] for operation in operations} == {"succeeded"}
        assert len([one for one in operations if one["kind"] == "instance.create"]) == 20
    wait(shared.is_empty, shared.log)


def test_the_board_loses_its_memory(shared: Shared, made: Made) -> None:
    """What was on the board is in the database, and comes on the board again."""
    with served(shared.settings) as server:
        call = server.call
        app = call.publish(made.overlay)
        answer = call.post("/v1/instances", {"instance": {"app_id": app["id"]}})
        shared.board.kill()
        lost = call.post("/v1/instances", {"instance": {"app_id": app["id"]}})
        shared.board.start()
        shared.conduct()
        for operation in (answer, lost):
            done = call.done(operation)
            call.done(call.delete(f"/v1/instances/{done['resources']['instance']}"))
    wait(shared.is_empty, shared.log)


@pytest.mark.slow
def test_what_one_process_is_told_all_know(shared: Shared, made: Made) -> None:
    """A machine that ends, an operation that is cancelled, an event that is waited for."""
    house = shared.conduct()
    shared.keeping_house()
    shared.conduct()
    with served(shared.settings) as first, also_served(shared) as second:
        app = first.call.publish(made.overlay)
        instances = [first.call.start(app) for _ in range(2)]
        house.kill()  # who kept house, and perhaps watched these machines
        for instance in instances:
            ((_, record),) = [
                (path, found)
                for path, found in records(shared.folder / "state" / "instances")
                if found.endpoints[0].host_port == instance["endpoints"][0]["port"]
            ]
            assert record.machine
            os.kill(record.machine.pid, signal.SIGKILL)
        for instance in instances:
            second.call.wait_event("instance.ended", instance["id"])
            assert first.call.instance(instance["id"])["state"] == "failed"
            second.call.done(first.call.delete(f"/v1/instances/{instance['id']}"))
        for _ in range(3):
            answer = first.call.post("/v1/instances", {"instance": {"app_id": app["id"]}})
            cancelled = second.call("DELETE", f"/v1/operations/{answer['operation']['id']}")
            ended = second.call.ended(answer["operation"])
            assert ended["state"] == ("succeeded" if cancelled.status_code == 409 else "cancelled") or (
                cancelled.status_code == 202 and ended["state"] == "succeeded"
            )
            first.call.done(second.call.delete(f"/v1/instances/{ended['resources']['instance']}"))
        shared.conductors[1].terminate()
        assert shared.conductors[1].wait(DEADLINE) == 0
    wait(shared.is_empty, shared.log)


def test_leases_end_where_nobody_keeps_house_but_a_conductor(shared: Shared, made: Made) -> None:
    shared.conduct()
    with served(shared.settings) as server:
        app = server.call.publish(made.overlay)
        instance = server.call.start(app, lease_seconds=1)
        server.call.wait_event("instance.expired", instance["id"])
        assert server.call.instance(instance["id"])["state"] == "expired"
        server.call.patch(f"/v1/instances/{instance['id']}", {"instance": {"lease_seconds": 60}})
        assert requests.get(instance["endpoints"][0]["url"], timeout=10).text == "hello\n"
        server.call.done(server.call.delete(f"/v1/instances/{instance['id']}"))


def test_figures_of_a_conductor(shared: Shared, made: Made) -> None:
    text = shared.settings.read_text().replace("[work]", "[work]\nmetrics_listen = 127.0.0.1:9")
    port = int(shared.board.url.rpartition(":")[2].partition("/")[0]) + 1
    shared.settings.write_text(text.replace("127.0.0.1:9", f"127.0.0.1:{port}"))
    shared.conduct()
    with served(shared.settings) as server:
        instance = server.call.start(server.call.publish(made.overlay))
        server.call.done(server.call.delete(f"/v1/instances/{instance['id']}"))
    figures = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
    assert 'cloudlet_step_seconds_count{operation="instance.create",step="start"} 1.0' in figures
    assert 'cloudlet_synthesis_seconds_count{moment="ready"} 1.0' in figures


@pytest.mark.slow
def test_errors_of_a_conductor(shared: Shared, tmp_path: Path, made: Made, hashed: str) -> None:
    def said(settings: Path) -> tuple[int, str]:
        done = subprocess.run(
            conductor_command(settings), capture_output=True, text=True, check=False, timeout=DEADLINE
        )
        return done.returncode, done.stderr

    shared.board.kill()
    code, text = said(shared.settings)
    assert code == 1 and "job board" in text and "cannot be reached" in text
    (tmp_path / "alone").mkdir()
    alone = settings_file(tmp_path / "alone", made, hashed)
    code, text = said(alone)
    assert code == 2 and "no job board is configured" in text
    shared.board.start()
    # The same site, once with a board and once without.
    alone.write_text(shared.settings.read_text().replace("job_board", "# job_board"))
    with served(alone):
        code, text = said(shared.settings)
        assert code == 5 and "served already" in text
