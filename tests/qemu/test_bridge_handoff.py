"""A user's open connection survives hand-offs, where both sites have a bridge in one network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cloudlet.settings import Settings
from tests.cli.conftest import RECIPE, command_line, write_recipe
from tests.conftest import KEPT
from tests.qemu.bridged import Bridged, bridged_sites, walk
from tests.service.conftest import Made

TAKEN = "another instance is at bridge guests"
pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def world(quick_base_id: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridged]:
    folder = tmp_path_factory.mktemp("bridged")
    made = Made(KEPT / "cache", folder / "keys", quick_base_id, folder / "hello.overlay")
    cloudlet = command_line(Settings(made.cache, folder / "state", made.keys, accelerator="tcg"))
    recipe = write_recipe(folder / "recipe", RECIPE)
    assert cloudlet("key", "create").status == 0
    done = cloudlet("overlay", "create", made.base_id, "--recipe", recipe, "-o", made.overlay, "--no-profile")
    assert done.status == 0, done.err
    with bridged_sites(folder, made) as bridged:
        yield bridged


def test_an_open_connection_goes_along(world: Bridged) -> None:
    assert list(walk(world, 3, seed=1)) == []


def test_a_second_guest_is_refused_wherever_it_comes_from(world: Bridged) -> None:
    here, there = world.sites
    app = here.call.publish(world.overlay, name="first")
    first = here.call.start(app)
    again = here.call.post("/v1/instances", {"instance": {"app_id": app["id"]}})["operation"]
    assert TAKEN in str(here.call.ended(again)["error"])
    other = there.call.start(there.call.publish(world.overlay, name="other"))
    wanted = {"instance_id": first["id"], "peer_id": here.peer_id}
    handoff = here.call.post("/v1/handoffs", {"handoff": wanted})["operation"]
    assert TAKEN in str(here.call.ended(handoff)["error"])
    for site, instance in ((here, first), (there, other)):
        assert site.call.instance(instance["id"])["state"] == "active"
        site.call.done(site.call.delete(f"/v1/instances/{instance['id']}"))
    for instance in here.call.get("/v1/instances")["instances"]:
        here.call.done(here.call.delete(f"/v1/instances/{instance['id']}"))
