"""The nouns of a site, as openstacksdk has them; what the fields mean stands in the API's description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from openstack import resource
from openstack.resource import Body, QueryParameters


class Noun(resource.Resource):
    """What all nouns have."""

    _max_microversion = "1.0"

    allow_fetch = True
    allow_list = True
    commit_method = "PATCH"

    project_id: str = Body("project_id")
    user_id: str = Body("user_id")
    created_at: str = Body("created_at")
    updated_at: str = Body("updated_at")

    def told(self) -> str:
        """What tells it from others of its name."""
        return self.id


class Base(Noun):
    """A base VM: disk, memory and devices of a machine, named by their content."""

    resource_key = "base"
    resources_key = "bases"
    base_path = "/bases"
    _query_mapping = QueryParameters("name", "state", "identity", "sort")

    allow_create = True
    allow_delete = True

    state: str = Body("state")
    identity: str | None = Body("identity")
    size: int | None = Body("size")
    description: Mapping[str, Any] | None = Body("description")
    error: Mapping[str, str] | None = Body("error")


class Overlay(Noun):
    """What an app adds to a base."""

    resource_key = "overlay"
    resources_key = "overlays"
    base_path = "/overlays"
    _query_mapping = QueryParameters("name", "state", "digest", "base_identity", "sort")

    allow_create = True
    allow_delete = True

    state: str = Body("state")
    public: bool = Body("public")
    size: int | None = Body("size")
    digest: str | None = Body("digest")
    identity: str | None = Body("identity")
    base_identity: str | None = Body("base_identity")
    url: str | None = Body("url")
    description: Mapping[str, Any] | None = Body("description")
    error: Mapping[str, str] | None = Body("error")


class App(Noun):
    """What a publisher publishes and a user starts."""

    resource_key = "app"
    resources_key = "apps"
    base_path = "/apps"
    _query_mapping = QueryParameters("name", "version", "sort")

    allow_create = True
    allow_commit = True
    allow_delete = True

    version: str = Body("version")
    summary: str = Body("summary")
    public: bool = Body("public")
    components: Sequence[Mapping[str, Any]] = Body("components")
    restart: bool = Body("restart")
    lease_seconds: int | None = Body("lease_seconds")
    intent: Mapping[str, Any] = Body("intent")
    handoff: Mapping[str, Any] = Body("handoff")

    @property
    def overlay_id(self) -> str:
        """The overlay of its first component."""
        return str(self.components[0]["overlay_id"])

    def told(self) -> str:
        return f"{self.id} (version {self.version})"


class Instance(Noun):
    """A running app of one user."""

    resource_key = "instance"
    resources_key = "instances"
    base_path = "/instances"
    _query_mapping = QueryParameters("name", "state", "app_id", "user_id", "sort")

    allow_commit = True

    state: str = Body("state")
    app_id: str | None = Body("app_id")
    overlay_id: str | None = Body("overlay_id")
    base_identity: str = Body("base_identity")
    memory_bytes: int = Body("memory_bytes")
    disk_bytes: int = Body("disk_bytes")
    cpus: int = Body("cpus")
    endpoints: Sequence[Mapping[str, Any]] = Body("endpoints")
    metadata: Mapping[str, str] = Body("metadata")
    timings: Mapping[str, float] = Body("timings")
    arrival: Mapping[str, int] | None = Body("arrival")
    lease_seconds: int | None = Body("lease_seconds")
    expires_at: str | None = Body("expires_at")
    epoch: int = Body("epoch")
    moved_to: Mapping[str, Any] | None = Body("moved_to")
    restarts: int = Body("restarts")
    error: Mapping[str, str] | None = Body("error")

    @property
    def endpoint(self) -> str | None:
        """The URL of its first port, while it can be reached."""
        return str(self.endpoints[0]["url"]) if self.endpoints else None


class Operation(Noun):
    """Long work, which one can wait for and cancel."""

    resource_key = "operation"
    resources_key = "operations"
    base_path = "/operations"
    _query_mapping = QueryParameters("state", "kind", "sort")

    kind: str = Body("kind")
    state: str = Body("state")
    cancelled: bool = Body("cancelled")
    steps: Sequence[Mapping[str, Any]] = Body("steps")
    error: Mapping[str, str] | None = Body("error")
    resources: Mapping[str, str] = Body("resources")
    output: Mapping[str, Any] | None = Body("output")
    request_id: str = Body("request_id")

    @property
    def ended(self) -> bool:
        """Whether nothing more becomes of it."""
        return self.state in ("succeeded", "failed", "cancelled")

    @property
    def moved(self) -> tuple[int, int]:
        """The bytes that its present step has done, and has to do in all; zeros where it does not count."""
        for step in self.steps:
            if step["state"] == "running":
                return step["bytes_done"] or 0, step["bytes_total"] or 0
        return 0, 0


class Handoff(Noun):
    """An instance on its way to another cloudlet, or from one."""

    resource_key = "handoff"
    resources_key = "handoffs"
    base_path = "/handoffs"
    _query_mapping = QueryParameters("instance_id", "peer_id", "state", "direction", "sort")

    instance_id: str = Body("instance_id")
    direction: str = Body("direction")
    peer_id: str = Body("peer_id")
    state: str = Body("state")
    epoch: int = Body("epoch")
    forecast: Mapping[str, Any] | None = Body("forecast")
    statistics: Mapping[str, Any] = Body("statistics")
    moved_to: Mapping[str, Any] | None = Body("moved_to")
    error: Mapping[str, str] | None = Body("error")


class Peer(Noun):
    """Another cloudlet, whose key is pinned."""

    resource_key = "peer"
    resources_key = "peers"
    base_path = "/peers"
    _query_mapping = QueryParameters("name", "state", "sort")

    allow_create = True
    allow_commit = True
    allow_delete = True

    url: str = Body("url")
    state: str = Body("state")
    public_key: str = Body("public_key")
    fingerprint: str = Body("fingerprint")
    certificate: str = Body("certificate")
    capabilities: Mapping[str, Any] = Body("capabilities")
    seen_at: str | None = Body("seen_at")
    error: Mapping[str, str] | None = Body("error")


class Event(resource.Resource):
    """Something that became true."""

    resource_key = "event"
    resources_key = "events"
    base_path = "/events"

    number: int = Body("number")
    time: str = Body("time")
    kind: str = Body("kind")
    noun: str = Body("noun")
    resource_id: str = Body("resource_id")
    project_id: str = Body("project_id")
    user_id: str = Body("user_id")
    detail: Mapping[str, Any] = Body("detail")
    site: str = ""
    """Where it was told; it is not on the wire. Each site has numbers of its own."""

    @classmethod
    def told_at(cls, site: str, **event: Any) -> Event:
        """An event as a site tells it."""
        told = cls.existing(**event)
        told.site = site
        return told


class Cloudlet(resource.Resource):
    """The site itself."""

    resource_key = "cloudlet"
    base_path = "/cloudlets"
    _max_microversion = "1.0"

    allow_fetch = True

    state: str = Body("state")
    software_version: str = Body("software_version")
    hypervisor: str = Body("hypervisor")
    accelerator: str = Body("accelerator")
    cpu_model: str = Body("cpu_model")
    fingerprint: str = Body("fingerprint")
    peers_url: str = Body("peers_url")
    limits: Mapping[str, int | None] = Body("limits")
    used: Mapping[str, int] = Body("used")
