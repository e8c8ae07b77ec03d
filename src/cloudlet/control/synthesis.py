"""VM synthesis: an overlay's bytes and a base become a running machine.

The bytes are used as they come: verified, decompressed, rebuilt and loaded frame by frame, while the
rest is still on its way and QEMU, started as soon as the root is known, waits for them. The machine
resumes with the last byte. Whatever goes wrong, nothing of it is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cloudlet.control import identity
from cloudlet.control.readiness import guest_port, wait_ready
from cloudlet.control.site import Site
from cloudlet.control.source import Bytes
from cloudlet.errors import NotFoundError
from cloudlet.hypervisor.driver import Instance
from cloudlet.model import PublishedPort, ReadinessKind
from cloudlet.overlay.apply import apply
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import PageSource, runs_of
from cloudlet.overlay.reader import OverlayReader
from cloudlet.overlay.root import Publish, Root
from cloudlet.store.bases import Base

READY_SECONDS = 120.0
"""Longest time from resume to readiness."""

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Timings:
    """Moments of a synthesis, in seconds after the first byte was asked for."""

    began: float = field(default_factory=time.monotonic)
    moments: dict[str, float] = field(default_factory=dict)

    def mark(self, name: str) -> None:
        self.moments[name] = round(time.monotonic() - self.began, 4)


@dataclass(frozen=True, slots=True)
class Synthesised:
    """A machine that runs, and how it came to be."""

    instance: Instance
    root: Root
    overlay_id: str
    signed_by: str | None
    overlay_bytes: int
    timings: Timings
    renewed: bool
    """Whether the clone has an identity of its own."""


@contextmanager
def synthesise(
    site: Site,
    source: Bytes,
    *,
    ports: Sequence[PublishedPort] = (),
    allow_unsigned: bool = False,
    progress: Progress | None = None,
    answering: Callable[[Instance], None] | None = None,
) -> Iterator[Synthesised]:
    """A running machine from an overlay; it ends when the context is left.

    :param ports: how to publish the app's ports; those not named get free ones on the loopback address.
    :param answering: called as soon as the application answers, which may be before its identity is renewed.
    """
    timings = Timings()
    reader = OverlayReader(source, site.keys.verify, allow_unsigned=allow_unsigned)
    timings.mark("root")
    root = reader.root
    base = _base_of(site, root)
    site.hypervisor.check(root.machine)
    root.check_base(base.id, base.machine, base.description.sections)
    incoming = site.hypervisor.resume(
        base.image(), _publish(root, ports), name=root.app.name, overlay_id=reader.identity
    )
    timings.mark("started")
    try:
        with base.pages() as pages:
            apply(reader, pages, incoming, progress)
        timings.mark("resumed")
        instance = incoming.instance
        # What an app printed before it was captured it does not print again: such a one is ready as it is.
        if root.app.ready.kind is not ReadinessKind.SERIAL:
            wait_ready(instance, root.app.ready, READY_SECONDS)
        timings.mark("answering")
        if answering and root.app.publish is Publish.ANSWERING:
            answering(instance)
        host_name = identity.host_name(root.app.name, instance.id)
        renewed = identity.renew(instance.agent, base.description.guest, host_name) is not None
        timings.mark("ready")
        yield Synthesised(
            instance=instance,
            root=root,
            overlay_id=reader.identity,
            signed_by=reader.signed_by,
            overlay_bytes=reader.header.file_bytes,
            timings=timings,
            renewed=renewed,
        )
    finally:
        incoming.abort()


@contextmanager
def resume_base(
    site: Site, base: Base, ports: Sequence[PublishedPort] = (), *, name: str = ""
) -> Iterator[Instance]:
    """A private instance of a base as it is; it ends when the context is left."""
    incoming = site.hypervisor.resume(base.image(), ports, name=name or base.name)
    try:
        nothing = runs_of(PageSource.empty().numbers)
        incoming.begin(PageMap(nothing, nothing))
        incoming.finish(base.image().device_state.read_bytes())
        yield incoming.instance
    finally:
        incoming.abort()


def _base_of(site: Site, root: Root) -> Base:
    try:
        return site.bases.get(root.base)
    except NotFoundError as error:
        raise NotFoundError(
            f"the overlay {root.app.name} is made for base {root.base[:16]}, which is not here",
            hint="cloudlet base import it, or ask the publisher for an overlay on a base that is here",
        ) from error


def _publish(root: Root, ports: Sequence[PublishedPort]) -> list[PublishedPort]:
    chosen = {port.guest_port: port for port in ports}
    for port in root.app.ports:
        chosen.setdefault(port.port, PublishedPort(port.port, name=port.name))
    if (asked := guest_port(root.app.ready)) is not None:
        chosen.setdefault(asked, PublishedPort(asked))
    return list(chosen.values())
