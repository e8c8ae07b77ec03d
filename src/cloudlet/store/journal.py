"""The journal: every event of a site, numbered without a gap in the order in which they became true.

An event is written in the transaction that makes it true. Its number is taken from a row that the transaction
keeps locked to its end, so that a reader who has seen number N has seen all before it, on every database.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cloudlet.store import tables
from cloudlet.store.rows import Owned, now

_COUNTER = "events"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that became true."""

    number: int
    time: datetime
    kind: str
    """``NOUN.WHAT``, such as ``instance.active``."""
    project_id: str
    user_id: str
    noun: str
    resource_id: str
    detail: Mapping[str, Any]


# Written once: to write a query costs more than to answer it.
_INSERT = sa.insert(tables.events)
_MINE = tables.counters.c.name == _COUNTER
_COUNT = sa.update(tables.counters).where(_MINE).values(value=tables.counters.c.value + 1)
_COUNTED = sa.select(tables.counters.c.value).where(_MINE)
_COLUMNS = [tables.events.c[entry.name] for entry in fields(Event)]
_AFTER = (
    sa.select(*_COLUMNS)
    .where(tables.events.c.number > sa.bindparam("after"))
    .order_by(tables.events.c.number)
    .limit(sa.bindparam("most"))
)


def emit(connection: Connection, noun: str, what: str, of: Owned, **detail: Any) -> int:
    """Write an event about a row; its number."""
    number = _next_number(connection)
    event = Event(number, now(), f"{noun}.{what}", of.project_id, of.user_id, noun, of.id, detail)
    connection.execute(_INSERT, {column.name: getattr(event, column.name) for column in _COLUMNS})
    return number


def read(
    connection: Connection,
    after: int,
    limit: int,
    *,
    project_id: str | None = None,
    user_id: str | None = None,
    kinds: Sequence[str] = (),
) -> list[Event]:
    """The events after a number, of everybody or of one project or user.

    :param kinds: only those whose kinds begin so.
    """
    columns = tables.events.c
    query = _AFTER
    if project_id is not None:
        query = query.where(columns.project_id == project_id)
    if user_id is not None:
        query = query.where(columns.user_id == user_id)
    if kinds:
        query = query.where(sa.or_(*(columns.kind.startswith(kind, autoescape=True) for kind in kinds)))
    return [Event(*row) for row in connection.execute(query, {"after": after, "most": limit})]


def last_number(connection: Connection) -> int:
    """The number of the last event; 0 if there was none."""
    return int(connection.execute(_COUNTED).scalar_one_or_none() or 0)


def forget(connection: Connection, before: datetime) -> int:
    """Remove the events before a moment; how many. Numbers are not given again."""
    return int(connection.execute(sa.delete(tables.events).where(tables.events.c.time < before)).rowcount)


def _next_number(connection: Connection) -> int:
    connection.execute(_COUNT)
    return int(connection.execute(_COUNTED).scalar_one())
