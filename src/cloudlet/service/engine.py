"""TaskFlow, which runs the steps of an operation and notes in the database which are done.

So after a kill -9 the next process goes on where this one was. A step that was begun is done again. What a
step did is undone, in the opposite order, when a later one fails or somebody cancels.
"""

from __future__ import annotations

import traceback
from contextlib import suppress

from oslo_log import log
from taskflow import states
from taskflow.engines.action_engine.engine import SerialActionEngine
from taskflow.exceptions import WrappedFailure
from taskflow.patterns import linear_flow
from taskflow.persistence import models
from taskflow.persistence.backends.impl_sqlalchemy import Connection as Kept
from taskflow.persistence.backends.impl_sqlalchemy import SQLAlchemyBackend

from cloudlet.errors import CloudletError, FailedError, of_the_system
from cloudlet.service.steps import CancelledError, Flow, Running
from cloudlet.store.database import Database
from cloudlet.store.rows import Operation, OperationState

LOG = log.getLogger(__name__)


class Engine:
    """Runs operations, and remembers in a database how far they are."""

    def __init__(self, database: Database) -> None:
        self._backend = _backend_of(database)

    def run(self, running: Running, flow: Flow) -> tuple[OperationState, CloudletError | None]:
        """Do an operation, or what is left of it; what became of it, and why it failed."""
        operation = running.operation
        steps = linear_flow.Flow(operation.kind)
        steps.add(*(step(running) for step in flow.steps))
        book = self._book(operation)
        if next(iter(book)).state == states.REVERTED:  # by a process that was killed before it could say so
            if running.cancelled.is_set():
                return OperationState.CANCELLED, None
            return OperationState.FAILED, FailedError(
                "it failed, and was undone, before the site was started again"
            )
        # By its class: by its name it would be looked for among all that is installed, each time.
        engine = SerialActionEngine(steps, next(iter(book)), self._backend, {})
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

    def forget(self, operation: Operation) -> None:
        """Forget how far an operation was; of no use any more."""
        with suppress(Exception):
            self._backend.get_connection().destroy_logbook(operation.id)

    def _book(self, operation: Operation) -> models.LogBook:
        """What TaskFlow knows of the operation; a new book if that is nothing."""
        connection = self._backend.get_connection()
        with suppress(Exception):
            return connection.get_logbook(operation.id)
        book = models.LogBook(operation.kind, operation.id)
        book.add(models.FlowDetail(operation.kind, operation.id))
        connection.save_logbook(book)
        return book


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
