"""The one loop of the network process: which descriptor is ready, and whose turn it is.

epoll is used itself rather than ``selectors``, because it reports the break of a socket of which
neither reading nor writing is awaited.
"""

import select
from collections.abc import Callable

READ, WRITE = select.EPOLLIN, select.EPOLLOUT
BROKEN = select.EPOLLERR | select.EPOLLHUP
"""Always reported, whatever is awaited."""


class Loop:
    """Descriptors, what is awaited of each, and the handler that gets the events."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._running = True
        self._timer: tuple[float, Callable[[], None]] | None = None

    def add(self, descriptor: int, awaited: int, handler: Callable[[int], None]) -> None:
        """Call ``handler`` with events of ``descriptor``: those ``awaited``, and breaks."""
        self._epoll.register(descriptor, awaited)
        self._handlers[descriptor] = handler

    def change(self, descriptor: int, awaited: int) -> None:
        """Await something else of a descriptor."""
        self._epoll.modify(descriptor, awaited)

    def remove(self, descriptor: int) -> None:
        """Forget a descriptor, before it is closed."""
        self._epoll.unregister(descriptor)
        del self._handlers[descriptor]

    def soon(self, seconds: float, action: Callable[[], None]) -> None:
        """Call ``action`` once, at the next event or after ``seconds``."""
        self._timer = seconds, action

    def run(self) -> None:
        """Serve until `stop`."""
        while self._running:
            events = self._epoll.poll(None if self._timer is None else self._timer[0])
            if self._timer is not None:
                (_, action), self._timer = self._timer, None
                action()
            # All are looked up before any runs: a descriptor that one closes and the next opens
            # anew is not served with an event of the old one.
            ready = [(self._handlers[descriptor], mask) for descriptor, mask in events]
            for handler, mask in ready:
                handler(mask)

    def stop(self) -> None:
        """Have `run` return after this round."""
        self._running = False
