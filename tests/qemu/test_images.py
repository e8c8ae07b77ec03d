"""Starts from an app's image: nothing is built, memory is shared, and nobody sees that it was an image."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cloudlet.control.site import Site
from cloudlet.control.start import Start
from cloudlet.overlay.reader import OverlayReader
from cloudlet.store.bases import Base
from cloudlet.store.images import MAP, ImageStore
from tests.cli.web import serving
from tests.qemu import guest
from tests.qemu.conftest import Warm
from tests.qemu.early import WRITE, Early, check_capture, image_of, starting, write_on

pytestmark = pytest.mark.qemu

SEED = 20240605
DEADLINE = 60.0
_IDENTITY = "hostname; cat /etc/machine-id"


@pytest.fixture
def image(site: Site, ordered: Path) -> Path:
    """The image of the ordered overlay, left by an early start."""
    with starting(site, str(ordered)) as early:
        early.wait()
        return image_of(site, early.made)


@contextmanager
def from_image(site: Site, overlay: Path) -> Iterator[Early]:
    with starting(site, str(overlay), start=None) as started:
        assert started.made.started.from_image
        yield started


def test_no_more_than_the_head_is_read(site: Site, warm: Warm, ordered: Path, image: Path) -> None:
    content = ordered.read_bytes()
    with serving(content) as web:
        web.hold = OverlayReader(io.BytesIO(content), None, allow_unsigned=True).header.parts_start
        with starting(site, f"{web.url}/whole", start=None) as started:
            assert started.made.started.from_image
            assert guest.shell(started.instance, "sha256sum < /run/known").split()[0] == warm.in_memory
            assert guest.shell(started.instance, "sha256sum < /root/known").split()[0] == warm.on_disk
            (answer,) = web.answers
            assert answer.count == web.hold
            web.go.set()
            assert answer.ended.wait(DEADLINE), "the link is kept though nothing is wanted of it"
        assert web.sent < len(content) // 2


def test_instances_share_the_memory_and_nothing_else(
    site: Site, warm: Warm, ordered: Path, image: Path
) -> None:
    with from_image(site, ordered) as one, from_image(site, ordered) as other:
        files = [_ram_of(early) for early in (one, other)]
        assert files[0].stat().st_ino == files[1].stat().st_ino, "the second took the first one's"
        with pytest.raises(PermissionError), files[0].open("r+b") as file:
            os.pwrite(file.fileno(), b"x", 0)
        identities = [guest.shell(early.instance, _IDENTITY).split() for early in (one, other)]
        assert set(identities[0]) & set(identities[1]) == set()
        guest.shell(one.instance, f"{WRITE}dd if=/dev/zero of=/run/known bs=1M count=24 2>/dev/null")
        assert guest.shell(other.instance, "sha256sum < /run/known").split()[0] == warm.in_memory
    with from_image(site, ordered) as later:
        assert guest.shell(later.instance, "sha256sum < /run/known").split()[0] == warm.in_memory


def test_a_capture_has_what_the_guest_never_wrote(
    site: Site, warm_base: Base, ordered: Path, image: Path, tmp_path: Path
) -> None:
    with from_image(site, ordered) as early:
        guest.shell(early.instance, write_on(random.Random(SEED)))
        check_capture(early, site, warm_base, tmp_path)


def test_the_image_of_another_evicts_it_and_its_machine_goes_on(
    site: Site, warm: Warm, warm_base: Base, ordered: Path, image: Path, tmp_path: Path
) -> None:
    kept = site.images.get(image.name)
    site = replace(site, images=ImageStore(site.images.folder, kept.bytes_on_disk() * 3 // 2))
    with from_image(site, ordered) as early:
        with starting(site, str(warm.overlay)) as other:
            other.wait()
            assert [found.path for found in site.images.all()] == [image_of(site, other.made)]
        assert not image.exists()
        guest.shell(early.instance, "echo 3 > /proc/sys/vm/drop_caches")
        assert guest.shell(early.instance, "sha256sum < /root/known").split()[0] == warm.on_disk
        # What is gone by name can still be captured.
        again = tmp_path / "again.overlay"
        guest.pack(warm_base, early.instance.capture(), again)
    with guest.clone_of(site, warm_base, again) as clone:
        assert guest.shell(clone, "sha256sum < /run/known").split()[0] == warm.in_memory
        assert guest.shell(clone, "sha256sum < /root/known").split()[0] == warm.on_disk


@pytest.mark.parametrize("damage", ["document", "map"])
def test_a_damaged_image_is_not_used_and_is_made_again(
    damage: str, site: Site, warm: Warm, ordered: Path, image: Path
) -> None:
    match damage:
        case "document":
            (image / "image.json").write_text("{")
        case "map":
            (image / MAP).write_bytes((image / MAP).read_bytes()[:-1])
    with serving(ordered.read_bytes()) as web:
        web.rate = 20e6  # so that the rest takes a while
        with starting(site, f"{web.url}/whole", start=None) as early:
            assert not early.made.started.from_image
            early.wait()
            assert guest.shell(early.instance, "sha256sum < /run/known").split()[0] == warm.in_memory
    with from_image(site, ordered) as early:
        assert guest.shell(early.instance, "sha256sum < /run/known").split()[0] == warm.in_memory


def test_without_images_none_is_used_or_left(site: Site, ordered: Path) -> None:
    with starting(site, str(ordered), use_image=False) as early:
        early.wait()
    assert site.images.all() == []
    without = replace(site, images=ImageStore(site.images.folder, 0))
    with starting(without, str(ordered)) as early:
        early.wait()
    assert site.images.all() == []
    with starting(site, str(ordered)) as early:
        early.wait()
    with starting(site, str(ordered), start=Start.FULL) as early:
        assert not early.made.started.from_image
    with starting(site, str(ordered), start=None, use_image=False) as early:
        assert not early.made.started.from_image
    assert [path.name for path in site.images.folder.iterdir() if path.name != ".lock"] == [
        early.made.overlay_id
    ]


def _ram_of(early: Early) -> Path:
    """The memory file of a machine, as the machine itself holds it."""
    record = early.instance.record
    assert record.machine
    path = Path(f"/proc/{record.machine.pid}/fd/{record.ram_descriptor}")
    assert str(path.readlink()).startswith("/memfd:cloudlet-app-")
    return path
