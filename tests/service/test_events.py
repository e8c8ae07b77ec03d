"""Events and those who wait for them."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import requests
from sqlalchemy.engine import Connection

from cloudlet.service.options import Options
from cloudlet.store import journal
from cloudlet.store.rows import HANDOFFS, Handoff, HandoffState, now
from tests.service.conftest import PASSWORD, Caller, Made, Running, serving


def test_a_client_that_was_away_misses_nothing(call: Caller, made: Made) -> None:
    mia = call.as_("mia")
    app = call.publish(made.overlay)
    last = call.get("/v1/events")["last"]
    instance = mia.start(app)
    seen = []
    while True:
        page = mia.get("/v1/events", params={"after": last, "limit": 1})
        if not page["events"]:
            break
        assert page["events"][0]["number"] > last
        last = page["last"]
        seen.append(page["events"][0]["kind"])
    assert seen == ["instance.requested", "instance.active", "operation.succeeded"]
    mine = call.get("/v1/events", params={"after": 0, "resource_id": instance["id"]})["events"]
    assert [event["kind"] for event in mine] == seen[:2]


def test_one_sees_what_is_ones_own(call: Caller, made: Made) -> None:
    call.as_("mia").start(call.publish(made.overlay))
    assert [event for event in call.as_("max").events() if event["user_id"] != "max"] == []
    assert {event["user_id"] for event in call.as_("rita").events()} == {"root", "mia"}


def test_a_wait_ends_with_the_first_event(call: Caller) -> None:
    answers = []

    def wait() -> None:
        began = time.monotonic()
        found = call.as_("root").get("/v1/events", params={"wait": 30, "kind": "overlay."})
        answers.append((time.monotonic() - began, [event["kind"] for event in found["events"]]))

    thread = threading.Thread(target=wait)
    thread.start()
    _until_waiting(call, 1)
    call.post("/v1/overlays", {"overlay": {"name": "o"}})
    thread.join(20)
    ((seconds, kinds),) = answers
    assert kinds == ["overlay.queued"]
    assert seconds < 20
    empty = call.get("/v1/events", params={"wait": 0.1})
    assert empty["events"] == []


def test_a_stream_goes_on_where_it_was_cut(call: Caller) -> None:
    call.post("/v1/overlays", {"overlay": {"name": "one"}})
    first = _stream(call, {"after": "0"})
    assert next(first)["detail"] == {"name": "one"}
    first.close()
    call.post("/v1/overlays", {"overlay": {"name": "two"}})
    second = _stream(call, {}, {"Last-Event-ID": "1"})
    assert next(second)["detail"] == {"name": "two"}
    call.post("/v1/overlays", {"overlay": {"name": "three"}})
    assert next(second)["detail"] == {"name": "three"}
    second.close()


def test_an_old_number_is_answered_from_the_journal(options: Options) -> None:
    with serving(options) as running:
        for number in range(5):
            running.call.post("/v1/overlays", {"overlay": {"name": str(number)}})
    with serving(options) as running:
        assert [event["number"] for event in running.call.events()] == [1, 2, 3, 4, 5]
        page = running.call.get("/v1/events", params={"after": 2, "limit": 2})
        assert [event["number"] for event in page["events"]] == [3, 4]
        assert page["last"] == 4


def test_five_hundred_wait_and_others_are_served(options: Options, running: Running) -> None:
    call = running.call
    number = running.site.news.last
    seen: list[int] = []

    def wait() -> None:
        session = requests.Session()
        answer = session.get(
            f"{call.url}/v1/events", params={"after": number, "wait": 60}, auth=("root", PASSWORD), timeout=90
        )
        seen.append(answer.status_code if answer.status_code != 200 else len(answer.json()["events"]))

    call.get("/v1/instances")
    waiters = [threading.Thread(target=wait) for _ in range(500)]
    for waiter in waiters:
        waiter.start()
    _until_waiting(call, 500)
    began = time.monotonic()
    for _ in range(20):
        call.get("/v1/instances")
    assert time.monotonic() - began < 20, "others wait too"
    call.post("/v1/overlays", {"overlay": {"name": "o"}})
    for waiter in waiters:
        waiter.join(60)
    assert seen == [1] * 500


def test_one_waiter_too_many_is_told_at_once(options: Options) -> None:
    with serving(replace(options, waiters=2)) as running:
        waiters = [
            threading.Thread(target=running.call.as_("root").get, args=("/v1/events?wait=3",))
            for _ in range(2)
        ]
        for waiter in waiters:
            waiter.start()
        _until_waiting(running.call, 2)
        answer = running.call("GET", "/v1/events?wait=3")
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "5"
        assert answer.json()["errors"][0]["code"] == "cloudlet.event.busy"
        for waiter in waiters:
            waiter.join(20)
        assert running.call.get("/v1/events?wait=0.1")["events"] == []


def test_numbers_have_no_gaps_while_many_write(running: Running) -> None:
    def write() -> None:
        call = running.call.as_("root")
        for _ in range(10):
            call.post("/v1/overlays", {"overlay": {"name": "o"}})

    writers = [threading.Thread(target=write) for _ in range(6)]
    for writer in writers:
        writer.start()
    seen: list[int] = []
    while len(seen) < 60:
        found = running.call.get("/v1/events", params={"after": seen[-1] if seen else 0, "wait": 20})[
            "events"
        ]
        assert found
        seen.extend(event["number"] for event in found)
    for writer in writers:
        writer.join(20)
    assert seen == list(range(1, 61))
    assert running.site.database.read(journal.last_number) == 60


def _stream(call: Caller, query: dict[str, str], headers: dict[str, str] | None = None) -> Iterator[dict]:  # type: ignore[type-arg]
    """The events of a stream, until it is closed."""
    accept = {"Accept": "text/event-stream", **(headers or {})}
    with call.as_("root")("GET", "/v1/events", params=query, headers=accept, stream=True) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        for line in answer.iter_lines(chunk_size=1):
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


def _until_waiting(call: Caller, wanted: int) -> None:
    deadline = time.monotonic() + 60
    while f'cloudlet_slots{{kind="waiters"}} {wanted}.0' not in call("GET", "/metrics").text:
        assert time.monotonic() < deadline, "they do not wait"
        time.sleep(0.05)


def test_what_is_old_is_forgotten(running: Running) -> None:
    call = running.call
    first = call.post("/v1/overlays", {"overlay": {"name": "o"}}, headers={"Idempotency-Key": "k"})["overlay"]
    keep = running.site.options.keep_days
    running.site.tidying.forget(now() + timedelta(hours=23))
    again = call.post("/v1/overlays", {"overlay": {"name": "o"}}, headers={"Idempotency-Key": "k"})["overlay"]
    assert again["id"] == first["id"]
    running.site.tidying.forget(now() + timedelta(days=keep + 1))
    assert running.site.database.read(lambda connection: journal.read(connection, 0, 10)) == []
    new = call.post("/v1/overlays", {"overlay": {"name": "o"}}, headers={"Idempotency-Key": "k"})["overlay"]
    assert new["id"] != first["id"]
    assert [event["number"] for event in call.events()][-1] == 2, "a number was given twice"


def test_the_hand_off_by_which_an_instance_went_last_is_kept(running: Running) -> None:
    peer, states = str(uuid.uuid4()), HandoffState
    went = [(1, states.COMPLETED), (2, states.REVERTED), (2, states.LOST), (3, states.REVERTED)]
    still = [(1, states.COMPLETED), (2, states.COPYING)]

    def add(connection: Connection) -> None:
        for instance, handoffs in (("went", went), ("still", still)):
            for epoch, state in handoffs:
                HANDOFFS.insert(
                    connection,
                    Handoff(
                        project_id="p", user_id="u", instance_id=instance, peer_id=peer, epoch=epoch,
                        state=state,
                    ),
                )  # fmt: skip

    def known(connection: Connection) -> set[tuple[str, int, HandoffState]]:
        return {(one.instance_id, one.epoch, one.state) for one in HANDOFFS.list(connection, peer_id=peer)}

    running.site.database.write(add)
    every = running.site.database.read(known)
    assert len(every) == 6
    running.site.tidying.forget(now() + timedelta(days=running.site.options.keep_days - 1))
    assert running.site.database.read(known) == every
    running.site.tidying.forget(now() + timedelta(days=running.site.options.keep_days + 1))
    kept = {("went", 2, states.LOST), *(("still", epoch, state) for epoch, state in still)}
    assert running.site.database.read(known) == kept
