"""A guest that runs while its pages arrive, held against a twin that was built of whole files before.

One arrival is made of dice: which pages the overlay calls hot, how fast the link is and where it is cut, what
the guest reads meanwhile, and whether it writes. The tests throw a few, ``python -m tests.soak`` many.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cloudlet.control.site import Site
from cloudlet.control.start import Start
from cloudlet.control.synthesis import Request, Synthesised, synthesise
from cloudlet.hypervisor.driver import Capture, Paging
from cloudlet.hypervisor.qemu import changed
from cloudlet.hypervisor.qemu.instance import QemuInstance
from cloudlet.model import MEBIBYTE
from cloudlet.overlay.apply import apply
from cloudlet.overlay.pages import Space, numbers_of
from cloudlet.overlay.plan import Hot
from cloudlet.overlay.reader import OverlayReader
from cloudlet.store.bases import Base
from cloudlet.store.images import DISK, RAM
from cloudlet.transfer.source import open_source
from tests.cli.web import serving
from tests.qemu import guest
from tests.qemu.conftest import Warm

ARRIVAL_SECONDS = 120.0
PIECE = 256 << 10
KNOWN = {"/run/known": 24 * MEBIBYTE // PIECE, "/root/known": 8 * MEBIBYTE // PIECE}
"""The warm guest's files, in memory and on the disk, and how many pieces they have."""

WRITE = """\
dd if=/dev/urandom of=/run/known bs=256k count=4 seek=96 conv=notrunc 2>/dev/null
dd if=/dev/urandom of=/run/other bs=256k count=16 2>/dev/null
dd if=/run/other of=/root/other bs=256k count=12 2>/dev/null
cat /root/other > /run/again
sync
rm /run/other /root/other /run/again
"""
"""Shell commands that write all over a guest's memory; the known files only grow."""


@dataclass(frozen=True)
class Twin:
    """What an eager synthesis of the warm overlay makes, as files, and what its guest reads."""

    ram: guest.Pages
    numbers: guest.Pages
    """Of the pages of RAM that the overlay brings."""
    disk: str
    """Digest of the whole disk."""
    pieces: dict[str, list[str]]
    """SHA-256 of each piece of the known files."""

    @classmethod
    def make(cls, site: Site, base: Base, warm: Warm, folder: Path) -> Twin:
        sink = guest.FileSink(base, folder / "ram", folder / "disk")
        with warm.overlay.open("rb") as source, base.pages() as pages:
            apply(OverlayReader(source, None, allow_unsigned=True), pages, sink)
        with guest.clone_of(site, base, warm.overlay) as clone:
            pieces = {
                path: guest.shell(clone, read_pieces(path, range(count))).split()
                for path, count in KNOWN.items()
            }
        ram = np.fromfile(folder / "ram", np.uint8).reshape(warm.memory.shape)
        return cls(ram, numbers_of(sink.announced[Space.RAM]), guest.digest(folder / "disk"), pieces)


@dataclass
class Early:
    """A machine that stands on an image, or on what becomes one; ``arrived`` is set when all is here."""

    made: Synthesised
    arrived: threading.Event

    @property
    def instance(self) -> QemuInstance:
        assert isinstance(self.made.instance, QemuInstance)
        return self.made.instance

    def progress(self) -> Paging:
        paging = self.made.started.progress()
        assert paging
        return paging

    def wait(self) -> None:
        assert self.arrived.wait(ARRIVAL_SECONDS), f"not all has come: {self.progress()}"


@contextmanager
def starting(
    site: Site, where: str, *, start: Start | None = Start.HOT, patience: float = 30.0, use_image: bool = True
) -> Iterator[Early]:
    """A machine of the unsigned overlay at ``where``, ready."""
    arrived = threading.Event()
    request = Request(allow_unsigned=True, start=start, patience=patience, use_image=use_image)
    with (
        open_source(where, None, patience=patience) as source,
        synthesise(site, source, request, arrived=arrived.set) as made,
    ):
        if made.started.from_image:
            arrived.set()
        yield Early(made, arrived)


def image_of(site: Site, made: Synthesised) -> Path:
    """The folder of the image that a start has left."""
    return site.images.folder / made.overlay_id


def random_hot(capture: Capture, rng: random.Random, count: int) -> Hot:
    """So many random pages in a random order, in stretches of one space."""
    hot = []
    while count > 0:
        space = Space.DISK if rng.random() < 0.3 else Space.RAM
        numbers = (capture.disk if space is Space.DISK else capture.ram).numbers
        picked = rng.choices(range(len(numbers)), k=min(count, rng.randrange(1, 200)))
        hot.append((space, numbers[picked]))
        count -= len(picked)
    return hot


def read_pieces(path: str, numbers: Iterator[int] | range | list[int]) -> str:
    """Shell commands that print the SHA-256 of each of these pieces of a file."""
    asked = " ".join(map(str, numbers))
    piece = f"dd if={path} bs={PIECE} skip=$piece count=1 2>/dev/null"
    return f"for piece in {asked}; do digest=$({piece} | sha256sum); echo ${{digest%% *}}; done"


