"""What time does to instances."""

from __future__ import annotations

from dataclasses import replace

from cloudlet.service.options import Leases, Options
from tests.service.conftest import Made, nothing_runs, serving


def test_a_lease_is_warned_of_ends_and_is_followed_by_deletion(options: Options, made: Made) -> None:
    leases = Leases(default=0, most=3600, warning=2, grace=1)
    with serving(replace(options, leases=leases)) as running:
        call = running.call
        instance = call.start(call.publish(made.overlay), lease_seconds=3)
        assert instance["expires_at"]
        for kind in ("expiring", "expired", "deleted"):
            call.wait_event(f"instance.{kind}", instance["id"])
        kinds = [event["kind"] for event in call.events() if event["resource_id"] == instance["id"]]
        assert kinds == [
            f"instance.{what}"
            for what in ("requested", "active", "expiring", "expired", "deleting", "deleted")
        ]
    nothing_runs(options.machine)


def test_a_lease_is_renewed(options: Options, made: Made) -> None:
    leases = Leases(default=0, most=3600, warning=1, grace=30)
    with serving(replace(options, leases=leases)) as running:
        call = running.call
        instance = call.start(call.publish(made.overlay), lease_seconds=1)
        call.wait_event("instance.expired", instance["id"])
        assert call.instance(instance["id"])["state"] == "expired"
        path = f"/v1/instances/{instance['id']}"
        assert call("POST", f"{path}/resume").status_code == 409
        renewed = call.patch(path, {"instance": {"lease_seconds": 600}})["instance"]
        assert renewed["state"] == "active"
        assert renewed["expires_at"] > instance["expires_at"]
        assert call("PATCH", path, {"instance": {"lease_seconds": 3601}}).status_code == 400
        assert (
            call("POST", "/v1/instances", {"instance": {"app_id": "x", "lease_seconds": 0}}).status_code
            == 400
        )
        call.done(call.delete(path))
    nothing_runs(options.machine)


def test_the_longest_lease_is_what_one_gets_who_asks_for_none(options: Options, made: Made) -> None:
    with serving(replace(options, leases=Leases(default=0, most=600, warning=1, grace=1))) as running:
        instance = running.call.start(running.call.publish(made.overlay))
        assert instance["lease_seconds"] == 600
        running.call.done(running.call.delete(f"/v1/instances/{instance['id']}"))
    nothing_runs(options.machine)
