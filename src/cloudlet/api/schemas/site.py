"""The site itself on the wire: versions and the cloudlet's own description."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from cloudlet.api.schemas.common import Incoming, Link, View
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
