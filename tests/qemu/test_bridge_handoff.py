"""A user's open connection survives hand-offs, where both sites have a bridge in one network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cloudlet.settings import Settings
from tests.cli.conftest import RECIPE, command_line, write_recipe
from tests.conftest import KEPT
from tests.qemu.bridged import Bridged, bridged_sites, walk
from tests.service.conftest import Made

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
