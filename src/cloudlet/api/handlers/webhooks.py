"""Webhooks: events are pushed to an address."""

from __future__ import annotations

import secrets

from cloudlet.api import listing
from cloudlet.api.operation import Call
from cloudlet.api.schemas.webhooks import (
    WebhookBody,
    WebhookCreateBody,
    WebhooksBody,
    WebhooksQuery,
    WebhookView,
)
from cloudlet.errors import RefusedError
from cloudlet.store.rows import WEBHOOKS, Webhook

_DEAD = 100
"""How many events that were given up are shown."""


def list(call: Call, query: WebhooksQuery) -> WebhooksBody:  # noqa: A001 (it is what it is called on the wire)
    """List webhooks."""
    rows, links = listing.page(call, WEBHOOKS, query, "/v1/webhooks")
    return WebhooksBody(webhooks=[_view(call, row) for row in rows], links=links)


def create(call: Call, body: WebhookCreateBody) -> WebhookBody:
    """Have events pushed to an address, from now on.

    They are signed as Standard Webhooks has it. The secret is told in this answer only.
    """
    wanted = body.webhook
    if wanted.everything and not call.everything:
        raise RefusedError("only an operator may have the events of all users")
    if again := call.again(WEBHOOKS):
        return WebhookBody(webhook=_view(call, again))
    webhook = Webhook(
        project_id=call.who.project_id,
        user_id=call.who.user_id,
        url=wanted.url,
        kinds=wanted.kinds,
        secret=wanted.secret or secrets.token_urlsafe(32),
        everything=wanted.everything,
        after=call.site.news.last,
    )
    made = call.site.webhooks.create(webhook, call.remember)
    return WebhookBody(webhook=WebhookView.of(made, [], told=True))


def show(call: Call, webhook: Webhook) -> WebhookBody:
    """Show a webhook, and the events that were given up."""
    return WebhookBody(webhook=_view(call, webhook))


def delete(call: Call, webhook: Webhook) -> None:
    """Push nothing more to it."""
    call.site.webhooks.delete(webhook)


def _view(call: Call, webhook: Webhook) -> WebhookView:
    return WebhookView.of(webhook, call.site.webhooks.dead(webhook, _DEAD))
