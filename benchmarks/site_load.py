"""Clients that keep a server busy: ``python -m benchmarks.site_load``, with a job on standard input.

Each of a few connections sends the same request again as soon as it is answered. They are read in turns by
one thread, which does so little that one core of clients is enough for one of any server that is measured.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import sys
import time
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_SECONDS = 60.0
"""Longest wait for an answer."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to ask, how often, and what must come back."""

    url: str
    method: str
    authorization: str = ""
    body: str = ""
    status: int = 200
    connections: int = 4
    seconds: float = _SECONDS
    most: int = 1 << 30
    """Requests, if they are not to be as many as there is time for."""

    def request(self) -> bytes:
        """The request as it is sent."""
        parts = urlsplit(self.url)
        lines = [
            f"{self.method} {parts.path}{f'?{parts.query}' if parts.query else ''} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Accept: application/json",
        ]
        if self.authorization:
            lines.append(f"Authorization: {self.authorization}")
        if self.body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(self.body)}"]
        return ("\r\n".join(lines) + f"\r\n\r\n{self.body}").encode()


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came of it."""

    count: int
    seconds: float
    """From the first request to the last answer."""


class _Connection:
    """A connection that is kept, and the answer that is coming."""

    def __init__(self, job: Job) -> None:
        parts = urlsplit(job.url)
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._status = f"HTTP/1.1 {job.status} ".encode()
        self._answer = b""

    def received(self) -> bool:
        """Take in what has come; whether the answer is whole."""
        piece = self.socket.recv(1 << 20)
        self._answer += piece
        head, found, body = self._answer.partition(b"\r\n\r\n")
        if not piece or (found and not head.startswith(self._status)):
            raise AssertionError(f"{self._answer[:300]!r} instead of {self._status!r}")
        if not found:
            return False
        length = _LENGTH.search(head + b"\r\n")
        if length is None:
            raise AssertionError(f"{head!r} has no length")
        if len(body) < int(length[1]):
            return False
        self._answer = b""
        return True


def load(job: Job) -> Loaded:
    """Do a job, in this process."""
    request = job.request()
    selector = selectors.DefaultSelector()
    connections = [_Connection(job) for _ in range(job.connections)]
    for connection in connections:
        selector.register(connection.socket, selectors.EVENT_READ, connection)
    sent = count = 0
    last = began = time.perf_counter()
    for connection in connections[: job.most]:
        connection.socket.sendall(request)
        sent += 1
    while count < sent:
        ready = selector.select(_SECONDS)
        if not ready:
            raise AssertionError(f"no answer within {_SECONDS:.0f} s")
        for key, _ in ready:
            if not key.data.received():
                continue
            count += 1
            last = time.perf_counter()
            if sent < job.most and last - began < job.seconds:
                key.data.socket.sendall(request)
                sent += 1
    for connection in connections:
        connection.socket.close()
    return Loaded(count, last - began)


def main() -> None:
    """Do the job on standard input, and print what came of it."""
    print(json.dumps(asdict(load(Job(**json.load(sys.stdin))))))


if __name__ == "__main__":
    main()
