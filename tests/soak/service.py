"""The faults of a site that serves, in large numbers: killed at every step and at random moments, under load.

Everything here is on the fake driver: what differs with real machines, ``tests/service/test_real.py`` shows.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import requests

from cloudlet.api.identity import hash_of
from cloudlet.service.options import Options
from tests.service.conftest import PASSWORD, USERS, Caller, Made, make, nothing_runs, options_in, serving
from tests.service.crashes import MOMENTS, SCENARIOS, check_after, create, dying, play
from tests.service.test_openapi import explore

if TYPE_CHECKING:
    from tests.soak.__main__ import Soak

CLIENTS = 16
PHASES = ("--phases", "fuzzing,stateful")
"""Not "coverage": it calls a header wrong that nobody knows, which HTTP wants to be passed over."""


def killed_steps(soak: Soak) -> None:
    """Every step of every kind, at its beginning and at its end."""

    def tries(count: int) -> Iterator[str]:
        with _made() as (folder, made, hashed):
            for number, (kind, step, state) in enumerate(MOMENTS[:count]):
                place = folder / f"step-{number}"
                place.mkdir()
                options = options_in(place, made, hashed)
                try:
                    with dying(place, made, hashed, kind, step, state) as (process, call):
                        play(SCENARIOS[kind], call, made, options)
                        assert process.wait(30) == -signal.SIGKILL, "it was not killed"
                    found = check_after(options)
                    assert found["states"][kind] == "succeeded", found
                except AssertionError as error:
                    yield f"{kind}, {step} {state}: {error}"

    soak.row("server killed at a step", "the next one goes on", len(MOMENTS), tries)


def killed_under_load(soak: Soak) -> None:
    """One site whose server is killed again and again while users come and go."""

    def tries(count: int) -> Iterator[str]:
        dice = soak.dice("service")
        with _made() as (folder, made, hashed):
            options = options_in(folder, made, hashed)
            for _ in range(count):
                delay = dice.uniform(0.1, 3.0)
                with dying(folder, made, hashed) as (process, call):
                    users = [
                        threading.Thread(target=play, args=(come_and_go, call.as_("root"), made, options))
                        for _ in range(4)
                    ]
                    for user in users:
                        user.start()
                    time.sleep(delay)
                    process.kill()
                    for user in users:
                        user.join(120)
            try:
                check_after(options)
            except AssertionError as error:
                yield str(error)

    soak.row("server killed at a random moment under load", "machines adopted, none lost", 100, tries)


def come_and_go(call: Caller, made: Made, options: Options) -> None:
    """A user who starts an app, and ends it."""
    while True:
        create(call, made, options)
        for instance in call.get("/v1/instances?state=active")["instances"][:1]:
            call.done(call.delete(f"/v1/instances/{instance['id']}"))


def many_instances(soak: Soak) -> None:
    """A thousand instances, made and ended by sixteen clients at once, while an observer counts."""

    def tries(count: int) -> Iterator[str]:
        with _made() as (folder, made, hashed):
            options = options_in(folder, made, hashed)
            options = replace(options, limits=replace(options.limits, instances=12), workers=16)
            with serving(options) as running:
                app = running.call.publish(made.overlay)
                yield from _crowd(running.call, app, count, 12)
                if left := running.call.get("/v1/instances")["instances"]:
                    yield f"{len(left)} instances are left"
            nothing_runs(options.machine)

    soak.row(
        "instance made and ended by 16 clients at once, 12 allowed", "no error, no more than 12", 1000, tries
    )


def real_instances(soak: Soak) -> None:
    """Real QEMU guests, several at once by each of four clients: all answer, and nothing is left."""

    def tries(count: int) -> Iterator[str]:
        with _made() as (folder, made, hashed):
            options = options_in(folder, made, hashed)
            options = replace(options, machine=replace(soak.settings, state_dir=folder / "state"))
            problems: list[str] = []

            def user() -> None:
                try:
                    _use(running.call.as_("mia"), app, max(1, count // 4))
                except (AssertionError, requests.RequestException) as error:
                    problems.append(str(error))

            with serving(options) as running:
                app = running.call.publish(soak.overlay)
                users = [threading.Thread(target=user) for _ in range(4)]
                for thread in users:
                    thread.start()
                for thread in users:
                    thread.join()
                yield from problems
                if left := running.call.get("/v1/instances")["instances"]:
                    yield f"{len(left)} instances are left"
            nothing_runs(options.machine)

    soak.row("real instances at once by 4 clients", "all answer, nothing is left", 12, tries)


def _use(call: Caller, app: dict[str, object], count: int) -> None:
    """Start instances, have each answer while all run, and end them."""
    asked = [call.post("/v1/instances", {"instance": {"app_id": app["id"]}}) for _ in range(count)]
    instances = [call.instance(call.done(answer)["resources"]["instance"]) for answer in asked]
    for instance in instances:
        assert requests.get(instance["endpoints"][0]["url"], timeout=60).status_code == 200, instance
    for instance in instances:
        call.done(call.delete(f"/v1/instances/{instance['id']}"))


def _crowd(call: Caller, app: dict[str, object], count: int, limit: int) -> Iterator[str]:
    problems: list[str] = []
    left, lock, done = [count], threading.Lock(), threading.Event()

    def user() -> None:
        mine = call.as_("mia")
        while True:
            with lock:
                if not left[0]:
                    return
                left[0] -= 1
            try:
                _one(mine, app)
            except (AssertionError, requests.RequestException) as error:
                problems.append(str(error))

    def observe() -> None:
        mine = call.as_("root")
        while not done.wait(0.05):
            used = mine.get("/v1/cloudlets/self")["cloudlet"]["used"]["instances"]
            if used > limit:
                problems.append(f"{used} instances at once")

    threads = [threading.Thread(target=user) for _ in range(CLIENTS)]
    observer = threading.Thread(target=observe)
    for thread in (*threads, observer):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    observer.join()
    yield from problems


def _one(call: Caller, app: dict[str, object]) -> None:
    """Start an instance, as soon as there is room, and end it."""
    while (answer := call("POST", "/v1/instances", {"instance": {"app_id": app["id"]}})).status_code == 503:
        time.sleep(0.05)
    assert answer.status_code == 202, answer.text
    instance_id = call.done(answer.json())["resources"]["instance"]
    call.done(call.delete(f"/v1/instances/{instance_id}"))


def explored(soak: Soak) -> None:
    """All operations as every persona, with all of schemathesis' checks."""

    def tries(count: int) -> Iterator[str]:
        personas = [*USERS, None][:count]
        with _made() as (folder, made, hashed), serving(options_in(folder, made, hashed)) as running:
            running.call.publish(made.overlay)
            for persona in personas:
                done = explore(folder, running.call.url, persona, "--max-examples", "20", *PHASES)
                if done.returncode:
                    said = done.stdout
                    found = max(said.find("= FAILURES"), said.find("= ERRORS"), 0)
                    yield f"{persona}: {said[found : found + 3000]}"

    soak.row("all operations explored as a persona", "no 5xx, nothing undocumented", len(USERS) + 1, tries)


@contextmanager
def _made() -> Iterator[tuple[Path, Made, str]]:
    """A folder with what publishers of fake machines bring, and the hash of the users' password."""
    with tempfile.TemporaryDirectory(prefix="cloudlet-soak-site-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        yield folder, make(folder / "made"), hash_of(PASSWORD)
