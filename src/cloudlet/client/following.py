"""Following an instance that is handed off: where it is now, what happens to it there, and its address.

A site that an instance has left says where it is now. What is asked there is asked with the same credentials.
"""

from __future__ import annotations

import http.client
import threading
import time
import urllib.error
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

import requests

from cloudlet.client.asking import id_of
from cloudlet.client.faults import LostError
from cloudlet.errors import CapacityError, ConflictError, FailedError, NotFoundError

if TYPE_CHECKING:
    from cloudlet.client.proxy import Proxy
    from cloudlet.client.resources import Event, Instance

P = ParamSpec("P")
T = TypeVar("T")

_MOST_HOPS = 16
_LONG_POLL_SECONDS = 30.0
_PATIENCE_SECONDS = 60.0
"""Longest time in which a site whose events are followed may be silent: it may be started anew."""
_AGAIN_SECONDS = 0.5
"""Between two questions to a site that is silent."""
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 1.0
"""Between two tries at the same address."""
_SILENT = (LostError, CapacityError)
"""A site that does not answer just now."""
_CUT = (OSError, http.client.HTTPException)
"""A connection that did not come to be, or did not last; the exceptions of requests are among them."""
_ANSWERED = (requests.HTTPError, urllib.error.HTTPError)
"""Among them, too; but these are answers."""


@dataclass(frozen=True, slots=True)
class Located:
    """Where an instance was found."""

    site: Proxy
    """Close it, if it is another than the one that was asked."""
    instance: Instance
    """What it is there."""
    events_after: int
    """The number of the last event at that site when it was looked for."""


def locate(site: Proxy, instance_id: str) -> Located:
    """Where an instance is that was at a site.

    :raises NotFoundError: there is none, or no more.
    :raises FailedError: it is nowhere that can be asked.
    """
    here, epoch = site, 0
    try:
        for _ in range(_MOST_HOPS):
            number = here.last_event()  # before the row is read: what happens then comes after it
            found = here.get_instance(instance_id)
            if not found.moved_to:
                return Located(here, found, number)
            if found.epoch <= epoch:
                raise _lost_between_sites(instance_id)
            epoch = found.epoch
            here = _gone_on(site, here, instance_id, found.moved_to)
        raise FailedError(f"instance {instance_id} was not found at {_MOST_HOPS} sites, one after the other")
    except BaseException:
        _let_go(site, here)
        raise


def follow(site: Proxy, instance_id: str, after: int) -> Iterator[Event]:
    """The events of an instance after one of a site, and on at those that it goes to, until it is deleted.

    :raises NotFoundError: it has ended before.
    :raises LostError: the site where it is is silent for longer than a restart takes.
    :raises FailedError: it is at a site that cannot be asked.
    """
    here = site
    been: set[tuple[str, int]] = set()
    try:
        while True:
            moved_to = yield from _at_one_site(here, instance_id, after)
            if moved_to is None:
                return
            after = int(moved_to.get("events_after") or 0)
            if (turn := (str(moved_to.get("url")), after)) in been:  # whoever comes back comes back later
                raise _lost_between_sites(instance_id)
            been.add(turn)
            here = _patiently(_gone_on, site, here, instance_id, moved_to)
    finally:
        _let_go(site, here)


def follow_from_now(site: Proxy, instance_id: str) -> Iterator[Event]:
    """The events of an instance from now on: from this call, not from when the first is asked for.

    :raises CloudletError: as :func:`locate` and :func:`follow` do.
    """
    found = locate(site, instance_id)

    def events() -> Iterator[Event]:
        try:
            yield from follow(found.site, instance_id, found.events_after)
        finally:
            _let_go(site, found.site)

    return events()


def _at_one_site(
    here: Proxy, instance_id: str, after: int
) -> Generator[Event, None, Mapping[str, Any] | None]:
    """The events of an instance at a site, until it leaves there: where to, or None if it is deleted."""
    # Before the events are read: if it has left or ended by now, they say so, if they are remembered.
    row = _patiently(_row, here, instance_id)
    wait = 0.0
    while True:
        events, last = _patiently(here.events_page, after, wait, resource_id=instance_id)
        for event in events:
            yield event
            if moved_to := event.detail.get("moved_to"):
                return dict(moved_to)
            if event.kind == "instance.deleted":
                return None
        if events or last > after:
            after = last
            continue
        if row is None:
            raise NotFoundError(f"instance {instance_id} has ended at {here.place}")
        if row.moved_to:
            return row.moved_to
        wait = _LONG_POLL_SECONDS


