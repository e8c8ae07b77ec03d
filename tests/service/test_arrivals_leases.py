"""What is left of a lease where an instance comes: what the way took is over, and no site gives too much."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.service.conftest import Made
from tests.service.test_handoffs import ask
from tests.service.two_sites import PeerSite, add_peer, peer_site

MOST = 600
NEAR = 1.5


@pytest.fixture(scope="module")
def sites(
    made: Made, hashed: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PeerSite, PeerSite]]:
    """Two sites, of which the second gives no lease longer than ten minutes."""
    folder: Path = tmp_path_factory.mktemp("sites")
    with (
        peer_site(folder / "a", made, hashed) as here,
        peer_site(folder / "b", made, hashed, leases={"most_seconds": MOST}) as there,
    ):
        here.peer_id, there.peer_id = add_peer(here, there), add_peer(there, here)
        here.call.publish(made.overlay)
        yield here, there


def moved(here: PeerSite, there: PeerSite, instance: dict[str, Any], **terms: Any) -> dict[str, Any]:
    """Have an instance handed off; what it is there."""
    here.hand_off(instance, **terms)
    return there.call.instance(instance["id"])


def delete(instance: dict[str, Any], *sites: PeerSite) -> None:
    for site in sites:
        site.call.done(site.call.delete(f"/v1/instances/{instance['id']}"))


def ends(instance: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(instance["expires_at"])


def test_a_hand_off_that_takes_long_makes_no_lease_longer(sites: tuple[PeerSite, PeerSite]) -> None:
    here, there = sites
    instance = here.call.start(here.call.get("/v1/apps")["apps"][0], lease_seconds=300)
    for page in range(600, 660):
        ask(instance, f"/write?space=ram&page={page}&seed={page}")
    began = time.monotonic()
    there_now = moved(here, there, instance, bandwidth_mbit=0.5, deadline_seconds=600)
    assert time.monotonic() - began > 3, "it took long"
    assert abs((ends(there_now) - ends(instance)).total_seconds()) < NEAR
    assert there_now["lease_seconds"] == 300
    delete(instance, there, here)


@pytest.mark.parametrize("lease", [{"lease_seconds": 3600}, {}])
def test_no_lease_is_longer_than_leases_may_be(
    sites: tuple[PeerSite, PeerSite], lease: dict[str, int]
) -> None:
    here, there = sites
    instance = here.call.start(here.call.get("/v1/apps")["apps"][0], **lease)
    assert instance["lease_seconds"] == lease.get("lease_seconds")
    there_now = moved(here, there, instance)
    assert there_now["lease_seconds"] == MOST
    assert MOST - 30 < (ends(there_now) - datetime.now(UTC)).total_seconds() <= MOST
    back = moved(there, here, there_now)
    assert abs((ends(back) - ends(there_now)).total_seconds()) < NEAR, "what is left goes along"
    delete(instance, here, there)
