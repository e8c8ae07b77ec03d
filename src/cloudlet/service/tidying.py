"""What a site forgets: old operations and hand-offs that have ended, old events, repetitions after a day.

Of an instance's hand-offs the last one that it went by is kept: by that the site knows, also when the
instance is deleted, that no older copy of it may come. So is one that came to nothing after the switch, as
long as its peer is one: that may have been silent since, and ask at last what became of it.
"""

from __future__ import annotations

import threading
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa
from oslo_log import log
from sqlalchemy.engine import Connection

from cloudlet.store import journal, retries, tables
from cloudlet.store.rows import SWITCHED, YES, HandoffState, OperationState, now

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

LOG = log.getLogger(__name__)
_EACH_SECONDS = 3600.0
_REPETITIONS = timedelta(days=1)
_ENDED = tuple(state for state in OperationState if state.ended)
_WENT = (HandoffState.COMPLETED, HandoffState.LOST)
_AT_ONCE = 500
"""Hand-offs that are forgotten at a time: their ids are in one statement."""


class Tidying:
    """A thread that forgets, once an hour."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tidying", daemon=True)

    def begin(self) -> None:
        if not self._thread.ident:
            self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread.ident:
            self._thread.join()

    def forget(self, moment: datetime) -> None:
        """Forget what is old at a moment."""
        oldest = moment - timedelta(days=self._site.options.keep_days)

        def forget(connection: Connection) -> None:
            operations = tables.operations
            old = sa.and_(operations.c.state.in_(_ENDED), operations.c.updated_at < oldest)
            connection.execute(sa.delete(operations).where(old))
            journal.forget(connection, oldest)
            _forget_handoffs(connection, oldest)
            retries.forget_before(connection, moment - _REPETITIONS)

        self._site.database.write(forget)

    def _run(self) -> None:
        while True:
            try:
                self.forget(now())
            except Exception:
                LOG.exception("what is old could not be forgotten")
            if self._closed.wait(_EACH_SECONDS):
                return


def _forget_handoffs(connection: Connection, oldest: datetime) -> None:
    """Forget those that came to nothing, and those after which the instance went by another."""
    columns, later, peers = tables.handoffs.c, tables.handoffs.alias(), tables.peers.c
    went_on = sa.exists().where(
        later.c.instance_id == columns.instance_id, later.c.state.in_(_WENT), later.c.epoch > columns.epoch
    )
    switched = sa.func.coalesce(columns.order[SWITCHED].as_string(), "") == YES
    is_asked_for = sa.and_(switched, sa.exists().where(peers.id == columns.peer_id))
    to_nothing = sa.and_(columns.state == HandoffState.REVERTED, sa.not_(is_asked_for))
    old = sa.and_(columns.updated_at < oldest, sa.or_(to_nothing, sa.and_(columns.state.in_(_WENT), went_on)))
    while ids := connection.execute(sa.select(columns.id).where(old).limit(_AT_ONCE)).scalars().all():
        connection.execute(sa.delete(tables.handoffs).where(columns.id.in_(ids)))
