"""The site itself on the wire: versions and the cloudlet's own description."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from cloudlet.api.schemas.common import Identifier, Incoming, Link, View
from cloudlet.service.draining import Wanted
from cloudlet.store.rows import CloudletState


class VersionView(View):
    """A version of the API, as keystoneauth looks for it."""

    id: str
    status: str
    min_version: str
    max_version: str
    version: str
    links: list[Link]


class VersionsBody(View):
    """The versions of the API."""

    versions: list[VersionView]


class VersionBody(View):
    """One version of the API."""

    version: VersionView


class CloudletView(View):
    """A site: what it is, what it may give, what it has given."""

    id: str
    name: str
    state: CloudletState
    software_version: str
    hypervisor: str
    accelerator: str
    cpu_model: str
    fingerprint: str = Field(description="of its key, for operators of other cloudlets: BLAKE3, hexadecimal")
    peers_url: str = Field(description="where other cloudlets reach it; empty: nowhere")
    limits: Mapping[str, int | None]
    used: Mapping[str, int]


class CloudletBody(View):
    """One cloudlet."""

    cloudlet: CloudletView


class CloudletUpdate(Incoming):
    """What may change of a cloudlet."""

    state: CloudletState = Field(description="draining: it admits no instance that is not there yet")


class CloudletUpdateBody(Incoming):
    """Changes of a cloudlet."""

    cloudlet: CloudletUpdate


class Drain(Incoming):
    """How a cloudlet is emptied."""

    deadline_seconds: float = Field(
        600.0, ge=0, le=86_400, description="no hand-off begins later, and those under way switch by then"
    )
    pause_seconds: float = Field(
        0.1, ge=0.02, le=60, description="an instance switches as soon as what is left fits into this"
    )
    peers: list[Identifier] | None = Field(
        None, min_length=1, max_length=1000, description="the ids of peers: only to these; without, to all"
    )

    def wanted(self) -> Wanted:
        """As the service takes it."""
        return Wanted(self.deadline_seconds, self.pause_seconds, tuple(self.peers or ()))


class DrainBody(Incoming):
    """One drain."""

    drain: Drain
