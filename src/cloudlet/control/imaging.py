"""An app's image, made without starting the app: for a machine that is to stand on it."""

from __future__ import annotations

from collections.abc import Callable

from cloudlet.control.site import Site
from cloudlet.errors import CapacityError
from cloudlet.overlay.apply import Sink, apply
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import PageBatch
from cloudlet.overlay.reader import OverlayReader, Progress
from cloudlet.store.images import Image, layer_in
from cloudlet.transfer.source import Source


def make_image(
    site: Site, source: Source, *, allow_unsigned: bool = False, progress: Progress | None = None
) -> Image:
    """The image of an overlay, from the overlay's bytes; nothing is read if it is here.

    :raises IntegrityError: they are not an overlay that may run here.
    :raises CapacityError: there is no room for it.
    """
    reader = OverlayReader(source, site.keys.verify, allow_unsigned=allow_unsigned)
    image = site.images.find(reader.identity)
    if image and image.read(reader.root):
        return image
    base = site.bases.get(reader.root.base)
    with site.images.workspace() as folder, base.pages() as pages:

        def sink(page_map: PageMap) -> Sink:
            return site.hypervisor.layer_sink(base.image(), layer_in(folder.path, reader.identity, page_map))

        building = _Building(sink)
        apply(reader, pages, building, progress)
        kept = site.images.adopt(
            folder.path, reader.identity, reader.root, building.device_state, building.page_map
        )
    if not kept or not (image := site.images.find(reader.identity)):
        raise CapacityError("no room for the app's image", hint="raise image_cache_mib")
    return image


class _Building:
    """A sink that knows where to write only when the map has come."""

    page_map: PageMap

    def __init__(self, make: Callable[[PageMap], Sink]) -> None:
        self._make = make
        self._sink: Sink | None = None
        self.device_state = b""

    def begin(self, pages: PageMap) -> None:
        self.page_map = pages
        self._sink = self._make(pages)
        self._sink.begin(pages)

    def pages(self, batch: PageBatch) -> None:
        assert self._sink
        self._sink.pages(batch)

    def finish(self, device_state: bytes) -> None:
        assert self._sink
        self._sink.finish(device_state)
        self.device_state = device_state
