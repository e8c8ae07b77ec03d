"""Instances on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from cloudlet.api.schemas.common import (
    ErrorView,
    GuestPortNumber,
    HostPortNumber,
    Identifier,
    Incoming,
    Link,
    ListQuery,
    Metadata,
    Moment,
    Name,
    Seconds,
    Url,
    View,
    error_view,
)
from cloudlet.keeper.order import Status
from cloudlet.store.rows import Instance, InstanceState


class EndpointView(View):
    """Where a port of the app is reached."""

    name: str
    url: str
    host: str
    port: int
    guest_port: int


class ArrivalView(View):
    """How much of the overlay is here."""

    received: int
    total: int


class InstanceView(View):
    """A running app of one user."""

    id: str
    name: str
    state: InstanceState
    app_id: str | None
    overlay_id: str | None
    base_identity: str
    memory_bytes: int
    disk_bytes: int
    cpus: int
    endpoints: list[EndpointView]
    metadata: Mapping[str, str]
    timings: Mapping[str, float] = Field(
        description="seconds from the first byte to each moment of its start"
    )
    arrival: ArrivalView | None
    lease_seconds: int | None
    expires_at: Moment | None
    epoch: int = Field(description="how often it has come to another site, and one more")
    moved_to: Mapping[str, Any] | None = Field(description="where it is, if it has left for another site")
    restarts: int
    error: ErrorView | None
    project_id: str
    user_id: str
    created_at: Moment
    updated_at: Moment

    @classmethod
    def of(cls, row: Instance, status: Status | None = None) -> InstanceView:
        endpoints = [
            EndpointView(
                name=endpoint["name"], url=endpoint["url"], host=endpoint["host"], port=endpoint["host_port"],
                guest_port=endpoint["guest_port"],
            )
            for endpoint in row.endpoints
        ]  # fmt: skip
        arrival = (
            ArrivalView(received=status.received, total=status.total) if status and status.total else None
        )
        return cls(
            id=row.id,
            name=row.name,
            state=row.state,
            app_id=row.app_id,
            overlay_id=row.overlay_id,
            base_identity=row.base_identity,
            memory_bytes=row.memory_bytes,
            disk_bytes=row.disk_bytes,
            cpus=row.cpus,
            endpoints=endpoints,
            metadata=row.metadata,
            timings=row.timings,
            arrival=arrival,
            lease_seconds=row.lease_seconds,
            expires_at=row.expires_at,
            epoch=row.epoch,
            moved_to=row.moved_to,
            restarts=row.restarts,
            error=error_view(row.error, "instance"),
            project_id=row.project_id,
            user_id=row.user_id,
            created_at=row.created_at,
            updated_at=row.updated_at,
        )


class InstanceBody(View):
    """One instance."""

    instance: InstanceView


class InstancesBody(View):
    """A page of instances."""

    instances: list[InstanceView]
    links: list[Link]


class PortWish(Incoming):
    """A port of the app that shall be published under a certain number."""

    guest_port: GuestPortNumber
    port: HostPortNumber = Field(0, description="0: any that is free")


class InstanceCreate(Incoming):
    """What to run: exactly one of app_id, overlay_id and url."""

    SOURCES: ClassVar[tuple[str, ...]] = ("app_id", "overlay_id", "url")

    name: Name | None = None
    app_id: Identifier | None = None
    overlay_id: Identifier | None = None
    url: Url | None = None
    ports: list[PortWish] = Field([], max_length=16)
    lease_seconds: Seconds | None = None
    metadata: Metadata = Field({})


class InstanceCreateBody(Incoming):
    """One new instance."""

    instance: InstanceCreate


class InstanceUpdate(Incoming):
    """What may change of an instance."""

    name: Name | None = None
    metadata: Metadata | None = None
    lease_seconds: Seconds | None = Field(
        None, description="renew the lease: it ends so many seconds from now"
    )


class InstanceUpdateBody(Incoming):
    """Changes of an instance."""

    instance: InstanceUpdate


class InstancesQuery(ListQuery):
    """Which instances."""

    SORTED_BY: ClassVar[tuple[str, ...]] = ("created_at", "updated_at", "name", "state")

    name: str | None = Field(None, max_length=255)
    state: InstanceState | None = None
    app_id: Identifier | None = None
    user_id: str | None = Field(None, max_length=255)


class ConsoleQuery(Incoming):
    """How much of the console."""

    length: int = Field(65536, ge=1, le=1 << 20, description="bytes at most, from the end")


class SaveBody(Incoming):
    """How to call what is saved."""

    class Save(Incoming):
        """An overlay that is to be made of an instance."""

        name: Name

    overlay: Save
