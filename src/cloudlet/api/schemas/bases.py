"""Bases on the wire."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from cloudlet.api.schemas.common import (
    ErrorView,
    Incoming,
    Link,
    ListQuery,
    Moment,
    Url,
    View,
    error_view,
)
from cloudlet.store.rows import Base, FileState

BaseName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"),
    Field(json_schema_extra={"not": {"pattern": "^[0-9A-Fa-f]{16,}$"}}),
]
"""It does not look like the id of a base: :func:`cloudlet.store.bases.check_name` sees to that."""


class BaseView(View):
    """A base VM: disk, memory and devices of a machine, named by their content."""

    id: str
    name: str
    state: FileState
    identity: str | None
    size: int | None
    description: dict[str, Any] | None
    error: ErrorView | None
    project_id: str
    user_id: str
    created_at: Moment
    updated_at: Moment

    @classmethod
    def of(cls, row: Base) -> BaseView:
        return cls(
            id=row.id,
            name=row.name,
            state=row.state,
            identity=row.identity,
            size=row.size,
            description=dict(row.description) if row.description else None,
            error=error_view(row.error, "base"),
            project_id=row.project_id,
            user_id=row.user_id,
            created_at=row.created_at,
            updated_at=row.updated_at,
        )


class BaseBody(View):
    """One base."""

    base: BaseView


class BasesBody(View):
    """A page of bases."""

    bases: list[BaseView]
    links: list[Link]


class BaseCreate(Incoming):
    """A new base, whose exported file is uploaded next, or fetched from a URL."""

    name: BaseName | None = Field(None, description="needed without url; else left out: as the file says")
    url: Url | None = None


class BaseCreateBody(Incoming):
    """One new base."""

    base: BaseCreate


class BasesQuery(ListQuery):
    """Which bases."""

    name: str | None = Field(None, max_length=64)
    state: FileState | None = None
    identity: str | None = Field(None, max_length=64)
