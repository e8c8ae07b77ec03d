"""Lists: a page of the rows that a caller may see."""

from __future__ import annotations

from typing import Any, TypeVar

import sqlalchemy as sa

from cloudlet.api.operation import Call
from cloudlet.api.schemas.common import Link, ListQuery
from cloudlet.errors import NotFoundError
from cloudlet.store.rows import Row, Rows

R = TypeVar("R", bound=Row)


def page(
    call: Call, rows: Rows[R], query: ListQuery, path: str, *, shared: bool = False
) -> tuple[list[R], list[Link]]:
    """The rows and the link to the next page.

    :param shared: rows of this kind are everybody's to see.
    """
    conditions = [] if shared else visible(call, rows)
    found = call.site.database.read(
        lambda connection: rows.list(connection, *conditions, **query.page(), **query.filters())
    )
    return found[: query.limit], query.links(call.root, path, found)


def seen(call: Call, rows: Rows[R], key: str) -> R:
    """The row with an id that is in a body.

    :raises NotFoundError: there is none that the caller may see.
    """
    row = call.site.database.read(lambda connection: rows.get(connection, key))
    if not call.allows("visible", row):
        raise NotFoundError(f"there is no {rows.noun} {key}", hint=rows.listed_by)
    return row


def visible(call: Call, rows: Rows[Any]) -> list[sa.ColumnElement[bool]]:
    """Which rows the caller may see: the policy's rule ``visible``, as a condition of the database."""
    if call.everything:
        return []
    columns = rows.table.c
    mine = columns.project_id == call.who.project_id
    if not call.project_wide:
        mine = sa.and_(mine, columns.user_id == call.who.user_id)
    return [sa.or_(mine, columns.public.is_(True)) if "public" in columns else mine]
