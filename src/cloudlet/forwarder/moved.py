"""After a hand-off: connections to the ports an instance had here are relayed to where it is, for a while."""

import os
import socket
import threading
from collections.abc import Callable, Sequence

from cloudlet.forwarder.loop import READ, Loop
from cloudlet.forwarder.relay import Relay

Way = tuple[socket.socket, tuple[str, int]]
"""A port's listening socket, and the address where its connections go."""


class Forwarding:
    """Relays in a thread, from now until it is closed; the listening sockets are its own."""

    def __init__(self, ways: Sequence[Way], limit: int, may: Callable[[str], bool]) -> None:
        """Relay at most ``limit`` connections at a time.

        :param may: whether a way may lead to an address: another site, which names it, could else have
            whoever connects reach what only this machine is to reach.
        :raises OSError: an address is not one, or no way may lead there.
        """
        self._listeners = [listener for listener, _ in ways]
        self._loop = Loop()
        relay = Relay(self._loop, limit)
        for listener, (host, port) in ways:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            if not may(str(address[0])):
                raise OSError(f"no way may lead to {address[0]}")
            relay.listen(listener, (str(address[0]), int(address[1])), family)
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._loop.add(self._end, READ, lambda _events: self._loop.stop())
        self._thread = threading.Thread(target=self._loop.run, name="forwarding", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; who is connected is cut off. Can be called again."""
        if self._end < 0:
            return
        os.eventfd_write(self._end, 1)
        self._thread.join()
        os.close(self._end)
        self._end = -1
        for listener in self._listeners:
            listener.close()
