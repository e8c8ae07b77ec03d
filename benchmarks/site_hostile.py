"""Clients that mean harm: ``python -m benchmarks.site_hostile KIND URL AUTHORIZATION OVERLAY``.

It says that they are there, goes on until its standard input is closed, and says which answers they got. Each
client is a thread that begins anew when it is cut off. All that they share with the rest of the machine is
their core, on which they give way to others: what is measured is what they do to the server.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from benchmarks.site_served import MEMBER, basic

DOWNLOAD_MIB = 12
"""More than the kernel takes off a server that sends to somebody who does not read."""
_ANSWER_SECONDS = 60.0
_BYTE_SECONDS = 0.5
"""Between two bytes of a slow client."""
_FORGED_SECONDS = 0.2
"""Between two passwords of one client."""
_EVENT_SECONDS = 2.0
_PAUSE = 0.05
"""Before one who was cut off begins anew."""
_OFFERED, _PIECE = 1 << 30, b" " * (1 << 16)
_ARRAYS = b"[" * 1_000_000
_OBJECTS = b'{"overlay":' * 90_000
"""Both have less bytes than a body may have."""


@dataclass
class Target:
    """Who is to be harmed, and what came of it."""

    url: str
    authorization: str
    overlay: str
    answers: Counter[int] = field(default_factory=Counter)
    connected: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname and parts.port
        return parts.hostname, parts.port

    def connect(self, receive_bytes: int = 0) -> socket.socket:
        """A connection, which takes in no more than so many bytes that nobody reads."""
        connection = socket.socket()
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(_ANSWER_SECONDS)
        connection.connect(self.address)
        self.connected.release()
        return connection

    def asks(self) -> http.client.HTTPConnection:
        """A connection of one who reads answers."""
        connection = http.client.HTTPConnection(*self.address, timeout=_ANSWER_SECONDS)
        connection.connect()
        self.connected.release()
        return connection

    def ask(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | None = None,
        authorization: str = "",
    ) -> bytes:
        """Ask, note what was answered, and return what it says."""
        headers = {"Authorization": authorization or self.authorization, "Content-Type": "application/json"}
        connection.request(method, path, body, headers)
        with connection.getresponse() as answer:
            said = answer.read()
            self.answers[answer.status] += 1
        return said

    def head(self, method: str, path: str, *more: str) -> bytes:
        """The head of a request of a known user."""
        lines = (f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: {self.authorization}", *more)
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


Client = Callable[[Target, int], None]
"""The life of a client with a number, until it is cut off."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Clients of a kind."""

    what: str
    client: Client
    number: int
    harmless: bool = False
    """Whether they ask for what they may have."""


def _slow(target: Target, _: int) -> None:
    with target.connect() as connection:
        connection.sendall(b"GET /v1/instances HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        while True:
            connection.sendall(b"x")
            time.sleep(_BYTE_SECONDS)


def _half_open(target: Target, _: int) -> None:
    with target.connect() as connection:
        connection.settimeout(None)
        connection.recv(1)


def _unread(target: Target, number: int) -> None:
    with target.connect(receive_bytes=4096) as connection:
        if number % 2:
            accept = "Accept: text/event-stream"
            connection.sendall(target.head("GET", "/v1/events?after=0", accept))
        else:
            connection.sendall(target.head("GET", f"/v1/overlays/{target.overlay}/file"))
        ended = select.poll()
        ended.register(connection, select.POLLRDHUP)
        ended.poll()


def _huge(target: Target, _: int) -> None:
    with target.connect() as connection:
        json_of = "Content-Type: application/json"
        connection.sendall(
            target.head("POST", "/v1/overlays", json_of, f"Content-Length: {_OFFERED}") + b'{"overlay": "'
        )
        answer = connection.recv(4096)
        target.answers[int(answer.split()[1])] += 1
        for _ in range(_OFFERED // len(_PIECE)):
            connection.sendall(_PIECE)


def _nested(target: Target, number: int) -> None:
    connection = target.asks()
    while True:
        target.ask(connection, "POST", "/v1/overlays", _OBJECTS if number % 2 else _ARRAYS)


def _forged(target: Target, number: int) -> None:
    connection = target.asks()
    tried = 0
    while True:
        began, tried = time.monotonic(), tried + 1
        forged = basic(MEMBER if number % 2 else f"nobody-{number}", f"guess {number} {tried}")
        target.ask(connection, "GET", "/v1/instances", authorization=forged)
        time.sleep(max(0.0, began + _FORGED_SECONDS - time.monotonic()))


def _waiting(target: Target, _: int) -> None:
    connection = target.asks()
    while True:
        target.ask(connection, "GET", "/v1/events?wait=30")


def _woken(target: Target, number: int) -> None:
    if number:
        return _waiting(target, number)
    connection = target.asks()
    while True:
        made = json.loads(target.ask(connection, "POST", "/v1/overlays", b'{"overlay": {"name": "x"}}'))
        target.ask(connection, "DELETE", f"/v1/overlays/{made['overlay']['id']}")
        time.sleep(_EVENT_SECONDS)


KINDS = {
    "slow": Kind(f"200 send a header, a byte every {_BYTE_SECONDS} s", _slow, 200),
    "half_open": Kind("200 connect and send nothing", _half_open, 200),
    "unread": Kind(
        f"100 ask, half of them for {DOWNLOAD_MIB} MiB and half for a stream of events, and read nothing",
        _unread, 100, True,
    ),
    "huge": Kind("8 offer bodies of 1 GiB of JSON", _huge, 8),
    "nested": Kind("4 send JSON, 1,000,000 arrays or 90,000 objects deep, again and again", _nested, 4),
    "forged": Kind("8 try 5 passwords a second each, for users that there are or are not", _forged, 8),
    "waiting": Kind("500 wait for events for 30 s", _waiting, 500, True),
    "woken": Kind(
        f"500 wait, and are woken and answered by 2 events every {_EVENT_SECONDS:.0f} s", _woken, 501, True
    ),
}  # fmt: skip


def _lives(client: Client, target: Target, number: int) -> None:
    while True:
        with suppress(OSError, http.client.HTTPException, ValueError, LookupError):
            client(target, number)
        time.sleep(_PAUSE)


def main() -> None:
    """Do harm until standard input is closed."""
    name, url, authorization, overlay = sys.argv[1:]
    os.nice(19)
    kind, target = KINDS[name], Target(url, authorization, overlay)
    threading.stack_size(256 << 10)
    for number in range(kind.number):
        threading.Thread(target=_lives, args=(kind.client, target, number), daemon=True).start()
    for _ in range(kind.number):
        target.connected.acquire()
    print("here", flush=True)
    sys.stdin.read()
    print(json.dumps(target.answers), flush=True)
    os._exit(0)  # all connections are cut off at once


if __name__ == "__main__":
    main()
