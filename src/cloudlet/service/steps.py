"""What operations consist of: steps that can be done again and undone, and what they know while they run."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from taskflow import task

from cloudlet.errors import CloudletError
from cloudlet.store.rows import OPERATIONS, Operation, OperationState

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

_MANY = 8
_NOTED_SECONDS = 0.5
"""Between two notes of a step's progress."""

Observer = Callable[[str, str, OperationState], None]
"""Told, before it is written, of a kind of operation, a step, and what became of that."""


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
        self.note(done, total)

    def note(self, done: int, total: int) -> None:
        """The same, also of a step that was cancelled."""
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
            self.site.meters.step(self.operation.kind, name, seconds)
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


class Lane(StrEnum):
    """Among which others an operation waits until somebody is free to work on it."""

    LONG = "long"
    URGENT = "urgent"
    """Those that give back what others wait for."""
    WAITING = "waiting"
    """Those that do little but wait themselves, so that many are worked on at a time."""

    def threads(self, usual: int) -> int:
        """How many of a lane a process works on at a time."""
        return usual * _MANY if self is Lane.WAITING else usual


@dataclass(frozen=True, slots=True)
class Flow:
    """What an operation of a kind consists of."""

    steps: tuple[type[Step], ...]
    gave_up: GaveUp = _nothing
    """Called when all that was done is undone, whichever step it was that failed."""
    can_be_cancelled: bool = True
    lane: Lane = Lane.LONG
