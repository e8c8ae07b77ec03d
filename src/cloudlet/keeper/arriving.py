"""The arrival of a machine: started paused, filled by its source, and run when it is this site's."""

from __future__ import annotations

import base64
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from cloudlet.control import identity
from cloudlet.control.handoff import Arrival
from cloudlet.control.ownership import Ownership, OwnershipFile, Record
from cloudlet.control.site import Site
from cloudlet.control.start import Choice, Start
from cloudlet.control.synthesis import Started, Synthesised, Timings
from cloudlet.errors import CloudletError, ConflictError, FailedError, NotFoundError
from cloudlet.hypervisor.driver import Layer
from cloudlet.keeper.control import Control, Progress
from cloudlet.keeper.correspondence import HttpPeer
from cloudlet.keeper.order import ArrivalOrder, KeeperState, Order
from cloudlet.overlay.known import KnownPages
from cloudlet.overlay.root import Root
from cloudlet.overlay.rounds import RoundReader
from cloudlet.store.bases import Base


class Arriving:
    """One arrival: its commands, and the machine that comes of it."""

    def __init__(self, folder: Path, site: Site, control: Control) -> None:
        self._folder = folder
        self._site = site
        self._control = control
        self._arrival: Arrival | None = None
        self._there = threading.Event()

    def records(self, message: Mapping[str, Any], _: Progress) -> dict[str, Any]:
        """Load records that came."""
        self._begun().records(int(message["first"]), message["body"])
        return self._answer()

    def commit(self, message: Mapping[str, Any], _: Progress) -> dict[str, Any]:
        """The machine is this site's."""
        self._begun().commit(int(message["epoch"]))
        return self._answer()

    def drop(self, message: Mapping[str, Any], _: Progress) -> dict[str, Any]:
        """Give the copy up."""
        self._begun().drop(str(message["reason"]))
        return self._answer()

    def take(self, _: Mapping[str, Any], __: Progress) -> dict[str, Any]:
        """An operator's word while the source is silent: it runs here."""
        self._begun().take()
        return self._answer()

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
            receiving = self._site.hypervisor.receive(
                base.image(), order.ports, name=root.app.name, overlay_id=coming.overlay, layer=layer,
                generation_id=coming.generation_id,
            )  # fmt: skip
            stack.callback(receiving.abort)
            receiving.begin()
            timings.mark("started")
            with ExitStack() as until_loaded:
                reader = self._reader(coming, base, layer, receiving.pages, until_loaded)
                record = Record(
                    coming.handoff, coming.instance, coming.epoch, Ownership.RECEIVING, coming.paused
                )
                self._arrival = Arrival(OwnershipFile(self._folder, record), receiving, reader, self._tell)
                self._there.set()
                self._tell(state=KeeperState.ARRIVING, endpoints=receiving.instance.endpoints)
                peer = HttpPeer.of(coming.peer, coming.handoff, self._site.keys)
                try:
                    state = self._arrival.settle(peer.state, coming.patience)
                finally:
                    peer.close()
            if state is Ownership.DROPPED:
                raise FailedError(f"the instance did not come: {self._arrival.reason}")
            timings.mark("resumed")
            self._control.tell(paused=coming.paused)
            self._set_clock(receiving.instance, base)
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

    def _begun(self) -> Arrival:
        self._there.wait(30.0)
        if self._arrival is None:
            raise ConflictError("the machine cannot be filled yet")
        return self._arrival

    def _reader(
        self, coming: ArrivalOrder, base: Base, layer: Layer | None, sink: Any, stack: ExitStack
    ) -> RoundReader:
        pages = stack.enter_context(base.pages())
        known = KnownPages(pages)
        if layer:
            held = stack.enter_context(self._site.hypervisor.layer_pages(layer, base.machine))
            known = KnownPages(pages, held, layer.overlay_id)
        literals = stack.enter_context(tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115 (it is one)
        return RoundReader(known, int(coming.seed, 16), sink, spool_fd=literals.fileno())

    def _layer(self, coming: ArrivalOrder, root: Root) -> Layer:
        image = self._site.images.find(coming.overlay)
        read = image.read(root) if image else None
        if read is None:
            raise NotFoundError(f"the image of overlay {coming.overlay[:16]} is gone")
        return read[0]

    def _set_clock(self, instance: Any, base: Base) -> None:
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
            keep=arrival.state is not Ownership.RECEIVING or bool(changes),
            handoff={
                "state": arrival.state.value,
                "records": arrival.count,
                "reason": arrival.reason,
                "in_doubt": arrival.in_doubt,
            },
            **changes,
        )
