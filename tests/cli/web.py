"""A web server with the faults that the world's have; the first part of a path says which.

``/whole`` ``/cut`` (each answer ends after some bytes, ranges are given) ``/cut-no-ranges`` (the same, and a
range is ignored) ``/changed`` (another entity tag at each request, and cut) ``/missing`` ``/broken``
(status 500) ``/mending`` (500 twice, then whole) ``/loop`` (a redirect to itself) ``/moved`` (to ``/whole``)
``/signed`` (a redirect to an address that is good as long as ``web.ticket`` stays; to none with
``web.never``) ``/slow`` (a piece every 10 ms) ``/stall`` (half of it, then nothing) ``/gone`` (cut once, then
every connection ends and nobody listens until ``web.back`` is set).

What is wrong with ranges only: ``/no-ranges`` (there are none) ``/claimed-ranges`` (there are none, but the
server says so) ``/wrong-range`` (the bytes after those that were asked for, and saying so) ``/lying-range``
(other bytes than it says) ``/short-range`` (half of what it says) ``/changed-ranges`` (of another entity tag)
``/closing-ranges`` (the connection ends after each) ``/slow-ranges`` (never answered).

And at the moment that a test chooses: from byte ``web.hold`` on a stream is not sent until ``web.go`` is
set, and with ``web.hold_ranges`` no single range either; byte ``web.damaged`` of the content has another
bit 3 than it should; after each of ``web.cuts`` bytes that were sent in
all a connection ends; ``web.leave`` ends all of them, and nobody listens until ``web.back`` is set.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tests.cli.damage import flipped

CUT_AFTER = 20_000
"""Bytes of an answer before the connection ends."""
_WITHOUT_RANGES = ("cut-no-ranges", "no-ranges", "claimed-ranges")
_PIECE_SECONDS = 0.01


@dataclass
class Answer:
    """What was sent for one request."""

    path: str
    wanted: str | None
    """The request's Range."""
    start: int = 0
    count: int = 0
    ended: threading.Event = field(default_factory=threading.Event)
    """All was sent, or who asked has gone."""

    @property
    def of_stream(self) -> bool:
        """Whether all from some byte on was asked for, and not one range."""
        return self.wanted is None or self.wanted.endswith("-")


@dataclass
class Web:
    """What is served, and what was asked for."""

    content: bytes
    url: str = ""
    rate: float | None = None
    """Bytes per second, of all answers together."""
    answers: list[Answer] = field(default_factory=list)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range of each request."""
    connections: int = 0
    left: threading.Event = field(default_factory=threading.Event)
    """Nobody listens."""
    back: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    hold: int | None = None
    hold_ranges: bool = False
    holding: threading.Event = field(default_factory=threading.Event)
    """Somebody waits for what is held."""
    go: threading.Event = field(default_factory=threading.Event)
    damaged: int | None = None
    cuts: list[int] = field(default_factory=list)
    ticket: int = 1
    """Of the address that is good."""
    never: bool = False
    """No further address is given."""
    leave: Callable[[], None] = lambda: None
    _asking: threading.Condition = field(default_factory=threading.Condition)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _taken_until: float = 0.0

    def note(self, path: str, wanted: str | None) -> None:
        with self._asking:
            self.asked.append((path, wanted))
            self._asking.notify_all()

    def wait_asked(self, wanted: set[str], timeout: float) -> bool:
        """Wait until all these ranges were asked for; whether they were."""
        with self._asking:
            return self._asking.wait_for(lambda: wanted <= set(self.ranges()), timeout)

    def wait_single_range(self, timeout: float) -> bool:
        """Wait until a range that ends somewhere was asked for; whether one was."""
        with self._asking:
            return self._asking.wait_for(
                lambda: any(wanted and not wanted.endswith("-") for wanted in self.ranges()), timeout
            )

    def ranges(self) -> list[str | None]:
        return [wanted for _, wanted in self.asked]

    @property
    def sent(self) -> int:
        """Bytes of all answers."""
        return sum(answer.count for answer in self.answers)

    def sent_twice(self) -> int:
        """Bytes that were sent more than once, counted each time after the first."""
        covered, twice = 0, 0
        for answer in sorted(self.answers, key=lambda answer: answer.start):
            end = answer.start + answer.count
            twice += max(0, min(end, covered) - answer.start)
            covered = max(covered, end)
        return twice

    def send(self, request: BaseHTTPRequestHandler, answer: Answer, body: bytes) -> None:
        size = max(1500, int(self.rate * _PIECE_SECONDS)) if self.rate else 16 << 10
        at = 0
        while at < len(body):
            place = answer.start + answer.count
            if place == self.hold if answer.of_stream else self.hold_ranges:
                self.holding.set()
                self.go.wait()
            piece = body[at : at + size]
            if answer.of_stream and self.hold is not None and place < self.hold:
                piece = piece[: self.hold - place]
            if self.rate:
                with self._lock:
                    self._taken_until = max(self._taken_until, time.monotonic()) + len(piece) / self.rate
                    wait = self._taken_until - time.monotonic()
                self.ended.wait(max(0.0, wait))
            if self.cuts and self.sent >= self.cuts[0]:
                del self.cuts[0]
                raise ConnectionAbortedError("cut")
            request.wfile.write(self._as_sent(piece, place))
            answer.count += len(piece)
            at += len(piece)

    def _as_sent(self, piece: bytes, place: int) -> bytes:
        if self.damaged is None or not place <= self.damaged < place + len(piece):
            return piece
        return flipped(piece, self.damaged - place, 3)


@contextmanager
def serving(content: bytes, tls: ssl.SSLContext | None = None) -> Iterator[Web]:
    web = Web(content)
    listening: list[tuple[_Server, threading.Thread]] = []
    leaving: list[threading.Thread] = []

    def open_at(port: int) -> None:
        server = _Server(web, port, tls)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        listening.append((server, thread))
        web.url = f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}"

    def close() -> int:
        server, thread = listening.pop()
        server.shutdown()
        thread.join()
        server.server_close()
        return server.server_address[1]

    def stay_away() -> None:
        port = close()
        web.left.set()
        if web.back.wait(60.0) and not web.ended.is_set():
            open_at(port)

    def leave() -> None:
        leaving.append(threading.Thread(target=stay_away))
        leaving[-1].start()

    web.leave = leave
    open_at(0)
    try:
        yield web
    finally:
        web.ended.set()
        web.back.set()
        web.go.set()
        for thread in leaving:
            thread.join()
        if listening:
            close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, web: Web, port: int, tls: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.web = web
        self.open: set[socket.socket] = set()
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: object) -> None:
        """Who asked has gone, or did not like the certificate."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.web.connections += 1
        self.server.open.add(self.connection)

    def finish(self) -> None:
        self.server.open.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.close_connection = True
        self.gone = False
        try:
            _answer(self.server.web, self)
        finally:
            if self.gone:
                self.server.web.leave()


