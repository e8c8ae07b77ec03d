"""One file of version 2, kept: it must be read for ever, and written as it is."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from cloudlet.overlay import canonical
from cloudlet.overlay.frames import zstd
from cloudlet.overlay.pages import Space
from cloudlet.overlay.reader import OverlayReader

from .forge import Forged
from .world import BUFFER, CONTENT, DEVICE, Key, Ring, World, near, page, unsigned

FILE = Path(__file__).with_name("golden-2.overlay")
DIGEST = "ea8fcb2425fc278613eb7e4ea5afb05753d74afad7c367bb245b6b093975d7dd"
ZSTD = (1, 5, 7)
"""The library that compressed the golden file; another one may find other bytes for the same content."""

KEY = Key(7, "golden")
ZERO = np.zeros(4096, np.uint8)
RAM = {0: ZERO, 1: page(1), 2: page(1), 3: page(1050), 4: page(2001), 70: page(2), 71: page(3), 90: page(1)}
RAM |= {92: BUFFER[0], 93: BUFFER[1], 7: near(page(1007))}
DISK = {5: page(4), 6: page(1003), 7: page(2000), 50: page(2), 51: np.full(4096, 7, np.uint8)}
DISK |= {52: CONTENT[0], 53: CONTENT[1], 54: CONTENT[2], 8: near(page(2008))}


def written(world: World) -> bytes:
    hot = [(Space.RAM, np.array([70, 2], np.uint32)), (Space.DISK, np.array([51], np.uint32))]
    return world.create(RAM, DISK, hot=hot, sign=KEY.sign)[0]


def content(data: bytes) -> tuple[Any, list[bytes]]:
    """Root and frames without what depends on the compressor: sizes in the file and digests."""
    forged = Forged.of(data)
    root = canonical.decode(unsigned(data).root_bytes, "root")
    for entries in root["frames"].values():
        for entry in entries:
            entry[1] = entry[5] = 0
    for chunk in root["index"]:
        chunk[1] = chunk[4] = 0
    return root, [bytes(forged.raw(at)) for at in range(len(forged.frames))]


def test_it_is_read(world: World) -> None:
    data = FILE.read_bytes()
    assert blake3(data).hexdigest() == DIGEST
    assert OverlayReader(io.BytesIO(data), Ring([KEY]).verify).signed_by == "golden"
    rebuilt = world.apply(data)
    assert all((rebuilt.ram[number] == row).all() for number, row in RAM.items())
    assert all((rebuilt.disk[number] == row).all() for number, row in DISK.items())
    assert rebuilt.device == DEVICE


def test_it_is_what_we_write(world: World) -> None:
    data = written(world)
    assert content(data) == content(FILE.read_bytes())
    if zstd.zstd_version_info == ZSTD:
        assert data == FILE.read_bytes()
