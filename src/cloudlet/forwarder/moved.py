"""After a hand-off: connections to the ports an instance had here are relayed to where it is, for a while."""

import ipaddress
import os
import socket
import threading
from collections.abc import Sequence

from cloudlet.forwarder.loop import READ, Loop
from cloudlet.forwarder.relay import Relay

Way = tuple[socket.socket, tuple[str, int]]
"""A port's listening socket, and the address where its connections go."""


class Forwarding:
    """Relays in a thread, from now until it is closed; the listening sockets are its own."""

    def __init__(self, ways: Sequence[Way], limit: int, *, within: bool = False) -> None:
        """Relay at most ``limit`` connections at a time.

        :param within: whether a way may lead to this machine itself; else another site could have its users
            reach what only this machine is to reach.
        :raises OSError: an address is not one, or leads to this machine.
        """
        self._listeners = [listener for listener, _ in ways]
        self._loop = Loop()
        relay = Relay(self._loop, limit)
        for listener, (host, port) in ways:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            if not within and is_within(str(address[0])):
                raise OSError(f"{address[0]} is this machine's own address")
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


def is_within(host: str) -> bool:
    """Whether an address is one by which this machine reaches itself, or its own link only."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_loopback or address.is_unspecified or address.is_link_local or address.is_multicast:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True
