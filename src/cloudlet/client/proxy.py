"""What can be done with a site: for each noun the verbs create, get, find, list, delete, and its own.

A verb that begins long work returns its :class:`~cloudlet.client.resources.Operation`;
:meth:`Proxy.wait_for_operation` waits for its end, and raises what made it fail. ``find`` takes a name or an
id. Every verb raises what the site refuses as an error of :mod:`cloudlet.errors`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cloudlet.client import faults, following
from cloudlet.client.asking import id_of, is_id, retry_headers
from cloudlet.client.following import Located
from cloudlet.client.publishing import Publishing
from cloudlet.client.resources import Cloudlet, Event, Handoff, Instance, Operation, Peer
from cloudlet.errors import FailedError, RefusedError

Told = Callable[[Operation], None]

_LONG_POLL = 30.0
_LOOK_SECONDS = 1.0
"""Between two looks at an operation whose progress is shown to somebody."""
_FEW = 1000
"""Events that are asked for at a time."""


class Proxy(Publishing):
    """A site, as its clients use it. Leave it as a context, or close it, when it is not needed any more."""

    def get_cloudlet(self) -> Cloudlet:
        """The site itself: what it is, what it may give, what it has given."""
        return self._get(Cloudlet, "self")

    def update_cloudlet(self, **changes: Any) -> Cloudlet:
        """Change the site, as its operator.

        :param changes: ``state``: ``draining``, so that it admits no new instance, or ``up`` again.
        """
        answer = self.patch("/cloudlets/self", json={"cloudlet": changes})
        return Cloudlet.existing(connection=self._connection, **answer.json()["cloudlet"])

    def drain_cloudlet(self, *, retry_key: str | None = None, **terms: Any) -> Operation:
        """Empty the site, as its operator: it admits nothing new, and hands what runs off to its peers.

        ``output["instances"]`` of the operation says what becomes, and in the end became, of each instance.

        :param terms: ``deadline_seconds``, ``pause_seconds``, ``peers`` (ids: only to these).
        :raises ConflictError: that is being done already.
        """
        return self._begun(
            self.post("/cloudlets/self/drain", json={"drain": terms}, headers=retry_headers(retry_key))
        )

    def peers(self, **query: Any) -> Iterator[Peer]:
        """All peers with these values; for the operator, as are the other verbs of peers."""
        return self._listed(Peer, query)

    def get_peer(self, peer: str | Peer) -> Peer:
        return self._get(Peer, peer)

    def find_peer(self, name_or_id: str) -> Peer:
        return self._named(Peer, name_or_id)

    def add_peer(
        self,
        url: str,
        fingerprint: str | None = None,
        name: str | None = None,
        *,
        retry_key: str | None = None,
    ) -> Peer:
        """Trust the cloudlet at a URL, whose key has the fingerprint that its operator says.

        :param name: what to call it; without, as it calls itself.
        :raises UnconfirmedError: there was no fingerprint; the error has the one that was found.
        :raises SignatureError: the key has another one.
        """
        given = {"url": url, "fingerprint": fingerprint, "name": name}
        known = {member: value for member, value in given.items() if value is not None}
        return self._made(Peer, known, retry_key)

    def update_peer(self, peer: str | Peer, **changes: Any) -> Peer:
        """Change the name, the URL or the state (``trusted``, ``blocked``) of a peer."""
        return self._changed(Peer, id_of(peer), changes)

    def refresh_peer(self, peer: str | Peer) -> Peer:
        """Have the site ask a peer what it can do; ``error`` says why that did not work."""
        answer = self.post(f"/peers/{id_of(peer)}/refresh")
        return Peer.existing(connection=self._connection, **answer.json()["peer"])

    def delete_peer(self, peer: str | Peer) -> None:
        """Forget a peer and its key."""
        self._delete(Peer, id_of(peer), ignore_missing=False)

    def instances(self, **query: Any) -> Iterator[Instance]:
        """All instances with these values."""
        return self._listed(Instance, query)

    def get_instance(self, instance: str | Instance) -> Instance:
        return self._get(Instance, instance)

    def find_instance(self, name_or_id: str) -> Instance:
        return self._named(Instance, name_or_id)

    def create_instance(self, *, retry_key: str | None = None, **attributes: Any) -> Operation:
        """Start something; ``resources["instance"]`` of the operation is the instance's id.

        :param attributes: exactly one of ``app_id``, ``overlay_id`` and ``url``; ``name``, ``ports``,
            ``lease_seconds``, ``metadata``.
        :raises CapacityError: it does not fit.
        """
        return self._begun(
            self.post("/instances", json={"instance": attributes}, headers=retry_headers(retry_key))
        )

    def wait_for_instance(self, operation: Operation, told: Told | None = None) -> Instance:
        """Wait until an instance answers that an operation makes; the instance, which says where."""
        return self.get_instance(self.wait_for_operation(operation, told=told).resources["instance"])

    def update_instance(self, instance: str | Instance, **changes: Any) -> Instance:
        """Change the name or the metadata of an instance."""
        return self._changed(Instance, id_of(instance), changes)

    def renew_instance(self, instance: str | Instance, seconds: int) -> Instance:
        """Have its lease end so many seconds from now."""
        return self._changed(Instance, id_of(instance), {"lease_seconds": seconds})

    def delete_instance(self, instance: str | Instance) -> Operation:
        """End an instance; what is being done with it is cancelled."""
        return self._begun(self.delete(f"/instances/{id_of(instance)}"))

    def pause_instance(self, instance: str | Instance) -> Instance:
        """Stop its CPUs; its memory stays where it is."""
        answer = self.post(f"/instances/{id_of(instance)}/pause")
        return Instance.existing(connection=self._connection, **answer.json()["instance"])

    def resume_instance(self, instance: str | Instance) -> Instance | Operation:
        """Let it go on: at once where it was paused, by an operation where it was suspended."""
        answer = self.post(f"/instances/{id_of(instance)}/resume")
        if answer.status_code == 202:
            return self._begun(answer)
        return Instance.existing(connection=self._connection, **answer.json()["instance"])

    def suspend_instance(self, instance: str | Instance) -> Operation:
        """Write it to the site's disk, and free its memory."""
        return self._begun(self.post(f"/instances/{id_of(instance)}/suspend"))

    def save_instance(
        self, instance: str | Instance, name: str, *, retry_key: str | None = None
    ) -> Operation:
        """Make an overlay of what its user changed; ``resources["overlay"]`` of the operation is its id."""
        body, headers = {"overlay": {"name": name}}, retry_headers(retry_key)
        return self._begun(self.post(f"/instances/{id_of(instance)}/overlay", json=body, headers=headers))

    def hand_off(
        self, instance: str | Instance, peer: str | Peer, *, retry_key: str | None = None, **terms: Any
    ) -> Operation:
        """Hand a running instance off to another cloudlet; ``resources["handoff"]`` is the hand-off's id.

        :param peer: the other cloudlet, its id or its name: who may hand off may not always list peers.
        :param terms: ``pause_seconds``, ``deadline_seconds``, ``bandwidth_mbit``, ``verify``, ``overlay``,
            ``switch``.
        """
        where = id_of(peer)
        whom = {"peer_id" if is_id(where) else "peer_name": where}
        body = {"handoff": {"instance_id": id_of(instance), **whom, **terms}}
        return self._begun(self.post("/handoffs", json=body, headers=retry_headers(retry_key)))

    def handoffs(self, **query: Any) -> Iterator[Handoff]:
        """All hand-offs with these values."""
        return self._listed(Handoff, query)

    def get_handoff(self, handoff: str | Handoff) -> Handoff:
        return self._get(Handoff, handoff)

    def cancel_handoff(self, handoff: str | Handoff) -> Operation:
        """Have its instance stay where it is.

        :raises ConflictError: it is at the target already.
        """
        return self._begun(self.delete(f"/handoffs/{id_of(handoff)}"))

    def resolve_handoff(self, handoff: str | Handoff, action: str) -> None:
        """Bring one in doubt to its end, as the operator.

        :param action: ``retry``; or ``keep`` at the source, ``take`` at the target, at the risk that the
            instance runs at both.
        """
        self.post(f"/handoffs/{id_of(handoff)}/resolve", json={"resolve": {"action": action}})

    def locate_instance(self, instance: str | Instance) -> Located:
        """Where an instance is now that was at this site; it is asked for there with the same credentials.

        :raises NotFoundError: there is none, or no more.
        :raises FailedError: it is at a site that cannot be asked.
        """
        return following.locate(self, id_of(instance))

    def follow_instance(self, instance: str | Instance, after: int | None = None) -> Iterator[Event]:
        """What happens to an instance, at this site and on at those that it is handed off to, until its end.

        Nothing is told twice, and nothing left out. Who was cut off goes on after the last event seen, at its
        ``site``: numbers are a site's own. A site that is silent is asked again for a minute.

        :param after: events after this one of this site; without, from now on, where the instance is now.
        :raises NotFoundError: it has ended.
        :raises FailedError: it is at a site that cannot be asked, or that is silent.
        """
        if after is not None:
            return following.follow(self, id_of(instance), after)
        return following.follow_from_now(self, id_of(instance))

    def elsewhere(self, url: str) -> Proxy:
        """Another site, asked with the same credentials; close it for itself.

        :raises RefusedError: who listens on the way there would hear them, and does not on the way here.
        :raises LostError: no cloudlet is there.
        """
        from cloudlet.client.connection import connect_beside  # which makes us

        if (self._root or "").startswith("https://") and not url.startswith("https://"):
            raise RefusedError(
                f"{url} is not encrypted, unlike {self.place}",
                hint="connect to it yourself, if that is wanted",
            )
        return connect_beside(self.session, url)

    def console_log(self, instance: str | Instance, length: int | None = None) -> str:
        """The end of what it wrote to its serial console.

        :param length: bytes at most.
        """
        query = {} if length is None else {"length": length}
        return self.get(f"/instances/{id_of(instance)}/console-log", params=query).text

    def operations(self, **query: Any) -> Iterator[Operation]:
        """All operations with these values."""
        return self._listed(Operation, query)

    def get_operation(self, operation: str | Operation, *, wait: float = 0) -> Operation:
        """An operation, at once, or as soon as it has ended but after ``wait`` seconds at the latest."""
        answer = self.get(f"/operations/{id_of(operation)}", params={"wait": wait} if wait else {})
        return self._begun(answer)

    def cancel_operation(self, operation: str | Operation) -> Operation:
        """Have an operation end, and what it did undone.

        :raises ConflictError: it has ended.
        """
        return self._begun(self.delete(f"/operations/{id_of(operation)}"))

    def wait_for_operation(
        self, operation: str | Operation, *, timeout: float | None = None, told: Told | None = None
    ) -> Operation:
        """Wait until an operation has succeeded.

        :param timeout: seconds; without, as long as it takes: an operation ends by itself.
        :param told: called about every second with how far it is.
        :raises CancelledError: it was cancelled.
        :raises CloudletError: it failed, or it has not ended in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        longest = _LOOK_SECONDS if told else _LONG_POLL
        while True:
            left = longest if deadline is None else deadline - time.monotonic()
            found = self.get_operation(operation, wait=max(0.0, min(left, longest)))
            if told:
                told(found)
            if found.ended:
                return _succeeded(found)
            if left <= 0:
                raise FailedError(f"operation {found.id} is still {found.state}", hint="wait for it again")

    def events(self, after: int | None = None, *, follow: bool = False, **query: Any) -> Iterator[Event]:
        """What happened after an event's number; without one, from now on.

        Numbers have no gaps: who was cut off goes on with the last number seen, and has missed nothing.

        :param follow: wait for more, without end.
        :param query: ``kind`` (kinds that begin so), ``resource_id``.
        """
        while True:
            events, last = self.events_page(after, _LONG_POLL if follow else 0, **query)
            yield from events
            if not follow and (after is None or last <= after):
                return
            after = last

    def events_page(self, after: int | None, wait: float = 0, **query: Any) -> tuple[Sequence[Event], int]:
        """Some events after a number, at once or within ``wait`` seconds, and after which number to go on."""
        wanted = {"after": after, "wait": wait, "limit": _FEW, **query}
        given = {name: value for name, value in wanted.items() if value is not None}
        page = self.get("/events", params=given).json()
        told = [Event.told_at(self.place, connection=self._connection, **event) for event in page["events"]]
        return told, int(page["last"])

    def last_event(self) -> int:
        """The number of the last event."""
        return self.events_page(None)[1]


def _succeeded(operation: Operation) -> Operation:
    if operation.state == "failed":
        error = operation.error or {}
        raise faults.coded(error.get("code", ""), error.get("detail", f"operation {operation.id} failed"))
    if operation.state == "cancelled":
        raise faults.CancelledError(f"operation {operation.id} was cancelled")
    return operation