class Endpoint:
    """The address of a guest's port, for programs whose requests may be repeated.

    A connection that was open when its instance was handed off is cut, and for a while the old address leads
    to the new place. :meth:`call` repeats what was cut, where the instance is by then. Threads may share it.
    """

    def __init__(
        self, site: Proxy, instance: str | Instance, guest_port: int, *, deadline_seconds: float = 60.0
    ) -> None:
        """Look where the port is reached.

        :param deadline_seconds: how long :meth:`call` repeats, if it is told nothing else.
        :raises NotFoundError: there is no such instance or port.
        :raises ConflictError: the port is not reached just now: the instance is suspended, for example.
        """
        self.guest_port = guest_port
        self.deadline_seconds = deadline_seconds
        self._instance_id = id_of(instance)
        self._asked = self._site = site
        self._looking = threading.Lock()
        self._address = self._looked_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections to other sites than the one that was given."""
        with self._looking:
            _let_go(self._asked, self._site)
            self._site = self._asked

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, as far as it is known."""
        return self._address

    def call(self, function: Callable[[str, int], T], *, deadline_seconds: float | None = None) -> T:
        """What a function of host and port returns.

        It is called again whenever it raises an :class:`OSError` (requests' own are such, too) or an
        :class:`http.client.HTTPException`, other than for an HTTP status; so it must be one that may be done
        twice. Between two calls this looks where the instance is.

        :param deadline_seconds: after which no call begins; what the last one raised is raised then.
        :raises NotFoundError: the instance has ended.
        """
        seconds = self.deadline_seconds if deadline_seconds is None else deadline_seconds
        ends, pause = time.monotonic() + seconds, _FIRST_PAUSE_SECONDS
        while True:
            address = self._address
            try:
                return function(*address)
            except _ANSWERED:
                raise
            except _CUT:
                if time.monotonic() + pause > ends:
                    raise
            if not self._has_moved(address, ends):
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _has_moved(self, address: tuple[str, int], ends: float) -> bool:
        """Whether another address is known than this; one thread looks, and those beside it wait for that."""
        if not self._looking.acquire(timeout=max(0.0, ends - time.monotonic())):
            return False
        try:
            if self._address == address:
                with suppress(*_SILENT, ConflictError):  # it may be reached again later
                    self._address = self._looked_up()
            return self._address != address
        finally:
            self._looking.release()

    def _looked_up(self) -> tuple[str, int]:
        found = locate(self._site, self._instance_id)
        if found.site is not self._site:
            _let_go(self._asked, self._site)
            self._site = found.site
        if not found.instance.endpoints:
            raise ConflictError(
                f"instance {self._instance_id} is {found.instance.state}, and not reached",
                hint="wait until it is active",
            )
        for endpoint in found.instance.endpoints:
            if endpoint["guest_port"] == self.guest_port:
                return str(endpoint["host"]), int(endpoint["port"])
        raise NotFoundError(f"instance {self._instance_id} has no port {self.guest_port}")


def _lost_between_sites(instance_id: str) -> FailedError:
    return FailedError(f"each site says of instance {instance_id} that it is at another")


def _row(site: Proxy, instance_id: str) -> Instance | None:
    with suppress(NotFoundError):
        return site.get_instance(instance_id)
    return None


def _gone_on(asked: Proxy, here: Proxy, instance_id: str, moved_to: Mapping[str, Any]) -> Proxy:
    """The site that an instance has gone to from here.

    :raises FailedError: nobody can be asked there.
    """
    if not (url := moved_to.get("url")):
        raise FailedError(
            f"instance {instance_id} is at the cloudlet {moved_to.get('cloudlet_id')}, "
            "which does not say where its API is",
            hint="its operator can: [api] public_url",
        )
    there = here.elsewhere(str(url))
    _let_go(asked, here)
    return there


def _let_go(asked: Proxy, here: Proxy) -> None:
    """Close a site that nobody gave us."""
    if here is not asked:
        here.close()


def _patiently(ask: Callable[P, T], *args: P.args, **given: P.kwargs) -> T:
    """What a site answers, though it be silent for a while."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return ask(*args, **given)
        except _SILENT:
            if time.monotonic() > until:
                raise
        time.sleep(_AGAIN_SECONDS)
