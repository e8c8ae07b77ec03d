"""Records on their way to a peer: packed by workers, sent in order, and counted when they are loaded.

Records are put into batches. Two requests are on their way at a time, so that the link is not idle while an
answer comes back. A batch that may not have arrived is sent again: the other end knows how many records it
has, and takes none twice. What waits to be sent is bounded; whoever makes more is held up.

To load records may take long, and so may a thin link: a peer is silent only if it does not say what it is
either, when it is asked beside that. Where nobody can go back any more (:meth:`Courier.persist`) nothing that
a peer says or does is the end, and what was not loaded is sent again and again.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from cloudlet.errors import CloudletError, FailedError, IntegrityError, NotFoundError, UnreachableError

_REQUESTS = 2
_BATCH_SECONDS = 0.1
"""A batch is about what the link carries in this time."""
_LINGER_SECONDS = 0.001
"""So long a batch waits for one more record: the last of a round come one right behind the other."""
_SMALLEST_BATCH, _LARGEST_BATCH = 64 << 10, 1 << 20
WAITING_BYTES = 4 << 20
_TAKES = ("receiving", "loaded", "filling")
"""What a peer is that may take more records."""
_HAS_ALL = "running"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_DAMAGED_TRIES = 3
_LOOK_SECONDS = 0.5
_LEAVE_SECONDS = 1.0
"""So long who gives up waits for requests that are cut; one that still connects sends nothing any more."""


@dataclass(frozen=True, slots=True)
class PeerState:
    """What a peer says of a hand-off."""

    state: str
    """Its own, or the other end's, of :class:`~cloudlet.control.ownership.Ownership`."""
    records: int = 0
    """How many have been loaded."""
    holds: str = "base"
    told: dict[str, Any] | None = None
    """What else it says: where the instance is reached."""
    reason: str = ""


class Peer(Protocol):
    """The other end of a hand-off. Each call may be repeated; without an answer it is `UnreachableError`."""

    def state(self, wait: float = 0.0) -> PeerState:
        """What it is there; after ``wait`` seconds at the latest, or as soon as it is another."""

    def records(self, first: int, body: bytes) -> PeerState:
        """Whole records, of which the first has the number ``first``; when they are loaded."""

    def commit(self, epoch: int) -> PeerState:
        """Have it run the instance: it is its own now."""

    def drop(self) -> PeerState:
        """Have it give up the copy."""

    def wanted(self, after: int, wait: float) -> PeerState:
        """Which missing pages its guest has waited for since the question that gave ``after``.

        It answers when there is one, when it is something else, or after ``wait`` seconds. What else it says:
        ``missing`` (how many), ``wanted`` (their numbers) and ``wanted_after``.
        """

    def close(self) -> None:
        """Cut what is on its way: who waits for an answer has none. It can be asked again."""


@dataclass(slots=True)
class _Waiting:
    record: Future[bytes]
    size: int
    """Before it was compressed."""


@dataclass(frozen=True, slots=True)
class _Batch:
    first: int
    count: int
    body: bytes
    size: int


