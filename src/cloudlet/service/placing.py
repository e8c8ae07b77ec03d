"""Where instances go when a site is emptied: who could take which, which is first, and what became of each.

Nothing is done here, only decided; :mod:`cloudlet.service.draining` does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Self

from cloudlet.store.rows import Instance, InstanceState, Peer

_MACHINE = ("hypervisor", "accelerator", "cpu_model")
"""Of what sites say that they can do: what has to be equal."""


class Result(StrEnum):
    """What becomes of an instance of a site that is being emptied."""

    WAITING = "waiting"
    """It waits for its turn, or until it runs."""
    MOVING = "moving"
    HANDED_OFF = "handed_off"
    STAYS = "stays"
    """It found no place, and goes on here."""
    IN_DOUBT = "in_doubt"
    """It stands still until the peer says whether it has it."""
    NOT_RUNNING = "not_running"

    @property
    def open(self) -> bool:
        return self in (self.WAITING, self.MOVING)


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of handing an instance off to one peer."""

    reason: str
    times: int = 1
    final: bool = False
    """Whether the peer refuses it, so that to ask again is of no use."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An instance in the report."""

    id: str
    name: str
    state: str
    """As it was looked at last; ``deleted`` if it is not there any more."""
    result: Result = Result.WAITING
    peer_id: str | None = None
    """Where it goes, or is."""
    peer: str | None = None
    """The name of that peer."""
    handoff_id: str | None = None
    reason: str = ""
    """Why it stays."""
    attempts: Mapping[str, Attempt] = field(default_factory=dict)
    """By the ids of peers, what came of those that did not take it."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        attempts = {peer: Attempt(**attempt) for peer, attempt in data["attempts"].items()}
        return cls(**{**data, "result": Result(data["result"]), "attempts": attempts})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def failed(self, peer_id: str, reason: str, *, final: bool) -> Entry:
        """The same, waiting again, since one peer did not take it."""
        before = self.attempts.get(peer_id)
        attempt = Attempt(reason, before.times + 1 if before else 1, final)
        attempts = {**self.attempts, peer_id: attempt}
        waiting = replace(self, result=Result.WAITING, attempts=attempts)
        return replace(waiting, peer_id=None, peer=None, handoff_id=None)

    def stays(self, reason: str) -> Entry:
        """The same, which goes on here."""
        staying = replace(self, result=Result.STAYS, reason=reason)
        return replace(staying, peer_id=None, peer=None, handoff_id=None)

    def tried(self, peer_id: str) -> int:
        """How often a peer was to take it."""
        return self.attempts[peer_id].times if peer_id in self.attempts else 0


def obstacle(own: Mapping[str, Any], peer: Peer, instance: Instance) -> str:
    """Why a peer cannot take an instance, as far as that can be known without asking; empty: it may.

    :param own: what this site can do: its instances need the same.
    :param peer: with what it said when it was asked last.
    """
    if peer.error:
        if peer.error.get("reason"):  # it answers, and says no
            return str(peer.error["message"])
        return f"it does not answer: {peer.error.get('message', '')}"
    theirs = peer.capabilities
    if not set(own["versions"]) & set(theirs.get("versions", ())):
        return "it speaks another version of the hand-off"
    for what in _MACHINE:
        if theirs.get(what) != own[what]:
            return f"its {what} is {theirs.get(what) or 'unknown'}, not {own[what]}"
    if instance.base_identity not in theirs.get("bases", ()):
        return f"it has not the base {instance.base_identity[:16]}"
    return ""


def by_need(instances: Iterable[Instance], takers: Mapping[str, int], until: datetime) -> list[Instance]:
    """Instances in the order in which they are handed off.

    Last come those that can best do without: paused ones, which nobody uses now, and those whose lease ends
    before the deadline, which end by themselves. Before them, those that the fewest peers can take are first,
    since the others have more choice; then the largest, since small ones find a place more easily.

    :param takers: by the ids of the instances, how many peers may take each.
    :param until: the deadline.
    """

    def need(instance: Instance) -> tuple[bool, bool, int, int, datetime, str]:
        return (
            instance.state is InstanceState.PAUSED,
            instance.expires_at is not None and instance.expires_at < until,
            takers[instance.id],
            -instance.memory_bytes,
            instance.created_at,
            instance.id,
        )

    return sorted(instances, key=need)


def choose(entry: Entry, peers: Sequence[Peer], entries: Iterable[Entry]) -> Peer:
    """The peer that is to take an instance: one that was tried least, and of those the one with the fewest.

    :param peers: that may take it; at least one.
    :param entries: of all instances: so are they spread over the peers.
    """
    taken = [one.peer_id for one in entries if one.result in (Result.MOVING, Result.HANDED_OFF)]
    return min(peers, key=lambda peer: (entry.tried(peer.id), taken.count(peer.id), peer.name, peer.id))
