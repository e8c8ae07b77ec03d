"""What is still to be pushed to webhooks: an event that a webhook wants is a delivery until it has arrived.

A delivery is written in the transaction that notes how far the journal was looked through for its webhook, so
that none is missed and none is made twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cloudlet.store import tables


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event on its way to a webhook."""

    webhook_id: str
    number: int
    event: Mapping[str, Any]
    """The body that is sent."""
    attempts: int
    next_at: datetime
    dead: bool = False
    """Whether it was given up."""
    error: str | None = None


_TABLE = tables.deliveries
_COLUMNS = [_TABLE.c[entry.name] for entry in fields(Delivery)]


def insert(connection: Connection, delivery: Delivery) -> None:
    """Write a delivery that is to be made."""
    connection.execute(sa.insert(_TABLE).values(asdict(delivery)))


def due(connection: Connection, webhook_id: str, moment: datetime, limit: int) -> list[Delivery]:
    """Deliveries to a webhook whose time has come, in the order of the events."""
    query = sa.select(*_COLUMNS).where(
        _TABLE.c.webhook_id == webhook_id, sa.not_(_TABLE.c.dead), _TABLE.c.next_at <= moment
    )
    return [Delivery(*row) for row in connection.execute(query.order_by(_TABLE.c.number).limit(limit))]


def waiting(connection: Connection) -> list[tuple[str, datetime]]:
    """The webhooks to which something is to be pushed, and when that begins: who waits longest is first."""
    first = sa.func.min(_TABLE.c.next_at)
    query = sa.select(_TABLE.c.webhook_id, first).where(sa.not_(_TABLE.c.dead))
    rows = connection.execute(query.group_by(_TABLE.c.webhook_id).order_by(first, _TABLE.c.webhook_id))
    return [(webhook_id, moment) for webhook_id, moment in rows]


def dead(connection: Connection, webhook_id: str, limit: int) -> list[Delivery]:
    """Deliveries of a webhook that were given up, the latest first."""
    query = sa.select(*_COLUMNS).where(_TABLE.c.webhook_id == webhook_id, _TABLE.c.dead)
    return [Delivery(*row) for row in connection.execute(query.order_by(_TABLE.c.number.desc()).limit(limit))]


def remove(connection: Connection, delivery: Delivery) -> None:
    """It has arrived."""
    connection.execute(sa.delete(_TABLE).where(*_mine(delivery)))


def failed(connection: Connection, delivery: Delivery, error: str, next_at: datetime, *, dead: bool) -> None:
    """It did not arrive: try it again at ``next_at``, or give it up."""
    connection.execute(
        sa.update(_TABLE)
        .where(*_mine(delivery))
        .values(attempts=delivery.attempts + 1, error=error, next_at=next_at, dead=dead)
    )


def _mine(delivery: Delivery) -> tuple[sa.ColumnElement[bool], ...]:
    return _TABLE.c.webhook_id == delivery.webhook_id, _TABLE.c.number == delivery.number
