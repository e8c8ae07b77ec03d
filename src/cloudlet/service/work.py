"""Operations: long work in named steps that survives a crash, can be cancelled, and is undone if it fails.

An operation is a row; that row is the truth. A queue only says who works on it now: the threads of this
process (:class:`Here`), or those of conductors that take it from a job board (``board.py``). What is lost on
the way to either is found in the rows again (:meth:`Work.resume`), and what comes twice is done once.

The steps of a kind stand in ``flows.py``, how they are run in ``engine.py``.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from oslo_log import log
from sqlalchemy.engine import Connection

from cloudlet.errors import CloudletError, ConflictError
from cloudlet.keeper.order import describe
from cloudlet.service.engine import Engine
from cloudlet.service.steps import CancelledError, Flow, Lane, Observer, Running
from cloudlet.store import journal
from cloudlet.store.rows import OPERATIONS, Operation, OperationState, now

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

LOG = log.getLogger(__name__)


class Queue(Protocol):
    """Operations on their way to who works on them."""

    def post(self, operation: Operation, lane: Lane) -> None:
        """Have an operation worked on, when somebody of its lane is free; one that is known is not taken."""

    def known(self) -> set[str] | None:
        """The ids of those that are waiting or being worked on; None if nobody knows just now."""

    def close(self) -> None:
        """Take no more."""


class Here:
    """A queue in memory, and the threads that work on it. Operations of the same take no more than one."""

    def __init__(self, perform: Callable[[str], bool], threads: int) -> None:
        self._perform = perform
        self._pools = {
            lane: ThreadPoolExecutor(lane.threads(threads), thread_name_prefix=lane) for lane in Lane
        }
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[tuple[str, Lane]]] = {}
        """By subject, in the order in which they came."""
        self._working: dict[str, str] = {}
        """By subject, the operation that is worked on."""

    def post(self, operation: Operation, lane: Lane) -> None:
        with self._lock:
            if operation.id in self._known():
                return
            self._waiting.setdefault(operation.subject, deque()).append((operation.id, lane))
        self._have_done(operation.subject, lane)

    def known(self) -> set[str]:
        with self._lock:
            return self._known()

    def close(self) -> None:
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def _known(self) -> set[str]:
        waiting = {operation_id for ids in self._waiting.values() for operation_id, _ in ids}
        return waiting.union(self._working.values())

    def _have_done(self, subject: str, lane: Lane) -> None:
        with suppress(RuntimeError):  # closed: the next process finds it in the rows
            self._pools[lane].submit(self._do_next, subject)

    def _do_next(self, subject: str) -> None:
        """Do the first that waits, unless one is being done: then who does that comes here again."""
        with self._lock:
            if subject in self._working or subject not in self._waiting:
                return
            self._working[subject], _ = self._waiting[subject].popleft()
        try:
            # If another process is at it, it is not done now: who keeps house finds it in the rows.
            self._perform(self._working[subject])
        finally:
            with self._lock:
                del self._working[subject]
                lanes = [lane for _, lane in self._waiting[subject] or self._waiting.pop(subject)]
            if lanes:
                self._have_done(subject, Lane.URGENT if Lane.URGENT in lanes else lanes[0])


class Work:
    """The operations of a site."""

    def __init__(
        self, site: ServedSite, flows: Mapping[str, Flow], queue: Queue | None, observe: Observer
    ) -> None:
        self._site = site
        self._flows = flows
        self._observe = observe
        self._engine = Engine(site.database)
        self._lock = threading.Lock()
        self._running: dict[str, Running] = {}
        self._closed = False
        self._queue = queue or Here(self.perform, site.options.workers)

    def add(self, connection: Connection, operation: Operation) -> Operation:
        """Write an operation, in the transaction that makes it necessary. Then :meth:`submit` it."""
        steps = [
            {
                "name": step.step,
                "state": OperationState.PENDING,
                "seconds": None,
                "bytes_done": None,
                "bytes_total": None,
            }
            for step in self._flows[operation.kind].steps
        ]
        return OPERATIONS.insert(connection, replace(operation, steps=steps))

    def submit(self, operation: Operation) -> None:
        """Have an operation done, as soon as somebody is free."""
        if not self._closed:
            self._queue.post(operation, self._flows[operation.kind].lane)

    def resume(self) -> list[Operation]:
        """Have all operations done that nobody has ended and nobody works on; they."""
        # In this order: what is added in between is posted by who adds it.
        if (known := self._queue.known()) is None:
            return []
        ids = self._site.database.read(lambda connection: OPERATIONS.ids(connection, state=_OPEN))
        if not (missing := ids - known):
            return []
        lost = self._site.database.read(lambda connection: OPERATIONS.list(connection, id=missing))
        for operation in lost:
            self.submit(operation)
        return lost

    def cancel(self, operation_id: str) -> Operation:
        """Ask for the end of an operation: what it did will be undone.

        :raises ConflictError: it has ended.
        """

        def note(connection: Connection) -> Operation:
            operation = OPERATIONS.get(connection, operation_id, lock=True)
            if operation.state.ended:
                raise ConflictError(f"operation {operation_id} is {operation.state}")
            if not self._flows[operation.kind].can_be_cancelled:
                raise ConflictError(f"what is being done by {operation.kind} cannot be taken back")
            return OPERATIONS.update(connection, operation_id, cancelled=True)

        operation = self._site.database.write(note)
        self._stop(operation_id)
        return operation

    def open_on(self, connection: Connection, subject: str) -> list[Operation]:
        """What is being done with an instance, or the site itself, or is about to be, in order."""
        return OPERATIONS.list(connection, state=_OPEN, subject=subject)

    def cancel_others(self, instance_id: str, besides: str) -> None:
        """Cancel what is being done with an instance, or is about to be."""
        for other in self._site.database.read(lambda connection: self.open_on(connection, instance_id)):
            if other.id != besides:
                with suppress(ConflictError):
                    self.cancel(other.id)

    def hear_cancelled(self) -> None:
        """Stop those operations of this process that were cancelled at another of the site's processes."""
        with self._lock:
            running = list(self._running)
        if running:
            cancelled = self._site.database.read(
                lambda connection: OPERATIONS.list(connection, state=_OPEN, cancelled=True)
            )
            for operation in cancelled:
                self._stop(operation.id)

    def perform(self, operation_id: str) -> bool:
        """Do an operation now, or what is left of it; nothing happens if it has ended.

        What was begun with the same before, by a process that was killed, is done first.

        :returns: False if another process works with the same: it is for another time.
        """
        try:
            operation = self._site.database.read(lambda connection: OPERATIONS.get(connection, operation_id))
            if operation.state.ended:
                return True
            with self._site.alone.at_once(operation.subject) as mine:
                if not mine:
                    return False
                for older in self._site.database.read(
                    lambda connection: self.open_on(connection, operation.subject)
                ):
                    if older.created_at <= operation.created_at and older.id != operation.id:
                        self._perform_alone(older.id)
                self._perform_alone(operation_id)
        except Exception:
            LOG.exception("operation %s could not be worked on", operation_id)
        return True

    def close(self) -> None:
        """Stop: what is being done stays as it is, for another process to go on with."""
        self._closed = True
        self._queue.close()

    def _stop(self, operation_id: str) -> None:
        with self._lock:
            if running := self._running.get(operation_id):
                running.cancelled.set()
        self._site.keeping.wake()

    def _perform_alone(self, operation_id: str) -> None:
        running_now = {"state": OperationState.RUNNING}
        try:
            operation = self._site.database.write(
                lambda connection: OPERATIONS.update(
                    connection, operation_id, where={"state": _OPEN}, **running_now
                )
            )
        except ConflictError:
            return  # it was posted twice, and has ended
        running = Running(self._site, operation, self._observe)
        with self._lock:
            self._running[operation.id] = running
        if self._is_cancelled(operation):  # meanwhile
            running.cancelled.set()
        try:
            state, error = self._engine.run(running, self._flows[operation.kind])
        finally:
            with self._lock:
                del self._running[operation.id]
        if self._closed:
            return
        if state is not OperationState.SUCCEEDED:
            self._give_up(running, error or CancelledError("cancelled by request"))
        self._end(operation, state, describe(error) if error else None)

    def _give_up(self, running: Running, error: CloudletError) -> None:
        """Say in the rows that it came to nothing; it ends even where that cannot be said."""
        try:
            self._flows[running.operation.kind].gave_up(running, error)
        except Exception:
            LOG.exception("what became of operation %s could not be noted", running.operation.id)

    def _is_cancelled(self, operation: Operation) -> bool:
        return self._site.database.read(lambda connection: OPERATIONS.get(connection, operation.id)).cancelled

    def _end(self, operation: Operation, state: OperationState, error: dict[str, str] | None) -> None:
        def note(connection: Connection) -> None:
            OPERATIONS.update(connection, operation.id, state=state, error=error)
            journal.emit(
                connection, "operation", state, operation, operation_kind=operation.kind, error=error
            )

        self._site.database.write(note)
        self._site.news.operation_changed(operation.id)
        self._engine.forget(operation)
        if state is not OperationState.SUCCEEDED and "instance" in operation.resources:
            self._site.keeping.look_again(operation.resources["instance"])


_OPEN = (OperationState.PENDING, OperationState.RUNNING)
_SUBJECTS = ("instance", "overlay", "base", "cloudlet")
"""Nouns, of which the first that an operation works on is what it must be alone with."""


def operation(kind: str, of: Any, resources: Mapping[str, str], **input_: Any) -> Operation:
    """A new operation on what somebody owns."""
    moment = now()
    subject = next(resources[noun] for noun in _SUBJECTS if noun in resources)
    return Operation(
        project_id=of.project_id, user_id=of.user_id, created_at=moment, updated_at=moment, kind=kind,
        resources=dict(resources), input=input_, subject=subject,
    )  # fmt: skip
