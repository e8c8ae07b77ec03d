"""``cloudlet serve`` on PostgreSQL and on MariaDB: a day, a rush, a kill, and a repeated request."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from cloudlet.cli.manage import main as manage
from cloudlet.hypervisor.records import records
from cloudlet.settings import load
from tests import databases
from tests.service.conftest import PASSWORD, Caller, Made, nothing_runs
from tests.service.served import served, settings_file
from tests.service.test_cli import as_it_was

MOST = 3
"""Instances that fit."""


@dataclass
class Site:
    """A site that is not served yet."""

    file: Path
    made: Made


@pytest.fixture(scope="module", params=["postgresql", "mariadb"])
def administrator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with getattr(databases, request.param)(tmp_path_factory.mktemp(request.param)) as url:
        yield url


@pytest.fixture
def site(administrator: str, made: Made, hashed: str, tmp_path: Path) -> Iterator[Site]:
    with databases.database_of(administrator, "cloudlet") as url:
        # oslo.config has a meaning for the sign.
        connection = {"connection": url.replace("$", "$$")}
        file = settings_file(tmp_path, made, hashed, database=connection, limits={"instances": MOST})
        settings = load(str(file))
        try:
            yield Site(file, made)
            nothing_runs(settings)
        finally:
            for _, record in records(settings.instances_dir):  # of a test that failed
                if record.machine:
                    os.kill(record.machine.pid, signal.SIGKILL)
        assert not (settings.state_dir / "site.sqlite").exists()


def no_gaps(call: Caller) -> None:
    numbers = [event["number"] for event in call.events()]
    assert numbers == list(range(1, len(numbers) + 1))


def delete_all(call: Caller) -> None:
    for instance in call.get("/v1/instances?limit=1000")["instances"]:
        call.done(call.delete(f"/v1/instances/{instance['id']}"))


def test_a_day(site: Site, tmp_path: Path) -> None:
    (tmp_path / "password").write_text(PASSWORD)
    options = ["--role", "member", "--project", "shop", "--password-file", str(tmp_path / "password")]
    with as_it_was():
        assert manage(["--config-file", str(site.file), "user", "set", "nina", *options]) == 0
    with served(site.file) as running:
        nina = running.call.as_("nina")
        app = running.call.as_("paula").publish(site.made.overlay)
        last = nina.get("/v1/events")["last"]
        seen: list[str] = []

        def follow() -> None:
            after = last
            while "instance.deleted" not in seen:
                page = running.call.as_("nina").get("/v1/events", params={"after": after, "wait": 30})
                seen.extend(event["kind"] for event in page["events"])
                after = page["last"]

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        instance = nina.start(app, metadata={"for": "tests"}, lease_seconds=600)
        assert (instance["state"], instance["metadata"]) == ("active", {"for": "tests"})
        assert nina.patch(f"/v1/instances/{instance['id']}", {"instance": {"name": "ä 🌩"}})
        assert nina.instance(instance["id"])["name"] == "ä 🌩"
        saving = nina.post(f"/v1/instances/{instance['id']}/overlay", {"overlay": {"name": "mine"}})
        saved = nina.done(saving)["resources"]["overlay"]
        assert nina.get(f"/v1/overlays/{saved}")["overlay"]["state"] == "active"
        nina.done(nina.post(f"/v1/instances/{instance['id']}/suspend"))
        nina.done(nina.post(f"/v1/instances/{instance['id']}/resume"))
        nina.done(nina.delete(f"/v1/instances/{instance['id']}"))
        follower.join(30)
        assert not follower.is_alive()
        kinds = [kind for kind in seen if kind.startswith("instance.")]
        assert (kinds[:2], kinds[-1]) == (["instance.requested", "instance.active"], "instance.deleted")
        assert nina("GET", f"/v1/instances/{instance['id']}").status_code == 404
        assert running.call.as_("max")("GET", f"/v1/overlays/{saved}").status_code == 404
        no_gaps(running.call)
        assert running.end() == 0


def test_a_rush_stays_within_the_limit(site: Site) -> None:
    with served(site.file) as running:
        app = running.call.publish(site.made.overlay)
        together = threading.Barrier(8)

        def create(_: int) -> int:
            call = running.call.as_("mia")
            call.get("/v1/apps")
            together.wait(30)
            return call("POST", "/v1/instances", {"instance": {"app_id": app["id"]}}).status_code

        for _ in range(2):
            with ThreadPoolExecutor(8) as threads:
                answers = sorted(threads.map(create, range(8)))
            assert answers == [202] * MOST + [503] * (8 - MOST)
            delete_all(running.call)
        no_gaps(running.call)


def test_a_kill_amid_work(site: Site) -> None:
    with served(site.file) as running:
        call = running.call
        app = call.publish(site.made.overlay)
        runs = call.start(app)
        asked = [
            call.post(
                "/v1/instances", {"instance": {"app_id": app["id"]}}, headers={"Idempotency-Key": f"key-{n}"}
            )["operation"]
            for n in range(MOST - 1)
        ]
        assert running.end(signal.SIGKILL) == -signal.SIGKILL
    with served(site.file) as running:
        call = running.call
        for number, operation in enumerate(asked):
            again = call.post(
                "/v1/instances",
                {"instance": {"app_id": app["id"]}},
                headers={"Idempotency-Key": f"key-{number}"},
            )["operation"]
            assert again["id"] == operation["id"]
            assert call.ended(operation)["state"] == "succeeded"
        other = call(
            "POST", "/v1/instances", {"instance": {"app_id": app["id"], "name": "x"}},
            headers={"Idempotency-Key": "key-0"},
        )  # fmt: skip
        assert other.status_code == 409
        instances = call.get("/v1/instances")["instances"]
        assert [instance["state"] for instance in instances] == ["active"] * MOST
        assert call.instance(runs["id"])["endpoints"] == runs["endpoints"]
        assert len(records(load(str(site.file)).instances_dir)) == MOST
        # Amid deleting, too.
        for instance in instances:
            call.delete(f"/v1/instances/{instance['id']}")
        running.end(signal.SIGKILL)
    with served(site.file) as running:
        deadline = time.monotonic() + 30
        while running.call.get("/v1/instances")["instances"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        operations = running.call.get("/v1/operations?limit=1000")["operations"]
        for operation in operations:
            assert running.call.ended(operation)["state"] == "succeeded", operation
        no_gaps(running.call)
