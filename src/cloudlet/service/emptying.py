"""How a site is emptied: what runs is handed off to peers; nothing is ended for that.

It is an operation, ``cloudlet.drain``, so that it goes on when nobody watches, and after a restart of the
site. What it knows is its ``output``: the report of what became, or becomes, of each instance
(:class:`~cloudlet.service.placing.Entry`). Each hand-off is written there in the transaction that begins it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from math import ceil
from typing import Any

from sqlalchemy.engine import Connection

from cloudlet.control.pace import Terms
from cloudlet.errors import (
    CapacityError,
    ConflictError,
    IntegrityError,
    NotFoundError,
    RefusedError,
)
from cloudlet.keeper.order import raised
from cloudlet.service.departures import Wish
from cloudlet.service.placing import Entry, Result, by_need, choose, obstacle
from cloudlet.service.steps import CancelledError, Flow, Lane, Running, Step
from cloudlet.store import journal
from cloudlet.store.journal import Event
from cloudlet.store.rows import (
    HANDOFFS,
    INSTANCES,
    OPERATIONS,
    PEERS,
    Handoff,
    HandoffState,
    Instance,
    InstanceState,
    Owned,
    Peer,
    PeerState,
    now,
)

MOST_AT_ONCE = 4
"""Hand-offs of a drain: more would share a link, and none of them get anywhere."""
_LEAST_SECONDS = 10.0
"""A hand-off gets so long, even where many others wait."""
_PATIENCE_SHARE = 1 / 3
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 60.0
"""Seconds until an instance is tried again that no peer has taken, while it may still work."""
_ASKED_AT_ONCE = 16
"""Peers, of what they can do."""
_LOOK_SECONDS = 1.0
_GIVE_UP_SECONDS = 60.0
"""Longest time for what is on its way to come back, where the drain is cancelled."""
_EVENTS = 1000
_RUNNING = (InstanceState.ACTIVE, InstanceState.PAUSED)
_COMING = (InstanceState.REQUESTED, InstanceState.SYNTHESISING, InstanceState.MOVING)
_REFUSALS = (CapacityError, ConflictError, IntegrityError, NotFoundError, RefusedError)
"""With these a peer says no to an offer; what fails otherwise is tried again."""


class HandOver(Step):
    """Hand all instances off."""

    step = "hand_over"

    def do(self) -> None:
        Drain(self.running).run()

    def undo(self) -> None:
        """Have what is on its way stay here. What has been handed off is gone."""
        Drain(self.running).give_up()


DRAIN_FLOWS: dict[str, Flow] = {"cloudlet.drain": Flow((HandOver,), lane=Lane.WAITING)}


class Drain:
    """One drain, as far as this process is concerned: begun, or gone on with."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._site = running.site
        self._id = running.operation.id
        self._heard = self._site.news.last
        wanted = running.operation.input
        self._only = set(wanted["peers"])
        self._pause_seconds = float(wanted["pause_seconds"])
        self._deadline = running.operation.created_at + timedelta(seconds=wanted["deadline_seconds"])
        operation = self._site.database.read(lambda connection: OPERATIONS.get(connection, self._id))
        output = operation.output or {}
        self._ended = bool(output.get("ended"))
        known = [Entry.from_json(entry) for entry in output.get("instances", ())]
        self._entries = {entry.id: entry for entry in known}
        self._written = self._entries.copy()
        self._own: dict[str, Any] = {}
        self._peers: dict[str, Peer] = {}
        self._names: dict[str, str] = {}
        """Of all peers, by their ids."""
        self._instances: dict[str, Instance] = {}
        self._not_before: dict[str, float] = {}
        """By instance, when it may be tried again."""

    def run(self) -> None:
        """Hand off what can be handed off, until all is decided; it can be done again."""
        if self._ended:
            return  # before a crash
        self._own = self._site.peers.capabilities()
        self._peers = {peer.id: peer for peer in self._asked_peers()}
        while True:
            self._running.check()
            self._look()
            self._begin()
            if not any(entry.result.open for entry in self._entries.values()):
                break
            self._wait()
        self._end()

    def give_up(self) -> None:
        """Have what is on its way stay, and say so; it can be done again."""
        if self._ended:
            return
        until = time.monotonic() + _GIVE_UP_SECONDS
        self._look()
        for entry in self._with(Result.MOVING):
            self._cancel(entry)
        while self._with(Result.MOVING) and time.monotonic() < until:
            self._wait()
            self._look()
        for entry in self._with(Result.WAITING):
            self._put(entry.stays("the drain was cancelled"))
        self._end()

    def _asked_peers(self) -> list[Peer]:
        """The peers, with what they say now that they can do."""
        peers = self._trusted()
        with ThreadPoolExecutor(_ASKED_AT_ONCE, thread_name_prefix="refresh") as pool:
            return list(pool.map(self._refreshed, peers))

    def _refreshed(self, peer: Peer) -> Peer:
        try:
            return self._site.peers.refresh(peer)
        except (ConflictError, NotFoundError):  # it was blocked or deleted meanwhile
            return peer

    def _trusted(self) -> list[Peer]:
        trusted = self._site.database.read(lambda connection: PEERS.list(connection, state=PeerState.TRUSTED))
        return [peer for peer in trusted if not self._only or peer.id in self._only]

    def _look(self) -> None:
        """Take note of what has become of all."""

        def read(connection: Connection) -> tuple[list[Instance], list[Handoff], list[Peer]]:
            ids = [entry.handoff_id for entry in self._with(Result.MOVING)]
            handoffs = HANDOFFS.list(connection, id=ids) if ids else []
            return INSTANCES.list(connection), handoffs, PEERS.list(connection)

        instances, handoffs, peers = self._site.database.read(read)
        self._names = {peer.id: peer.name for peer in peers}
        self._instances = {instance.id: instance for instance in instances}
        for instance in instances:
            if instance.id not in self._entries:
                running = instance.state in (*_RUNNING, *_COMING)
                result = Result.WAITING if running else Result.NOT_RUNNING
                self._put(Entry(instance.id, instance.name, instance.state.value, result))
        for handoff in handoffs:
            self._look_at_handoff(self._entries[handoff.instance_id], handoff)
        for entry in self._with(Result.WAITING, Result.NOT_RUNNING):
            self._look_at_instance(entry, self._instances.get(entry.id))
        self._write()

    def _look_at_handoff(self, entry: Entry, handoff: Handoff) -> None:
        if handoff.state is HandoffState.COMPLETED:
            self._put(replace(entry, result=Result.HANDED_OFF, state=InstanceState.MOVED.value))
        elif handoff.state is HandoffState.REVERTED:
            self._put(self._back(entry, handoff))
        elif handoff.state is HandoffState.LOST:
            reason = f"it was lost on its way: {(handoff.error or {}).get('message', '')}"
            self._put(replace(entry, result=Result.NOT_RUNNING, state=HandoffState.LOST.value, reason=reason))
        elif self._over and handoff.state is HandoffState.IN_DOUBT:
            reason = "the peer does not say whether it has it"
            self._put(replace(entry, result=Result.IN_DOUBT, reason=reason))
        elif self._over and handoff.state is HandoffState.PREPARING:
            self._cancel(entry)

    def _back(self, entry: Entry, handoff: Handoff) -> Entry:
        """An instance that one peer did not take."""
        error, instance = handoff.error or {}, self._instances.get(entry.id)
        if error.get("kind") == CancelledError.__name__ and instance and instance.state in _RUNNING:
            staying = entry.stays(self._over or "its hand-off was cancelled")
            return replace(staying, state=instance.state.value)
        accepted = "holds" in handoff.order
        final = not accepted and isinstance(raised(error), _REFUSALS)
        back = entry.failed(handoff.peer_id, error.get("message", ""), final=final)
        pause = _FIRST_PAUSE * 2 ** (back.tried(handoff.peer_id) - 1)
        self._not_before[entry.id] = time.monotonic() + min(pause, _LONGEST_PAUSE)
        return back

    def _look_at_instance(self, entry: Entry, instance: Instance | None) -> None:
        if instance is None:
            self._put(replace(entry, result=Result.NOT_RUNNING, state="deleted", reason="deleted"))
            return
        seen = replace(entry, state=instance.state.value)
        if instance.state in (*_RUNNING, *_COMING):
            seen = replace(seen, result=Result.WAITING, reason="")
        elif instance.state is InstanceState.MOVED and entry.result is Result.WAITING:
            # Somebody else has handed it off.
            peer_id = str((instance.moved_to or {}).get("cloudlet_id") or "")
            seen = replace(seen, result=Result.HANDED_OFF, peer_id=peer_id, peer=self._names.get(peer_id))
        elif entry.result is not Result.NOT_RUNNING or not entry.handoff_id:
            seen = replace(seen, result=Result.NOT_RUNNING, reason=self._why_not_running(instance))
        self._put(seen)

    def _why_not_running(self, instance: Instance) -> str:
        """Why there is nothing of an instance to hand off."""
        if instance.state is InstanceState.MOVED:
            there = instance.moved_to or {}
            place = self._names.get(str(there.get("cloudlet_id"))) or there.get("url") or "another site"
            return f"moved to {place}"
        error = (instance.error or {}).get("message")
        return f"{instance.state}: {error}" if error else str(instance.state)

    def _begin(self) -> None:
        """Begin what can begin, and decide what stays."""
        trusted = {peer.id for peer in self._trusted()}
        peers = [peer for peer in self._peers.values() if peer.id in trusted]
        takers: dict[str, list[Peer]] = {}
        for entry in self._with(Result.WAITING):
            instance = self._instances[entry.id]
            able = [peer for peer in peers if not self._obstacle(peer, instance)]
            if over := self._over:
                self._put(entry.stays("; ".join(filter(None, (over, self._why(entry, peers))))))
            elif instance.state is InstanceState.MOVING:
                pass  # it comes, or somebody else hands it off
            elif not able:
                self._put(entry.stays(self._why(entry, peers)))
            elif instance.state in _RUNNING:
                takers[entry.id] = able
        counts = {one: len(able) for one, able in takers.items()}
        waiting = by_need((self._instances[one] for one in takers), counts, self._deadline)
        for position, instance in enumerate(waiting):
            if len(self._with(Result.MOVING)) >= MOST_AT_ONCE:
                break
            self._hand_off(instance, takers[instance.id], len(waiting) - position)
        self._write()

    def _hand_off(self, instance: Instance, able: Sequence[Peer], waiting: int) -> None:
        """Begin the hand-off of an instance, unless it is too early to try again.

        :param able: the peers that may take it.
        :param waiting: how many wait, it included.
        """
        entry = self._entries[instance.id]
        peer = choose(entry, able, self._entries.values())
        if entry.tried(peer.id) and time.monotonic() < self._not_before.get(entry.id, 0.0):
            return

        def remember(connection: Connection, operation_id: str) -> None:
            """Write it down in the transaction that begins it."""
            handoff_id = OPERATIONS.get(connection, operation_id).resources["handoff"]
            moving = replace(entry, result=Result.MOVING, state=InstanceState.MOVING.value)
            self._put(replace(moving, peer_id=peer.id, peer=peer.name, handoff_id=handoff_id))
            self._note(connection)

        wish = Wish(peer, self._terms(waiting))
        try:
            self._site.departures.create(instance, wish, remember, self._running.operation.request_id)
        except (ConflictError, NotFoundError):
            self._put(entry)  # something else has become of it, or of the peer: the next look says what

    def _terms(self, waiting: int) -> Terms:
        """On what terms a hand-off goes, so that all who wait get their share of the time that is left.

        A peer that falls silent is given up early enough for another to be tried.
        """
        share = self._left / ceil(waiting / MOST_AT_ONCE)
        seconds = max(min(self._left, max(share, _LEAST_SECONDS)), 1.0)
        peers = self._site.options.peers
        return Terms(
            pause_seconds=self._pause_seconds,
            deadline_seconds=seconds,
            patience_seconds=min(peers.patience_seconds, seconds * _PATIENCE_SHARE),
            bytes_per_second=peers.bytes_per_second or 0.0,
        )

    def _obstacle(self, peer: Peer, instance: Instance) -> str:
        """Why a peer does not take an instance, or would not; empty: it may."""
        attempt = self._entries[instance.id].attempts.get(peer.id)
        if attempt and attempt.final:
            return attempt.reason
        return obstacle(self._own, peer, instance)

    def _why(self, entry: Entry, peers: Sequence[Peer]) -> str:
        """What was in the way of an instance, for its operator."""
        if not peers:
            return self._why_no_peers()
        found = {
            peer.name: self._obstacle(peer, self._instances[entry.id])
            or (entry.attempts[peer.id].reason if peer.id in entry.attempts else "")
            for peer in peers
        }
        # What a peer has said begins with its name already.
        named = (
            why if why.startswith(f"{name} ") else f"{name}: {why}" for name, why in found.items() if why
        )
        return "; ".join(named)

    def _why_no_peers(self) -> str:
        blocked = self._site.database.read(lambda connection: PEERS.list(connection, state=PeerState.BLOCKED))
        names = [peer.name for peer in blocked if not self._only or peer.id in self._only]
        if not names:
            return "the site has no peers"
        which = names[0] if len(names) == 1 else "NAME"
        return f"its peers are blocked: {', '.join(names)} (cloudlet peer set {which} --trust)"

    def _cancel(self, entry: Entry) -> None:
        def read(connection: Connection) -> Handoff:
            return HANDOFFS.get(connection, entry.handoff_id or "")

        with suppress(ConflictError):  # it has just ended
            self._site.departures.cancel(self._site.database.read(read))

    def _wait(self) -> None:
        """Wait until something has happened to an instance or a hand-off, or for a second."""
        news = self._site.news
        if news.closed:  # the process is about to end; another goes on
            time.sleep(_LOOK_SECONDS)
            return
        heard = news.events(self._heard, _is_of_interest, _EVENTS, _LOOK_SECONDS)
        self._heard = heard[1] if heard else news.last

    @property
    def _left(self) -> float:
        """Seconds until the deadline."""
        return (self._deadline - now()).total_seconds()

    @property
    def _over(self) -> str:
        """Why nothing more is handed off; empty while it is."""
        if self._running.cancelled.is_set():
            return "the drain was cancelled"
        return "the deadline has passed" if self._left <= 0 else ""

    def _with(self, *results: Result) -> list[Entry]:
        return [entry for entry in self._entries.values() if entry.result in results]

    def _put(self, entry: Entry) -> None:
        self._entries[entry.id] = entry

    def _write(self) -> None:
        """Have the row say what is known, if that is not what it says."""
        if self._entries != self._written:
            self._site.database.write(self._note)
            self._site.news.operation_changed(self._id)

    def _note(self, connection: Connection, *, ended: bool = False) -> None:
        report = [entry.to_json() for entry in self._entries.values()]
        OPERATIONS.update(connection, self._id, output={"ended": ended, "instances": report})
        self._written = self._entries.copy()

    def _end(self) -> None:
        """Say what has become of each."""
        told = ("id", "name", "state", "result", "peer_id", "peer", "reason")
        report = [entry.to_json() for entry in self._entries.values()]
        instances = [{name: entry[name] for name in told} for entry in report]
        by = self._running.operation
        site = Owned(id=self._site.id, project_id=by.project_id, user_id=by.user_id)

        def note(connection: Connection) -> None:
            self._note(connection, ended=True)
            journal.emit(connection, "cloudlet", "drained", site, operation_id=self._id, instances=instances)

        self._site.database.write(note)


def _is_of_interest(event: Event) -> bool:
    return event.noun in ("instance", "handoff")
