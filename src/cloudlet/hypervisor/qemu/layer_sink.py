"""An app's layer, written from its overlay without a machine: for a site that is to have it in advance."""

from __future__ import annotations

from cloudlet.hypervisor.qemu.incoming import no_room_for_a_layer
from cloudlet.hypervisor.qemu.layer import LayerWriter
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import PageBatch


class LayerFiles:
    """See :class:`cloudlet.hypervisor.driver.LayerSink`."""

    def __init__(self, writer: LayerWriter) -> None:
        self._writer = writer

    def begin(self, pages: PageMap) -> None:
        """The layer knows its pages already."""

    def pages(self, batch: PageBatch) -> None:
        """Write pages.

        :raises CapacityError: there is no room.
        """
        with no_room_for_a_layer():
            self._writer.write(batch)

    def finish(self, device_state: bytes) -> None:
        """All pages are written; the device state is not a layer's."""
        self.close()

    def close(self) -> None:
        self._writer.close()
