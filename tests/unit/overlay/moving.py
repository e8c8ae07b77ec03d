"""A machine that moves: what both ends hold, its pages at the source, and what the target makes of it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from io import BytesIO
from typing import Any

import numpy as np

from cloudlet.overlay.index import JoinedIndex, Lookup, index_of_layer
from cloudlet.overlay.known import ZEROS, HeldPages, KnownPages
from cloudlet.overlay.limits import FRAME_PAGES
from cloudlet.overlay.pages import PageBatch, Rows, Space
from cloudlet.overlay.records import Record, read_record
from cloudlet.overlay.rounds import Ended, RoundReader, RoundWriter, pack

from .world import DEVICE, World

SEED = 0x0123456789ABCDEF
OVERLAY = "cd" * 32
Pages = dict[int, Rows]


def held_pages(pages: Pages, shift: int = 24) -> HeldPages:
    """Pages in a file of their own: in no order, some beside each other, none at a page border."""
    numbers = np.array(sorted(pages), np.uint32)
    places = np.roll(np.arange(numbers.size), 3)
    filled = np.array([bool(pages[number].any()) for number in numbers.tolist()], np.bool_)
    offsets = np.where(filled, places * 4096 + shift, ZEROS).astype(np.int64)
    descriptor = os.memfd_create("layer")
    for number, offset in zip(numbers.tolist(), offsets.tolist(), strict=True):
        if offset != ZEROS:
            os.pwrite(descriptor, pages[number].tobytes(), offset)
    return HeldPages(numbers, offsets, descriptor)


class Held:
    """What both ends hold: the world's base, or the base and a layer."""

    def __init__(self, world: World, ram: Pages | None = None, disk: Pages | None = None) -> None:
        self.pages = {Space.RAM: world.ram.copy(), Space.DISK: world.disk.copy()}
        self.known = KnownPages(world.base)
        self.index: Lookup = world.index
        self._descriptors: list[int] = []
        if ram is not None and disk is not None:
            layer = {Space.RAM: held_pages(ram), Space.DISK: held_pages(disk)}
            self._descriptors = [held.descriptor for held in layer.values()]
            self.known = KnownPages(world.base, layer, OVERLAY)
            self.index = JoinedIndex([index_of_layer(self.known), world.index])
            for space, changed in ((Space.RAM, ram), (Space.DISK, disk)):
                for number, row in changed.items():
                    self.pages[space][number] = row

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)


class Source:
    """A machine, the pages of it that may have changed, and the records so far."""

    def __init__(self, held: Held, seed: int = SEED, **options: Any) -> None:
        self.pages = {space: rows.copy() for space, rows in held.pages.items()}
        self.writer = RoundWriter(held.known, held.index, seed, **options)
        self.touched: dict[Space, set[int]] = {space: set() for space in Space}
        self.records: list[Record] = []
        self.rounds = 0

    def change(self, space: Space, number: int, row: Rows) -> None:
        self.pages[space][number] = row
        self.touched[space].add(number)

    def round(self, torn: Iterable[tuple[Space, int]] = ()) -> list[Record]:
        """Look at all that may have changed; of torn pages only half is seen as it is."""
        torn, before = set(torn), len(self.records)
        for space in (Space.DISK, Space.RAM):
            numbers = np.array(sorted(self.touched[space]), np.uint32)
            rows = self.pages[space][numbers]
            for at, number in enumerate(numbers.tolist()):
                if (space, number) in torn:
                    rows[at, 2048:] = 0x55
            for at in range(0, numbers.size, FRAME_PAGES):
                batch = slice(at, at + FRAME_PAGES)
                self.writer.look(space, numbers[batch], rows[batch])
                self.drain()
            rows[:] = 0xEE  # they were only lent
        self.rounds += 1
        ending = self.writer.end_round(self.rounds)
        self.drain()
        self.records += ending
        return self.records[before:]

    def drain(self) -> None:
        """Pack what waits, in an order that workers would finish in, and put it in its order."""
        payloads = self.writer.payloads()
        packed = [pack(payload, 1) for payload in reversed(payloads)]
        for blob in reversed(packed):
            record = read_record(BytesIO(blob), len(self.records))
            assert record
            self.records.append(record)

    def end(self, device_state: bytes = DEVICE) -> list[Record]:
        self.records += [*self.writer.device_records(device_state), self.writer.end_record(device_state)]
        return self.records


class Target:
    """The machine that the records make."""

    def __init__(self, held: Held, seed: int = SEED, spool_fd: int | None = None) -> None:
        self.pages = {space: rows.copy() for space, rows in held.pages.items()}
        self.loaded: list[tuple[Space, int]] = []
        self.full = False
        self.reader = RoundReader(held.known, seed, self._load, spool_fd)

    def _load(self, batch: PageBatch) -> None:
        if self.full:
            raise OSError("no room")
        self.pages[batch.space][batch.numbers] = batch.data
        self.loaded += [(batch.space, number) for number in batch.numbers.tolist()]

    def take(self, records: Iterable[Record]) -> Ended | None:
        """Take records; what the last of them gave."""
        ended = None
        for record in records:
            assert ended is None
            ended = self.reader.take(record)
        return ended

    def equals(self, source: Source) -> bool:
        return all((self.pages[space] == source.pages[space]).all() for space in Space)
