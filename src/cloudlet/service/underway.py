"""What is on its way to another site, or from one, as refusals name it."""

from __future__ import annotations

from sqlalchemy.engine import Connection

from cloudlet.errors import ConflictError
from cloudlet.store.rows import (
    HANDOFFS,
    OPEN_HANDOFFS,
    Direction,
    Handoff,
    HandoffState,
    Instance,
    InstanceState,
)

_CAN_BE_CANCELLED = (HandoffState.PREPARING, HandoffState.COPYING)


def check_not_moving(connection: Connection, instance: Instance) -> None:
    """Refuse what cannot be done with an instance that is being handed off, and name the hand-off.

    :raises ConflictError: it is.
    """
    if instance.state is not InstanceState.MOVING:
        return
    for handoff in HANDOFFS.list(connection, instance_id=instance.id, state=OPEN_HANDOFFS, limit=1):
        leaves = handoff.direction is Direction.OUT
        does = "is being handed off already" if leaves else "is still coming from another site"
        raise ConflictError(f"instance {instance.id} {does}: hand-off {handoff.id}", hint=way_out(handoff))


def way_out(handoff: Handoff) -> str:
    """How a hand-off that is under way can be brought to its end."""
    if handoff.state is HandoffState.IN_DOUBT:
        return f"cloudlet handoff resolve {handoff.id}"
    if handoff.state in _CAN_BE_CANCELLED:
        cancel = f"cloudlet handoff cancel {handoff.id}"
        return cancel if handoff.direction is Direction.OUT else f"where it comes from: {cancel}"
    return f"wait for its end: cloudlet handoff show {handoff.id}"
