"""One machine that comes from another site and may run before all of its RAM is there.

QEMU has mapped the page server's file as RAM, so nothing of RAM goes through its stream. Pages that come are
written to a file of the machine's own, over the base's, and before the devices are loaded the kernel is made
to forget what had been read until then. Which pages come later is said before that; who reads one of them,
QEMU too, waits for it. The disk is as in :mod:`cloudlet.hypervisor.qemu.receiving`.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloudlet.hypervisor.driver import Layer, Paging
from cloudlet.hypervisor.qemu.incoming import Starting, Stream, full_disk_is_capacity
from cloudlet.hypervisor.qemu.instance import QemuInstance
from cloudlet.hypervisor.qemu.page_server import PageServer
from cloudlet.hypervisor.qemu.qcow2 import GrowingQcow2
from cloudlet.hypervisor.qemu.receiving import load_and_stay
from cloudlet.model import PAGE_BYTES, Machine
from cloudlet.overlay.pages import Numbers, PageBatch, Space, numbers_of
from cloudlet.pageserver.state import BASE, HERE
from cloudlet.sparse import copy_range, write_rows

RAM = "ram.own"
RAM_FILE = 0
"""The page server's only file."""


class OwnRam:
    """The file of a machine's own pages of RAM: those of its layer, and those that came from another site."""

    def __init__(self, path: Path, machine: Machine, layer: Layer | None) -> None:
        self.path = path
        self._layer = layer
        self._came = np.zeros(machine.ram_pages, np.bool_)
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(self.descriptor, machine.memory_bytes)

    @property
    def received(self) -> Numbers:
        """The pages that came, or are to come, in order."""
        return np.flatnonzero(self._came).astype(np.uint32)

    def states(self) -> NDArray[np.uint8]:
        """At the beginning, where each page of RAM is."""
        states = np.full(self._came.size, BASE, np.uint8)
        if self._layer:
            states[numbers_of(self._layer.pages.runs(Space.RAM))] = HERE
        return states

    def copy_layer(self) -> None:
        """Fill in the pages of the layer."""
        if not self._layer:
            return
        source = os.open(self._layer.ram, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start, length in self._layer.pages.runs(Space.RAM).tolist():
                copy_range(source, self.descriptor, start * PAGE_BYTES, length * PAGE_BYTES)
        finally:
            os.close(source)

    def write(self, batch: PageBatch) -> None:
        """Write pages that came."""
        write_rows(self.descriptor, batch.numbers.astype(np.int64), batch.data)
        self.note(batch.numbers)

    def note(self, numbers: Numbers) -> None:
        """These pages have come or are to come."""
        self._came[numbers] = True

    def close(self) -> None:
        """Close the file. Can be called again."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class QemuReceivingEarly:
    """See :class:`cloudlet.hypervisor.driver.ReceivingEarly`."""

    def __init__(
        self,
        instance: QemuInstance,
        target: Stream,
        ram: OwnRam,
        disk: GrowingQcow2,
        server: PageServer,
        starting: Starting,
    ) -> None:
        self.instance = instance
        self._stream = target
        self._ram = ram
        self._disk = disk
        self._server = server
        self._starting = starting

    def begin(self) -> None:
        """Wait for the network, and fill in the layer's pages."""
        self._starting.wait()
        with _no_room():
            self._ram.copy_layer()
        self._stream.open()

    def pages(self, batch: PageBatch) -> None:
        """Put pages where the machine finds them, and wake who waits for one."""
        if not batch.numbers.size:
            return
        if batch.space is Space.RAM:
            with _no_room():
                self._ram.write(batch)
            self._server.arrived(RAM_FILE, batch.numbers)
        else:
            with full_disk_is_capacity():
                self._disk.write(batch.numbers, batch.data)

    def lack(self, numbers: Numbers) -> None:
        self._ram.note(numbers)
        self._server.expect(RAM_FILE, numbers)

    def load(self, device_state: bytes) -> None:
        """Load the devices; the machine is paused when this returns.

        :raises MismatchError: the device state is not one of the base's machine; QEMU has not seen it.
        :raises FailedError: QEMU refused the device state.
        """
        self.instance.stands_on(self._ram.path, self._ram.received)
        self._server.settle()
        load_and_stay(self.instance, self._stream, self._disk, device_state)

    def complete(self) -> None:
        """All pages have come."""
        self._server.complete()
        self._ram.close()

    def progress(self) -> Paging:
        return self._server.progress()

    def sever(self) -> None:
        """End page server and machine, in this order; what is held of them stays until :meth:`abort`."""
        for process in (self._server.process, self.instance.record.machine):
            if process:
                process.kill()

    def abort(self) -> None:
        """Give up: nothing of the instance is left."""
        self._stream.close()
        # First: what waits for a page cannot be ended before its wait fails.
        self._server.stop()
        self._disk.close()
        self._starting.close()
        self.instance.stop()
        self._ram.close()


def _no_room() -> AbstractContextManager[None]:
    return full_disk_is_capacity("the instance's memory")
