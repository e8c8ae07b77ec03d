"""A user who asks every 10 ms, at one address or several: when each answer came, and what it was.

A question is a line, its answer a number. At each address one question at a time is open; a connection that
ends is made again at once. A process of its own, so that nothing else delays it.

``python -m benchmarks.handoff_client HOST:PORT ...`` asks until its standard input ends, and prints the
answers as JSON: seconds on the monotonic clock, the address's place among the arguments, the number.
"""

from __future__ import annotations

import json
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise

INTERVAL = 0.01

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, at a moment of the monotonic clock."""

    at: float
    where: int
    """The place of its address."""
    number: int


@dataclass(slots=True)
class Using:
    """A user, and what was answered once they have stopped."""

    answers: list[Answer] = field(default_factory=list)

    def gap(self, began: float, ended: float, where: int | None = None, held: float = 0.0) -> float:
        """The longest time between two answers in a stretch of time: at any address, or at one.

        :param held: seconds for which the one who measures kept the answers back.
        """
        moments = [
            answer.at
            for answer in self.answers
            if began <= answer.at <= ended and where in (None, answer.where)
        ]
        ends = [began, *moments, ended]
        return max(after - before for before, after in pairwise(ends)) - held

    def kept_counting(self) -> bool:
        """Whether no number came twice: then nothing was forgotten, and no second copy has counted."""
        return len({answer.number for answer in self.answers}) == len(self.answers) > 0


@contextmanager
def using(*addresses: Address) -> Iterator[Using]:
    """A user of these addresses while the context lasts; the answers are there when it has been left."""
    command = [sys.executable, "-I", "-S", __file__, *(f"{host}:{port}" for host, port in addresses)]
    used = Using()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdin and process.stdout
            process.stdout.readline()  # it asks
            yield used
            process.stdin.close()
            used.answers += [Answer(*row) for row in json.loads(process.stdout.read())]
        finally:
            process.kill()


class _Line:
    """Questions to one address."""

    def __init__(self, address: Address, where: int, selector: selectors.BaseSelector) -> None:
        self.where = where
        self._address = address
        self._selector = selector
        self._socket: socket.socket | None = None
        self._unread = b""
        self._open = False

    def ask(self) -> None:
        """Ask, if no question is open."""
        if self._socket is None:
            self._connect()
        if self._socket and not self._open:
            try:
                self._open = self._socket.send(b"\n") == 1
            except BlockingIOError:
                pass  # it is not connected yet
            except OSError:
                self._drop()

    def answers(self) -> Iterator[int]:
        """Read what has come."""
        assert self._socket
        try:
            came = self._socket.recv(4096)
        except BlockingIOError:
            return
        except ConnectionRefusedError:
            self._drop()
            return
        except OSError:
            came = b""
        if not came:
            self._drop()
            self.ask()
            return
        *whole, self._unread = (self._unread + came).split(b"\n")
        for line in whole:
            self._open = False
            yield int(line)

    def _connect(self) -> None:
        made = socket.socket()
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(BlockingIOError):
            try:
                made.connect(self._address)
            except ConnectionRefusedError:
                made.close()
                return
        self._socket = made
        self._selector.register(made, selectors.EVENT_READ, self)

    def _drop(self) -> None:
        if self._socket:
            self._selector.unregister(self._socket)
            self._socket.close()
        self._socket, self._unread, self._open = None, b"", False


def _use(addresses: Sequence[Address]) -> list[tuple[float, int, int]]:
    """Ask until standard input ends."""
    came: list[tuple[float, int, int]] = []
    with selectors.DefaultSelector() as selector:
        lines = [_Line(address, where, selector) for where, address in enumerate(addresses)]
        selector.register(sys.stdin, selectors.EVENT_READ)
        due = time.monotonic()
        while True:
            if (wait := due - time.monotonic()) <= 0:
                for line in lines:
                    line.ask()
                due = max(due + INTERVAL, time.monotonic())
                continue
            for key, _ in selector.select(wait):
                if key.fileobj is sys.stdin:
                    return came
                line = key.data
                for number in line.answers():
                    came.append((time.monotonic(), line.where, number))


def main() -> None:
    places = [text.rpartition(":") for text in sys.argv[1:]]
    print("asking", flush=True)
    with suppress(KeyboardInterrupt):
        print(json.dumps(_use([(host, int(port)) for host, _, port in places])))


if __name__ == "__main__":
    main()
