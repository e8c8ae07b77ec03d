"""Apps on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from cloudlet.api.schemas.common import (
    GuestPortNumber,
    Identifier,
    Incoming,
    Link,
    ListQuery,
    Moment,
    Name,
    Seconds,
    View,
)
from cloudlet.store.rows import App

_PORT = r"([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"


class ComponentPort(Incoming):
    """A port of a component's guest that users reach."""

    port: GuestPortNumber
    name: str = Field("", max_length=128)
    access: Literal["open"] = Field("open", description="who may connect: everybody who reaches the site")


class Component(Incoming):
    """One VM of an app."""

    name: Name = "main"
    overlay_id: Identifier
    ports: list[ComponentPort] | None = Field(
        None, max_length=64, description="which ports are published; those of the overlay if not given"
    )
    readiness: str | None = Field(
        None,
        max_length=1024,
        pattern=rf"^(agent|tcp:{_PORT}|http:{_PORT}(/[!-~]*)?)$",
        description="when the app answers, if not when its overlay says: agent, tcp:PORT or http:PORT/PATH",
    )


class Intent(Incoming):
    """What the app needs of a place to be of use."""

    latency_ms: float | None = Field(None, gt=0, le=10_000)
    bandwidth_mbit: float | None = Field(None, gt=0, le=1_000_000)
    accelerators: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field(
        default_factory=list, max_length=16, description="what it computes with, such as gpu"
    )


class HandOffPolicy(Incoming):
    """What may be done to instances of the app on their way to another cloudlet."""

    early: bool = Field(
        False, description="whether one may be resumed there before all of its memory is; it can be lost then"
    )


class AppCreate(Incoming):
    """An app: what is to be run, and how."""

    name: Name
    version: str = Field("", max_length=128)
    summary: str = Field("", max_length=1024)
    public: bool = Field(True, description="whether every user of the site may start it")
    components: list[Component] = Field(min_length=1, max_length=1)
    restart: bool = Field(False, description="whether an instance that ends by itself is started again")
    lease_seconds: Seconds | None = None
    intent: Intent = Intent()
    handoff: HandOffPolicy = HandOffPolicy()

    def descriptor(self) -> dict[str, Any]:
        """What is kept of it besides its name."""
        whole = self.model_dump(mode="json", exclude={"name", "version", "public"})
        # As it may be given again: what is not said is left out.
        components = [one.model_dump(mode="json", exclude_none=True) for one in self.components]
        return {**whole, "components": components}


class AppCreateBody(Incoming):
    """One new app."""

    app: AppCreate


class AppUpdate(Incoming):
    """What may change of an app."""

    summary: str | None = Field(None, max_length=1024)
    public: bool | None = None
    components: list[Component] | None = Field(None, min_length=1, max_length=1)
    restart: bool | None = None
    lease_seconds: Seconds | None = None
    intent: Intent | None = None
    handoff: HandOffPolicy | None = None


class AppUpdateBody(Incoming):
    """Changes of an app."""

    app: AppUpdate


class AppView(View):
    """An app."""

    id: str
    name: str
    version: str
    summary: str
    public: bool
    components: list[Mapping[str, Any]]
    restart: bool
    lease_seconds: int | None
    intent: Mapping[str, Any]
    handoff: Mapping[str, Any]
    project_id: str
    user_id: str
    created_at: Moment
    updated_at: Moment

    @classmethod
    def of(cls, row: App) -> AppView:
        return cls(
            id=row.id,
            name=row.name,
            version=row.version,
            public=row.public,
            **{"handoff": HandOffPolicy().model_dump(), **row.descriptor},
            project_id=row.project_id,
            user_id=row.user_id,
            created_at=row.created_at,
            updated_at=row.updated_at,
        )


class AppBody(View):
    """One app."""

    app: AppView


class AppsBody(View):
    """A page of apps."""

    apps: list[AppView]
    links: list[Link]


class AppsQuery(ListQuery):
    """Which apps."""

    SORTED_BY: ClassVar[tuple[str, ...]] = ("created_at", "updated_at", "name", "version")

    name: str | None = Field(None, max_length=255)
    version: str | None = Field(None, max_length=128)
