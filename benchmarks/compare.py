"""One overlay beside what one would do without it, for the demonstration: row by row as each is done.

Synthesis and the download at 100 Mbit/s are measured; at 10 Mbit/s the download of a full image would take
minutes, so its time on the wire is computed from its bytes and the boot is the one that was measured.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import plain
from benchmarks.answers import Question, wait_answer
from benchmarks.lab import compress_image, full_image
from benchmarks.transfers import bytes_per_second, download_and_boot, served, wire
from cloudlet.control.site import Site
from cloudlet.control.source import open_source
from cloudlet.control.synthesis import Request, synthesise
from cloudlet.hypervisor.driver import Instance
from cloudlet.overlay.reader import OverlayReader


@dataclass(frozen=True, slots=True)
class Row:
    """A way to a first answer."""

    what: str
    seconds: float
    bytes: int
    """What has to come over the link; 0 where all is here."""
    computed: bool = False
    """Whether the time on the wire was computed."""


def compare(site: Site, overlay: Path, app_request: Question) -> Iterator[Row]:
    """The rows, each as soon as it is measured. The full image is made between the second and the third.

    :param app_request: asks the application once, at a URL, with a time limit in seconds; raises if the
        answer is not the right one. It is the first answer that is timed.
    """
    size = overlay.stat().st_size
    for mbit in (100, 10):
        seconds = _synthesis(site, overlay, app_request, mbit)
        yield Row(f"synthesis at {mbit} Mbit/s", seconds, size)
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
        yield Row("full image at 100 Mbit/s, then boot", whole, packed_size)
        yield Row(
            "full image at 10 Mbit/s, then boot", wire(packed_size, 10) + boot, packed_size, computed=True
        )


def _synthesis(site: Site, overlay: Path, ask: Question, mbit: int) -> float:
    took = 0.0

    def answered(instance: Instance) -> None:
        nonlocal took
        wait_answer(instance, ask)
        took = time.monotonic() - began

    with served(overlay) as url:
        began = time.monotonic()
        with (
            open_source(url, io.BytesIO(), bytes_per_second(mbit)) as source,
            synthesise(
                site, source, Request(allow_unsigned=True, use_image=False), answering=answered
            ) as made,
        ):
            if not took:  # an app that is published when it is ready
                answered(made.instance)
    return took


def _port(overlay: Path) -> int:
    with overlay.open("rb") as file:
        return OverlayReader(file, allow_unsigned=True).root.app.ports[0].port
