"""Operations on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from cloudlet.api.schemas.common import ErrorView, Incoming, Link, ListQuery, Moment, View, error_view
from cloudlet.store.rows import Operation, OperationState

LONGEST_WAIT = 60


class StepView(View):
    """A step of an operation."""

    name: str
    state: OperationState
    seconds: float | None
    bytes_done: int | None
    bytes_total: int | None


class OperationView(View):
    """Long work."""

    id: str
    kind: str
    state: OperationState
    cancelled: bool
    steps: list[StepView]
    error: ErrorView | None
    resources: Mapping[str, str]
    output: Mapping[str, Any] | None = Field(
        description="what came of it, where that is more than its resources say"
    )
    project_id: str
    user_id: str
    request_id: str
    created_at: Moment
    updated_at: Moment

    @classmethod
    def of(cls, row: Operation) -> OperationView:
        steps = [StepView.model_validate(dict(step)) for step in row.steps]
        return cls(
            id=row.id,
            kind=row.kind,
            state=row.state,
            cancelled=row.cancelled,
            steps=steps,
            error=error_view(row.error, "operation"),
            resources=row.resources,
            output=row.output,
            project_id=row.project_id,
            user_id=row.user_id,
            request_id=row.request_id,
            created_at=row.created_at,
            updated_at=row.updated_at,
        )


class OperationBody(View):
    """One operation."""

    operation: OperationView


class OperationsBody(View):
    """A page of operations."""

    operations: list[OperationView]
    links: list[Link]


class OperationsQuery(ListQuery):
    """Which operations."""

    SORTED_BY: ClassVar[tuple[str, ...]] = ("created_at", "updated_at", "kind", "state")

    state: OperationState | None = None
    kind: str | None = Field(None, max_length=40)


class WaitQuery(Incoming):
    """How long to wait."""

    wait: float = Field(0, ge=0, le=LONGEST_WAIT, description="seconds until it has ended, at most")
