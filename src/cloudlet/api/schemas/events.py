"""Events on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from cloudlet.api.schemas.common import MOST_ROWS, Incoming, Moment, View
from cloudlet.api.schemas.operations import LONGEST_WAIT
from cloudlet.store.journal import Event


class EventView(View):
    """Something that became true."""

    number: int
    time: Moment
    kind: str
    noun: str
    resource_id: str
    project_id: str
    user_id: str
    detail: Mapping[str, Any]

    @classmethod
    def of(cls, event: Event) -> EventView:
        return cls(
            number=event.number,
            time=event.time,
            kind=event.kind,
            noun=event.noun,
            resource_id=event.resource_id,
            project_id=event.project_id,
            user_id=event.user_id,
            detail=event.detail,
        )


class EventsBody(View):
    """Events, and after which number to ask for the next."""

    events: list[EventView]
    last: int


class EventsQuery(Incoming):
    """Which events."""

    after: int | None = Field(
        None, ge=0, le=2**62, description="those after this number; default: from now on"
    )
    wait: float = Field(0, ge=0, le=LONGEST_WAIT, description="seconds until there is one, at most")
    limit: int = Field(100, ge=1, le=MOST_ROWS)
    kind: str | None = Field(None, max_length=60, description="kinds that begin so, separated by commas")
    resource_id: str | None = Field(None, max_length=36)
