"""A source's way to here, over all its connections: counted, measured, held to a rate, given up on.

The stream and single ranges share one rate, and take turns: whoever wants bytes gets some 10 ms of the
link at a time, and then the other one does, so that neither waits behind much of the other's.
"""

from __future__ import annotations

import math
import ssl
import threading
import time
from urllib.error import URLError

from cloudlet.errors import FailedError

_TURN_SECONDS = 0.01
_SMALLEST_TURN = 1500
_CREDIT_SECONDS = 0.05
"""What a limited link makes up for when its user came late: about what a socket's buffer would have kept."""
_RATE_BYTES, _RATE_SECONDS = 16 << 10, 0.005
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 2.0
_SHORTEST_TIMEOUT = 1.0


class Link:
    """What came from a source, and how fast it may come; for any thread."""

    def __init__(self, limit: float | None = None, *, local: bool = False) -> None:
        """A link that has brought nothing yet.

        :param limit: bytes per second at most.
        :param local: whether the bytes are on this machine: then their rate is infinite, unless limited.
        """
        self.closed = threading.Event()
        """Set at the end: who still waits for bytes then stops at the next chance."""
        self.received = 0
        self._limit = limit
        self._local = local
        self._lock = threading.Lock()
        self._taken_until = 0.0
        self._first: tuple[float, int] | None = None
        self._last = 0.0

    def turn(self, size: int) -> int:
        """How many of ``size`` bytes to take at once."""
        return min(size, max(_SMALLEST_TURN, int(self._limit * _TURN_SECONDS))) if self._limit else size

    def came(self, count: int) -> None:
        """Count bytes that came, and hold who took them until a link of this rate would have brought them."""
        if not count:
            return
        if self._limit:
            with self._lock:
                now = time.monotonic()
                free = max(self._taken_until, now - _CREDIT_SECONDS) if self._taken_until else now
                self._taken_until = until = free + count / self._limit
            if until > now:
                self.closed.wait(until - now)
        with self._lock:
            self.received += count
            self._last = time.monotonic()
            self._first = self._first or (self._last, count)

    def rate(self) -> float | None:
        """Bytes per second between the first bytes that came and the last; None while that is too little."""
        if self._local and not self._limit:
            return math.inf
        with self._lock:
            if self._first is None:
                return None
            began, count = self._first
            seconds, received = self._last - began, self.received - count
        return received / seconds if received >= _RATE_BYTES and seconds >= _RATE_SECONDS else None


class Patience:
    """Of one who waits for a server: so many seconds without a byte, however many tries that are."""

    def __init__(self, seconds: float, link: Link) -> None:
        self._seconds = seconds
        self._link = link
        self.renew()

    def renew(self) -> None:
        """A byte came."""
        self._until = time.monotonic() + self._seconds
        self._pause = _FIRST_PAUSE

    def timeout(self) -> float:
        """Seconds to wait for one answer: a connection that died is found out while there are tries left."""
        left = self._until - time.monotonic()
        return min(self._seconds / 3, max(left, _SHORTEST_TIMEOUT))

    def wait(self, url: str, problem: Exception, hint: str) -> None:
        """Wait before the next try, each time longer.

        :raises FailedError: there is none: patience is over, the problem stays, or the link was closed.
        """
        cause = problem.reason if isinstance(problem, URLError) else problem
        lasting = isinstance(cause, ssl.SSLCertVerificationError)
        left = 0.0 if lasting else max(0.0, self._until - time.monotonic())
        if self._link.closed.wait(min(self._pause, left)):
            raise FailedError(f"{url} was closed while it was read", hint="try again")
        if not left:
            # Without the number, which tells users nothing.
            said = cause.strerror if isinstance(cause, OSError) and cause.strerror else cause
            raise FailedError(f"{url} does not come: {said}", hint=hint) from problem
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
