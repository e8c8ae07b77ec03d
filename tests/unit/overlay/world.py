"""A small base, captures on it, and overlays of them: what the tests of the engine stand on."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cloudlet.errors import SignatureError
from cloudlet.model import Accelerator, GuestPort, Machine
from cloudlet.overlay.apply import apply
from cloudlet.overlay.base import BasePages
from cloudlet.overlay.create import CreateReport, Description, create
from cloudlet.overlay.index import PageIndex
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import PageBatch, PageSource, Rows, Space, numbers_of
from cloudlet.overlay.reader import OverlayReader
from cloudlet.overlay.root import App, DeviceSection

RAM_PAGES, DISK_PAGES = 96, 64
MACHINE = Machine("pc-q35-7.2", Accelerator.TCG, "Nehalem", 1, RAM_PAGES * 4096, DISK_PAGES * 4096)
SECTIONS = (DeviceSection("ram", 0, 4), DeviceSection("0000:00:02.0/virtio-blk", 0, 2))
APP = App("hello", "1.0", "Says hello", (GuestPort(80, "web"),))
DEVICE = b"the state of the devices" * 20


def page(seed: int) -> Rows:
    """A page that no other seed gives; it compresses to some forty bytes."""
    row = np.zeros(4096, np.uint8)
    row[:16] = np.frombuffer(blake3(seed.to_bytes(8, "little")).digest(length=16), np.uint8)
    return row


def near(row: Rows) -> Rows:
    """The page with a byte changed: where the base has the page, the difference is half of the content."""
    changed = row.copy()
    changed[0] ^= 0xFF
    return changed


def noise(pages: int, seed: int = 1) -> Rows:
    """Pages that do not compress."""
    return np.random.default_rng(seed).integers(0, 256, (pages, 4096), np.uint8)


CONTENT = np.arange(3 * 512, dtype="<u8").view(np.uint8).reshape(3, 4096)
"""Three pages of a file, each of whose words is another."""

BUFFER = CONTENT.reshape(-1)[48 : 48 + 2 * 4096].reshape(2, 4096)
"""Two pages that hold the middle of the file, 48 bytes further on."""


def source(pages: dict[int, Rows]) -> PageSource:
    if not pages:
        return PageSource.empty()
    numbers = np.array(sorted(pages), np.uint32)
    return PageSource(numbers, np.stack([pages[n] for n in sorted(pages)]))


class World:
    """A base in two anonymous files. RAM page i holds ``page(1000 + i)`` and block i ``page(2000 + i)``
    up to two thirds of each; the rest is zero.
    """

    def __init__(self, machine: Machine = MACHINE) -> None:
        self.machine = machine
        self.ram = np.zeros((machine.ram_pages, 4096), np.uint8)
        self.disk = np.zeros((machine.disk_blocks, 4096), np.uint8)
        for i in range(min(machine.ram_pages * 2 // 3, 64)):
            self.ram[i] = page(1000 + i)
        for i in range(min(machine.disk_blocks * 2 // 3, 42)):
            self.disk[i] = page(2000 + i)
        self.fds = []
        for rows in (self.ram, self.disk):
            fd = os.memfd_create("base")
            os.truncate(fd, rows.nbytes)
            os.pwrite(fd, rows.tobytes(), 0)
            self.fds.append(fd)
        self.base = BasePages("ab" * 32, machine, SECTIONS, *self.fds)
        self.index = PageIndex.build(self.base, np.array([[0, machine.disk_blocks]], np.uint32))

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)

    def create(
        self,
        ram: dict[int, Rows] | None = None,
        disk: dict[int, Rows] | None = None,
        device: bytes = DEVICE,
        **options: Any,
    ) -> tuple[bytes, CreateReport]:
        out = io.BytesIO()
        about = Description(APP, "2026-11-24T23:00:00Z", self.machine, SECTIONS, device)
        report = create(
            out,
            io.BytesIO(),
            about,
            source(ram or {}),
            source(disk or {}),
            self.base,
            self.index,
            **options,
        )
        return out.getvalue(), report

    def apply(self, data: bytes, spool_fd: int | None = None, **options: Any) -> Rebuilt:
        sink = Rebuilt(self)
        apply(unsigned(data, **options), self.base, sink, spool_fd=spool_fd)
        return sink


@dataclass
class Rebuilt:
    """A sink that holds the resulting machine, and insists on the rules of the protocol."""

    world: World
    device: bytes | None = None
    announced: dict[Space, set[int]] = field(default_factory=dict)
    came: dict[Space, list[int]] = field(default_factory=lambda: {s: [] for s in Space})

    def begin(self, pages: PageMap) -> None:
        assert not self.announced
        self.map = pages
        self.ram, self.disk = self.world.ram.copy(), self.world.disk.copy()
        self.announced = {s: set(numbers_of(pages.runs(s)).tolist()) for s in Space}

    def pages(self, batch: PageBatch) -> None:
        assert set(batch.numbers.tolist()) <= self.announced[batch.space]
        self.came[batch.space] += batch.numbers.tolist()
        (self.ram if batch.space is Space.RAM else self.disk)[batch.numbers] = batch.data

    def finish(self, device_state: bytes) -> None:
        for space in Space:
            assert len(self.came[space]) == len(self.announced[space])
        self.device = device_state


class Trickle(io.BytesIO):
    """A stream that gives at most a few bytes at a time, as sockets do."""

    def __init__(self, data: bytes, most: int) -> None:
        super().__init__(data)
        self.most = most

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None and size >= 0
        return super().read(min(size, self.most))


def unsigned(data: bytes, most: int = 1 << 30) -> OverlayReader:
    return OverlayReader(Trickle(data, most), allow_unsigned=True)


class Key:
    """A signing key, as the key ring will have it."""

    def __init__(self, seed: int, name: str) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
        self.name = name
        self.public = self._private.public_key()
        self.id = blake3(self.public.public_bytes_raw()).digest()

    def sign(self, message: bytes) -> tuple[bytes, bytes]:
        return self.id, self._private.sign(message)


class Ring:
    """Keys that are trusted."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys: dict[bytes, tuple[str, Ed25519PublicKey]] = {k.id: (k.name, k.public) for k in keys}

    def verify(self, key_id: bytes, message: bytes, signature: bytes) -> str:
        if key_id not in self._keys:
            raise SignatureError(f"the key {key_id.hex()} is not trusted here")
        name, key = self._keys[key_id]
        try:
            key.verify(signature, message)
        except InvalidSignature as error:
            raise SignatureError(f"the signature of {name} does not match") from error
        return name
