"""Who waits for what: the newest events and the changes of operations, in memory.

Waiters never ask the database. One thread reads each new event once and hands it to all of them; who was
away for longer than memory reaches begins with the journal.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from oslo_log import log

from cloudlet.store import journal
from cloudlet.store.database import Database
from cloudlet.store.journal import Event

LOG = log.getLogger(__name__)
_REMEMBERED = 10_000
_BATCH = 1000
_FAILED_SECONDS = _AGAIN_SECONDS = 1.0
_TOGETHER_SECONDS = 0.005
"""What is written so shortly one after the other is read together."""
_CALLED_AT_ONCE, _EACH_SECONDS = 16, 0.002
"""Of those who wait for the same so many are called at once, the others one after the other."""


@dataclass(eq=False, slots=True)
class _Waiter:
    """Somebody who waits for an event."""

    wanted: Callable[[Event], bool]
    called: threading.Event = field(default_factory=threading.Event)


class News:
    """What happened last, and the waiting for what comes."""

    def __init__(self, database: Database, others_seconds: float) -> None:
        """Begin to read.

        :param others_seconds: how often to look for what other processes of this site wrote.
        """
        self._database = database
        self._others_seconds = others_seconds
        self._changed = threading.Condition()
        self._last = database.read(journal.last_number)
        self._events: deque[Event] = deque(maxlen=_REMEMBERED)
        self._before = self._last
        """The number before the first event that is remembered."""
        self._waiters: set[_Waiter] = set()
        self._operations: dict[str, tuple[int, int]] = {}
        """Who waits for an operation, and how often it has changed meanwhile."""
        self._written = threading.Event()
        self._caught_up = threading.Condition()
        self._heard = self._read_to = 0
        """How often this process has written, and how much of that was read."""
        self._closed = False
        database.when_committed(self._hear)
        self._to_call: queue.SimpleQueue[list[_Waiter]] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in (("news", self._run), ("calls", self._call))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def last(self) -> int:
        """The number of the last event."""
        return self._last

    @property
    def closed(self) -> bool:
        """Whether the site has stopped serving."""
        return self._closed

    def events(
        self, after: int, wanted: Callable[[Event], bool], limit: int, timeout: float
    ) -> tuple[list[Event], int] | None:
        """The wanted events after a number, and the number up to which there are no others.

        Waits for one, at most ``timeout`` seconds. None where memory does not reach so far: read the journal.
        """
        deadline = time.monotonic() + timeout
        waiter = _Waiter(wanted)
        self._catch_up()
        try:
            while True:
                with self._changed:
                    if after < self._before:
                        return None
                    found = []
                    for event in self._newer(after):
                        if wanted(event):
                            found.append(event)
                            if len(found) == limit:
                                return found, event.number
                    after = max(after, self._last)
                    left = deadline - time.monotonic()
                    if found or left <= 0 or self._closed:
                        return found, after
                    waiter.called.clear()
                    self._waiters.add(waiter)
                waiter.called.wait(left)
        finally:
            with self._changed:
                self._waiters.discard(waiter)

    def operation_changed(self, operation_id: str) -> None:
        """Wake those who wait for an operation."""
        with self._changed:
            if operation_id in self._operations:
                waiters, changes = self._operations[operation_id]
                self._operations[operation_id] = waiters, changes + 1
                self._changed.notify_all()

    def wait_operation(self, operation_id: str, timeout: float, ended: Callable[[], bool]) -> None:
        """Wait until ``ended``, asked again whenever the operation changes, at most for so many seconds."""
        deadline = time.monotonic() + timeout
        with self._watching(operation_id):
            while not self._closed:
                seen = self._operations[operation_id][1]
                if ended() or (left := deadline - time.monotonic()) <= 0:
                    return
                with self._changed:
                    if self._operations[operation_id][1] == seen:
                        # Its end comes with an event; what it does meanwhile another process may know.
                        self._changed.wait(min(left, _AGAIN_SECONDS))

    @contextmanager
    def _watching(self, operation_id: str) -> Iterator[None]:
        """Have the changes of an operation counted."""
        with self._changed:
            waiters, changes = self._operations.get(operation_id, (0, 0))
            self._operations[operation_id] = waiters + 1, changes
        try:
            yield
        finally:
            with self._changed:
                waiters, changes = self._operations.pop(operation_id)
                if waiters > 1:
                    self._operations[operation_id] = waiters - 1, changes

    def close(self) -> None:
        """Send all waiters home: before a server stops, which would wait for them. Can be called again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for waiter in self._waiters:
                waiter.called.set()
        self._written.set()
        self._to_call.put([])
        for thread in self._threads:
            thread.join()

    def _newer(self, after: int) -> list[Event]:
        if not self._events or after >= self._last:
            return []
        # Numbers have no gaps, but old events may have been forgotten: count from the end.
        first = max(0, len(self._events) - (self._last - after))
        return [self._events[at] for at in range(first, len(self._events)) if self._events[at].number > after]

    def _hear(self) -> None:
        """Somebody of this process has written."""
        self._heard += 1
        if not self._written.is_set():
            self._written.set()

    def _catch_up(self) -> None:
        """Wait a moment until all is read that was written before: who has written wants to see that."""
        heard = self._heard
        with self._caught_up:
            self._caught_up.wait_for(lambda: self._read_to >= heard or self._closed, _FAILED_SECONDS)

    def _run(self) -> None:
        while not self._closed:
            if self._written.wait(self._others_seconds) and not self._closed:
                time.sleep(_TOGETHER_SECONDS)
            self._written.clear()
            heard = self._heard
            try:
                self._read()
                with self._caught_up:
                    self._read_to = heard
                    self._caught_up.notify_all()
            except Exception:
                LOG.exception("events could not be read")
                time.sleep(_FAILED_SECONDS)

    def _read(self) -> None:
        """Take in what is new."""
        while new := self._database.read(lambda connection: journal.read(connection, self._last, _BATCH)):
            with self._changed:
                for event in new:
                    if len(self._events) == _REMEMBERED:
                        self._before = self._events[0].number
                    self._events.append(event)
                self._last = new[-1].number
                called = [waiter for waiter in self._waiters if any(map(waiter.wanted, new))]
                self._waiters.difference_update(called)
            if called:
                self._to_call.put(called)
            for event in new:
                if event.noun == "operation":  # it has ended, perhaps by another process's work
                    self.operation_changed(event.resource_id)

    def _call(self) -> None:
        """Call those who waited, not all at once: each of them answers somebody, and others want that too."""
        while called := self._to_call.get():
            for number, waiter in enumerate(called):
                if number >= _CALLED_AT_ONCE and not self._closed:
                    time.sleep(_EACH_SECONDS)
                waiter.called.set()