class Courier:
    """Takes records to a peer, from number ``first`` on; a context that ends with nothing on its way."""

    def __init__(
        self, peer: Peer, stopped: threading.Event, *, first: int = 0, patience: float, limit: float = 0.0
    ) -> None:
        """A courier that has taken nothing yet.

        :param stopped: set when nobody wants it any more.
        :param patience: seconds without an answer until it gives up.
        :param limit: bytes per second at most; 0: as many as the link carries.
        """
        self.limit = limit
        self.patience = patience
        self.most_waiting = WAITING_BYTES
        """Bytes of records, before they are compressed, that wait to be sent or acknowledged."""
        self.sent = 0
        """Bytes that were acknowledged."""
        self.busy = 0.0
        """Seconds in which something was on its way."""
        self.held = 0.0
        """Seconds in which whoever makes records was held up, since the link carries no more."""
        self.answer = PeerState("receiving", first)
        """What the peer said last."""
        self.heard = -math.inf
        """When it answered last, by the monotonic clock."""
        self.trouble: Exception | None = None
        """Why records are not taken just now, though they are sent again; not, that the peer is silent."""
        self._peer = peer
        self._stopped = stopped
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._bytes = self._arrived = 0
        self._next = first
        self._requests = 0
        self._busy_since = 0.0
        self._free_at = 0.0
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self._taking = threading.Lock()
        self._threads = [
            threading.Thread(target=self._guard, args=(self._run,), name="courier", daemon=True)
            for _ in range(_REQUESTS)
        ]

    def __enter__(self) -> Courier:
        for thread in self._threads:
            thread.start()
        threading.Thread(target=self._guard, args=(self._watch,), name="courier-watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
        given_up = kind is not None or self._stopped.is_set()
        if given_up:
            self._peer.close()
        for thread in self._threads:
            thread.join(_LEAVE_SECONDS if given_up else None)

    def persist(self) -> None:
        """Give up for nothing from now on, but when it is stopped.

        :raises CloudletError: it has given up already.
        """
        with self._changed:
            if self._error:
                raise self._error
            self.patience = math.inf

    @property
    def persists(self) -> bool:
        """Whether it gives up for nothing."""
        return self.patience == math.inf

    def put(self, record: Future[bytes], size: int) -> None:
        """Have a record sent, when it is packed; wait while too much is on its way.

        :raises CloudletError: the peer does not take records any more, or it was stopped.
        """
        with self._changed:
            began = time.monotonic()
            self._wait(lambda: self._bytes < self.most_waiting)
            self.held += time.monotonic() - began
            self._waiting.append(_Waiting(record, size))
            self._bytes += size
            self._changed.notify_all()

    def wait_for_room(self) -> None:
        """Wait until a record can be put at once; as :meth:`put`, for who chooses then which one."""
        with self._changed:
            self._wait(lambda: self._bytes < self.most_waiting)

    def flush(self) -> PeerState:
        """Wait until the peer has loaded all; what it says then.

        :raises CloudletError: as :meth:`put`.
        """
        with self._changed:
            self._wait(lambda: self._bytes == 0)
            return self.answer

    @property
    def share(self) -> float:
        """How much of what was put, before it was compressed, has arrived: from 0 to 1."""
        with self._changed:
            return self._arrived / (self._arrived + self._bytes) if self._arrived else 0.0

    def rate(self) -> float | None:
        """Bytes per second that the link carries; None while that is not known."""
        with self._changed:
            busy = self.busy + (time.monotonic() - self._busy_since if self._requests else 0.0)
            if self.sent <= _SMALLEST_BATCH or busy <= 0.01:
                return None
            return min(self.sent / busy, self.limit or math.inf)

    def _wait(self, until: Callable[[], bool]) -> None:
        while not (until() or self._error or self._stopped.is_set()):
            self._changed.wait(_LOOK_SECONDS)
            if self._silent > self.patience:
                self._error = _unanswered(UnreachableError(f"nothing came for {self.patience:.0f} s"))
        if self._error:
            raise self._error
        if self._stopped.is_set():
            raise FailedError("the hand-off was cancelled")

    @property
    def _silent(self) -> float:
        """For how many seconds something is on its way, and nothing was answered."""
        return time.monotonic() - max(self.heard, self._busy_since) if self._requests else 0.0

    def _guard(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _run(self) -> None:
        while batch := self._take():
            self._deliver(batch)

    def _watch(self) -> None:
        """Ask a peer that has not answered for long what it is: to load records may take longer."""
        while not self._closed.wait(min(_LOOK_SECONDS, self.patience / 8) or _FIRST_PAUSE):
            if self._silent > self.patience / 2 and answered(self._peer.state):
                self.heard = time.monotonic()

    def _take(self) -> _Batch | None:
        """The next batch, as soon as its first record is packed; None at the end."""
        with self._taking:
            records: list[bytes] = []
            most, size, raw, lingered = self._batch_bytes(), 0, 0, False
            while size < most:
                with self._changed:
                    while not (self._waiting or records or self._closed.is_set() or self._error):
                        self._changed.wait()
                    if self._error or self._closed.is_set():
                        break
                    if records and not (self._waiting and self._waiting[0].record.done()):
                        if lingered:
                            break
                        lingered = True
                        self._changed.wait(_LINGER_SECONDS)
                        continue
                    waiting = self._waiting.popleft()
                records.append(waiting.record.result())
                size, raw = size + len(records[-1]), raw + waiting.size
            if not records:
                return None
            with self._changed:
                batch = _Batch(self._next, len(records), b"".join(records), raw)
                self._next += len(records)
                return batch

    def _batch_bytes(self) -> int:
        rate = min(self.rate() or _SMALLEST_BATCH / _BATCH_SECONDS, self.limit or math.inf)
        return int(min(max(rate * _BATCH_SECONDS, _SMALLEST_BATCH), _LARGEST_BATCH))

    def _deliver(self, batch: _Batch) -> None:
        self._hold(len(batch.body))
        self._began()
        answer = None
        try:
            answer = self._sent(batch)
        finally:
            self._ended(batch, answer)

    def _sent(self, batch: _Batch) -> PeerState | None:
        """Send a batch until it is loaded; None if nobody wants it any more."""
        since, taken, pause, damaged = time.monotonic(), -1, _FIRST_PAUSE, 0
        while not (self._closed.is_set() or self._error or self._stopped.is_set()):
            try:
                answer = self._peer.records(batch.first, batch.body)
                self.heard = time.monotonic()
                if answer.records >= batch.first + batch.count or answer.state == _HAS_ALL:
                    self.trouble = None
                    return answer
                if answer.state not in _TAKES:
                    raise FailedError(f"the peer has given up: {answer.reason or answer.state}")
                if answer.records > taken:
                    since, taken = time.monotonic(), answer.records
                elif time.monotonic() > since + self.patience:
                    raise FailedError(f"the peer has {answer.records} records, and takes no more")
            except UnreachableError as error:
                if time.monotonic() > since + self.patience:
                    self._give_up(_unanswered(error))
            except IntegrityError as error:
                damaged += 1
                if damaged >= _DAMAGED_TRIES:
                    self._give_up(error)
            except Exception as error:
                self._give_up(error)
            self._stopped.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return None

    def _give_up(self, error: Exception) -> None:
        """Send nothing any more; it returns only where nothing is the end.

        :raises Exception: the error.
        """
        with self._changed:  # either now, or never again
            if not self.persists:
                self._error = self._error or error
                raise error
            self.trouble = error

    def _hold(self, size: int) -> None:
        """Wait for a limited link's turn."""
        if not self.limit:
            return
        with self._changed:
            now = time.monotonic()
            begin = max(now, self._free_at)
            self._free_at = begin + size / self.limit
        self._stopped.wait(begin - now)

    def _began(self) -> None:
        with self._changed:
            if not self._requests:
                self._busy_since = time.monotonic()
            self._requests += 1

    def _ended(self, batch: _Batch, answer: PeerState | None) -> None:
        with self._changed:
            self._requests -= 1
            if not self._requests:
                self.busy += time.monotonic() - self._busy_since
            if answer:
                self.sent += len(batch.body)
                self._bytes -= batch.size
                self._arrived += batch.size
                if answer.records >= self.answer.records or answer.state not in _TAKES:
                    self.answer = answer
            self._changed.notify_all()


def _unanswered(error: UnreachableError) -> FailedError:
    failed = FailedError(f"the peer does not answer: {error.message}")
    failed.__cause__ = error
    return failed


def answered(call: Callable[[], PeerState]) -> PeerState | None:
    """What a peer answers; None if it does not, or cannot now; ``unknown`` if it knows of no hand-off."""
    try:
        return call()
    except NotFoundError as error:
        return PeerState("unknown", reason=error.message)
    except CloudletError:
        return None
