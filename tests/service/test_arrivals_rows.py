"""Rows of hand-offs: written twice at once, kept for whoever may ask, and of what is being suspended."""

from __future__ import annotations

import base64
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy.engine import Connection

from cloudlet.api.schemas.handoffs import Offer
from cloudlet.control.ownership import Ownership
from cloudlet.overlay.reader import OverlayReader
from cloudlet.service import capacity
from cloudlet.service.options import Options
from cloudlet.service.site import ServedSite
from cloudlet.store.rows import (
    HANDOFFS,
    PEERS,
    SITE,
    Direction,
    Handoff,
    HandoffState,
    OperationState,
    Peer,
    now,
)
from tests import databases
from tests.service.conftest import Made, Running, nothing_runs, serving

HELD_SECONDS = 1.0


@pytest.fixture
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An empty database of a server on which transactions are under way at the same time."""
    with (
        databases.postgresql(tmp_path_factory.mktemp("postgresql")) as administrator,
        databases.database_of(administrator, "cloudlet") as url,
    ):
        yield url


def peer_of(site: ServedSite) -> Peer:
    """A peer that nobody answers for."""
    key = base64.b64encode(bytes(32)).decode()
    peer = Peer(
        id=str(uuid.uuid4()), project_id=SITE, user_id=SITE, name="far", url="https://127.0.0.1:1",
        public_key=key, fingerprint="0" * 64,
    )  # fmt: skip
    return site.database.write(lambda connection: PEERS.insert(connection, peer))


def offer_from(site: ServedSite, overlay: Path) -> Offer:
    """The offer of an instance of an overlay that was never here."""
    with overlay.open("rb") as stream:
        reader = OverlayReader(stream, site.machine.keys.verify)
    about = {
        "id": str(uuid.uuid4()), "epoch": 1, "name": "n", "project_id": "shop", "user_id": "mia", "lease": {},
        "created_at": "2024-01-02T03:04:05+00:00", "overlay": reader.identity,
        "root": base64.b64encode(reader.root_bytes).decode(),
    }  # fmt: skip
    offer = {"id": str(uuid.uuid4()), "seed": "0" * 16, "needs": "nothing", "instance": about}
    return Offer.model_validate(offer)


def test_who_offers_the_same_twice_at_once_is_told_the_same(
    options: Options, made: Made, database: str
) -> None:
    with serving(replace(options, database_url=database)) as running:
        site, peer = running.site, peer_of(running.site)
        offered = offer_from(site, made.overlay).offered()
        locked = threading.Event()

        def admit_nothing(connection: Connection) -> None:
            capacity.lock(connection)
            locked.set()
            time.sleep(HELD_SECONDS)  # until both have come to where they wait for this

        with ThreadPoolExecutor(3) as pool:
            holding = pool.submit(site.database.write, admit_nothing)
            assert locked.wait(30)
            both = [pool.submit(site.arrivals.offer, peer, offered) for _ in range(2)]
            holding.result()
            first, second = (one.result() for one in both)
        assert first.id == second.id == offered.id
        assert site.arrivals.drop(first).state == Ownership.DROPPED
        for operation in running.call.get("/v1/operations")["operations"]:
            running.call.ended(operation)
    nothing_runs(options.machine)


def test_a_hand_off_that_was_reverted_after_the_switch_is_kept_for_its_peer(running: Running) -> None:
    site, peer = running.site, peer_of(running.site)
    gone = str(uuid.uuid4())
    cases = {
        "before the switch": (peer.id, {}, False),
        "after it": (peer.id, {"switched": "yes"}, True),
        "with a peer that is none any more": (gone, {"switched": "yes"}, False),
    }
    rows = {
        name: Handoff(
            project_id="p", user_id="u", instance_id=str(uuid.uuid4()), peer_id=peer_id, epoch=1,
            state=HandoffState.REVERTED, direction=Direction.OUT, order=order,
        )
        for name, (peer_id, order, _) in cases.items()
    }  # fmt: skip

    def add(connection: Connection) -> None:
        for row in rows.values():
            HANDOFFS.insert(connection, row)

    site.database.write(add)
    site.tidying.forget(now() + timedelta(days=site.options.keep_days + 1))
    for name, row in rows.items():
        found = site.database.read(lambda connection, key=row.id: HANDOFFS.find(connection, id=key))
        assert bool(found) is cases[name][2], name
        if found:
            assert site.departures.state(found).state == Ownership.REVERTED


@pytest.mark.parametrize("state", list(HandoffState))
def test_what_is_reverted_remembers_whether_it_had_switched(state: HandoffState) -> None:
    row = Handoff(
        project_id="p", user_id="u", instance_id="i", peer_id="q", epoch=1, state=state, order={"a": 1}
    )
    switched = state in (HandoffState.SWITCHING, HandoffState.IN_DOUBT, HandoffState.SERVING)
    assert row.order_when_reverted == {"a": 1, **({"switched": "yes"} if switched else {})}


def test_what_is_being_suspended_is_not_handed_off(options: Options, made: Made) -> None:
    """Its machine ends: there would be nothing to hand off, and its row would say two things."""
    going, go_on = threading.Event(), threading.Event()

    def observe(kind: str, step: str, state: OperationState) -> None:
        if (kind, step, state) == ("instance.suspend", "suspend", OperationState.RUNNING):
            going.set()
            assert go_on.wait(30)

    with serving(options, observe) as running:
        call = running.call
        peer = peer_of(running.site)
        instance = call.start(call.publish(made.overlay))
        begun = call.post(f"/v1/instances/{instance['id']}/suspend")
        assert going.wait(30)
        wanted = {"handoff": {"instance_id": instance["id"], "peer_id": peer.id}}
        refused = call("POST", "/v1/handoffs", wanted)
        go_on.set()
        assert refused.status_code == 409, refused.text
        assert f"cloudlet operation cancel {begun['operation']['id']}" in refused.text
        call.done(begun)
        assert call.instance(instance["id"])["state"] == "suspended"
        call.done(call.delete(f"/v1/instances/{instance['id']}"))
    nothing_runs(options.machine)
