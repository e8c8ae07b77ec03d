"""The site itself on the wire: versions and the cloudlet's own description."""

from __future__ import annotations

from collections.abc import Mapping

from cloudlet.api.schemas.common import Link, View


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
    state: str
    software_version: str
    hypervisor: str
    accelerator: str
    cpu_model: str
    limits: Mapping[str, int | None]
    used: Mapping[str, int]


class CloudletBody(View):
    """One cloudlet."""

    cloudlet: CloudletView
