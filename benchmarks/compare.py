"""One overlay beside what one would do without it, for the demonstration: row by row as each is done.

Synthesis is measured at both rates, early and in full, as ``cloudlet run --rate`` has it; and so is the
download of a full image at 100 Mbit/s. At 10 Mbit/s that would take minutes, so its time on the wire is
computed from its bytes and the boot is the one that was measured.
"""

from __future__ import annotations

import io
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks import plain
from benchmarks.answers import Question, url_of, wait_answer
from benchmarks.lab import compress_image, full_image
from benchmarks.transfers import bytes_per_second, download_and_boot, wire
from cloudlet.control.site import Site
from cloudlet.control.start import Start
from cloudlet.control.synthesis import Request, synthesise
from cloudlet.errors import FailedError
from cloudlet.hypervisor.driver import Instance
from cloudlet.overlay.reader import OverlayReader
from cloudlet.transfer.source import open_source

RATES = (10, 100)
"""Mbit/s."""
_ANSWER_SECONDS = 60.0
_ARRIVAL_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Row:
    """A way to a first answer."""

    what: str
    seconds: float
    bytes: int
    """What has to come over the link; 0 where all is here."""
    mbit: int = 0
    """The link's rate; 0 where all is here."""
    computed: bool = False
    """Whether the time on the wire was computed."""


def compare(site: Site, overlay: Path, app_request: Question) -> Iterator[Row]:
    """The rows, each as soon as it is measured, our own way first at each rate.

    Leaves the site as it was: an image of the app that was not there before is removed.

    :param app_request: asks the application once, at a URL, with a time limit in seconds; raises if the
        answer is not the right one. It is the first answer that is timed.
    """
    size = overlay.stat().st_size
    starts = [(Start.FULL, "full start: all bytes first")]
    if not site.hypervisor.early_obstacle():
        starts.insert(0, (Start.HOT, "early start"))
    for mbit in RATES:
        for start, what in starts:
            request = Request(allow_unsigned=True, start=start, use_image=False)
            seconds = _synthesis(site, overlay, app_request, mbit, request)
            yield Row(f"{what}, {mbit} Mbit/s", seconds, size, mbit)
    if len(starts) > 1:
        yield Row("second start, from the app's image here", _second(site, overlay, app_request), 0)
    with tempfile.TemporaryDirectory(prefix="compare-", dir=site.settings.cache_dir) as folder:
        image = full_image(site, overlay, Path(folder) / "full.raw")
        port = _port(overlay)
        packed = Path(folder) / "full.qcow2"
        packed_size = compress_image(image.disk, packed)
        began = time.monotonic()
        with plain.run(site.settings, image, port) as instance:
            wait_answer(instance, app_request)
            yield Row("cold boot of the full image, here", time.monotonic() - began, 0)
        whole, boot = download_and_boot(site.settings, image, packed, port, app_request, Path(folder))
        yield Row("full image, then boot, 100 Mbit/s", whole, packed_size, 100)
        seconds = wire(packed_size, 10) + boot
        yield Row("full image, then boot, 10 Mbit/s", seconds, packed_size, 10, computed=True)


def _second(site: Site, overlay: Path, ask: Question) -> float:
    """A start from the app's image, which a first start leaves, unless it is here."""
    with overlay.open("rb") as file:
        overlay_id = OverlayReader(file, allow_unsigned=True).identity
    was_here = site.images.find(overlay_id) is not None
    try:
        if not was_here:
            _synthesis(site, overlay, ask, 100, Request(allow_unsigned=True, start=Start.HOT), arrives=True)
            if site.images.find(overlay_id) is None:
                raise FailedError("the first start left no image", hint="image_cache_mib is too small")
        return _synthesis(site, overlay, ask, 100, Request(allow_unsigned=True))
    finally:
        if not was_here and (image := site.images.find(overlay_id)):
            site.images.delete(image)


def _synthesis(
    site: Site, overlay: Path, ask: Question, mbit: int, request: Request, *, arrives: bool = False
) -> float:
    """Seconds to the first answer; then, if told to, wait until all has arrived."""
    took = 0.0
    here = threading.Event()

    def answered(instance: Instance) -> None:
        nonlocal took
        # It answers already: who gives up now and asks again would only wait longer.
        with suppress(TimeoutError):
            ask(url_of(instance), _ANSWER_SECONDS)
            took = time.monotonic() - began

    began = time.monotonic()
    with (
        open_source(str(overlay), io.BytesIO(), bytes_per_second(mbit)) as source,
        synthesise(site, source, request, answering=answered, arrived=here.set) as made,
    ):
        if not took:  # an app that is published when it is ready
            answered(made.instance)
        if not took or (arrives and not here.wait(_ARRIVAL_SECONDS)):
            raise FailedError(f"{made.root.app.name} does not answer, or does not arrive")
    return took


def _port(overlay: Path) -> int:
    with overlay.open("rb") as file:
        return OverlayReader(file, allow_unsigned=True).root.app.ports[0].port
