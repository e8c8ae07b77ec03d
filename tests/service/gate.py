"""A port in front of a site through which bytes pass, wait, are cut or damaged, as a test wants it.

Bytes are not understood here: what passes may be encrypted. What shall wait is asked before each piece.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_PIECE = 64 << 10
_LOOK_SECONDS = 0.002
_RESET = struct.pack("ii", 1, 0)
_MOST_REMEMBERED = 1 << 20


@dataclass(frozen=True)
class Passing:
    """A piece that wants to pass."""

    way: str
    """``up`` to the site, ``down`` from it."""
    size: int
    before: int
    """Bytes that have passed this way in its connection."""


Holds = Callable[[Passing], bool]
"""Whether a piece has to wait; asked again and again."""


@dataclass(eq=False)
class _Pair:
    """Both ends of a connection."""

    client: socket.socket
    server: socket.socket
    heard: bytearray = field(default_factory=bytearray)
    """What has come from the client."""
    cut: bool = False
    ways: int = 2

    def end(self) -> None:
        self.cut = True
        for one in (self.client, self.server):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class Gate:
    """See :func:`gated`."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.holds: Holds = lambda _: False
        self.held = 0
        """How many pieces wait now."""
        self.flips = ""
        """The way in which a bit of the next piece is changed, once."""
        self.target = target
        self._down = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._pairs: list[_Pair] = []
        self._heard: list[bytearray] = []
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def heard(self) -> list[bytes]:
        """What came from each of the last clients, byte for byte."""
        with self._lock:
            return [bytes(one) for one in self._heard[-3:]]

    def open(self) -> None:
        """Let all pass."""
        self.holds = lambda _: False

    def cut(self) -> None:
        """End all connections, with what waits in them, and refuse new ones."""
        with self._lock:
            self._down = True
            for pair in self._pairs:
                pair.end()

    def mend(self) -> None:
        self._down = False

    def start(self) -> None:
        self._threads[0].start()

    def close(self) -> None:
        self.cut()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        while self._threads:
            self._threads.pop(0).join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self._down:
                    raise ConnectionRefusedError
                server = socket.create_connection(self.target, timeout=10)
                server.settimeout(None)
            except OSError:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                client.close()
                continue
            self._begin(_Pair(client, server))

    def _begin(self, pair: _Pair) -> None:
        with self._lock:
            self._pairs.append(pair)
            self._heard = [*self._heard[-7:], pair.heard]
            for ends in ((pair.client, pair.server, "up"), (pair.server, pair.client, "down")):
                thread = threading.Thread(target=self._carry, args=(pair, *ends))
                self._threads.append(thread)
                thread.start()

    def _carry(self, pair: _Pair, source: socket.socket, target: socket.socket, way: str) -> None:
        passed = 0
        with suppress(OSError):
            while piece := source.recv(_PIECE):
                self._wait(pair, Passing(way, len(piece), passed))
                if pair.cut:
                    break
                if way == "up" and len(pair.heard) < _MOST_REMEMBERED:
                    pair.heard += piece
                target.sendall(self._altered(way, piece))
                passed += len(piece)
        pair.end()
        with self._lock:
            pair.ways -= 1
            if not pair.ways:
                self._pairs.remove(pair)
                pair.client.close()
                pair.server.close()

    def _wait(self, pair: _Pair, passing: Passing) -> None:
        if not self.holds(passing):
            return
        with self._lock:
            self.held += 1
        while not pair.cut and self.holds(passing):
            time.sleep(_LOOK_SECONDS)
        with self._lock:
            self.held -= 1

    def _altered(self, way: str, piece: bytes) -> bytes:
        with self._lock:
            if self.flips != way:
                return piece
            self.flips = ""
        at = len(piece) // 2
        return piece[:at] + bytes([piece[at] ^ 0x10]) + piece[at + 1 :]


@contextmanager
def gated(target: tuple[str, int]) -> Iterator[Gate]:
    """A gate in front of a site, on a port of its own, until the context is left."""
    gate = Gate(target)
    gate.start()
    try:
        yield gate
    finally:
        gate.close()
