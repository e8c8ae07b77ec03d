"""The shutdown of the machine: what runs is suspended before, and resumed when the site is started again.

``cloudlet-manage suspend`` asks for it by a fact in the database, and whoever keeps house does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from oslo_log import log

from cloudlet.errors import CloudletError
from cloudlet.service.capacity import SHUTDOWN
from cloudlet.store import facts
from cloudlet.store.database import Database
from cloudlet.store.rows import INSTANCES, Instance, InstanceState

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

LOG = log.getLogger(__name__)
_ASKED, _HEARD = "asked", "heard"
_COMING = (InstanceState.REQUESTED, InstanceState.SYNTHESISING)
_RUNNING = (InstanceState.ACTIVE, InstanceState.PAUSED)


def ask(database: Database) -> None:
    """Have whoever serves suspend all that runs, until it is started again."""
    database.write(lambda connection: facts.write(connection, SHUTDOWN, _ASKED))


def heard(database: Database) -> bool:
    """Whether somebody serves, and has heard of it."""
    return database.read(lambda connection: facts.read(connection, SHUTDOWN)) == _HEARD


def take_back(database: Database) -> None:
    """Have it no more."""
    database.write(lambda connection: facts.write(connection, SHUTDOWN, None))


def still_running(database: Database) -> list[Instance]:
    """The instances that are not suspended yet."""
    states = (*_COMING, *_RUNNING)
    return database.read(lambda connection: INSTANCES.list(connection, state=states))


class Shutdown:
    """What is done for a machine that is about to be shut down, and when it is back."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site

    def look(self) -> None:
        """Suspend what runs, if that is asked for. What is just coming waits for the next look."""
        said = self._site.database.read(lambda connection: facts.read(connection, SHUTDOWN))
        if said is None:
            return
        if said == _ASKED:
            self._site.database.write(lambda connection: facts.write(connection, SHUTDOWN, _HEARD))
        for instance in self._running():
            try:
                self._suspend(instance)
            except CloudletError as error:
                LOG.warning("instance %s cannot be suspended now: %s", instance.id, error)

    def undo(self) -> None:
        """At the start: resume what was suspended for a shutdown. What was not yet goes on."""
        take_back(self._site.database)
        flagged = self._site.database.read(
            lambda connection: INSTANCES.list(connection, resume_at_start=True)
        )
        for instance in flagged:
            self._flag(instance, value=False)
            try:
                if instance.state is InstanceState.SUSPENDED:
                    self._site.instances.resume(instance, even_draining=True)
                else:
                    self._site.work.cancel_others(instance.id, besides="")
            except CloudletError as error:
                LOG.error("instance %s stays suspended: %s", instance.id, error)

    def _running(self) -> list[Instance]:
        return self._site.database.read(lambda connection: INSTANCES.list(connection, state=_RUNNING))

    def _suspend(self, instance: Instance) -> None:
        if self._site.database.read(lambda connection: self._site.work.open_on(connection, instance.id)):
            return  # when that has ended
        # Who has paused an instance resumes it: it waits for that in a file instead of in memory.
        self._flag(instance, value=instance.state is InstanceState.ACTIVE)
        self._site.instances.suspend(instance)

    def _flag(self, instance: Instance, *, value: bool) -> None:
        self._site.database.write(
            lambda connection: INSTANCES.update(connection, instance.id, resume_at_start=value)
        )