def _answer(web: Web, request: _Handler) -> None:
    how = urlsplit(request.path).path.strip("/")
    wanted = request.headers.get("Range")
    web.note(request.path, wanted)
    match how:
        case "missing":
            return _head(request, 404, 0)
        case "loop" | "moved":
            place = {"loop": "/loop", "moved": "/whole"}[how]
            return _head(request, 302, 0, Location=f"{web.url}{place}")
        case "signed" if web.never:
            return _head(request, 403, 0)
        case "signed":
            return _head(request, 302, 0, Location=f"{web.url}/ticket/{web.ticket}")
        case _ if how.startswith("ticket/") and how != f"ticket/{web.ticket}":
            return _head(request, 403, 0)
        case "broken":
            return _head(request, 500, 0)
        case "mending" if len(web.asked) < 3:
            return _head(request, 500, 0)
        case "slow-ranges" if wanted:
            web.ended.wait()
            return None
    tag = {"changed": f'"{len(web.asked)}"', "changed-ranges": '"2"' if wanted else '"1"'}.get(how, '"1"')
    answer = Answer(request.path, wanted)
    web.answers.append(answer)
    fields = {"ETag": tag}
    if how not in ("cut-no-ranges", "no-ranges"):
        fields["Accept-Ranges"] = "bytes"
    same = request.headers.get("If-Range") in (None, tag) or how == "changed-ranges"
    asked = (
        re.fullmatch(r"bytes=(\d+)-(\d*)", wanted) if wanted and same and how not in _WITHOUT_RANGES else None
    )
    if asked:
        return _answer_range(web, request, how, answer, int(asked[1]), asked[2], fields)
    body = web.content
    _head(request, 200, len(body), **fields)
    if how == "cut-no-ranges":
        body = body[: CUT_AFTER * len(web.asked)]
    elif how in ("cut", "changed", "gone"):
        body = body[:CUT_AFTER]
        request.gone = how == "gone"
    elif how == "stall":
        body = body[: len(body) // 2]
    return _body(web, request, how, answer, body)


def _answer_range(
    web: Web, request: _Handler, how: str, answer: Answer, start: int, last: str, fields: dict[str, str]
) -> None:
    total = len(web.content)
    if start >= total:
        return _head(request, 416, 0, **{"Content-Range": f"bytes */{total}"})
    end = min(int(last) + 1, total) if last else total
    if how == "wrong-range":
        start, end = start + 1, end + 1
    body = web.content[start:end]
    answer.start = start
    fields["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
    if how == "lying-range":
        body = bytes(255 - byte for byte in body)
    elif how == "short-range":
        body = body[: len(body) // 2]
    # Cuts are for the connection: what an answer says it brings is right.
    keep = bool(last) and how != "closing-ranges" and not (how == "cut" and len(body) > CUT_AFTER)
    request.close_connection = not keep
    _head(request, 206, len(body), **fields)
    if how in ("cut", "changed"):
        body = body[:CUT_AFTER]
    elif how == "stall":
        body = body[: max(0, total // 2 - start)]
    return _body(web, request, how, answer, body)


def _body(web: Web, request: _Handler, how: str, answer: Answer, body: bytes) -> None:
    pieces = [body[at : at + 4096] for at in range(0, len(body), 4096)] if how == "slow" else [body]
    try:
        for piece in pieces:
            web.send(request, answer, piece)
            if how == "slow":
                web.ended.wait(0.01)
        if how == "stall":
            web.ended.wait()
    except OSError:
        request.close_connection = True  # who asked has gone
    finally:
        answer.ended.set()


def _head(request: _Handler, status: int, size: int, **fields: str) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(size))
    if request.close_connection:
        request.send_header("Connection", "close")
    for name, value in fields.items():
        request.send_header(name, value)
    request.end_headers()
