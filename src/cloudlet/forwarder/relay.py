"""Relay TCP connections from the host's ports to the guest's, both ways, in one thread.

A byte is read into a buffer that all connections share and handed on at once; only what the
receiver does not take is kept, and until it has taken that, its sender is not read: that bounds the
memory to one block per direction. An end of one direction is handed on as such (half-close), and a
reset as a reset, so that a client does not mistake a broken answer for a whole one.
"""

import os
import socket
import struct

from cloudlet.forwarder.loop import BROKEN, READ, WRITE, Loop

BLOCK = 64 * 1024
"""Bytes read at a time, and the most that is kept for one slow receiver."""

_PAUSE = 0.5  # seconds without accepting, after the machine ran out of something
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, 0 seconds


class Relay:
    """Listeners and their connections, served by a loop."""

    def __init__(self, loop: Loop, limit: int) -> None:
        """Relay at most ``limit`` connections at a time, of all listeners together."""
        self.block = memoryview(bytearray(BLOCK))
        self._loop = loop
        self._free = limit
        self._listeners: list[socket.socket] = []

    def listen(self, listener: socket.socket, target: tuple[str, int], family: int = socket.AF_INET) -> None:
        """Relay each connection to ``listener`` to a new one to ``target``, an address of that family."""
        listener.setblocking(False)
        self._listeners.append(listener)
        self._loop.add(listener.fileno(), READ, lambda _events: self._accept(listener, target, family))

    def update(self, side: "_Side", awaited: int | None) -> None:
        """Have the loop report ``awaited`` (and breaks) of ``side``, or nothing at all."""
        if awaited is None:
            self._loop.remove(side.socket.fileno())
        elif side.awaited is None:
            self._loop.add(side.socket.fileno(), awaited, side.serve)
        else:
            self._loop.change(side.socket.fileno(), awaited)
        side.awaited = awaited

    def release(self) -> None:
        """Count one connection less."""
        self._free += 1

    def _accept(self, listener: socket.socket, target: tuple[str, int], family: int) -> None:
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            self._pause(error)
            return
        if self._free == 0:
            client.close()  # the answer: the client sees an orderly end at once, and no byte
            return
        try:
            guest = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            client.close()
            self._pause(error)
            return
        self._free -= 1
        guest.setblocking(False)
        client.setblocking(False)
        guest.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        guest.connect_ex(target)  # the loop reports a refusal as it does any later error
        one, other = _Side(self, client), _Side(self, guest)
        one.peer, other.peer = other, one
        self.update(one, READ)
        self.update(other, READ)

    def _pause(self, error: OSError) -> None:
        """Leave clients in the kernel's queues for a moment, instead of spinning on an error."""
        os.write(2, f"cannot accept a connection: {error.strerror}\n".encode())
        self._await_clients(0)
        self._loop.soon(_PAUSE, lambda: self._await_clients(READ))

    def _await_clients(self, awaited: int) -> None:
        for listener in self._listeners:
            self._loop.change(listener.fileno(), awaited)


class _Side:
    """One side of a connection: a socket, and what its peer has sent that it has not taken yet."""

    __slots__ = ("awaited", "closed", "ended", "peer", "relay", "socket", "unsent")

    peer: "_Side"

    def __init__(self, relay: Relay, endpoint: socket.socket) -> None:
        self.relay = relay
        self.socket = endpoint
        self.unsent = memoryview(b"")
        self.ended = False  # it has sent its last byte
        self.closed = False  # it has been told that its peer has
        self.awaited: int | None = None

    def serve(self, events: int) -> None:
        """Do what the socket is ready for; an error of either socket ends both by a reset."""
        if self.awaited is None:
            return  # left earlier in the same round
        try:
            if events & BROKEN and (self.ended or self.peer.unsent):
                raise ConnectionResetError  # there is nothing to read that would say so
            if events & WRITE:
                self._flush()
            if events & (READ | BROKEN):
                self._receive()
        except OSError:
            for side in (self, self.peer):
                side.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self._leave()
            return
        if self.closed and self.peer.closed:
            self._leave()
        else:
            self._await()
            self.peer._await()

    def _receive(self) -> None:
        try:
            count = self.socket.recv_into(self.relay.block)
        except BlockingIOError:
            return
        if count == 0:
            self.ended = True
            self.peer._flush()
        else:
            self.peer._send(self.relay.block[:count])

    def _send(self, data: memoryview) -> None:
        """Send what the socket takes and keep a copy of the rest."""
        try:
            count = self.socket.send(data)
        except BlockingIOError:  # also while it is still connecting
            count = 0
        if count < len(data):
            self.unsent = memoryview(bytes(data[count:]))

    def _flush(self) -> None:
        """Send what was kept; then the end, if the peer has ended."""
        if self.unsent:
            try:
                self.unsent = self.unsent[self.socket.send(self.unsent) :]
            except BlockingIOError:
                return
        if self.peer.ended and not self.unsent and not self.closed:
            self.socket.shutdown(socket.SHUT_WR)
            self.closed = True

    def _await(self) -> None:
        """Await what is of use now: no reading while the peer is behind, no writing without need.

        A socket whose own end has been sent and of which nothing is awaited leaves the loop, which
        would report its hang-up without pause.
        """
        wanted = READ if not self.ended and not self.peer.unsent else 0
        wanted |= WRITE if self.unsent else 0
        awaited = None if self.closed and not wanted else wanted
        if awaited != self.awaited:
            self.relay.update(self, awaited)

    def _leave(self) -> None:
        for side in (self, self.peer):
            if side.awaited is not None:
                self.relay.update(side, None)
            side.socket.close()
        self.relay.release()
