"""What the tests with real guests share: one warm guest, captured once, with all the truth about it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from cloudlet.control.site import Site
from cloudlet.hypervisor.driver import Capture
from cloudlet.model import GIBIBYTE
from cloudlet.overlay.pages import Space
from cloudlet.settings import Settings
from cloudlet.store.bases import Base
from cloudlet.store.hints import HintStore
from cloudlet.store.images import ImageStore
from tests.conftest import KEPT
from tests.qemu import guest

COUNTER_PORT = 8080

_WARM_UP = f"""
dd if=/dev/urandom of=/root/known bs=1M count=8 2>/dev/null
dd if=/dev/urandom of=/run/known bs=1M count=24 2>/dev/null
tr -d - < /proc/sys/kernel/random/uuid > /etc/machine-id
sync
# A block that holds something in the base, and is given back.
rm /www/index.html
sync
fstrim /
echo not-yet-on-the-disk > /root/late
for turn in 1 2 3; do {guest.COUNT}; done
echo $(sha256sum < /root/known) $(sha256sum < /run/known) $(dmesg | grep -c 'crng reseeded due to virtual')
"""


@dataclass(frozen=True)
class Warm:
    """An overlay of a guest with a counter at 3 in memory and known files on disk and in memory.

    The capture's pages are files of ``folder``; ``memory`` and ``cpu_view`` are the RAM at the moment of
    the capture as the process had it mapped and as QEMU's ``pmemsave`` wrote it.
    """

    folder: Path
    overlay: Path
    base_id: str
    capture: Capture
    memory: guest.Pages
    cpu_view: guest.Pages
    disk: Path
    on_disk: str
    """SHA-256 of ``/root/known``, on the disk."""
    in_memory: str
    """SHA-256 of ``/run/known``, 24 MiB in memory only."""
    forks: int
    """How often the guest's kernel had noticed that it is a copy."""


@pytest.fixture
def site(site: Site, tmp_path: Path) -> Site:
    """A site whose images and hints are this test's own, where the bases are those of all tests."""
    return replace(
        site, images=ImageStore(tmp_path / "images", GIBIBYTE), hints=HintStore(tmp_path / "hints")
    )


@pytest.fixture(scope="session")
def warm(quick_base_id: str, tmp_path_factory: pytest.TempPathFactory) -> Warm:
    """A warm guest, captured from a private instance that was neither made quiet nor shut down."""
    folder = tmp_path_factory.mktemp("warm")
    return make_warm(Site.open(settings_in(folder)), quick_base_id, folder)


def settings_in(folder: Path) -> Settings:
    """Settings whose state and keys are in a folder, with the bases of all tests."""
    return Settings(
        cache_dir=KEPT / "cache", state_dir=folder / "state", keys_dir=folder / "keys", accelerator="tcg"
    )


def make_warm(site: Site, base_id: str, folder: Path) -> Warm:
    """The warm guest of a site's quick base, with its files in ``folder``."""
    base = site.bases.find(base_id)
    overlay, disk = folder / "warm.overlay", folder / "disk.raw"
    with guest.resumed(site, base) as instance:
        *counts, last = guest.shell(instance, _WARM_UP).splitlines()
        assert counts == ["1", "2", "3"]
        on_disk, _, in_memory, _, forks = last.split()
        capture = instance.capture()
        memory = guest.memory_of(instance)
        cpu_view = guest.saved_memory_of(instance)
        guest.saved_disk_of(instance, base, disk)
        guest.pack(base, capture, overlay, ports=[COUNTER_PORT])
        for pages in ("ram.pages", "disk.blocks"):
            # The sources are mappings of these files, and outlive the instance's folder by a link.
            (folder / pages).hardlink_to(instance.directory / pages)
    return Warm(
        folder, overlay, base.id, capture, memory, cpu_view, disk, on_disk, in_memory, forks=int(forks)
    )


@pytest.fixture
def warm_base(site: Site, warm: Warm) -> Base:
    """The base of the warm overlay, of this test's site."""
    return site.bases.find(warm.base_id)


@pytest.fixture(scope="session")
def ordered(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The warm overlay with some of its pages in front, in no order in particular."""
    overlay = tmp_path_factory.mktemp("ordered") / "ordered.overlay"
    site = Site.open(settings_in(overlay.parent))
    rng = random.Random(len(warm.capture.ram.numbers))
    hot = [(Space.RAM, np.array(rng.sample(warm.capture.ram.numbers.tolist(), 300), np.uint32))]
    guest.pack(site.bases.get(warm.base_id), warm.capture, overlay, hot=hot)
    return overlay
