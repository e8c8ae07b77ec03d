"""What a site forgets: ended operations and events, when they are old, and repetitions after a day."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa
from oslo_log import log
from sqlalchemy.engine import Connection

from cloudlet.store import journal, retries, tables
from cloudlet.store.rows import OperationState, now

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

LOG = log.getLogger(__name__)
_EACH_SECONDS = 3600.0
_REPETITIONS = timedelta(days=1)
_ENDED = tuple(state for state in OperationState if state.ended)


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
