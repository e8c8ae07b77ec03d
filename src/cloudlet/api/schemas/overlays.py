"""Overlays on the wire."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from cloudlet.api.schemas.common import (
    ErrorView,
    Incoming,
    Link,
    ListQuery,
    Moment,
    Name,
    Url,
    View,
    error_view,
)
from cloudlet.store.rows import FileState, Overlay


class OverlayView(View):
    """What an app adds to a base."""

    id: str
    name: str
    state: FileState
    public: bool
    size: int | None
    digest: str | None
    identity: str | None
    base_identity: str | None
    url: str | None
    description: dict[str, Any] | None
    error: ErrorView | None
    project_id: str
    user_id: str
    created_at: Moment
    updated_at: Moment

    @classmethod
    def of(cls, row: Overlay) -> OverlayView:
        return cls(
            id=row.id, name=row.name, state=row.state, public=row.public, size=row.size, digest=row.digest,
            identity=row.identity, base_identity=row.base_identity, url=row.url,
            description=dict(row.description) if row.description else None,
            error=error_view(row.error, "overlay"), project_id=row.project_id, user_id=row.user_id,
            created_at=row.created_at, updated_at=row.updated_at,
        )  # fmt: skip


class OverlayBody(View):
    """One overlay."""

    overlay: OverlayView


class OverlaysBody(View):
    """A page of overlays."""

    overlays: list[OverlayView]
    links: list[Link]


class OverlayCreate(Incoming):
    """A new overlay, whose bytes are uploaded next, or are at a URL."""

    name: Name
    url: Url | None = None
    public: bool = False


class OverlayCreateBody(Incoming):
    """One new overlay."""

    overlay: OverlayCreate


class OverlaysQuery(ListQuery):
    """Which overlays."""

    SORTED_BY: ClassVar[tuple[str, ...]] = ("created_at", "updated_at", "name")

    name: str | None = Field(None, max_length=255)
    state: FileState | None = None
    digest: str | None = Field(None, max_length=64)
    base_identity: str | None = Field(None, max_length=64)
