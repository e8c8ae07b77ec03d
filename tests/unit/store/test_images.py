"""The images of a site: which are used, which are kept, and which go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudlet.errors import NotFoundError
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import runs_of
from cloudlet.overlay.root import Root
from cloudlet.store.images import DEVICE_STATE, DISK, MAP, RAM, ImageStore
from tests.unit.overlay.world import DEVICE, World, page, source, unsigned

SIZE = 64 << 10
"""Bytes that an image takes here, besides a few small files."""
ROOM = 16 << 10
"""For the small files."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture(scope="module")
def root(world: World) -> Root:
    data, _ = world.create({3: page(3)}, {})
    return unsigned(data).root


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images", 3 * (SIZE + ROOM))


def adopt(store: ImageStore, root: Root, name: str) -> bool:
    """Keep an image of the overlay with this identity, as an early start does."""
    nothing = runs_of(source({}).numbers)
    pages = PageMap(runs_of(source({3: page(3)}).numbers), nothing)
    with store.workspace() as workspace:
        with (workspace.path / RAM).open("wb") as ram:
            ram.write(os.urandom(SIZE // 2))
            ram.truncate(root.machine.memory_bytes)
        (workspace.path / DISK).write_bytes(os.urandom(SIZE // 2))
        return store.adopt(workspace.path, name, root, DEVICE, pages)


def names(store: ImageStore) -> list[str]:
    return [image.overlay_id for image in store.all()]


def used(store: ImageStore, name: str, when: float) -> None:
    os.utime(store.folder / name / "image.json", (when, when))


def test_an_image_is_found_by_its_overlay(store: ImageStore, root: Root) -> None:
    assert store.find("one") is None
    assert adopt(store, root, "one")
    image = store.find("one")
    assert image
    assert (image.app, image.version, image.base_id) == (root.app.name, root.app.version, root.base)
    assert image.bytes_on_disk() >= SIZE
    read = image.read(root)
    assert read
    layer, device_state = read
    assert (layer.overlay_id, layer.ram, device_state) == ("one", image.path / RAM, DEVICE)
    assert [path.name for path in store.folder.iterdir() if path.name != ".lock"] == ["one"]


def test_what_was_not_used_for_longest_goes_first(store: ImageStore, root: Root) -> None:
    for number, name in enumerate(("one", "two", "three")):
        assert adopt(store, root, name)
        used(store, name, 1000.0 + number)
    assert store.find("one"), "which counts as a use"
    assert adopt(store, root, "four")
    assert names(store)[:2] == ["three", "one"]
    assert set(names(store)) == {"one", "three", "four"}


def test_what_has_no_room_is_not_kept_and_nothing_goes_for_it(store: ImageStore, root: Root) -> None:
    assert adopt(store, root, "one")
    for limit in (0, SIZE - 1):
        assert not adopt(ImageStore(store.folder, limit), root, "two")
    assert names(store) == ["one"]


def test_of_two_that_arrive_at_once_one_is_kept(store: ImageStore, root: Root) -> None:
    assert adopt(store, root, "one")
    first = (store.folder / "one" / DISK).read_bytes()
    assert adopt(store, root, "one")
    assert (store.folder / "one" / DISK).read_bytes() == first


@pytest.mark.parametrize("part", [RAM, DISK, DEVICE_STATE, MAP])
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_what_is_not_whole_is_not_read(part: str, damage: str, store: ImageStore, root: Root) -> None:
    assert adopt(store, root, "one")
    path = store.folder / "one" / part
    path.unlink() if damage == "missing" else os.truncate(path, 0)
    image = store.find("one")
    assert image
    assert image.read(root) is None


@pytest.mark.parametrize("document", ["", "{", "[]", '{"app": "x"}'])
def test_what_says_nothing_of_itself_is_none_and_is_replaced(
    document: str, store: ImageStore, root: Root
) -> None:
    assert adopt(store, root, "one")
    (store.folder / "one" / "image.json").write_text(document)
    assert store.find("one") is None
    assert names(store) == []
    assert adopt(store, root, "one")
    assert names(store) == ["one"]


def test_images_are_deleted_by_name_by_id_and_with_their_base(store: ImageStore, root: Root) -> None:
    for number, name in enumerate(("aaaa1", "bbbb2", "cccc3")):
        assert adopt(store, root, name)
        used(store, name, 1000.0 + number)
    assert store.get("aaaa").overlay_id == "aaaa1"
    assert store.get(root.app.name).overlay_id == "cccc3", "the last used"
    with pytest.raises(NotFoundError):
        store.get("aaa")
    store.delete(store.get("bbbb2"))
    assert names(store) == ["aaaa1", "cccc3"]
    store.delete_of_base("cd" * 32)
    assert names(store) == ["aaaa1", "cccc3"]
    store.delete_of_base(root.base)
    assert names(store) == []
    assert [path.name for path in store.folder.iterdir()] == [".lock"]


def test_what_was_begun_is_removed(store: ImageStore, root: Root) -> None:
    with store.workspace() as workspace:
        (workspace.path / RAM).write_bytes(b"half")
        assert store.reap() == []
        assert store.all() == []
    assert not workspace.path.exists()


def test_what_was_being_removed_is_removed(store: ImageStore, root: Root) -> None:
    assert adopt(store, root, "one")
    (store.folder / "one").rename(store.folder / ".deleted-one")  # and then the power was cut
    store.reap()
    assert [path.name for path in store.folder.iterdir()] == [".lock"]


def test_one_that_is_here_makes_no_room_for_itself(store: ImageStore, root: Root) -> None:
    for name in ("one", "two", "three"):
        assert adopt(store, root, name)
    assert adopt(store, root, "three")
    assert set(names(store)) == {"one", "two", "three"}


def test_a_folder_where_no_image_can_be_built(store: ImageStore, tmp_path: Path) -> None:
    assert store.obstacle() == ""
    (tmp_path / "file").touch()
    assert "--cache-dir" in ImageStore(tmp_path / "file" / "images", 0).obstacle()
