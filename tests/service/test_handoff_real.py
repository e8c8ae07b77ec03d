"""Hand-off of a real QEMU guest between two sites that are served: what only a guest can show."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import EARLY_RECIPE, Hello, publish
from tests.conftest import KEPT
from tests.qemu.newer import newer_qemu
from tests.service.conftest import Made
from tests.service.two_sites import PeerSite, add_peer, peer_site, two_sites

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def early(quick_base_id: str, tmp_path_factory: pytest.TempPathFactory) -> Hello:
    """A signed overlay on the quick guest, with 2 MiB on its disk and 4 MiB in memory."""
    return publish(quick_base_id, tmp_path_factory.mktemp("early"), EARLY_RECIPE)


@pytest.fixture(scope="module")
def sites(
    early: Hello, hashed: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PeerSite, PeerSite]]:
    made = Made(KEPT / "cache", early.keys, early.base_id, early.path)
    machine = {"hypervisor": "qemu", "accelerator": "tcg", "cache_dir": KEPT / "cache"}
    with two_sites(tmp_path_factory.mktemp("sites"), made, hashed, DEFAULT=machine) as both:
        yield both


def page(instance: dict[str, Any], path: str) -> bytes:
    """What the guest's web server has at a path."""
    with urllib.request.urlopen(instance["endpoints"][0]["url"] + path, timeout=60) as answer:
        return bytes(answer.read())


@pytest.mark.parametrize("overlay", ["nothing", "overlay"])
def test_a_guest_goes_there_and_back(
    sites: tuple[PeerSite, PeerSite], early: Hello, overlay: str, tmp_path: Path
) -> None:
    here, there = sites
    app = here.call.publish(early.path, name=f"early-{overlay}")
    if overlay == "overlay":
        there.call.publish(early.path, name="early")
    instance = here.call.start(app)
    cold = page(instance, "/cold")
    here.hand_off(instance, verify="full", overlay=overlay)
    moved = there.call.instance(instance["id"])
    assert (moved["state"], moved["epoch"]) == ("active", 2)
    assert page(moved, "/cold") == cold
    assert page(instance, "/cold") == cold, "during the grace time the old address leads there"
    there.hand_off(moved, verify="full", overlay=overlay)
    back = here.call.instance(instance["id"])
    assert (back["state"], back["epoch"]) == ("active", 3)
    assert page(back, "/cold") == cold
    here.call.done(here.call.delete(f"/v1/instances/{instance['id']}"))


def test_what_it_left_behind_does_not_come_back(sites: tuple[PeerSite, PeerSite], early: Hello) -> None:
    """Pages of the overlay that are the base's again: a machine that stands on the base does not own them."""
    here, there = sites
    for site in sites:
        if not site.call.get("/v1/overlays")["overlays"]:
            site.call.publish(early.path, name="early")
    instance = here.call.start(here.call.get("/v1/apps")["apps"][0])
    page(instance, "/cold")
    for number, overlay in enumerate(("nothing", "nothing", "any", "nothing", "any")):
        source, target = (here, there) if number % 2 == 0 else (there, here)
        source.hand_off(instance, verify="full", overlay=overlay)
        assert target.call.instance(instance["id"])["state"] == "active"
    there.call.done(there.call.delete(f"/v1/instances/{instance['id']}"))
    here.call.done(here.call.delete(f"/v1/instances/{instance['id']}"))


def test_a_site_with_another_accelerator_refuses(
    sites: tuple[PeerSite, PeerSite], early: Hello, hashed: str, tmp_path: Path
) -> None:
    here, _ = sites
    if not here.call.get("/v1/apps")["apps"]:
        here.call.publish(early.path, name="early")
    instance = here.call.start(here.call.get("/v1/apps")["apps"][0])
    made = Made(KEPT / "cache", early.keys, early.base_id, early.path)
    machine = {"hypervisor": "qemu", "accelerator": "kvm", "cache_dir": KEPT / "cache"}
    with peer_site(tmp_path / "kvm", made, hashed, DEFAULT=machine) as other:
        wanted = {"instance_id": instance["id"], "peer_id": add_peer(here, other)}
        add_peer(other, here)
        ended = here.call.ended(here.call.post("/v1/handoffs", {"handoff": wanted})["operation"])
        assert ended["state"] == "failed"
        assert "made under tcg, this site runs kvm" in ended["error"]["detail"]
        assert other.call("GET", f"/v1/instances/{instance['id']}").status_code == 404
    assert here.call.instance(instance["id"])["state"] == "active"
    here.call.done(here.call.delete(f"/v1/instances/{instance['id']}"))


@pytest.mark.slow
def test_a_guest_goes_to_a_newer_qemu_and_back(early: Hello, hashed: str, tmp_path: Path) -> None:
    """From Debian 12's QEMU to Debian 13's, and back."""
    made = Made(KEPT / "cache", early.keys, early.base_id, early.path)
    machine = {"hypervisor": "qemu", "accelerator": "tcg", "cache_dir": KEPT / "cache"}
    newer = {**machine, "qemu_binary": newer_qemu(KEPT)}
    with (
        peer_site(tmp_path / "older", made, hashed, DEFAULT=machine) as older,
        peer_site(tmp_path / "newer", made, hashed, DEFAULT=newer) as ahead,
    ):
        older.peer_id, ahead.peer_id = add_peer(older, ahead), add_peer(ahead, older)
        older.call.post(f"/v1/peers/{older.peer_id}/refresh")
        versions = [
            site.call.get(f"/v1/peers/{site.peer_id}")["peer"]["capabilities"]["qemu"]
            for site in (ahead, older)
        ]
        assert [int(version.split(".")[0]) for version in versions] == [7, 10]
        instance = older.call.start(older.call.publish(early.path, name="early"))
        cold = page(instance, "/cold")
        older.hand_off(instance, verify="full")
        moved = ahead.call.instance(instance["id"])
        assert page(moved, "/cold") == cold
        ahead.hand_off(moved, verify="full")
        assert page(older.call.instance(instance["id"]), "/cold") == cold
        older.call.done(older.call.delete(f"/v1/instances/{instance['id']}"))
