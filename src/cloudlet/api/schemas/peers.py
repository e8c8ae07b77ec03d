"""Peers on the wire, for operators; and what cloudlets say of themselves to each other."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

from pydantic import Field, StringConstraints

from cloudlet.api.schemas.common import ErrorView, Incoming, Link, ListQuery, Moment, Name, View, error_view
from cloudlet.store.rows import Peer, PeerState

_SEPARATORS = re.compile(r"[ :-]")
Fingerprint = Annotated[str, StringConstraints(pattern=r"^([0-9a-fA-F]{2}[ :-]?){31}[0-9a-fA-F]{2}$")]
Nonce = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{0,64}$")]
# With a slash it could be taken for a path, or for a URL.
PeerName = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f/]+$")]
PeerUrl = Annotated[str, StringConstraints(max_length=4096, pattern=r"^https://[!-~]+$")]


class CapabilitiesView(View):
    """What a site can do."""

    versions: list[int] = Field([], description="of the protocol between sites")
    hypervisor: str = ""
    qemu: str = Field("", description="its version")
    accelerator: str = ""
    cpu_model: str = ""
    bases: list[str] = Field([], description="their identities")


class CapabilitiesBody(View):
    """What this site can do."""

    capabilities: CapabilitiesView


class DescriptionView(View):
    """A site as it describes itself, signed with its key."""

    site_id: str
    name: str
    url: str = Field(description="where it is reached; empty: nowhere")
    public_key: str = Field(description="of Ed25519: its 32 bytes, in base64")
    fingerprint: str = Field(description="of the key: BLAKE3, hexadecimal")
    certificate: str = Field(description="SHA-256 of what another TLS server shows; empty: it is of the key")
    nonce: str = Field(description="as in the question")
    signature: str = Field(description="of all else in canonical form, by the key, in base64")


class DescriptionBody(View):
    """The site that answers."""

    peer: DescriptionView


class DescriptionQuery(Incoming):
    """What the answer has to say, so that it is a new one."""

    nonce: Nonce = Field("", description="made up by who asks")


class PeerCreate(Incoming):
    """Whom to trust."""

    url: PeerUrl = Field(description="where it is reached")
    fingerprint: Fingerprint | None = Field(
        None, description="of its key, as its operator says; left out: the answer is an error, and shows it"
    )
    name: PeerName | None = Field(None, description="what to call it; left out: as it calls itself")

    @property
    def digits(self) -> str | None:
        """The fingerprint without what makes it readable."""
        return _SEPARATORS.sub("", self.fingerprint).lower() if self.fingerprint else None


class PeerCreateBody(Incoming):
    """One new peer."""

    peer: PeerCreate


class PeerUpdate(Incoming):
    """What may change of a peer."""

    name: PeerName | None = None
    url: PeerUrl | None = Field(None, description="it has to be there")
    state: PeerState | None = Field(None, description="blocked: it is neither called nor heard")


class PeerUpdateBody(Incoming):
    """Changes of a peer."""

    peer: PeerUpdate


class PeerView(View):
    """Another cloudlet."""

    id: str = Field(description="its own, as it calls itself")
    name: str
    url: str
    state: PeerState
    public_key: str = Field(description="of Ed25519: its 32 bytes, in base64")
    fingerprint: str = Field(description="of the key: BLAKE3, hexadecimal")
    certificate: str = Field(description="SHA-256 of what another TLS server showed; empty: it is of the key")
    capabilities: CapabilitiesView = Field(description="as it said last")
    seen_at: Moment | None = Field(description="when it was heard of last")
    error: ErrorView | None = Field(description="why the last call did not work")
    project_id: str
    user_id: str
    created_at: Moment
    updated_at: Moment

    @classmethod
    def of(cls, row: Peer) -> PeerView:
        return cls(
            id=row.id,
            name=row.name,
            url=row.url,
            state=row.state,
            public_key=row.public_key,
            fingerprint=row.fingerprint,
            certificate=row.certificate,
            capabilities=CapabilitiesView.model_validate(row.capabilities),
            seen_at=row.seen_at,
            error=error_view(row.error, "peer"),
            project_id=row.project_id,
            user_id=row.user_id,
            created_at=row.created_at,
            updated_at=row.updated_at,
        )


class PeerBody(View):
    """One peer."""

    peer: PeerView


class PeersBody(View):
    """A page of peers."""

    peers: list[PeerView]
    links: list[Link]


class PeersQuery(ListQuery):
    """Which peers."""

    SORTED_BY: ClassVar[tuple[str, ...]] = ("created_at", "updated_at", "name", "seen_at")

    name: Name | None = None
    state: PeerState | None = None
