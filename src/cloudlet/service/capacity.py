"""What fits: the site's limits, kept under a lock, so that no race exceeds them.

An instance's row is its reservation. It is written in a transaction that first locks one row of the database,
which all who admit do; so what is counted is true until the row stands. Under the same lock the site begins
and ceases to admit: who asks after that was changed is refused by every process of the site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cloudlet.errors import CapacityError, DrainingError, TooLargeError
from cloudlet.model import format_bytes
from cloudlet.service.options import Limits
from cloudlet.store import facts, journal, tables
from cloudlet.store.rows import SITE, CloudletState, FileState, InstanceState, Owned

_LOCK, _STATE = "capacity", "state"
SHUTDOWN = "shutdown"
"""The fact that the machine is about to be shut down."""
_UP = CloudletState.UP
_TAKES_NOTHING = (InstanceState.FAILED, InstanceState.SUSPENDED, InstanceState.MOVED)

# Written once: to write a query costs more than to answer it.
_COUNT = tables.counters.c
_LOCKED = sa.update(tables.counters).where(_COUNT.name == _LOCK).values(value=_COUNT.value + 1)
_HAS = tables.instances.c
_USED = sa.select(
    sa.func.count(),
    *(sa.func.coalesce(sa.func.sum(what), 0) for what in (_HAS.memory_bytes, _HAS.cpus, _HAS.disk_bytes)),
).where(*(_HAS.state != state for state in _TAKES_NOTHING))


@dataclass(frozen=True, slots=True)
class Usage:
    """What instances have, or are to have."""

    instances: int = 0
    memory_bytes: int = 0
    cpus: int = 0
    disk_bytes: int = 0


def lock(connection: Connection) -> None:
    """Be the only one who admits, to the end of the transaction."""
    connection.execute(_LOCKED)


def used(connection: Connection) -> Usage:
    """What all instances of the site have."""
    return Usage(*(int(value) for value in connection.execute(_USED).one()))


def state(connection: Connection) -> CloudletState:
    """Whether the site admits new instances."""
    known = facts.both(connection, SHUTDOWN, _STATE)
    return CloudletState.DRAINING if SHUTDOWN in known else CloudletState(known.get(_STATE, _UP))


def become(connection: Connection, wanted: CloudletState, by: Owned) -> None:
    """Have the site admit new instances, or none, from the end of the transaction on; an event says so.

    :param by: the site's id, and who wants it.
    """
    lock(connection)
    if _wanted(connection) is not wanted:
        facts.write(connection, _STATE, wanted)
        journal.emit(connection, "cloudlet", wanted, by)


def _wanted(connection: Connection) -> CloudletState:
    """What its operator said last."""
    return CloudletState(facts.read(connection, _STATE) or _UP)


def admit(connection: Connection, limits: Limits, wanted: Usage, *, even_draining: bool = False) -> None:
    """Whether so much more fits. The caller writes its row in the same transaction.

    :param even_draining: it is nothing new, and comes back also to a site that is being emptied.
    :raises DrainingError: the site is being emptied.
    :raises CapacityError: it does not fit; the message says what is missing.
    """
    lock(connection)
    if not even_draining and state(connection) is CloudletState.DRAINING:
        raise DrainingError("the site is being emptied, and admits no instance")
    have = used(connection)
    missing = []
    for name, limit, taken, more in (
        ("instances", limits.instances, have.instances, wanted.instances),
        ("cpus", limits.cpus, have.cpus, wanted.cpus),
    ):
        if taken + more > limit:
            missing.append(f"{taken + more - limit} {name} ({taken} of {limit} taken)")
    for name, limit_bytes, taken, more in (
        ("memory", limits.memory_bytes, have.memory_bytes, wanted.memory_bytes),
        ("disk", limits.disk_bytes, have.disk_bytes, wanted.disk_bytes),
    ):
        if limit_bytes is not None and taken + more > limit_bytes:
            short = format_bytes(taken + more - limit_bytes)
            missing.append(f"{short} of {name} ({format_bytes(taken)} of {format_bytes(limit_bytes)} taken)")
    if missing:
        raise CapacityError(
            f"the site is full: it lacks {', '.join(missing)}", hint="try again later, or elsewhere"
        )


def admit_upload(
    connection: Connection, limits: Limits, project_id: str, size: int, replaces: int = 0
) -> None:
    """Whether a project may upload so many bytes more; the caller writes the size in the same transaction.

    :raises TooLargeError: it may not.
    """
    overlays = tables.overlays.c
    mine = (overlays.project_id == project_id, overlays.state != FileState.REJECTED, overlays.url.is_(None))
    left = limits.project_upload_bytes - _bytes(connection, overlays.size, *mine) + replaces
    if size > left:
        raise TooLargeError(
            f"the project may upload {format_bytes(max(0, left))} more, not {format_bytes(size)}",
            hint="delete overlays that are not needed, or ask the provider for more",
        )


def admit_base(connection: Connection, limits: Limits, size: int, replaces: int = 0) -> None:
    """Whether so many bytes more of bases may come; the caller writes the size in the same transaction.

    :raises TooLargeError: they may not.
    """
    bases = tables.bases.c
    brought = (bases.user_id != SITE, bases.state != FileState.REJECTED)
    left = limits.base_upload_bytes - _bytes(connection, bases.size, *brought) + replaces
    if size > left:
        raise TooLargeError(
            f"the site takes {format_bytes(max(0, left))} more of bases, not {format_bytes(size)}",
            hint="ask its operator to delete some, or to raise base_upload_mib",
        )


def _bytes(connection: Connection, size: sa.Column[Any], *of: sa.ColumnElement[bool]) -> int:
    """All bytes of some rows, under the lock of what is admitted."""
    lock(connection)
    query = sa.select(sa.func.coalesce(sa.func.sum(size), 0)).where(*of)
    return int(connection.execute(query).scalar_one())
