"""VM synthesis: an overlay's bytes and a base become a running machine.

There are three ways to it, and one story. In full: the bytes are verified, rebuilt and loaded frame by frame
as they come, and the machine resumes with the last one. Early: it resumes with the first ones, and the rest
follows while it runs (:mod:`~cloudlet.control.delivery`). From an image: the app has been here before, and
there is nothing to build. Whatever goes wrong, nothing of it is left.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace

from cloudlet.control import identity
from cloudlet.control.delivery import PATIENCE, Delivery
from cloudlet.control.readiness import FIRST_TRY, WHILE_ARRIVING, guest_port, wait_ready
from cloudlet.control.site import Site
from cloudlet.control.start import Choice, Start, choose
from cloudlet.errors import CloudletError, NotFoundError
from cloudlet.hypervisor.driver import Arriving, Incoming, Instance, Layer, Paging
from cloudlet.model import PublishedPort, Readiness, ReadinessKind
from cloudlet.overlay.apply import apply
from cloudlet.overlay.arrival import Arrival
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import PageSource, runs_of
from cloudlet.overlay.reader import OverlayReader
from cloudlet.overlay.root import Publish, Root
from cloudlet.store.bases import Base
from cloudlet.store.images import layer_in
from cloudlet.transfer.source import Source

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
    started: Started


@dataclass(frozen=True, slots=True)
class Started:
    """How a machine was started, and what is still to come for it."""

    choice: Choice
    from_image: bool = False
    delivery: Delivery | None = None
    arriving: Arriving | None = None

    def progress(self) -> Paging | None:
        """How far its pages have come, if they come while it runs."""
        return self.arriving.progress() if self.arriving else None


@dataclass(frozen=True, slots=True)
class Request:
    """What is wanted of a synthesis besides the overlay."""

    ports: Sequence[PublishedPort] = ()
    """How to publish the app's ports; those not named get free ones on the loopback address."""
    only_these: bool = False
    """Not those not named."""
    ready: Readiness | None = None
    """When the app answers, if it is not when its overlay says."""
    allow_unsigned: bool = False
    start: Start | None = None
    """What to wait for before the machine resumes; None chooses."""
    patience: float = PATIENCE
    """Longest time, in seconds, that a guest waits for a page that has not come."""
    use_image: bool = True
    """Whether to use what the site knows of the app, its image and its hints, and to leave some."""


@contextmanager
def synthesise(
    site: Site,
    source: Source,
    request: Request = Request(),
    *,
    progress: Progress | None = None,
    answering: Callable[[Instance], None] | None = None,
    arrived: Callable[[], None] | None = None,
) -> Iterator[Synthesised]:
    """A running machine from an overlay; it ends when the context is left.

    :param answering: called as soon as the application answers, which may be before its identity is renewed.
    :param arrived: called from another thread when the overlay of a machine that runs has come whole.
    """
    timings = Timings()
    reader = OverlayReader(source, site.keys.verify, allow_unsigned=request.allow_unsigned)
    timings.mark("root")
    root = _as_wanted(reader.root, request)
    base = _base_of(site, root)
    site.hypervisor.check(root.machine)
    root.check_base(base.id, base.machine, base.description.sections)
    with ExitStack() as stack:
        incoming, started = _start(site, source, reader, base, request, timings, stack, progress, arrived)
        timings.mark("resumed")
        try:
            instance = incoming.instance
            # What an app printed before it was captured it does not print again: it is ready as it is.
            if root.app.ready.kind is not ReadinessKind.SERIAL:
                first_try = WHILE_ARRIVING if started.arriving else FIRST_TRY
                wait_ready(instance, root.app.ready, READY_SECONDS, first_try=first_try)
            timings.mark("answering")
            if answering and root.app.publish is Publish.ANSWERING:
                answering(instance)
                if started.delivery:
                    # Its pages come behind those that users need; a guest with one CPU waits for all at once.
                    started.delivery.wait_hot()
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
                started=started,
            )
        except CloudletError as error:
            # A machine whose pages do not come ends; the reason is what the user wants to hear.
            if started.delivery and started.delivery.error:
                raise started.delivery.error from error
            raise


