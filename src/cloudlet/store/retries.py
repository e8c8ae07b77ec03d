"""What requests made that may be repeated: who sends an ``Idempotency-Key`` twice gets the same thing twice.

It is remembered in the transaction that makes the thing, so that a crash leaves both or none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Self

import sqlalchemy as sa
from blake3 import blake3
from sqlalchemy.engine import Connection

from cloudlet.errors import ConflictError, UsageError
from cloudlet.store import tables
from cloudlet.store.database import Database
from cloudlet.store.rows import now

_KEY = re.compile("[!-~]{1,128}")

Remember = Callable[[Connection, str], None]
"""Told of the id of what was made, in the transaction that makes it."""


@dataclass(frozen=True, slots=True)
class Retry:
    """A request that may be repeated."""

    user_id: str
    key: str
    fingerprint: str

    @classmethod
    def of(cls, user_id: str, key: str, operation: str, body: str) -> Self:
        """The request of a user with this key.

        :raises UsageError: the key is too long, or not of visible characters.
        """
        if not _KEY.fullmatch(key):
            raise UsageError("Idempotency-Key: it has 1 to 128 visible characters of ASCII")
        return cls(user_id, key, blake3(f"{operation}\n{body}".encode()).hexdigest())


def known(database: Database, retry: Retry) -> str | None:
    """The id of what the request made before; None if it did not.

    :raises ConflictError: the key was another request's.
    """
    columns = tables.retries.c
    query = sa.select(columns.fingerprint, columns.resource_id).where(
        columns.user_id == retry.user_id, columns.key == retry.key
    )
    found = database.read(lambda connection: connection.execute(query).one_or_none())
    if found is None:
        return None
    if found.fingerprint != retry.fingerprint:
        raise ConflictError(
            "Idempotency-Key: it was another request's", hint="use a new one for a new request"
        )
    return str(found.resource_id)


def drop(database: Database, retry: Retry) -> None:
    """Forget a request whose thing has gone: to repeat it is to ask anew."""
    columns = tables.retries.c
    mine = sa.and_(columns.user_id == retry.user_id, columns.key == retry.key)
    database.write(lambda connection: connection.execute(sa.delete(tables.retries).where(mine)))


def remember(connection: Connection, retry: Retry, resource_id: str) -> None:
    """Remember what a request made."""
    connection.execute(
        sa.insert(tables.retries).values(
            user_id=retry.user_id, key=retry.key, fingerprint=retry.fingerprint, resource_id=resource_id,
            created_at=now(),
        )
    )  # fmt: skip


def forget(connection: Connection, resource_id: str) -> None:
    """A request that nobody will repeat."""


def forget_before(connection: Connection, moment: datetime) -> None:
    """Forget what was made before a moment."""
    connection.execute(sa.delete(tables.retries).where(tables.retries.c.created_at < moment))
