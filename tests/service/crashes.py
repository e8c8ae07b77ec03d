"""What a site is like after its server was killed, and how to have it killed. For tests and the soak."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import requests

from cloudlet.hypervisor.records import records
from cloudlet.keeper.folder import is_kept
from cloudlet.service.flows import FLOWS
from cloudlet.service.options import Options
from cloudlet.store.rows import OPERATIONS
from tests.cli.traces import first_line
from tests.service.conftest import Caller, Made, nothing_runs, serving

ROOT = Path(__file__).parents[2]
RUNS = ("active", "paused", "expired")


@contextmanager
def dying(
    folder: Path, made: Made, hashed: str, *moment: str
) -> Iterator[tuple[subprocess.Popen[str], Caller]]:
    """A server of the site in ``folder`` that is killed at a moment, or at the end of the context."""
    told = json.dumps({name: str(value) for name, value in asdict(made).items()})
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.service.dying",
        str(folder),
        told,
        hashed,
        *moment,
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process, Caller(first_line(process))
    finally:
        process.kill()
        process.communicate()


Scenario = Callable[[Caller, Made, Options], None]
"""Does what leads to an operation; the server may be gone at any moment."""


def create(call: Caller, made: Made, options: Options) -> None:
    call.start(call.publish(made.overlay))


def delete(call: Caller, made: Made, options: Options) -> None:
    instance = call.start(call.publish(made.overlay))
    call.done(call.delete(f"/v1/instances/{instance['id']}"))


def save(call: Caller, made: Made, options: Options) -> None:
    instance = call.start(call.publish(made.overlay))
    call.done(call.post(f"/v1/instances/{instance['id']}/overlay", {"overlay": {"name": "saved"}}))


def suspend(call: Caller, made: Made, options: Options) -> None:
    instance = call.start(call.publish(made.overlay))
    call.done(call.post(f"/v1/instances/{instance['id']}/suspend"))


def resume(call: Caller, made: Made, options: Options) -> None:
    instance = call.start(call.publish(made.overlay))
    call.done(call.post(f"/v1/instances/{instance['id']}/suspend"))
    call.done(call.post(f"/v1/instances/{instance['id']}/resume"))


def restart(call: Caller, made: Made, options: Options) -> None:
    app = call.publish(made.overlay)
    call.patch(f"/v1/apps/{app['id']}", {"app": {"restart": True}})
    instance = call.start(app)
    ((_, record),) = records(options.machine.instances_dir)
    assert record.machine
    os.kill(record.machine.pid, signal.SIGKILL)
    call.wait_event("instance.ended", instance["id"])
    call.get("/v1/events?wait=60&kind=none")  # until the server is gone, which ends this


def prestage(call: Caller, made: Made, options: Options) -> None:
    call.done(call.post(f"/v1/apps/{call.publish(made.overlay)['id']}/prestage"))


def drain(call: Caller, made: Made, options: Options) -> None:
    call.start(call.publish(made.overlay))
    call.done(call.post("/v1/cloudlets/self/drain", {"drain": {}}))


SCENARIOS: dict[str, Scenario] = {
    "instance.create": create,
    "instance.restart": restart,
    "instance.delete": delete,
    "instance.save": save,
    "instance.suspend": suspend,
    "instance.resume": resume,
    "app.prestage": prestage,
    "cloudlet.drain": drain,
}
"""How each kind of operation comes about; those of bases and hand-offs have tests of their own."""


MOMENTS = [
    (kind, step.step, state)
    for kind in SCENARIOS
    for step in FLOWS[kind].steps
    for state in ("running", "succeeded")
]
"""When a server can be killed: an operation of a kind is about to note that a step has a state."""


def play(scenario: Scenario, call: Caller, made: Made, options: Options) -> None:
    """Play a scenario until it ends or the server is gone."""
    with suppress(requests.RequestException, AssertionError):
        scenario(call, made, options)


def check_after(options: Options) -> dict[str, Any]:
    """Serve the site again: all has ended or goes on, and at its end nothing is left. What was found."""
    with serving(options) as running:
        call = running.call
        operations = running.site.database.read(OPERATIONS.list)
        states = {operation.kind: call.ended({"id": operation.id})["state"] for operation in operations}
        numbers = [event["number"] for event in call.events()]
        assert numbers == list(range(1, len(numbers) + 1)), "an event is missing"
        instances = call.get("/v1/instances?limit=1000")["instances"]
        for instance in instances:
            _check_instance(instance, options)
        kept = {folder.name for folder in options.machine.keepers_dir.glob("*") if is_kept(folder)}
        assert kept <= {instance["id"] for instance in instances}, "a machine is nobody's"
        for overlay in call.get("/v1/overlays")["overlays"]:
            # An upload that was cut waits for its client to go on.
            assert overlay["state"] in ("active", "rejected", "queued", "uploading"), overlay
        assert running.site.blobs.verify() == []
        for instance in instances:
            call.done(call.delete(f"/v1/instances/{instance['id']}"))
    nothing_runs(options.machine)
    return {"states": states, "instances": {instance["id"]: instance["state"] for instance in instances}}


def _check_instance(instance: dict[str, Any], options: Options) -> None:
    """An instance that is said to run does, and one that is said not to does not."""
    kept = is_kept(options.machine.keepers_dir / instance["id"])
    assert instance["state"] in (*RUNS, "suspended", "failed"), instance
    assert kept == (instance["state"] in RUNS), instance
    if instance["state"] == "active":
        answer = requests.get(instance["endpoints"][0]["url"], timeout=10)
        assert answer.text == "hello\n"