def check_arrival(site: Site, base: Base, warm: Warm, twin: Twin, seed: int, folder: Path) -> str:
    """One arrival, by the dice of ``seed``; what it was, in a few words.

    :raises AssertionError: something is not as in the twin.
    """
    rng = random.Random(seed)
    overlay = folder / f"{seed}.overlay"
    hot = random_hot(warm.capture, rng, rng.randrange(1, 800))
    guest.pack(base, warm.capture, overlay, hot=hot)
    content = overlay.read_bytes()
    with serving(content) as web:
        web.rate = rng.uniform(4e6, 20e6)
        web.cuts = sorted(rng.randrange(len(content)) for _ in range(rng.randrange(4)))
        cuts = len(web.cuts)
        with starting(site, f"{web.url}/whole", start=rng.choice([Start.HOT, Start.READY])) as early:
            _read_at_random(early, twin, rng)
            if writes := rng.random() < 0.5:
                guest.shell(early.instance, WRITE, timeout=ARRIVAL_SECONDS)
            early.wait()
            check_against(early, site, base, twin, folder)
            for path, digest in (("/run/known", warm.in_memory), ("/root/known", warm.on_disk)):
                # What was written stands behind the first 24 MiB.
                found = guest.shell(
                    early.instance, f"head -c {24 * MEBIBYTE} {path} | sha256sum", ARRIVAL_SECONDS
                )
                assert found.split()[0] == digest, f"{path} is another"
            stalls = early.progress().stalls
    overlay.unlink()
    site.images.delete(site.images.get(image_of(site, early.made).name))
    return f"{web.rate / 1e6:.1f} MB/s, {cuts} cuts, {stalls} stalls{', writes' if writes else ''}"


def check_captures(site: Site, base: Base, warm: Warm, seed: int, folder: Path) -> str:
    """Capture a guest that writes all over itself while its pages arrive, and one that does so on its image.

    :raises AssertionError: a page or a block is not what QEMU has.
    """
    rng = random.Random(seed)
    overlay = folder / f"{seed}.overlay"
    guest.pack(base, warm.capture, overlay, hot=random_hot(warm.capture, rng, rng.randrange(1, 800)))
    with serving(overlay.read_bytes()) as web:
        web.rate = rng.uniform(4e6, 20e6)
        with starting(site, f"{web.url}/whole") as early:
            guest.shell(early.instance, write_on(rng))
            check_capture(early, site, base, folder)
    with starting(site, str(overlay), start=None) as early:
        assert early.made.started.from_image, "it was not started from its image"
        guest.shell(early.instance, write_on(rng))
        check_capture(early, site, base, folder)
    site.images.delete(site.images.get(image_of(site, early.made).name))
    return f"{web.rate / 1e6:.1f} MB/s"


def write_on(rng: random.Random) -> str:
    """Shell commands that begin to write all over a guest's memory and disk, and go on."""
    size = rng.randrange(1, 8)
    disk = f"dd if=/dev/urandom of=/root/known bs=1M count={size} seek={8 - size} conv=notrunc"
    return f"{disk} 2>/dev/null; (while true; do {WRITE} done) >/dev/null 2>&1 &"


def check_against(early: Early, site: Site, base: Base, twin: Twin, folder: Path) -> None:
    """Pause a machine of which all is here, and compare it and its image with the twin; it goes on then."""
    instance = early.instance
    instance.pause()
    mapping = guest.mapping_of(instance)
    private = changed.private_pages(mapping)
    others = np.setdiff1d(guest.differing(guest.memory_of(instance), twin.ram), private)
    assert others.size == 0, f"{others.size} pages are not the twin's, from {others[:5]}"
    compared = np.setdiff1d(twin.numbers, private).size
    assert compared > 20 * MEBIBYTE >> 12, f"only {compared} of the overlay's pages were compared"
    instance.resume()

    image = image_of(site, early.made)
    assert (image / "image.json").exists(), "no image was left"
    kept = np.memmap(image / RAM, np.uint8, "r").reshape(twin.ram.shape)
    assert guest.differing(kept[twin.numbers], twin.ram[twin.numbers]) == [], "the image has other pages"
    disk = folder / "layer.raw"
    guest.save_disk([image / DISK], base, disk)
    assert guest.digest(disk) == twin.disk, "the image has another disk"
    disk.unlink()


def check_capture(early: Early, site: Site, base: Base, folder: Path) -> None:
    """Capture a machine that stands on an image, and compare with what its process and QEMU hold."""
    instance = early.instance
    capture = instance.capture()
    early.wait()
    memory = guest.memory_of(instance)
    seen = guest.differing(memory, guest.saved_memory_of(instance))
    assert set(seen) <= set(range(guest.SHADOWED.start, guest.SHADOWED.stop)), "QEMU and its process disagree"
    rebuilt = guest.base_memory(base)
    rebuilt[capture.ram.numbers] = capture.ram.data
    wrong = guest.differing(rebuilt, memory)
    assert wrong == [], f"{len(wrong)} pages changed and were not captured, from {wrong[:5]}"

    truth, ours = folder / "truth.raw", folder / "ours.raw"
    guest.saved_disk_of(instance, base, truth, image_of(site, early.made) / DISK)
    sink = guest.FileSink(base, folder / "ours.ram", ours)
    with os.fdopen(os.open(ours, os.O_RDWR), "r+b") as file:
        guest.write_pages(file.fileno(), capture.disk.numbers, capture.disk.data)
    sink.finish(b"")
    assert guest.digest(ours) == guest.digest(truth), "base and captured blocks are another disk"
    for path in (truth, ours, folder / "ours.ram"):
        path.unlink()


def _read_at_random(early: Early, twin: Twin, rng: random.Random) -> None:
    """Let the guest read pieces of its files in a random order, some of them from the disk itself."""
    if rng.random() < 0.5:
        guest.shell(early.instance, "echo 3 > /proc/sys/vm/drop_caches")
    for path in rng.sample(list(KNOWN), 2):
        wanted = rng.sample(range(KNOWN[path]), rng.randrange(1, 12))
        found = guest.shell(early.instance, read_pieces(path, wanted), ARRIVAL_SECONDS).split()
        assert found == [twin.pieces[path][number] for number in wanted], f"{path} was read wrong"
