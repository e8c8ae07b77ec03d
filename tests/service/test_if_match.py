"""Changes that are meant for a row as it was: ``ETag`` and ``If-Match``, also while others change it."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from cloudlet.api import conditions
from cloudlet.store.rows import BASES, Base
from tests.service.conftest import Caller, Made, Running


def rows(call: Caller, made: Made) -> dict[str, str]:
    """The path of a row of each noun that has a tag, and ``PATCH`` or ``DELETE``."""
    app = call.publish(made.overlay)
    instance = call.start(app)
    overlay = call.post("/v1/overlays", {"overlay": {"name": "o"}})["overlay"]
    base = call.post("/v1/bases", {"base": {"name": "b"}})["base"]
    webhook = call.post("/v1/webhooks", {"webhook": {"url": "http://127.0.0.1:9/", "kinds": ["none"]}})[
        "webhook"
    ]
    return {
        "instance": f"/v1/instances/{instance['id']}",
        "app": f"/v1/apps/{app['id']}",
        "overlay": f"/v1/overlays/{overlay['id']}",
        "base": f"/v1/bases/{base['id']}",
        "webhook": f"/v1/webhooks/{webhook['id']}",
    }


def tag(call: Caller, path: str) -> str:
    return str(call("GET", path).headers["ETag"])


def settled(call: Caller, path: str) -> str:
    """The tag of a row when nothing changes it any more: a keeper may have had something to add."""
    for _ in range(50):
        before = tag(call, path)
        time.sleep(0.1)
        if before == tag(call, path):
            return before
    raise AssertionError("it changes by itself, and goes on doing so")


def conditional(call: Caller, method: str, path: str, wanted: str, body: Any = None) -> int:
    answer = call(method, path, body, headers={"If-Match": wanted})
    if answer.status_code == 412:
        (error,) = answer.json()["errors"]
        noun = path.split("/")[2].removesuffix("s")
        assert error["code"] == f"cloudlet.{noun}.changed"
        assert "get it again" in error["detail"]
    return answer.status_code


def test_every_noun_has_a_tag_that_a_change_is_bound_to(call: Caller, made: Made) -> None:
    for noun, path in reversed(rows(call, made).items()):
        before = settled(call, path)
        for other in ('"0"', f"W/{before}", before.strip('"'), "", '"a", "b"', before.replace('"', '"0', 1)):
            assert conditional(call, "DELETE", path, other) == 412, other
        changes = {
            "app": {"app": {"summary": "s"}},
            "instance": {"instance": {"metadata": {"a": "b"}, "lease_seconds": 600}},
        }
        if body := changes.get(noun):
            assert conditional(call, "PATCH", path, '"0"', body) == 412
            assert conditional(call, "PATCH", path, f'"0", {before}', body) == 200
            assert conditional(call, "PATCH", path, before, body) == 412, "it was changed since"
            assert conditional(call, "PATCH", path, "*", body) == 200
            assert call("PATCH", path, body).status_code == 200
            before = settled(call, path)
        if noun == "instance":  # what it does changes it
            assert conditional(call, "DELETE", path, before) == 202
            continue
        if noun == "app":
            continue  # it runs
        assert conditional(call, "DELETE", path, before) == 204
        assert call("GET", path).status_code == 404


def test_what_is_wrong_is_said_before_what_has_changed(call: Caller, made: Made) -> None:
    app = call.publish(made.overlay)
    path = f"/v1/apps/{app['id']}"
    assert conditional(call, "PATCH", path, '"0"', {"app": {"no": 1}}) == 400
    assert conditional(call.as_("mia"), "DELETE", path, '"0"') == 403
    assert conditional(call, "DELETE", path.replace(app["id"], "0" * 8 + app["id"][8:]), "*") == 404


def test_the_state_of_an_instance_is_part_of_its_tag(call: Caller, made: Made) -> None:
    path = f"/v1/instances/{call.start(call.publish(made.overlay))['id']}"
    active = tag(call, path)
    call.post(f"{path}/pause")
    assert conditional(call, "DELETE", path, active) == 412
    assert call.get(path)["instance"]["state"] == "paused"


def test_of_two_who_saw_the_same_one_changes_it(call: Caller, made: Made) -> None:
    path = f"/v1/apps/{call.publish(made.overlay)['id']}"
    for _ in range(5):
        seen, answers = tag(call, path), []
        gate = threading.Barrier(6)

        def change(number: int, seen: str = seen, answers: list[int] = answers, gate: Any = gate) -> None:
            mine = call.as_("root")
            gate.wait()
            answers.append(conditional(mine, "PATCH", path, seen, {"app": {"summary": f"by {number}"}}))

        users = [threading.Thread(target=change, args=(number,)) for number in range(6)]
        for thread in users:
            thread.start()
        for thread in users:
            thread.join(60)
        assert sorted(answers) == [200] + [412] * 5


def test_it_is_looked_at_again_when_the_change_is_made(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody changes the row just after it was looked at."""
    call, database = running.call, running.site.database
    base = call.post("/v1/bases", {"base": {"name": "b"}})["base"]
    path, check = f"/v1/bases/{base['id']}", conditions.check
    seen = tag(call, path)
    looked: list[str] = []

    def check_and_be_late(wanted: str, row: Base, noun: str) -> None:
        check(wanted, row, noun)
        if not looked:
            database.write(lambda connection: BASES.update(connection, row.id, name="other"))
        looked.append(row.name)

    monkeypatch.setattr(conditions, "check", check_and_be_late)
    assert conditional(call, "DELETE", path, seen) == 412
    assert looked == ["b"], "the second look refused"
    assert call.get(path)["base"]["name"] == "other"
    monkeypatch.undo()
    assert call("DELETE", path).status_code == 204, "the condition outlived its request"


def test_operations_have_none(call: Caller, made: Made) -> None:
    app = call.publish(made.overlay)
    operation = call.post(f"/v1/apps/{app['id']}/prestage")["operation"]
    assert "ETag" not in call("GET", f"/v1/operations/{operation['id']}").headers
    assert "ETag" not in call("GET", "/v1/apps").headers
    call.ended(operation)
