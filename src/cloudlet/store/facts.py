"""Facts: what a site remembers of itself as a whole, by name."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cloudlet.store import tables

_FACTS = tables.facts
_ONE = sa.select(_FACTS.c.value).where(_FACTS.c.name == sa.bindparam("key"))

_BOTH = sa.select(_FACTS.c.name, _FACTS.c.value).where(
    sa.or_(_FACTS.c.name == sa.bindparam("one"), _FACTS.c.name == sa.bindparam("other"))
)


def read(connection: Connection, name: str) -> str | None:
    """A fact; None if nobody has stated it."""
    return connection.execute(_ONE, {"key": name}).scalar_one_or_none()


def both(connection: Connection, one: str, other: str) -> dict[str, str]:
    """Those of two facts that somebody has stated, by name."""
    rows = connection.execute(_BOTH, {"one": one, "other": other})
    return {row.name: row.value for row in rows}


def write(connection: Connection, name: str, value: str | None) -> None:
    """State a fact, or have it forgotten."""
    connection.execute(sa.delete(_FACTS).where(_FACTS.c.name == name))
    if value is not None:
        connection.execute(sa.insert(_FACTS).values(name=name, value=value))
