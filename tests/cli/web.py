"""A web server with the faults that the world's have; the first part of a path says which.

``/whole`` ``/cut`` (the connection ends after some bytes, ranges are given) ``/cut-no-ranges`` (the same, and
a range is ignored) ``/changed`` (another entity tag at each request, and cut) ``/missing`` ``/broken``
(status 500) ``/mending`` (500 twice, then whole) ``/loop`` (a redirect to itself) ``/moved`` (to ``/whole``)
``/slow`` (a piece every 10 ms) ``/stall`` (half of it, then nothing).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CUT_AFTER = 60_000
"""Bytes of an answer before the connection ends."""


@dataclass
class Web:
    """What is served, and what was asked for."""

    content: bytes
    url: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range of each request."""
    ended: threading.Event = field(default_factory=threading.Event)

    def ranges(self) -> list[str | None]:
        return [wanted for _, wanted in self.asked]


@contextmanager
def serving(content: bytes) -> Iterator[Web]:
    web = Web(content)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            _answer(web, self)
            self.close_connection = True

    server = Server(("127.0.0.1", 0), Handler)
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield web
    finally:
        web.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _answer(web: Web, request: BaseHTTPRequestHandler) -> None:
    how = request.path.strip("/")
    wanted = request.headers.get("Range")
    web.asked.append((request.path, wanted))
    match how:
        case "missing":
            return _head(request, 404, 0)
        case "loop" | "moved":
            place = {"loop": "/loop", "moved": "/whole"}[how]
            return _head(request, 302, 0, Location=f"{web.url}{place}")
        case "broken":
            return _head(request, 500, 0)
        case "mending" if len(web.asked) < 3:
            return _head(request, 500, 0)
    tag = f'"{len(web.asked)}"' if how == "changed" else '"1"'
    start = 0
    if wanted and how != "cut-no-ranges" and request.headers.get("If-Range") in (None, tag):
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
    body = web.content[start:]
    _head(request, 206 if start else 200, len(body), ETag=tag)
    if how == "cut-no-ranges":
        body = body[: CUT_AFTER * len(web.asked)]
    elif how in ("cut", "changed"):
        body = body[:CUT_AFTER]
    elif how == "stall":
        body = body[: len(body) // 2]
    pieces = [body[at : at + 4096] for at in range(0, len(body), 4096)] if how == "slow" else [body]
    try:
        for piece in pieces:
            request.wfile.write(piece)
            request.wfile.flush()
            if how == "slow":
                web.ended.wait(0.01)
        if how == "stall":
            web.ended.wait()
    except ConnectionError:
        pass  # who asked has gone


def _head(request: BaseHTTPRequestHandler, status: int, size: int, **fields: str) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(size))
    request.send_header("Connection", "close")
    for name, value in fields.items():
        request.send_header(name, value)
    request.end_headers()
