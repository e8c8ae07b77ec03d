"""The departure of a keeper's machine: begun once, asked for by any number, gone on with by itself."""

from __future__ import annotations

import base64
import io
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cloudlet.control.handoff import Departure, Progress
from cloudlet.control.imaging import make_image
from cloudlet.control.ownership import Ownership, OwnershipFile, Record
from cloudlet.control.pace import Terms
from cloudlet.control.sending import Parcel
from cloudlet.control.site import Site
from cloudlet.control.synthesis import Synthesised
from cloudlet.errors import CloudletError, ConflictError, NotFoundError
from cloudlet.forwarder.moved import Forwarding
from cloudlet.hypervisor.driver import Layer, Listener
from cloudlet.hypervisor.qemu.network import MAX_CONNECTIONS
from cloudlet.keeper.control import Control, describe_any
from cloudlet.keeper.correspondence import HttpPeer, Whom, connector
from cloudlet.keeper.order import Order, raised
from cloudlet.overlay.index import JoinedIndex, Lookup, index_of_layer
from cloudlet.overlay.known import KnownPages
from cloudlet.overlay.pages import Numbers, Space
from cloudlet.transfer.networks import Networks
from cloudlet.transfer.source import open_source

Told = Callable[[int, int], None]
_TOLD_SECONDS = 1.0
"""Between two words to who waits, so that they know that it goes on."""


