"""The shutdown of the machine: what runs is suspended before, and resumed when the site is started again.

``cloudlet-manage suspend`` asks for it by a fact in the database, and whoever keeps house does it. The fact
says in which boot of the machine that was: only a later one, or ``suspend --off``, brings the instances back,
and not another process that takes over meanwhile.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from oslo_log import log
from sqlalchemy.engine import Connection

from cloudlet.errors import CloudletError, ConflictError
from cloudlet.service.capacity import SHUTDOWN
from cloudlet.store import facts
from cloudlet.store.database import Database
from cloudlet.store.rows import INSTANCES, Instance, InstanceState, Operation

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

LOG = log.getLogger(__name__)
_COMING = (InstanceState.REQUESTED, InstanceState.SYNTHESISING, InstanceState.MOVING)
"""What is on its way: it is waited for, and suspended once it is here."""
_RUNNING = (InstanceState.ACTIVE, InstanceState.PAUSED)
_OVER = "over"


def ask(database: Database) -> None:
    """Have whoever serves suspend all that runs, until the machine has been started again."""
    database.write(lambda connection: facts.write(connection, SHUTDOWN, f"asked {_boot()}"))


def heard(database: Database) -> bool:
    """Whether somebody serves, and has heard of it."""
    said = database.read(lambda connection: facts.read(connection, SHUTDOWN)) or ""
    return said.startswith("heard ")


def take_back(database: Database) -> None:
    """Have whoever serves resume what was suspended so, and admit instances again."""

    def over(connection: Connection) -> None:
        if facts.read(connection, SHUTDOWN):
            facts.write(connection, SHUTDOWN, _OVER)

    database.write(over)


def still_running(database: Database) -> list[Instance]:
    """The instances that are not suspended yet."""
    states = (*_COMING, *_RUNNING)
    return database.read(lambda connection: INSTANCES.list(connection, state=states))


class Shutdown:
    """What is done for a machine that is about to be shut down, and when it is back."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site

    def look(self) -> None:
        """Suspend what runs, if that is asked for; what just comes waits for the next look. Or undo it."""
        if not self._site.database.read(lambda connection: facts.read(connection, SHUTDOWN)):
            return
        said = self._site.database.write(_hear) or _OVER
        if said == _OVER or not said.endswith(_boot()):
            self._undo()
            return
        for instance in self._site.database.read(
            lambda connection: INSTANCES.list(connection, state=_RUNNING)
        ):
            if self._open_on(instance):
                continue  # when that has ended
            try:
                self._site.instances.suspend(instance, until_start=True)
            except CloudletError as error:
                LOG.warning("instance %s cannot be suspended now: %s", instance.id, error)

    def _undo(self) -> None:
        """Resume what was suspended for a shutdown. What was not yet goes on."""
        flagged = self._site.database.read(
            lambda connection: INSTANCES.list(connection, resume_at_start=True)
        )
        for instance in flagged:
            try:
                if instance.state is InstanceState.SUSPENDED:
                    self._site.instances.resume(instance, even_draining=True)
                    continue
                for begun in self._open_on(instance):
                    if begun.kind == "instance.suspend":
                        with suppress(ConflictError):
                            self._site.work.cancel(begun.id)
                self._site.instances.describe(instance, resume_at_start=False)
            except CloudletError as error:
                LOG.error("instance %s stays suspended: %s", instance.id, error)
        # Last: until here what comes anew would take their places.
        self._site.database.write(lambda connection: facts.write(connection, SHUTDOWN, None))

    def _open_on(self, instance: Instance) -> list[Operation]:
        return self._site.database.read(lambda connection: self._site.work.open_on(connection, instance.id))


def _hear(connection: Connection) -> str | None:
    """What is asked for; from then on it is heard."""
    said = facts.read(connection, SHUTDOWN)
    if said and said.startswith("asked "):
        facts.write(connection, SHUTDOWN, said.replace("asked ", "heard ", 1))
    return said


def _boot() -> str:
    """Which boot of the machine this is."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
