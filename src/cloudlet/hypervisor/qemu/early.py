"""One machine that runs while its pages arrive: they go to the layer's files; the page server serves them.

QEMU has mapped the page server's file as RAM, so nothing of RAM goes through its stream: only the devices do.
Loading them may touch pages that have not come, and then waits for them as the guest does; so does QEMU's
monitor, which is not asked anything until all is here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloudlet.hypervisor.driver import Paging, Wanted
from cloudlet.hypervisor.qemu.incoming import Starting, Stream, no_room_for_a_layer
from cloudlet.hypervisor.qemu.instance import QemuInstance
from cloudlet.hypervisor.qemu.layer import LayerWriter
from cloudlet.hypervisor.qemu.page_server import PageServer
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import Numbers, PageBatch, Space

FILES = (Space.RAM, Space.DISK)
"""What the page server's files are, in their order."""

_TOUCHED = struct.Struct("<BI")


class QemuArriving:
    """See :class:`cloudlet.hypervisor.driver.Arriving`."""

    def __init__(
        self,
        instance: QemuInstance,
        target: Stream,
        writer: LayerWriter,
        server: PageServer,
        starting: Starting,
        touched: Path | None = None,
    ) -> None:
        self.instance = instance
        self._stream = target
        self._writer = writer
        self._server = server
        self._starting = starting
        self._touched = touched

    def begin(self, page_map: PageMap) -> None:
        """Look whether all is there that a machine needs; the layer knows its pages already."""
        self._starting.wait()
        self._stream.open()

    def pages(self, batch: PageBatch) -> None:
        """Put verified pages where the guest finds them, and wake what waits for them."""
        with no_room_for_a_layer():
            places = self._writer.write(batch)
        self._server.arrived(FILES.index(batch.space), places.astype(np.uint32))

    def received(self, done: int, total: int) -> None:
        self._server.received(done, total)

    def start(self, device_state: bytes) -> None:
        """Load the devices; the machine runs when this returns.

        :raises MismatchError: the device state is not one of the base's machine; QEMU has not seen it.
        :raises FailedError: QEMU ended, or did not load it.
        """
        self._stream.load_devices(device_state)
        # QEMU closes its end when it runs, but also when it is about to exit.
        if self.instance.wait(0):
            raise self._stream.refusal()

    def finish(self, device_state: bytes) -> None:
        """All pages are in their places."""
        self._server.complete()
        self._writer.close()

    def progress(self) -> Paging:
        return self._server.progress()

    def touched(self) -> list[tuple[Space, Numbers]]:
        """The pages that the guest has read, in stretches of one space."""
        if self._touched is None:
            raise ValueError("the order of first touch was not recorded")
        self._server.flush_touched()
        raw = self._touched.read_bytes()
        records = np.frombuffer(
            raw[: len(raw) // _TOUCHED.size * _TOUCHED.size], [("file", "u1"), ("page", "<u4")]
        )
        return list(self._by_space(records["file"], records["page"].astype(np.int64)))

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
        self._starting.close()
        self.instance.stop()
        self._writer.close()

    def _by_space(
        self, files: NDArray[np.uint8], places: NDArray[np.int64]
    ) -> Iterator[tuple[Space, Numbers]]:
        edges = [0, *(np.flatnonzero(np.diff(files)) + 1).tolist(), len(files)]
        for first, after in pairwise(edges):
            if after > first:
                space = FILES[int(files[first])]
                numbers = self._writer.numbers_at(space, places[first:after])
                if numbers.size:
                    yield space, numbers


def told_in_pages(wanted: Wanted, writer: LayerWriter) -> Callable[[int, int, int], None]:
    """What the page server tells of a place in a file, told as pages of a space.

    The server has read what a guest and its QEMU wrote: what cannot be is not believed.
    """

    def tell(file: int, place: int, count: int) -> None:
        if file >= len(FILES) or place >= (pages := writer.file_pages(FILES[file])):
            return
        space = FILES[file]
        numbers = writer.numbers_at(space, np.arange(place, min(place + count, pages), dtype=np.int64))
        if numbers.size:
            wanted(space, numbers)

    return tell