class Leaving:
    """At most one departure at a time of one machine."""

    def __init__(self, folder: Path, site: Site, made: Synthesised, control: Control, order: Order) -> None:
        self.forwarding: Forwarding | None = None
        """Who takes connections to where the machine is now, once it is."""
        self._folder = folder
        self._site = site
        self._made = made
        self._control = control
        self._order = order
        self._lock = threading.Lock()
        self._departure: Departure | None = None
        self._thread: threading.Thread | None = None
        self._handoff = ""
        self.grace = 0.0
        """Seconds in which users are shown the way."""
        self._way_shown = False
        """Whether it was tried to show users the way while the machine is kept here."""
        self._peer: HttpPeer | None = None
        self._whom: Whom = {}
        self._error: CloudletError | None = None
        self._told: dict[str, Any] = {}

    def gone_for_good(self) -> bool:
        """Whether the machine, which has ended, is another site's.

        If it ended while nobody knew yet whose it is, this waits until that is known.
        """
        if self._thread:
            self._thread.join()
        gone = (Ownership.COMPLETED, Ownership.LOST)
        return self._departure is not None and self._departure.state in gone

    def close(self) -> None:
        """Show nobody the way any more."""
        if self.forwarding:
            self.forwarding.close()

    @property
    def busy(self) -> bool:
        """Whether the machine is leaving just now, and nothing else may be done with it."""
        return self._thread is not None and self._thread.is_alive()

    def is_about(self, handoff: str) -> bool:
        """Whether the machine leaves, or last left, by this hand-off."""
        return handoff == self._handoff

    def describe(self) -> dict[str, Any]:
        """What another site has to know of the machine, to have it."""
        made = self._made
        return {
            "root": base64.b64encode(made.root.encode()).decode(),
            "overlay": made.overlay_id,
            "generation_id": made.instance.generation_id(),
            "layer": self._layer() is not None,
        }

    def depart(self, message: Mapping[str, Any], told: Told) -> dict[str, Any]:
        """Hand the machine off as the message says, and wait for the end; who asks again waits for the same.

        :raises CloudletError: it stays here.
        """
        with self._lock:
            if message["handoff"] != self._handoff:
                if self.busy:
                    raise ConflictError("the instance is being handed off already")
                self._begin(message)
            elif self._peer:
                self.find(message["peer"])
            thread, departure = self._thread, self._departure
        assert thread and departure
        while thread.is_alive():
            thread.join(_TOLD_SECONDS)
            told(departure.statistics.bytes, 0)
        if self._error:
            raise self._error
        return {"told": self._told, "statistics": asdict(departure.statistics)}

    def find(self, whom: Whom) -> None:
        """The peer is somewhere else from now on.

        :raises ConflictError: the machine is not being handed off.
        """
        if self._peer is None:
            raise ConflictError("the instance is not being handed off")
        if whom != self._whom:
            self._whom = whom
            self._peer.be_at(connector(whom, self._site.keys))

    def stay(self) -> None:
        """Cancel the departure, if there is one, and wait until the machine stays.

        :raises ConflictError: the machine is another site's already.
        """
        if self._departure and self._thread and self.busy:
            self._departure.cancel()
            self._thread.join()

    def keep(self) -> None:
        """An operator's word while the peer is silent: the machine stays.

        :raises ConflictError: there is nothing to decide.
        """
        self._in_question().keep()

    def resume_as_of_switch(self) -> None:
        """An operator's word: the machine goes on as it was when it was switched early.

        :raises ConflictError: there is nothing to decide.
        """
        self._in_question().resume_as_of_switch()

    def give_up(self) -> None:
        """An operator's word: what is kept of a machine that was switched early is ended.

        :raises ConflictError: there is nothing to decide.
        """
        self._in_question().give_up()

    def _in_question(self) -> Departure:
        if not self._departure or not self.busy:
            raise ConflictError("the instance is not being handed off")
        return self._departure

    def _begin(self, message: Mapping[str, Any]) -> None:
        record = Record(
            handoff=message["handoff"], instance=message["instance"], epoch=message["epoch"],
            state=Ownership.COPYING, paused=self._control.status.paused,
        )  # fmt: skip
        peer = HttpPeer.of(message["peer"], message["handoff"], self._site.keys)
        stack = ExitStack()
        try:
            parcel = self._parcel(message, stack)
            terms = Terms.from_json(message["terms"])  # before anything is written down
            self._departure = Departure(
                OwnershipFile(self._folder, record), peer, terms, parcel,
                self._progress, message.get("rate"), message.get("overhead"),
            )  # fmt: skip
        except BaseException:
            stack.close()
            raise
        self._error, self._told, self._way_shown = None, {}, False
        self._peer, self._whom = peer, message["peer"]
        self._handoff, self.grace = record.handoff, float(message["grace"])
        run = (self._departure, peer, stack)
        self._thread = threading.Thread(target=self._run, args=run, name="departure", daemon=True)
        self._thread.start()

    def _parcel(self, message: Mapping[str, Any], stack: ExitStack) -> Parcel:
        """What is to be sent, and what both ends hold: the base, and the app's layer if it stands on one."""
        made, hypervisor = self._made, self._site.hypervisor
        base = self._site.bases.get(made.root.base)
        pages = stack.enter_context(base.pages())
        indexes: list[Lookup] = [base.index()]
        besides: Mapping[Space, Numbers] = {}
        if shared := message["holds"] == "overlay":
            if not (layer := self._layer()):
                raise NotFoundError("the image of the app is gone", hint="hand it off once more")
            held = stack.enter_context(hypervisor.layer_pages(layer, base.machine))
            known = KnownPages(pages, held, layer.overlay_id)
            indexes.insert(0, index_of_layer(known))
            if not made.instance.layer:
                besides = {space: pages_of.numbers for space, pages_of in held.items()}
        else:
            known = KnownPages(pages)
        return Parcel(
            made.instance, known, JoinedIndex(indexes), int(message["seed"], 16), not shared, besides
        )

    def _layer(self) -> Layer | None:
        """The app's layer: what the machine stands on, or that of the app's image, made now if it can be."""
        made, images = self._made, self._site.images
        if made.instance.layer:
            return made.instance.layer
        image = images.find(made.overlay_id)
        read = image.read(made.root) if image else None
        if not read and Path(self._order.source).is_file():
            with suppress(CloudletError, OSError), open_source(self._order.source, io.BytesIO()) as source:
                image = make_image(self._site, source, allow_unsigned=self._order.allow_unsigned)
                read = image.read(made.root)
        return read[0] if read else None

    def _run(self, departure: Departure, peer: HttpPeer, stack: ExitStack) -> None:
        try:
            departure.run()
            self._left()
        except Exception as error:
            self._error = raised(describe_any(error))
            self._came_to_nothing(departure)
        finally:
            stack.close()
            peer.close()

    def _left(self) -> None:
        """The machine is another site's: end what there is of it here, and show its users the way."""
        self._told = dict(self._departure.told) if self._departure else {}
        try:
            if not self.forwarding:
                self._show_way(self._made.instance.take_listeners())
        finally:
            self._made.instance.stop()

    def _show_way(self, listeners: Sequence[Listener]) -> None:
        """Take the users who connect to where the machine is."""
        told = self._departure.told if self._departure else {}
        try:
            places = {
                int(place["guest_port"]): (str(place["host"]), int(place["host_port"]))
                for place in told.get("endpoints", ())
            }
        except (KeyError, TypeError, ValueError):  # not understood: nobody is shown the way
            places = {}
        ways = [
            (listener, places[endpoint.guest_port])
            for endpoint, listener in listeners
            if endpoint.guest_port in places
        ]
        try:
            self.forwarding = Forwarding(ways, MAX_CONNECTIONS, self._may_lead_to)
        except (OSError, ValueError, OverflowError):  # no address, or none for users: nobody is shown the way
            for listener, _ in ways:
                listener.close()

    def _may_lead_to(self, address: str) -> bool:
        """Whether users may be shown the way to an address that the peer names.

        It may be the peer's own, as it is asked there; within this machine, where the peer is there, too; or
        one that URLs may lead to.
        """
        host = urlsplit(self._whom["url"]).hostname
        peers = {str(place[0]) for *_, place in socket.getaddrinfo(host, None)}
        loops = [ip_address(one.partition("%")[0]).is_loopback for one in (address, *peers)]
        return address in peers or all(loops) or Networks(self._site.settings.fetch_networks).allows(address)

    def _came_to_nothing(self, departure: Departure) -> None:
        """The machine goes on here, or is lost: nobody is shown the way any more."""
        self.close()
        self.forwarding = None
        if departure.state is Ownership.LOST:
            self._made.instance.stop()

    def _progress(self, progress: Progress) -> None:
        if progress.state is Ownership.SERVING and not self._way_shown:
            self._way_shown = True
            # What the instance holds of its sockets stays its own: it may go on here.
            self._show_way([(port, one.dup()) for port, one in self._made.instance.listeners])
            self._made.instance.cut_connections()
        forecast = progress.forecast.to_json() if progress.forecast else None
        self._control.tell(
            keep=progress.state is not Ownership.COPYING,
            handoff={
                "id": self._handoff, "state": progress.state.value, "rounds": progress.rounds,
                "bytes": progress.bytes_sent, "forecast": forecast, "in_doubt": progress.in_doubt,
                "error": progress.error,
            },
        )  # fmt: skip
