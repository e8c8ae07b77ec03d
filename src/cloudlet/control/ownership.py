"""Who may run an instance that is handed off: a record at each end, on the disk before anything follows.

Both ends' states and what may become of them are those of ``docs/formats/handoff.md``. A record outlives its
process, so that a later one can say what was decided; and it never goes back.

What is decided within the pause is written beside the record, and not through to the disk. After a power cut
that file may be empty: it counts only where it can be read and follows from the record, which is whole.
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

RECORD, FOLLOWING = "handoff.json", "handoff.following.json"
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

    def follows(self, before: Record) -> bool:
        """Whether it says what became of ``before`` within the pause."""
        same = (self.handoff, self.instance, self.epoch) == (before.handoff, before.instance, before.epoch)
        return same and self.state in _KERNEL_REMEMBERS & _FOLLOWS[before.state]


class OwnershipFile:
    """The record of one end, in a folder that is the instance's."""

    def __init__(self, folder: Path, record: Record) -> None:
        """Go on with ``record``, which is in the folder already or is written now, whatever is there."""
        self._folder = folder
        self.record = record
        before = None
        with suppress(CorruptError):
            before = read_record(folder)
        if before != record:
            self._write(record)
            # What followed from the record that was there might follow from this one.
            (folder / FOLLOWING).unlink(missing_ok=True)

    @property
    def state(self) -> Ownership:
        return self.record.state

    def become(self, state: Ownership, **changes: Any) -> None:
        """Change the state, in its file, before anything follows from it; it may be that already.

        :raises ConflictError: it cannot follow.
        :raises OSError: it cannot be written, so it is as before; or it is written, and the folder could not
            be: then it is what its file says.
        """
        if state is self.state:
            return
        if state not in _FOLLOWS[self.state]:
            raise ConflictError(f"hand-off {self.record.handoff} is {self.state}, and cannot be {state}")
        record = replace(self.record, state=state, **changes)
        if state in _KERNEL_REMEMBERS:
            self._replace(FOLLOWING, record, through=False)
            self.record = record
        else:
            self._write(record)

    def _write(self, record: Record) -> None:
        # First: where it cannot be opened, nothing has been changed yet.
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._replace(RECORD, record, through=True)
            self.record = record
            os.fsync(folder)
        finally:
            os.close(folder)

    def _replace(self, name: str, record: Record, *, through: bool) -> None:
        # Two may note the same end of a keeper at once: each writes a file of its own.
        descriptor, made = tempfile.mkstemp(prefix=f".{name}-", dir=self._folder)
        new = Path(made)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(json.dumps(record.to_json()).encode())
                file.flush()
                if through:
                    os.fsync(descriptor)
            new.replace(self._folder / name)
        except OSError:
            new.unlink(missing_ok=True)
            raise


def read_record(folder: Path) -> Record | None:
    """What the end whose folder this is has decided; None if it has nothing to do with a hand-off.

    :raises CorruptError: the record cannot be read: nobody knows who may run the instance.
    """
    try:
        record = _read(folder / RECORD)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptError(
            f"{folder / RECORD} cannot be read: {error}", hint="cloudlet handoff resolve"
        ) from error
    with suppress(FileNotFoundError, ValueError, TypeError, KeyError):
        following = _read(folder / FOLLOWING)
        if following.follows(record):
            return following
    return record


def _read(path: Path) -> Record:
    return Record.from_json(json.loads(path.read_text()))
