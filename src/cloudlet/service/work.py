"""Operations: long work in named steps that survives a crash, can be cancelled, and is undone if it fails.

The steps of a kind stand in ``flows.py``. TaskFlow runs them, one after the other, and keeps in the database
which are done, so that after a kill -9 the next process goes on where this one was. A step that was begun is
done again: each is written so that this does no harm. What a step did is undone, in the opposite order, when
a later one fails or somebody cancels.
"""

from __future__ import annotations

import threading
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from oslo_log import log
from sqlalchemy.engine import Connection
from taskflow import states, task
from taskflow.engines.action_engine.engine import SerialActionEngine
from taskflow.exceptions import WrappedFailure
from taskflow.patterns import linear_flow
from taskflow.persistence import models
from taskflow.persistence.backends.impl_sqlalchemy import Connection as Kept
from taskflow.persistence.backends.impl_sqlalchemy import SQLAlchemyBackend

from cloudlet.errors import CloudletError, ConflictError, FailedError, of_the_system
from cloudlet.keeper.order import describe
from cloudlet.store import journal
from cloudlet.store.database import Database
from cloudlet.store.rows import OPERATIONS, Operation, OperationState, now

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

LOG = log.getLogger(__name__)
_NOTED_SECONDS = 0.5
"""Between two notes of a step's progress."""


class CancelledError(CloudletError):
    """Somebody asked for the end of the operation."""


class Running:
    """An operation that is being worked on; its steps read it and report to it."""

    def __init__(self, site: ServedSite, operation: Operation, observe: Observer) -> None:
        self.site = site
        self.operation = operation
        self.cancelled = threading.Event()
        if operation.cancelled:
            self.cancelled.set()
        self._observe = observe
        self._steps = [dict(step) for step in operation.steps]
        self._noted = 0.0

    @property
    def instance_id(self) -> str:
        return self.operation.resources["instance"]

    def check(self) -> None:
        """Whether to go on.

        :raises CancelledError: no.
        """
        if self.cancelled.is_set():
            raise CancelledError("cancelled by request")

    def progress(self, done: int, total: int) -> None:
        """How many bytes of the present step are done, of how many. Stops a step that was cancelled.

        :raises CancelledError: it was.
        """
        self.check()
        step = next(step for step in self._steps if step["state"] == OperationState.RUNNING)
        step["bytes_done"], step["bytes_total"] = done, total
        if time.monotonic() - self._noted > _NOTED_SECONDS:
            self._note()

    def step(self, name: str, state: OperationState, seconds: float | None = None) -> None:
        """Note what became of a step."""
        self._observe(self.operation.kind, name, state)
        entry = next(step for step in self._steps if step["name"] == name)
        entry["state"] = state
        if seconds is not None:
            entry["seconds"] = round(seconds, 3)
        self._note()

    def undone(self, name: str) -> None:
        """Note that a step was undone; one that failed stays as that."""
        if next(step for step in self._steps if step["name"] == name)["state"] != OperationState.FAILED:
            self.step(name, OperationState.CANCELLED)

    def _note(self) -> None:
        self._noted = time.monotonic()
        steps = [dict(step) for step in self._steps]
        self.site.database.write(
            lambda connection: OPERATIONS.update(connection, self.operation.id, steps=steps)
        )
        self.site.news.operation_changed(self.operation.id)


class Step(task.Task):  # type: ignore[misc]
    """A step of an operation: can be done again, and undone whether it was done, half done, or not at all."""

    step: ClassVar[str]
    """Its name on the wire."""

    def __init__(self, running: Running) -> None:
        super().__init__(name=self.step)
        self.running = running
        self.site = running.site
        self.operation = running.operation

    @abstractmethod
    def do(self) -> None:
        """Do it."""

    def undo(self) -> None:
        """Undo it."""

    def execute(self) -> None:
        """What TaskFlow calls."""
        self.running.check()
        began = time.monotonic()
        self.running.step(self.step, OperationState.RUNNING)
        try:
            self.do()
        except BaseException:
            self.running.step(self.step, OperationState.FAILED, time.monotonic() - began)
            raise
        self.running.step(self.step, OperationState.SUCCEEDED, time.monotonic() - began)

    def revert(self, *_: Any, **__: Any) -> None:
        """What TaskFlow calls when this step, or a later one, failed."""
        self.undo()
        self.running.undone(self.step)


