"""Who may run an instance that is handed off: a record at each end, on the disk before anything follows.

Both ends' states and what may become of them are those of ``docs/formats/handoff.md``. A record outlives its
process, so that a later one can say what was decided; and it never goes back.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from cloudlet.errors import ConflictError, CorruptError

RECORD = "handoff.json"
DOUBT_SECONDS = 10.0
"""So long an end waits for the other's word before it says that it is in doubt."""


class Ownership(StrEnum):
    """The state of a departure (at the source) or of an arrival (at the target)."""

    COPYING = "copying"
    SWITCHING = "switching"
    COMMITTED = "committed"
    SERVING = "serving"
    """It runs at the target, and some of its memory is only here."""
    COMPLETED = "completed"
    REVERTED = "reverted"

    RECEIVING = "receiving"
    LOADED = "loaded"
    FILLING = "filling"
    """It runs, and some of its memory is only at the source."""
    RUNNING = "running"
    DROPPED = "dropped"

    LOST = "lost"
    """At either end: it ended at the target before all of its memory was there."""

    @property
    def ended(self) -> bool:
        """Whether nothing becomes of it any more."""
        return not _FOLLOWS[self]


_FOLLOWS: Mapping[Ownership, frozenset[Ownership]] = {
    Ownership.COPYING: frozenset({Ownership.SWITCHING, Ownership.REVERTED}),
    Ownership.SWITCHING: frozenset({Ownership.COMMITTED, Ownership.REVERTED}),
    # Reverted only if the target says that it never ran there, or by an operator's command.
    Ownership.COMMITTED: frozenset({Ownership.COMPLETED, Ownership.REVERTED, Ownership.SERVING}),
    # Reverted or lost only by an operator's command, or where there is nothing left to decide.
    Ownership.SERVING: frozenset({Ownership.COMPLETED, Ownership.REVERTED, Ownership.LOST}),
    Ownership.COMPLETED: frozenset(),
    Ownership.REVERTED: frozenset(),
    Ownership.RECEIVING: frozenset({Ownership.LOADED, Ownership.DROPPED}),
    Ownership.LOADED: frozenset({Ownership.RUNNING, Ownership.FILLING, Ownership.DROPPED}),
    Ownership.FILLING: frozenset({Ownership.RUNNING, Ownership.LOST}),
    Ownership.RUNNING: frozenset(),
    Ownership.DROPPED: frozenset(),
    Ownership.LOST: frozenset(),
}


_KERNEL_REMEMBERS = frozenset({Ownership.LOADED, Ownership.COMMITTED})
"""States, within the pause, that a power cut may forget: it ends the machine here too, and to have forgotten
that it was loaded, or given away, leads to the same end. A process that is killed forgets nothing."""


@dataclass(frozen=True, slots=True)
class Record:
    """What one end has decided."""

    handoff: str
    instance: str
    epoch: int
    """The instance's at the source; the target's is one more."""
    state: Ownership
    paused: bool = False
    """Whether its user had paused the instance before: it is paused again wherever it ends up."""
    reason: str = ""
    """Why it came to nothing, if it did."""
    early: bool = False
    """Whether it switched before all memory was at the target."""
    as_of_switch: bool = False
    """Whether it was reverted after it had run at the target: its epoch there is not its last one."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """What the other end said at last: where the instance is reached there."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        known = dict(data)
        known["state"] = Ownership(known["state"])
        return cls(**known)


class OwnershipFile:
    """The record of one end, in a folder that is the instance's."""

    def __init__(self, folder: Path, record: Record) -> None:
        """Go on with ``record``, which is in the folder already or is written now, whatever is there."""
        self._path = folder / RECORD
        self.record = record
        before = None
        with suppress(CorruptError):
            before = read_record(folder)
        if before != record:
            self._write(record)

    @property
    def state(self) -> Ownership:
        return self.record.state

    def become(self, state: Ownership, **changes: Any) -> None:
        """Change the state, in its file, before anything follows from it; it may be that already.

        :raises ConflictError: it cannot follow.
        :raises OSError: it cannot be written, so it is as before.
        """
        if state is self.state:
            return
        if state not in _FOLLOWS[self.state]:
            raise ConflictError(f"hand-off {self.record.handoff} is {self.state}, and cannot be {state}")
        record = replace(self.record, state=state, **changes)
        self._write(record, through=state not in _KERNEL_REMEMBERS)
        self.record = record

    def _write(self, record: Record, *, through: bool = True) -> None:
        # Two may note the same end of a keeper at once: each writes a file of its own.
        descriptor, name = tempfile.mkstemp(prefix=f".{RECORD}-", dir=self._path.parent)
        new = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(json.dumps(record.to_json()).encode())
                file.flush()
                if through:
                    os.fsync(descriptor)
            new.replace(self._path)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        if not through:
            return
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_record(folder: Path) -> Record | None:
    """What the end whose folder this is has decided; None if it has nothing to do with a hand-off.

    :raises CorruptError: the record cannot be read: nobody knows who may run the instance.
    """
    try:
        return Record.from_json(json.loads((folder / RECORD).read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptError(
            f"{folder / RECORD} cannot be read: {error}", hint="cloudlet handoff resolve"
        ) from error
