"""What becomes of instances: what their keepers tell, as it comes, and all at once when a site starts.

A keeper's word reaches its instance's row here. Whoever waits for a machine waits here too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oslo_log import log
from sqlalchemy.engine import Connection

from cloudlet.control.ownership import Ownership
from cloudlet.errors import CloudletError, ConflictError, FailedError, NotFoundError
from cloudlet.keeper.folder import Generation
from cloudlet.keeper.handle import Keepers
from cloudlet.keeper.order import KeeperState, Order, Status, describe
from cloudlet.store import journal
from cloudlet.store.rows import INSTANCES, OPERATIONS, Instance, InstanceState, OperationState

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

LOG = log.getLogger(__name__)
MOST_RESTARTS = 5
_RUNNING = (InstanceState.ACTIVE, InstanceState.PAUSED, InstanceState.EXPIRED)


class Keeping:
    """The keepers of a site, and what they said last."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site
        self._changed = threading.Condition()
        self._statuses: dict[str, tuple[Generation | None, Status]] = {}
        self._unnoted: set[str] = set()
        """Instances whose keeper said something that could not be noted."""
        self.keepers = Keepers(site.options.machine, self._told)

    def status(self, instance_id: str) -> Status | None:
        """What the keeper of an instance said last, if there is one."""
        return self._fresh(instance_id) or self.keepers.status(instance_id)

    def known(self, instance_id: str) -> Status | None:
        """The same, if it is in memory; perhaps of a keeper before."""
        return self._statuses[instance_id][1] if instance_id in self._statuses else None

    def wait(
        self,
        instance_id: str,
        until: Callable[[Status], bool],
        timeout: float,
        each: Callable[[Status | None], None],
    ) -> Status:
        """Wait until a keeper's status is as wanted; ``each`` is called now and then, and may raise.

        :raises FailedError: it was not in so many seconds, or there is no keeper.
        """
        deadline = time.monotonic() + timeout
        while True:
            with self._changed:
                said = self._statuses.get(instance_id)
            status = self._fresh(instance_id)
            each(status)
            if status and until(status):
                return status
            if not status and not self.keepers.watch(instance_id) and not self._fresh(instance_id):
                raise FailedError(f"the keeper of instance {instance_id} is gone")
            with self._changed:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise FailedError(f"instance {instance_id} is not ready after {timeout:.0f} s")
                if self._statuses.get(instance_id) is said:
                    self._changed.wait(min(left, 1.0))

    def wake(self) -> None:
        """Have those who wait look again: something was cancelled."""
        with self._changed:
            self._changed.notify_all()

    def start(self, instance_id: str, order: Order) -> None:
        """Have a keeper for an instance. One that lives stays; one that has ended is forgotten before.

        :raises FailedError: it does not begin.
        """
        status = self.keepers.status(instance_id)
        over = (KeeperState.ENDED, KeeperState.MOVED)
        if status and (status.state in over or not self.keepers.lives(instance_id)):
            # Of an earlier try, or of the machine that is to be started again.
            self.end(instance_id)
        with self._changed:
            self._statuses.pop(instance_id, None)  # of a keeper before it, which another process has ended
        self.keepers.start(instance_id, order)

    def folder(self, instance_id: str) -> Path:
        """Where the keeper of an instance keeps what it has decided."""
        return self._site.options.machine.keepers_dir / instance_id

    def end(self, instance_id: str) -> None:
        """End the machine of an instance, if there is one, and forget what its keeper said."""
        self.keepers.end(instance_id)
        with self._changed:
            self._statuses.pop(instance_id, None)
        # What a keeper that was killed left.
        self._site.machine.hypervisor.reap()

    def look_again(self, instance_id: str) -> None:
        """Note that a machine has ended while nobody took it for one that runs."""
        if self.keepers.watch(instance_id) or self.keepers.status(instance_id):
            return  # it lives, or its end has just been told
        with suppress(NotFoundError):
            instance = self._site.database.read(lambda connection: INSTANCES.get(connection, instance_id))
            if instance.state in _RUNNING:
                self._ended(instance, describe(FailedError("its machine is gone")))

    @contextmanager
    def asking(self, instance_id: str) -> Iterator[None]:
        """Change an instance's row and ask its keeper for the same, when nobody else does either."""
        with self._site.alone.with_(f"asking {instance_id}"):
            yield

    def adopt(self) -> None:
        """At the start: find the keepers that live, end those nobody knows, note what became of others."""
        self.keepers.warm()
        found = self.keepers.adopt()

        def read(connection: Connection) -> tuple[dict[str, Instance], set[str]]:
            states = (OperationState.PENDING, OperationState.RUNNING)
            busy = OPERATIONS.list(connection, state=states)
            return (
                {instance.id: instance for instance in INSTANCES.list(connection)},
                {operation.resources["instance"] for operation in busy if "instance" in operation.resources},
            )

        known, busy = self._site.database.read(read)
        for orphan in found - known.keys():
            LOG.warning("instance %s is in no row: its machine is ended", orphan)
            try:
                self.end(orphan)
            except CloudletError as error:
                LOG.error("%s", error)
        for instance in known.values():
            # Another process of the site may have started it since.
            lost = instance.id not in found | busy and not self.keepers.watch(instance.id)
            if instance.state in _RUNNING and lost:
                self._ended(instance, describe(FailedError("its machine was gone when the site started")))

    def find_new(self) -> None:
        """Watch the keepers that other processes of the site started; note what could not be noted before."""
        with self._changed:
            unnoted = {one: self._statuses[one][1] for one in self._unnoted & self._statuses.keys()}
        for instance_id, status in unnoted.items():
            self._take_note(instance_id, status)
        ended = {
            one
            for one, (generation, status) in self._statuses.copy().items()
            if status.state is KeeperState.ENDED and generation == self.keepers.generation(one)
        }
        self.keepers.adopt(besides=ended)

    def close(self) -> None:
        """Stop watching; the machines go on."""
        self.keepers.close()

    def _fresh(self, instance_id: str) -> Status | None:
        """What the keeper that there is said last, if it is in memory, and not what one before it said."""
        generation, status = self._statuses.get(instance_id, (None, None))
        return status if generation == self.keepers.generation(instance_id) else None

    def _told(self, instance_id: str, status: Status | None, generation: Generation | None) -> None:
        with self._changed:
            before = self._statuses.pop(instance_id, None)
            if status:
                self._statuses[instance_id] = generation, status
            self._changed.notify_all()
        if not status or (before and before[0] == generation and _is_no_news(before[1], status)):
            return
        self._take_note(instance_id, status)

    def _take_note(self, instance_id: str, status: Status) -> None:
        """Have the rows say what a keeper has said; what cannot be noted now is noted later."""
        with self._changed:
            self._unnoted.discard(instance_id)
        try:
            instance = self._site.database.read(lambda connection: INSTANCES.get(connection, instance_id))
            if instance.state is InstanceState.MOVING:
                self._site.arrivals.look_at(instance, status)
                self._site.departures.look_at(instance, status)
                return
            if status.handoff:
                self._site.arrivals.look_at(instance, status)  # it runs before all of its memory is here
            if status.state is KeeperState.ENDED:
                self._machine_ended(instance, status)
            elif status.state is KeeperState.READY:
                self._note(instance, status)
        except NotFoundError:
            if status.state is KeeperState.ENDED:
                self.end(instance_id)  # it is in no row any more, or never came to be in one
        except Exception:
            LOG.exception("what became of instance %s could not be noted yet", instance_id)
            with self._changed:
                self._unnoted.add(instance_id)

    def _note(self, instance: Instance, status: Status) -> None:
        """Have the row say what the keeper says, where that may change by itself."""
        timings = dict(status.timings)
        if instance.state in _RUNNING and dict(instance.timings) != timings:
            self._site.database.write(
                lambda connection: INSTANCES.update(connection, instance.id, timings=timings)
            )

    def _machine_ended(self, instance: Instance, status: Status) -> None:
        if instance.state is InstanceState.MOVED:
            self.end(instance.id)  # nobody is shown the way any more
        # What the site itself ends has another state before.
        if instance.state in _RUNNING:
            self._ended(instance, dict(status.error or describe(FailedError("it ended by itself"))))

    def _ended(self, instance: Instance, error: dict[str, str]) -> None:
        """A machine has ended that should run."""
        restart = instance.restart and instance.restarts < MOST_RESTARTS
        restart = restart and not self._site.arrivals.was_lost(instance)
        self._site.machine.hypervisor.reap()

        def note(connection: Connection) -> Any:
            state = InstanceState.SYNTHESISING if restart else InstanceState.FAILED
            try:
                changed = INSTANCES.update(
                    connection,
                    instance.id,
                    where={"state": _RUNNING},
                    state=state,
                    error=error,
                    endpoints=[],
                    restarts=instance.restarts + restart,
                )
            except ConflictError:
                return None  # somebody has begun to delete it
            journal.emit(connection, "instance", "ended", changed, error=error, restarts=restart)
            return self._site.instances.restart(connection, changed) if restart else None

        if operation := self._site.database.write(note):
            self._site.work.submit(operation)


def _is_no_news(before: Status, after: Status) -> bool:
    """Whether a keeper has only told how far a hand-off is: then nothing is to be noted."""
    if after.state is KeeperState.ENDED or not (before.handoff and after.handoff):
        return False
    if Ownership(after.handoff["state"]).ended:
        return False
    same = all(before.handoff.get(name) == after.handoff.get(name) for name in ("id", "state", "in_doubt"))
    return same and before.with_(handoff=None) == after.with_(handoff=None)


def endpoints_of(status: Status) -> list[dict[str, Any]]:
    """Where an instance is reached, as its row keeps it."""
    return [{**asdict(endpoint), "url": endpoint.url} for endpoint in status.endpoints]
