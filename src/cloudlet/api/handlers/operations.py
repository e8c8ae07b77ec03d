"""Operations: look at long work, wait for it, cancel it."""

from __future__ import annotations

from cloudlet.api import listing
from cloudlet.api.operation import Answer, Call
from cloudlet.api.schemas.operations import (
    OperationBody,
    OperationsBody,
    OperationsQuery,
    OperationView,
    WaitQuery,
)
from cloudlet.store.rows import OPERATIONS, Operation


def list(call: Call, query: OperationsQuery) -> OperationsBody:  # noqa: A001 (it is what it is called on the wire)
    """List operations."""
    rows, links = listing.page(call, OPERATIONS, query, "/v1/operations")
    return OperationsBody(operations=[OperationView.of(row) for row in rows], links=links)


def show(call: Call, operation: Operation, query: WaitQuery) -> OperationBody:
    """Show an operation, at once or as soon as it has ended.

    With ``wait`` the answer comes when the operation has ended, or after so many seconds.
    """

    def now() -> Operation:
        return call.site.database.read(lambda connection: OPERATIONS.get(connection, operation.id))

    if query.wait and not operation.state.ended:
        with call.waiters.one():
            call.site.news.wait_operation(operation.id, query.wait, lambda: now().state.ended)
        operation = now()
    return OperationBody(operation=OperationView.of(operation))


def cancel(call: Call, operation: Operation) -> Answer:
    """Cancel an operation and undo what it did."""
    return accepted(call, call.site.work.cancel(operation.id))


def accepted(call: Call, operation: Operation) -> Answer:
    """The answer that says that long work has begun."""
    where = f"{call.root}/v1/operations/{operation.id}"
    return Answer(OperationBody(operation=OperationView.of(operation)), 202, {"Location": where})
