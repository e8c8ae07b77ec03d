"""The files of an app's layer: held open while a machine stands on them, written while its pages come.

RAM is a sparse file, the disk a qcow2 file over the base's. Both are new; a page that is not there yet reads
as zeros, so nobody may be given one before it was written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloudlet.hypervisor.driver import Layer
from cloudlet.hypervisor.qemu.qcow2 import Qcow2Writer, held_blocks
from cloudlet.model import PAGE_BYTES, Machine
from cloudlet.overlay.known import HeldPages
from cloudlet.overlay.pages import Numbers, PageBatch, Space, numbers_of
from cloudlet.pageserver.state import BASE, HERE, MISSING
from cloudlet.sparse import write_rows


class OpenLayer:
    """A layer whose files stay open: they may be renamed or removed while a machine stands on them."""

    def __init__(self, layer: Layer) -> None:
        self._files = ExitStack()
        with self._files as on_error:
            ram, disk = (self._open(path) for path in (layer.ram, layer.disk))
            self._files = on_error.pop_all()
        self.layer = replace(layer, ram=Path(f"/proc/self/fd/{ram}"), disk=Path(f"/proc/self/fd/{disk}"))
        self.ram = ram
        self.disk = disk

    def _open(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._files.callback(os.close, descriptor)
        return descriptor

    def close(self) -> None:
        """Close the files. Can be called again."""
        self._files.close()


@contextmanager
def layer_pages(layer: Layer, machine: Machine) -> Iterator[Mapping[Space, HeldPages]]:
    """The pages of a whole layer and where they are in its files, which are open as long as the context."""
    with closing(OpenLayer(layer)) as opened:
        ram = numbers_of(layer.pages.runs(Space.RAM))
        blocks, offsets = held_blocks(opened.layer.disk, machine.disk_bytes)
        yield {
            Space.RAM: HeldPages(ram, ram.astype(np.int64) * PAGE_BYTES, opened.ram),
            Space.DISK: HeldPages(blocks.astype(np.uint32), offsets, opened.disk),
        }


class LayerWriter:
    """Writes the files of a layer."""

    def __init__(self, layer: Layer, machine: Machine) -> None:
        self._pages = layer.pages
        self._ram_pages = machine.ram_pages
        self.ram = _create(layer.ram)
        os.ftruncate(self.ram, machine.memory_bytes)
        self._disk = Qcow2Writer(layer.disk, machine.disk_bytes)
        # A machine's own user opens it to read, by a descriptor that it is given.
        layer.disk.chmod(0o444)
        self._disk.announce(numbers_of(layer.pages.runs(Space.DISK)))

    @property
    def disk(self) -> int:
        """The descriptor of the disk's file."""
        return self._disk.descriptor

    @property
    def disk_bytes(self) -> int:
        return os.fstat(self.disk).st_size

    def states(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """At the beginning, where each page of RAM is, and each cluster of the disk's file."""
        ram = np.full(self._ram_pages, BASE, np.uint8)
        ram[numbers_of(self._pages.runs(Space.RAM))] = MISSING
        disk = np.full(self.file_pages(Space.DISK), HERE, np.uint8)
        disk[self._disk.places(numbers_of(self._pages.runs(Space.DISK)))] = MISSING
        return ram, disk

    def file_pages(self, space: Space) -> int:
        """How many pages the file of a space has."""
        return -(-self.disk_bytes // PAGE_BYTES) if space is Space.DISK else self._ram_pages

    def write(self, batch: PageBatch) -> NDArray[np.int64]:
        """Write pages; where they are in their space's file, in pages."""
        if batch.space is Space.DISK:
            self._disk.write(batch.numbers, batch.data)
            return self._disk.places(batch.numbers)
        places = batch.numbers.astype(np.int64)
        write_rows(self.ram, places, batch.data)
        return places

    def numbers_at(self, space: Space, places: NDArray[np.int64]) -> Numbers:
        """The numbers of the pages at places of a file."""
        return self._disk.block_at(places) if space is Space.DISK else places.astype(np.uint32)

    def close(self) -> None:
        """Close the files. Can be called again."""
        self._disk.close()
        if self.ram >= 0:
            os.close(self.ram)
            self.ram = -1


def _create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
