"""What fits and what does not: limits are kept by races too."""

from __future__ import annotations

import threading
from dataclasses import replace

from cloudlet.service.options import Options
from tests.service.conftest import Caller, Made, nothing_runs, serving


def test_what_does_not_fit_is_told_what_is_missing(options: Options, made: Made) -> None:
    limits = replace(options.limits, instances=1, cpus=1, memory_bytes=5 << 20, disk_bytes=5 << 20)
    with serving(replace(options, limits=limits)) as running:
        call = running.call
        app = call.publish(made.overlay)
        instance = call.start(app)
        answer = call("POST", "/v1/instances", {"instance": {"app_id": app["id"]}})
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "30"
        (error,) = answer.json()["errors"]
        assert error["code"] == "cloudlet.instance.no_capacity"
        for missing in ("1 instances (1 of 1", "1 cpus", "3.0 MiB of memory", "3.0 MiB of disk"):
            assert missing in error["detail"]
        assert len(call.get("/v1/instances")["instances"]) == 1
        call.done(call.post(f"/v1/instances/{instance['id']}/suspend"))
        second = call.start(app)
        assert call("POST", f"/v1/instances/{instance['id']}/resume").status_code == 503
        for one in (instance, second):
            call.done(call.delete(f"/v1/instances/{one['id']}"))
        call.done(call.delete(f"/v1/instances/{call.start(app)['id']}"))
    nothing_runs(options.machine)


def test_limits_are_never_exceeded(options: Options, made: Made) -> None:
    """Clients that all want what is left, while an observer counts."""
    limits = replace(options.limits, instances=4)
    with serving(replace(options, limits=limits)) as running:
        app = running.call.publish(made.overlay)
        started: list[str] = []
        refused: list[str] = []
        most = 0
        done = threading.Event()

        def observe() -> None:
            nonlocal most
            call = running.call.as_("root")
            while not done.is_set():
                most = max(most, call.get("/v1/cloudlets/self")["cloudlet"]["used"]["instances"])

        def user() -> None:
            call = running.call.as_("mia")
            for _ in range(4):
                answer = call("POST", "/v1/instances", {"instance": {"app_id": app["id"]}})
                if answer.status_code == 503:
                    refused.append(answer.json()["errors"][0]["detail"])
                    continue
                operation = call.done(answer.json())
                started.append(operation["resources"]["instance"])
                call.done(call.delete(f"/v1/instances/{started[-1]}"))

        observer = threading.Thread(target=observe)
        observer.start()
        users = [threading.Thread(target=user) for _ in range(8)]
        for thread in users:
            thread.start()
        for thread in users:
            thread.join(120)
        done.set()
        observer.join(10)
        assert most <= 4
        assert len(started) + len(refused) == 32
        assert len(started) >= 4
        assert running.call.get("/v1/instances")["instances"] == []
    nothing_runs(options.machine)


def test_a_repeated_request_makes_one_instance(call: Caller, made: Made) -> None:
    app = call.publish(made.overlay)
    body = {"instance": {"app_id": app["id"]}}
    answers = []

    def post() -> None:
        answers.append(call.as_("mia")("POST", "/v1/instances", body, headers={"Idempotency-Key": "once"}))

    threads = [threading.Thread(target=post) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {answer.status_code for answer in answers} <= {202, 409}
    assert len({answer.json()["operation"]["id"] for answer in answers if answer.status_code == 202}) == 1
    assert len(call.get("/v1/instances")["instances"]) == 1
    other = call.as_("mia")("POST", "/v1/instances", {"instance": {"overlay_id": app["id"]}},
                            headers={"Idempotency-Key": "once"})  # fmt: skip
    assert other.status_code == 409
    assert len(call.get("/v1/instances")["instances"]) == 1
