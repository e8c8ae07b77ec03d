"""What time does to instances: leases are warned of, end, and are followed by deletion after a grace.

One thread sleeps until the next of these moments, and is woken when that changes.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from oslo_log import log
from sqlalchemy.engine import Connection

from cloudlet.errors import CloudletError
from cloudlet.store import journal, tables
from cloudlet.store.rows import INSTANCES, Instance, InstanceState, now

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

LOG = log.getLogger(__name__)
_LEASED = (InstanceState.ACTIVE, InstanceState.PAUSED, InstanceState.EXPIRED)
_LONGEST_SLEEP = 3600.0
_ASK_SECONDS = 10.0


class Leases:
    """The clock of a site's leases."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site
        self._poked = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def begin(self) -> None:
        if not self._thread.ident:
            self._thread.start()

    def look(self) -> None:
        """A lease has changed."""
        self._poked.set()

    def within(self, seconds: float | None) -> float | None:
        """Seconds of a lease that another site has given, no more than leases may have here; None: no end."""
        most = self._site.options.leases.most or None
        return min((one for one in (seconds, most) if one is not None), default=None)

    def close(self) -> None:
        self._closed = True
        self._poked.set()
        if self._thread.ident:
            self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            self._poked.clear()
            try:
                wait = self._look()
            except Exception:
                LOG.exception("leases could not be looked at")
                wait = 1.0
            self._poked.wait(wait)

    def _look(self) -> float:
        """Do what is due; the seconds until the next moment."""
        leased = tables.instances.c.expires_at.is_not(None)
        instances = self._site.database.read(
            lambda connection: INSTANCES.list(connection, leased, state=_LEASED)
        )
        moment = now()
        dues = [self._due(instance, moment) for instance in instances]
        return max(0.0, min((due.total_seconds() for due in dues), default=_LONGEST_SLEEP))

    def _due(self, instance: Instance, moment: datetime) -> timedelta:
        """Do what is due for an instance; how long until something is again."""
        end = instance.expires_at
        assert end
        options = self._site.options.leases
        if instance.state is InstanceState.EXPIRED:
            if (left := end + timedelta(seconds=options.grace) - moment) <= timedelta():
                with suppress(CloudletError):  # if it was renewed meanwhile
                    self._site.instances.delete(
                        instance, only_if={"state": InstanceState.EXPIRED, "expires_at": end}
                    )
                return timedelta(seconds=_LONGEST_SLEEP)
            return left
        if end <= moment:
            self._expire(instance)
            return timedelta(seconds=options.grace)
        warning = end - timedelta(seconds=options.warning)
        if not instance.warned and warning <= moment:
            self._warn(instance)
        return end - moment if instance.warned or warning <= moment else warning - moment

    def _expire(self, instance: Instance) -> None:
        def expire(connection: Connection) -> None:
            after = INSTANCES.update(
                connection, instance.id, where={"state": _LEASED, "expires_at": instance.expires_at},
                state=InstanceState.EXPIRED,
            )  # fmt: skip
            journal.emit(
                connection, "instance", "expired", after, grace_seconds=self._site.options.leases.grace
            )

        with suppress(CloudletError), self._site.keeping.asking(instance.id):
            self._site.database.write(expire)
            self._site.keeping.keepers.ask(instance.id, "pause", timeout=_ASK_SECONDS)

    def _warn(self, instance: Instance) -> None:
        def warn(connection: Connection) -> None:
            after = INSTANCES.update(connection, instance.id, where={"warned": False}, warned=True)
            assert after.expires_at
            journal.emit(connection, "instance", "expiring", after, expires_at=after.expires_at.isoformat())

        with suppress(CloudletError):
            self._site.database.write(warn)
