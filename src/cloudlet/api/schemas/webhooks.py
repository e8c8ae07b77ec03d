"""Webhooks on the wire."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, StringConstraints

from cloudlet.api.schemas.common import Incoming, Link, ListQuery, Moment, Url, View
from cloudlet.store.deliveries import Delivery
from cloudlet.store.rows import Webhook

Kind = Annotated[str, StringConstraints(pattern=r"^[a-z]{1,20}(\.[a-z_]{0,40})?$")]
Secret = Annotated[str, StringConstraints(min_length=16, max_length=255, pattern=r"^[!-~]+$")]


class WebhookCreate(Incoming):
    """Where to push events to."""

    url: Url
    kinds: list[Kind] = Field([], max_length=32, description="beginnings of kinds; none: all")
    secret: Secret | None = Field(None, description="for the signature; left out: one is made, and told once")
    everything: bool = Field(False, description="the events of all users: for operators")


class WebhookCreateBody(Incoming):
    """One new webhook."""

    webhook: WebhookCreate


class DeadView(View):
    """An event that was given up."""

    number: int
    attempts: int
    error: str | None


class WebhookView(View):
    """Where events are pushed to."""

    id: str
    url: str
    kinds: list[str]
    everything: bool
    secret: str | None = Field(description="told only when it is made")
    dead: list[DeadView] = Field(description="the latest events that were given up")
    project_id: str
    user_id: str
    created_at: Moment
    updated_at: Moment

    @classmethod
    def of(cls, row: Webhook, dead: list[Delivery], *, told: bool = False) -> WebhookView:
        return cls(
            id=row.id,
            url=row.url,
            kinds=list(row.kinds),
            everything=row.everything,
            secret=row.secret if told else None,
            dead=[DeadView(number=one.number, attempts=one.attempts, error=one.error) for one in dead],
            project_id=row.project_id,
            user_id=row.user_id,
            created_at=row.created_at,
            updated_at=row.updated_at,
        )


class WebhookBody(View):
    """One webhook."""

    webhook: WebhookView


class WebhooksBody(View):
    """A page of webhooks."""

    webhooks: list[WebhookView]
    links: list[Link]


class WebhooksQuery(ListQuery):
    """Which webhooks."""

    SORTED_BY: ClassVar[tuple[str, ...]] = ("created_at", "updated_at")