def _start(
    site: Site,
    source: Source,
    reader: OverlayReader,
    base: Base,
    request: Request,
    timings: Timings,
    stack: ExitStack,
    progress: Progress | None,
    arrived: Callable[[], None] | None,
) -> tuple[Incoming, Started]:
    """The machine, running, by the way that fits; ``stack`` ends it."""
    ports = _publish(_as_wanted(reader.root, request), request.ports)
    image = site.images.find(reader.identity) if request.use_image and not request.start else None
    if image and (read := image.read(reader.root)):
        with suppress(NotFoundError, FileNotFoundError):  # it went meanwhile, for another's sake
            incoming = _from_image(site, base, *read, reader, ports, timings, stack)
            source.close()
            return incoming, Started(Choice(Start.FULL, "the app's image is here"), from_image=True)
    elif image:
        with suppress(OSError, CloudletError):  # where nothing can be removed it is only not used
            site.images.delete(image)
    rest = reader.header.file_bytes - reader.offset
    obstacle = site.hypervisor.early_obstacle() or site.images.obstacle()
    choice = choose(request.start, reader.root, rest, source.rate(), obstacle)
    if choice.start is Start.FULL:
        return _in_full(site, base, reader, ports, timings, stack, progress), Started(choice)
    return _early(site, source, reader, base, request, choice, timings, stack, progress, arrived)


def _in_full(
    site: Site,
    base: Base,
    reader: OverlayReader,
    ports: Sequence[PublishedPort],
    timings: Timings,
    stack: ExitStack,
    progress: Progress | None,
) -> Incoming:
    incoming = site.hypervisor.resume(
        base.image(), ports, name=reader.root.app.name, overlay_id=reader.identity
    )
    stack.callback(incoming.abort)
    timings.mark("started")
    with base.pages() as pages:
        apply(reader, pages, incoming, progress)
    return incoming


def _from_image(
    site: Site,
    base: Base,
    layer: Layer,
    device_state: bytes,
    reader: OverlayReader,
    ports: Sequence[PublishedPort],
    timings: Timings,
    stack: ExitStack,
) -> Incoming:
    incoming = site.hypervisor.resume(
        base.image(), ports, name=reader.root.app.name, overlay_id=reader.identity, layer=layer
    )
    stack.callback(incoming.abort)
    timings.mark("started")
    incoming.begin(_no_pages())
    incoming.finish(device_state)
    return incoming


def _early(
    site: Site,
    source: Source,
    reader: OverlayReader,
    base: Base,
    request: Request,
    choice: Choice,
    timings: Timings,
    stack: ExitStack,
    progress: Progress | None,
    arrived: Callable[[], None] | None,
) -> tuple[Incoming, Started]:
    root, identity_ = reader.root, reader.identity
    folder = stack.enter_context(site.images.workspace()).path
    pages = stack.enter_context(base.pages())
    literals = stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115 (it is one)
    delivery = Delivery(
        source,
        Arrival(reader.header, root, pages, literals.fileno()),
        reader.header.file_bytes,
        patience=request.patience,
        hints=site.hints.of(identity_, root.totals.frames) if request.use_image else (),
        progress=progress,
    )
    page_map, device_state = delivery.take_head()
    timings.mark("head")
    layer = layer_in(folder, identity_, page_map)
    incoming = site.hypervisor.resume_early(
        base.image(), layer, delivery.wanted, _publish(root, request.ports), name=root.app.name
    )
    stack.callback(incoming.abort)
    stack.callback(delivery.close)
    timings.mark("started")

    def keep() -> None:
        timings.mark("arrived")
        os.ftruncate(literals.fileno(), 0)  # nothing refers to them any more
        if request.use_image:  # the machine has all it needs, whatever can be kept
            with suppress(OSError):
                site.hints.add(identity_, root.totals.frames, delivery.asked)
            with suppress(OSError, CloudletError):
                site.images.adopt(folder, identity_, root, device_state, page_map)
        if arrived:
            arrived()

    delivery.deliver(incoming, keep)
    if choice.start is Start.READY:
        delivery.wait_hot()
    try:
        incoming.begin(page_map)
        incoming.start(device_state)
    except CloudletError as error:
        if delivery.error:
            raise delivery.error from error
        raise
    return incoming, Started(choice, delivery=delivery, arriving=incoming)


@contextmanager
def resume_base(
    site: Site, base: Base, ports: Sequence[PublishedPort] = (), *, name: str = ""
) -> Iterator[Instance]:
    """A private instance of a base as it is; it ends when the context is left."""
    incoming = site.hypervisor.resume(base.image(), ports, name=name or base.name)
    try:
        incoming.begin(_no_pages())
        incoming.finish(base.image().device_state.read_bytes())
        yield incoming.instance
    finally:
        incoming.abort()


def _no_pages() -> PageMap:
    nothing = runs_of(PageSource.empty().numbers)
    return PageMap(nothing, nothing)


def _as_wanted(root: Root, request: Request) -> Root:
    """What the overlay says of the app, but for what is wanted otherwise of this machine."""
    app = root.app
    if request.ready:
        app = replace(app, ready=request.ready)
    if request.only_these:
        named = {port.guest_port for port in request.ports}
        app = replace(app, ports=tuple(port for port in app.ports if port.port in named))
    return root if app is root.app else replace(root, app=app)


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
