"""Peers: other cloudlets, with pinned keys."""

from __future__ import annotations

from cloudlet.api import listing
from cloudlet.api.operation import Call
from cloudlet.api.schemas.peers import (
    PeerBody,
    PeerCreateBody,
    PeersBody,
    PeersQuery,
    PeerUpdateBody,
    PeerView,
)
from cloudlet.store.rows import PEERS, Owned, Peer


def list(call: Call, query: PeersQuery) -> PeersBody:  # noqa: A001 (it is what it is called on the wire)
    """List peers."""
    rows, links = listing.page(call, PEERS, query, "/v1/peers")
    return PeersBody(peers=[PeerView.of(row) for row in rows], links=links)


def create(call: Call, body: PeerCreateBody) -> PeerBody:
    """Trust another cloudlet, whose key has the fingerprint that its operator says.

    Without a fingerprint nothing is trusted: the answer is 409, and shows the fingerprint that was found. The
    other site has to trust this one, too, before it answers; until then ``error`` says that it does not.
    """
    if again := call.again(PEERS):
        return PeerBody(peer=PeerView.of(again))
    wanted = body.peer
    made = call.site.peers.add(
        wanted.url,
        Owned(project_id=call.who.project_id, user_id=call.who.user_id),
        fingerprint=wanted.digits,
        name=wanted.name,
        elsewhere=call.transfers.one,
        remember=call.remember,
    )
    return PeerBody(peer=PeerView.of(made))


def show(peer: Peer) -> PeerBody:
    """Show a peer."""
    return PeerBody(peer=PeerView.of(peer))


def update(call: Call, peer: Peer, body: PeerUpdateBody) -> PeerBody:
    """Change a peer's name or URL, where it has to be; or deal with it no more (``blocked``), or again."""
    wanted = body.peer
    changed = call.site.peers.update(
        peer, name=wanted.name, url=wanted.url, state=wanted.state, elsewhere=call.transfers.one
    )
    return PeerBody(peer=PeerView.of(changed))


def delete(call: Call, peer: Peer) -> None:
    """Forget a peer and its key."""
    call.site.peers.delete(peer)


def refresh(call: Call, peer: Peer) -> PeerBody:
    """Ask a peer what it can do. ``error`` says why that did not work."""
    return PeerBody(peer=PeerView.of(call.site.peers.refresh(peer, elsewhere=call.transfers.one)))
