"""Saving a running machine: what its user has changed becomes an overlay on the same base.

The machine pauses while it is captured, and may go on while the overlay is packed. The overlay says that it
is the same app, and carries the app as it is now; it is signed by this site.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cloudlet.control.publishing import make_quiet
from cloudlet.control.site import Site
from cloudlet.control.synthesis import Synthesised
from cloudlet.errors import CloudletError
from cloudlet.output import written
from cloudlet.overlay.create import CreateReport, Description, create

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Saved:
    """An overlay that was made of a running machine."""

    report: CreateReport
    pause_seconds: float


def save(
    site: Site,
    made: Synthesised,
    output: Path,
    *,
    paused: bool = False,
    quiet: bool = True,
    progress: Progress | None = None,
) -> Saved:
    """Write a machine as an overlay to ``output``.

    :param paused: it is paused, or shall be: it does not run on.
    :param quiet: have the guest drop what need not be saved, before it pauses; it must be running.
    """
    base = site.bases.get(made.root.base)
    instance, guest = made.instance, base.description.guest
    if quiet and guest.agent:
        with suppress(CloudletError):  # then it is only larger
            make_quiet(instance.agent, guest.quiet)
    try:
        capture = instance.capture()
    finally:
        if not paused:
            instance.resume()
    description = Description(
        app=made.root.app,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        machine=base.machine,
        device_sections=capture.sections,
        device_state=capture.device_state,
    )
    with base.pages() as pages, written(output) as out, tempfile.TemporaryFile(dir=output.parent) as spool:
        report = create(
            out, spool, description, capture.ram, capture.disk, pages, base.index(),
            sign=site.keys.signer(), hot=(), plain_delta=False, progress=progress,
        )  # fmt: skip
    return Saved(report, capture.pause_seconds)
