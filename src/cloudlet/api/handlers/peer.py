"""What other cloudlets ask of this one: the protocol between sites, ``docs/formats/handoff.md``."""

from __future__ import annotations

import time

from cloudlet.api.operation import Call, Upload
from cloudlet.api.schemas.handoffs import (
    MOST_RECORDS_BYTES,
    CommitBody,
    OfferBody,
    PeerStateBody,
    PeerStateView,
    PeerWantedBody,
    PeerWantedView,
    RecordsQuery,
    StateQuery,
    WantedQuery,
)
from cloudlet.api.schemas.peers import (
    CapabilitiesBody,
    CapabilitiesView,
    DescriptionBody,
    DescriptionQuery,
    DescriptionView,
)
from cloudlet.control.courier import PeerState
from cloudlet.errors import ConflictError, LimitError, TruncatedError
from cloudlet.store.rows import Direction, Handoff

_LOOK_SECONDS = 0.02
_PIECE = 256 << 10


def description(call: Call, query: DescriptionQuery) -> DescriptionBody:
    """Show this cloudlet to others: its id, its name, where it is reached, and its key.

    It is signed with that key, and with what was made up for this question.
    """
    said = call.site.peers.description(query.nonce)
    return DescriptionBody(peer=DescriptionView.model_validate(said.to_json()))


def capabilities(call: Call) -> CapabilitiesBody:
    """Show a peer what this cloudlet can do: protocol, machine, bases."""
    return CapabilitiesBody(capabilities=CapabilitiesView.model_validate(call.site.peers.capabilities()))


def offer(call: Call, body: OfferBody) -> PeerStateBody:
    """OFFER: have an instance admitted that is to come here."""
    assert call.peer
    made = call.site.arrivals.offer(call.peer, body.handoff.offered())
    return _state(call, call.site.arrivals.state(made))


def state(call: Call, handoff: Handoff, query: StateQuery) -> PeerStateBody:
    """STATE: what has become of a hand-off here, at once or as soon as it is prepared."""
    ends = time.monotonic() + query.wait
    found = _found(call, handoff)
    if found.state == "preparing" and query.wait:
        with call.turns.one(f"state:{handoff.id}"), call.waiters.one():
            while found.state == "preparing" and time.monotonic() < ends:
                time.sleep(_LOOK_SECONDS)
                found = _found(call, handoff)
    return _state(call, found)


def records(call: Call, handoff: Handoff, query: RecordsQuery, upload: Upload) -> PeerStateBody:
    """RECORDS: have them loaded."""
    if upload.length > MOST_RECORDS_BYTES:
        raise LimitError(f"{upload.length} bytes of records came; {MOST_RECORDS_BYTES} are allowed at a time")
    with call.turns.one(f"records:{handoff.id}"):
        body = _read(upload)
        return _state(call, call.site.arrivals.records(_coming(handoff), query.first, body))


def wanted(call: Call, handoff: Handoff, query: WantedQuery) -> PeerWantedBody:
    """WANTED: which missing pages the instance has waited for, as soon as there is one."""
    with call.turns.one(f"wanted:{handoff.id}"), call.waiters.one():
        found = call.site.arrivals.wanted(_coming(handoff), query.after, query.wait)
    return PeerWantedBody(handoff=PeerWantedView.of(found, call.site.api_url))


def commit(call: Call, handoff: Handoff, body: CommitBody) -> PeerStateBody:
    """COMMIT: the instance is this site's, and runs."""
    return _state(call, call.site.arrivals.commit(_coming(handoff), body.epoch))


def drop(call: Call, handoff: Handoff) -> PeerStateBody:
    """DROP: the source keeps the instance."""
    return _state(call, call.site.arrivals.drop(_coming(handoff)))


def _found(call: Call, handoff: Handoff) -> PeerState:
    leaves = handoff.direction is Direction.OUT
    return (call.site.departures if leaves else call.site.arrivals).state(handoff)


def _coming(handoff: Handoff) -> Handoff:
    if handoff.direction is Direction.OUT:
        raise ConflictError("this hand-off leaves here")
    return handoff


def _state(call: Call, found: PeerState) -> PeerStateBody:
    return PeerStateBody(handoff=PeerStateView.of(found, call.site.api_url))


def _read(upload: Upload) -> bytes:
    pieces, left = [], upload.length
    while left and (piece := upload.read(min(left, _PIECE))):
        pieces.append(piece)
        left -= len(piece)
    if left:
        raise TruncatedError(f"{left} bytes of the records did not come", hint="send them again")
    return b"".join(pieces)
