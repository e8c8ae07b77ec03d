"""Hand-offs: a user's running instance goes to another cloudlet."""

from __future__ import annotations

from sqlalchemy.engine import Connection

from cloudlet.api import listing
from cloudlet.api.handlers.operations import accepted
from cloudlet.api.operation import Answer, Call
from cloudlet.api.schemas.handoffs import (
    HandoffBody,
    HandoffCreate,
    HandoffCreateBody,
    HandoffsBody,
    HandoffsQuery,
    HandoffView,
    ResolveBody,
)
from cloudlet.errors import ConflictError, NotFoundError, RefusedError
from cloudlet.service.departures import Wish
from cloudlet.store.rows import HANDOFFS, INSTANCES, OPERATIONS, PEERS, Direction, Handoff, Peer


def list(call: Call, query: HandoffsQuery) -> HandoffsBody:  # noqa: A001 (it is what it is called on the wire)
    """List hand-offs."""
    rows, links = listing.page(call, HANDOFFS, query, "/v1/handoffs")
    return HandoffsBody(handoffs=[HandoffView.of(row) for row in rows], links=links)


def create(call: Call, body: HandoffCreateBody) -> Answer:
    """Hand a running instance off to another cloudlet.

    It goes on running meanwhile, and stands still for a moment at the end. The operation has ended well when
    it runs there; the hand-off then says where.
    """
    if again := call.again(OPERATIONS):
        return accepted(call, again)
    wanted = body.handoff
    instance = listing.seen(call, INSTANCES, wanted.instance_id)
    if not call.allows("owner", instance):
        raise RefusedError("only who owns an instance may hand it off")
    peer = call.site.database.read(lambda connection: _peer(connection, wanted))
    if wanted.switch == "early" and not (
        call.allows("admin", instance) or call.site.departures.allows_early(instance)
    ):
        raise ConflictError(
            "the app's policy does not allow an early switch, in which an instance can be lost",
            hint="its publisher can: cloudlet app set APP --early-hand-off; or have an operator do it",
        )
    settings = call.site.options.peers
    terms = wanted.terms(settings.patience_seconds, settings.bytes_per_second)
    wish = Wish(peer, terms, wanted.overlay)
    _, begun = call.site.departures.create(instance, wish, call.remember, call.request_id)
    return accepted(call, begun)


def _peer(connection: Connection, wanted: HandoffCreate) -> Peer:
    """The peer that a hand-off is to go to: who may not list peers may name one."""
    if wanted.peer_id is not None:
        return PEERS.get(connection, wanted.peer_id)
    found = PEERS.list(connection, name=wanted.peer_name, limit=2)
    if not found:
        raise NotFoundError(f"there is no peer {wanted.peer_name}", hint=PEERS.listed_by)
    if len(found) > 1:
        raise ConflictError(f"several peers are called {wanted.peer_name}", hint="name one by its id")
    return found[0]


def show(handoff: Handoff) -> HandoffBody:
    """Show a hand-off: how far it is, what is expected of it, what it took."""
    return HandoffBody(handoff=HandoffView.of(handoff))


def cancel(call: Call, handoff: Handoff) -> Answer:
    """Have the instance stay where it is."""
    if handoff.direction is Direction.IN:
        raise ConflictError("it comes from another site", hint="cancel it there")
    return accepted(call, call.site.departures.cancel(handoff))


def resolve(call: Call, handoff: Handoff, body: ResolveBody) -> Answer | HandoffBody:
    """Bring a hand-off in doubt to its end.

    It resolves itself when the peer is back. Where that does not come back, an operator may say that the
    instance runs here: at the risk that it runs at the peer too.
    """
    action = body.resolve.action
    leaves = handoff.direction is Direction.OUT
    if leaves == (action in ("take", "give_back")):
        way = "leaves" if leaves else "comes"
        raise ConflictError(f"the instance {way}: it cannot be resolved by {action}")
    if action == "retry":
        return accepted(call, call.site.departures.resolve(handoff))
    departures = call.site.departures
    match action:
        case "keep":
            departures.keep(handoff)
        case "resume_as_of_switch":
            departures.resume_as_of_switch(handoff)
        case "give_up":
            departures.give_up(handoff)
        case "take":
            call.site.arrivals.take(handoff)
        case "give_back":
            call.site.arrivals.give_back(handoff)
    return HandoffBody(handoff=HandoffView.of(call.site.departures.get(handoff.id)))
