"""The arrival of a machine: started paused, filled by its source, and run when it is this site's."""

from __future__ import annotations

import base64
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from cloudlet.control import identity
from cloudlet.control.arrival import Arrival
from cloudlet.control.filling import EarlyArrival, WantedPages
from cloudlet.control.ownership import Ownership, OwnershipFile, Record
from cloudlet.control.site import Site
from cloudlet.control.start import Choice, Start
from cloudlet.control.synthesis import Started, Synthesised, Timings
from cloudlet.errors import CloudletError, ConflictError, FailedError, NotFoundError
from cloudlet.hypervisor.driver import Layer, Receiving
from cloudlet.keeper.control import Control, Progress
from cloudlet.keeper.correspondence import HttpPeer, Whom, connector
from cloudlet.keeper.order import ArrivalOrder, KeeperState, Order
from cloudlet.overlay.known import KnownPages
from cloudlet.overlay.pages import PageBatch
from cloudlet.overlay.root import Root
from cloudlet.overlay.rounds import RoundReader
from cloudlet.store.bases import Base

_CLOCK_SECONDS = 1.0
"""Until a machine's clock is set: a guest that has just come answers those first who have waited for it."""


class Arriving:
    """One arrival: its commands, and the machine that comes of it."""

    def __init__(self, folder: Path, site: Site, control: Control) -> None:
        self._folder = folder
        self._site = site
        self._control = control
        self._arrival: Arrival | None = None
        self._peer: HttpPeer | None = None
        self._there = threading.Event()

    def records(self, message: Mapping[str, Any], _: Progress) -> dict[str, Any]:
        """Load records that came."""
        self._begun(message).records(int(message["first"]), message["body"])
        return self._answer()

    def commit(self, message: Mapping[str, Any], _: Progress) -> dict[str, Any]:
        """The machine is this site's."""
        self._begun(message).commit(int(message["epoch"]))
        return self._answer()

    def drop(self, message: Mapping[str, Any], _: Progress) -> dict[str, Any]:
        """Give the copy up."""
        self._begun(message).drop(str(message["reason"]))
        return self._answer()

    def take(self, message: Mapping[str, Any], _: Progress) -> dict[str, Any]:
        """An operator's word while the source is silent: it runs here."""
        self._begun(message).take()
        return self._answer()

    def is_about(self, handoff: str) -> bool:
        """Whether the machine comes, or came, by this hand-off."""
        return self._arrival is not None and self._arrival.is_of(handoff)

    def find(self, whom: Whom) -> None:
        """The source is somewhere else from now on."""
        assert self._peer
        self._peer.be_at(connector(whom, self._site.keys))

    @contextmanager
    def machine(self, order: Order) -> Iterator[Synthesised]:
        """The machine, once it runs here; it ends when the context is left.

        :raises CloudletError: it did not come, or stays where it was.
        """
        coming = order.arrival
        assert coming
        timings = Timings()
        root = Root.decode(base64.b64decode(coming.root))
        base = self._site.bases.get(root.base)
        with ExitStack() as stack:
            layer = self._layer(coming, root) if coming.holds == "overlay" else None
            peer = self._peer = HttpPeer.of(coming.peer, coming.handoff, self._site.keys)
            stack.callback(peer.close)
            until_whole = stack.enter_context(ExitStack())
            receiving = self._prepare(order, root, base, layer, until_whole, stack)
            timings.mark("started")
            arrival = self._arrival
            assert arrival
            self._there.set()
            self._tell(state=KeeperState.ARRIVING, endpoints=receiving.instance.endpoints)
            state = arrival.settle(peer.state, coming.patience)
            if state is Ownership.DROPPED:
                raise FailedError(f"the instance did not come: {arrival.reason}")
            timings.mark("resumed")
            self._control.tell(paused=coming.paused)

            def whole() -> None:
                until_whole.close()
                # A guest that is slow to answer keeps nobody from the machine.
                clock = (receiving.instance, base)
                threading.Thread(target=self._set_clock, args=clock, name="clock", daemon=True).start()

            if isinstance(arrival, EarlyArrival):
                stack.enter_context(self._filled(arrival, peer, coming.patience, whole))
            else:
                whole()
            yield Synthesised(
                instance=receiving.instance,
                root=root,
                overlay_id=coming.overlay,
                signed_by=None,
                overlay_bytes=0,
                timings=timings,
                renewed=True,
                started=Started(Choice(Start.FULL, "it came from another site")),
            )

    def wanted(self, message: Mapping[str, Any], _: Progress) -> dict[str, Any]:
        """What a machine waits for that runs already."""
        arrival = self._begun(message)
        if not isinstance(arrival, EarlyArrival):
            raise ConflictError("all of the machine comes before it runs")
        wish = arrival.ask(int(message["after"]), float(message["wait"]))
        return {
            **self._answer(), "missing": wish.missing, "wanted": wish.pages, "wanted_after": wish.after,
        }  # fmt: skip

    @property
    def runs(self) -> bool:
        """Whether the machine runs here."""
        arrival = self._arrival
        return arrival is not None and arrival.state in (Ownership.RUNNING, Ownership.FILLING)

    @property
    def filling(self) -> bool:
        """Whether the machine runs, and some of its memory is still to come."""
        return self._arrival is not None and self._arrival.state is Ownership.FILLING

    def _prepare(
        self,
        order: Order,
        root: Root,
        base: Base,
        layer: Layer | None,
        until_whole: ExitStack,
        stack: ExitStack,
    ) -> Receiving:
        """A machine that can be filled, and its arrival."""
        coming = order.arrival
        assert coming
        known = self._known(base, layer, until_whole)
        literals = until_whole.enter_context(tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115 (it is one)
        record = Record(coming.handoff, coming.instance, coming.epoch, Ownership.RECEIVING, coming.paused)
        about: dict[str, Any] = {
            "name": root.app.name, "overlay_id": coming.overlay, "layer": layer,
            "generation_id": coming.generation_id,
        }  # fmt: skip
        seed, spool = int(coming.seed, 16), literals.fileno()
        if not coming.early:
            receiving = self._site.hypervisor.receive(base.image(), order.ports, **about)
            stack.callback(receiving.abort)
            receiving.begin()
            receiving.instance.hold_connections(True)
            reader = RoundReader(known, seed, receiving.pages, spool_fd=spool)
            self._arrival = Arrival(OwnershipFile(self._folder, record), receiving, reader, self._tell)
            return receiving
        wanted = WantedPages(base.machine)
        early = self._site.hypervisor.receive_early(base.image(), wanted.want, order.ports, **about)
        stack.callback(early.abort)
        early.begin()
        early.instance.hold_connections(True)

        def sink(batch: PageBatch) -> None:
            early.pages(batch)
            wanted.came(batch)

        reader = RoundReader(known, seed, sink, spool_fd=spool)
        ownership = OwnershipFile(self._folder, record)
        self._arrival = EarlyArrival(ownership, early, reader, wanted, self._tell)
        return early

    @contextmanager
    def _filled(
        self, arrival: EarlyArrival, peer: HttpPeer, patience: float, whole: Callable[[], None]
    ) -> Iterator[None]:
        """Watch a machine while its memory comes, beside its life.

        :raises FailedError: the machine has ended since some of it did not come.
        """

        def watch() -> None:
            arrival.watch(peer.state, patience)
            if arrival.state is Ownership.RUNNING:
                whole()

        thread = threading.Thread(target=watch, name="filling", daemon=True)
        thread.start()
        try:
            yield
        except FailedError as error:
            arrival.lose("its machine ended before all of its memory had come")
            if arrival.state is Ownership.LOST:
                raise FailedError(f"the instance is lost: {arrival.reason}") from error
            raise
        finally:
            arrival.lose("it was ended before all of its memory had come")

    def _begun(self, message: Mapping[str, Any] | None = None) -> Arrival:
        """The arrival, which has to be that of the hand-off that a message is about."""
        self._there.wait(30.0)
        if self._arrival is None:
            raise ConflictError("the machine cannot be filled yet")
        if message is not None and not self._arrival.is_of(str(message.get("handoff"))):
            raise ConflictError("the machine comes by another hand-off")
        return self._arrival

    def _known(self, base: Base, layer: Layer | None, stack: ExitStack) -> KnownPages:
        """What both ends hold."""
        pages = stack.enter_context(base.pages())
        if not layer:
            return KnownPages(pages)
        held = stack.enter_context(self._site.hypervisor.layer_pages(layer, base.machine))
        return KnownPages(pages, held, layer.overlay_id)

    def _layer(self, coming: ArrivalOrder, root: Root) -> Layer:
        image = self._site.images.find(coming.overlay)
        read = image.read(root) if image else None
        if read is None:
            raise NotFoundError(f"the image of overlay {coming.overlay[:16]} is gone")
        return read[0]

    def _set_clock(self, instance: Any, base: Base) -> None:
        time.sleep(_CLOCK_SECONDS)
        if not self._control.status.paused:
            with suppress(CloudletError):  # it goes on with the time that it has
                identity.set_clock(instance.agent, base.description.guest)

    def _answer(self) -> dict[str, Any]:
        arrival = self._begun()
        return {"state": arrival.state.value, "records": arrival.count, "reason": arrival.reason}

    def _tell(self, **changes: Any) -> None:
        arrival = self._arrival
        assert arrival
        self._control.tell(
            keep=arrival.state not in (Ownership.RECEIVING, Ownership.FILLING) or bool(changes),
            handoff={
                "state": arrival.state.value,
                "records": arrival.count,
                "reason": arrival.reason,
                "in_doubt": arrival.in_doubt,
            },
            **changes,
        )