def _nothing(_: Running, __: CloudletError) -> None:
    """There is nothing to say."""


GaveUp = Callable[[Running, CloudletError], None]
"""Says in the rows that an operation came to nothing, and why; can be done again."""


@dataclass(frozen=True, slots=True)
class Flow:
    """What an operation of a kind consists of."""

    steps: tuple[type[Step], ...]
    gave_up: GaveUp = _nothing
    """Called when all that was done is undone, whichever step it was that failed."""
    can_be_cancelled: bool = True


Observer = Callable[[str, str, OperationState], None]
"""Told, before it is written, of a kind of operation, a step, and what became of that."""


class Work:
    """The operations of a site, in this process."""

    def __init__(
        self, site: ServedSite, flows: Mapping[str, Flow], threads: int, observe: Observer = lambda *_: None
    ) -> None:
        self._site = site
        self._flows = flows
        self._observe = observe
        self._backend = _backend_of(site.database)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="work")
        self._lock = threading.Lock()
        self._running: dict[str, Running] = {}
        self._locks: dict[str, tuple[threading.Lock, int]] = {}
        self._closed = False

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
        """Have an operation done, as soon as a thread is free."""
        if not self._closed:
            self._pool.submit(self._run, operation.id)

    def resume(self) -> list[Operation]:
        """Go on with all operations that nobody has ended; at the start of the only process that works."""
        left = self._site.database.read(lambda connection: OPERATIONS.list(connection, state=_OPEN))
        for operation in left:
            self.submit(operation)
        return left

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
        with self._lock:
            if running := self._running.get(operation_id):
                running.cancelled.set()
        self._site.keeping.wake()
        return operation

    def open_on(self, connection: Connection, instance_id: str) -> list[Operation]:
        """What is being done with an instance, or is about to be, in order."""
        found = OPERATIONS.list(connection, state=_OPEN)
        return [one for one in found if one.resources.get("instance") == instance_id]

    def cancel_others(self, instance_id: str, besides: str) -> None:
        """Cancel what is being done with an instance, or is about to be."""
        for other in self._site.database.read(lambda connection: self.open_on(connection, instance_id)):
            if other.id != besides:
                with suppress(ConflictError):
                    self.cancel(other.id)

    def close(self) -> None:
        """Stop: what is being done stays as it is, for the next process to go on with."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, operation_id: str) -> None:
        try:
            operation = self._site.database.read(lambda connection: OPERATIONS.get(connection, operation_id))
            with self._alone(_what(operation)):
                self._run_alone(operation_id)
        except Exception:
            LOG.exception("operation %s could not be worked on", operation_id)

    def _run_alone(self, operation_id: str) -> None:
        running_now = {"state": OperationState.RUNNING}
        try:
            operation = self._site.database.write(
                lambda connection: OPERATIONS.update(
                    connection, operation_id, where={"state": _OPEN}, **running_now
                )
            )
        except ConflictError:
            return  # it was submitted twice, and has ended
        running = Running(self._site, operation, self._observe)
        with self._lock:
            self._running[operation.id] = running
        if self._is_cancelled(operation):  # meanwhile
            running.cancelled.set()
        try:
            state, error = self._do(running)
        finally:
            with self._lock:
                del self._running[operation.id]
        if self._closed:
            return
        if state is not OperationState.SUCCEEDED:
            self._flows[operation.kind].gave_up(running, error or CancelledError("cancelled by request"))
        self._end(operation, state, describe(error) if error else None)

    def _is_cancelled(self, operation: Operation) -> bool:
        return self._site.database.read(lambda connection: OPERATIONS.get(connection, operation.id)).cancelled

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Work on something when nobody else does: an instance's operations follow each other."""
        with self._lock:
            lock, users = self._locks.get(what, (threading.Lock(), 0))
            self._locks[what] = lock, users + 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, users = self._locks[what]
                if users > 1:
                    self._locks[what] = lock, users - 1
                else:
                    del self._locks[what]

    def _do(self, running: Running) -> tuple[OperationState, CloudletError | None]:
        operation = running.operation
        flow = linear_flow.Flow(operation.kind)
        flow.add(*(step(running) for step in self._flows[operation.kind].steps))
        book = self._book(operation)
        if next(iter(book)).state == states.REVERTED:  # by a process that was killed before it could say so
            if running.cancelled.is_set():
                return OperationState.CANCELLED, None
            return OperationState.FAILED, FailedError(
                "it failed, and was undone, before the site was started again"
            )
        # By its class: by its name it would be looked for among all that is installed, each time.
        engine = SerialActionEngine(flow, next(iter(book)), self._backend, {})
        try:
            engine.run()
        except CancelledError:
            return OperationState.CANCELLED, None
        except CloudletError as error:
            return OperationState.FAILED, error
        except (OSError, MemoryError) as error:
            return OperationState.FAILED, of_the_system(error)
        except WrappedFailure as failures:
            said = "; ".join(failure.exception_str for failure in failures)
            return OperationState.FAILED, FailedError(said)
        except Exception as error:
            LOG.error("a defect in %s: %s", operation.kind, traceback.format_exc())
            return OperationState.FAILED, FailedError(f"a defect: {type(error).__name__}: {error}")
        return OperationState.SUCCEEDED, None

    def _book(self, operation: Operation) -> models.LogBook:
        """What TaskFlow knows of the operation; a new book if that is nothing."""
        connection = self._backend.get_connection()
        with suppress(Exception):
            return connection.get_logbook(operation.id)
        book = models.LogBook(operation.kind, operation.id)
        book.add(models.FlowDetail(operation.kind, operation.id))
        connection.save_logbook(book)
        return book

    def _end(self, operation: Operation, state: OperationState, error: dict[str, str] | None) -> None:
        def note(connection: Connection) -> None:
            OPERATIONS.update(connection, operation.id, state=state, error=error)
            journal.emit(
                connection, "operation", state, operation, operation_kind=operation.kind, error=error
            )

        self._site.database.write(note)
        self._site.news.operation_changed(operation.id)
        with suppress(Exception):  # of no use any more
            self._backend.get_connection().destroy_logbook(operation.id)


def _what(operation: Operation) -> str:
    """What an operation must be alone with."""
    resources = operation.resources
    return next(
        (resources[noun] for noun in ("instance", "overlay", "base") if noun in resources), operation.id
    )


_OPEN = (OperationState.PENDING, OperationState.RUNNING)


def create_tables(database: Database) -> None:
    """Bring TaskFlow's own tables to its version; nothing happens where they are."""
    _backend_of(database).get_connection().upgrade()


def _backend_of(database: Database) -> SQLAlchemyBackend:
    return _Backend({"connection": database.url}, engine=database.engine)


class _Backend(SQLAlchemyBackend):  # type: ignore[misc]
    """TaskFlow's tables in our database; its connection, which describes them anew each time, is kept."""

    _kept: Kept | None = None

    def get_connection(self) -> Kept:
        if self._kept is None:
            self._kept = super().get_connection()
        return self._kept


def operation(kind: str, of: Any, resources: Mapping[str, str], **input_: Any) -> Operation:
    """A new operation on what somebody owns."""
    moment = now()
    return Operation(
        project_id=of.project_id, user_id=of.user_id, created_at=moment, updated_at=moment, kind=kind,
        resources=dict(resources), input=input_,
    )  # fmt: skip
