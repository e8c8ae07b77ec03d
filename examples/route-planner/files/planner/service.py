"""The HTTP side: one table of routes, small handlers, and limits on everything a stranger sends.

Stands between `server` and `solver`. Body size and the time to send it are bounded; each answer
closes its connection. There is no authentication here: who may reach the port is the platform's
business. Errors are JSON: {"error": code, "message": what to do}.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from . import page, solver
from .instance import BadInstanceError, parse
from .query import RefusalError, read_budget, read_query

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .server import Server

MAX_BODY = 1 << 20  # bytes
BODY_SECONDS = 30.0  # to send the whole body
DRAIN_BYTES = 8 * MAX_BODY  # read and thrown away so that a refused sender sees the answer


class Handler(BaseHTTPRequestHandler):
    """One request: looked up in ROUTES, answered, closed."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "route-planner/1.0"
    timeout = BODY_SECONDS  # for the request line, the headers, and each read

    def dispatch(self) -> None:
        """Answer by the table; every refusal leaves through here."""
        self.close_connection = True
        try:
            url = urlsplit(self.path)
            methods = ROUTES.get(url.path)
            if methods is None:
                raise RefusalError(HTTPStatus.NOT_FOUND, "not-found", f"known are {', '.join(ROUTES)}")
            handler = methods.get("GET" if self.command == "HEAD" else self.command)
            if handler is None:
                allowed = ", ".join(methods)
                raise RefusalError(
                    HTTPStatus.METHOD_NOT_ALLOWED,
                    "method-not-allowed",
                    f"{url.path} answers to {allowed}",
                    Allow=allowed,
                )
            handler(self, read_query(url.query))
        except RefusalError as refusal:
            self.refuse(refusal)
        except ConnectionError as error:
            self.log_error("the client left: %s", error)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = dispatch  # noqa: N815

    def healthz(self, _query: Mapping[str, str]) -> None:
        """200 once the solver has solved the bundled instance, 503 before."""
        ready = self.server.planner.ready.is_set()
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        self.reply(status, {"status": "ok" if ready else "warming-up", "solver": solver.SOLVER})

    def counter(self, _query: Mapping[str, str]) -> None:
        """Count this request: a captured process goes on counting, a restarted one begins at 1."""
        planner = self.server.planner
        self.reply(HTTPStatus.OK, {"counter": planner.count(), "process": planner.process})

    def home(self, _query: Mapping[str, str]) -> None:
        """The page for people."""
        document = page.render(self.server.planner.last).encode()
        self.send("text/html; charset=utf-8", HTTPStatus.OK, document, page.HEADERS)

    def plan(self, query: Mapping[str, str]) -> None:
        """Plan the posted instance."""
        budget, seed = read_budget(query)
        try:
            instance = parse(self.body().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RefusalError(HTTPStatus.BAD_REQUEST, "bad-body", "the body is not UTF-8 text") from error
        except BadInstanceError as error:
            raise RefusalError(HTTPStatus.UNPROCESSABLE_ENTITY, "bad-instance", str(error)) from error
        plan = self.server.planner.plan(instance, budget, seed)
        answer = {
            "instance": instance.name,
            "routes": plan.routes,
            "cost": plan.cost,
            "vehicles": len(plan.routes),
            "solver": solver.SOLVER,
            "seconds": round(plan.seconds, 4),
            "iterations": plan.iterations,
            "seed": seed,
        }
        self.reply(HTTPStatus.OK, answer)

    def body(self) -> bytes:
        """The request's body, whose length must be announced and allowed."""
        self.check_length()
        left = int(self.headers["Content-Length"])
        chunks: list[bytes] = []
        deadline = time.monotonic() + BODY_SECONDS
        while left:
            try:
                chunk = self.rfile.read1(left)
            except TimeoutError:
                chunk = b""
            if not chunk or time.monotonic() > deadline:
                raise RefusalError(HTTPStatus.REQUEST_TIMEOUT, "incomplete", "the body ended early or late")
            chunks.append(chunk)
            left -= len(chunk)
        return b"".join(chunks)

    def check_length(self) -> None:
        """Refuse a body without a length or beyond MAX_BODY before reading any of it."""
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not length:
            raise RefusalError(HTTPStatus.LENGTH_REQUIRED, "length-required", "send a Content-Length")
        if not (length.isascii() and length.isdigit()):
            raise RefusalError(HTTPStatus.BAD_REQUEST, "bad-length", "Content-Length is not a number")
        if len(length) > 9 or int(length) > MAX_BODY:
            raise RefusalError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "too-large",
                f"the body may hold {MAX_BODY} bytes",
            )

    def handle_expect_100(self) -> bool:
        """Ask for the body only if it would be read: curl waits for this with large ones."""
        try:
            self.check_length()
        except RefusalError as refusal:
            self.close_connection = True
            self.refuse(refusal)
            return False
        return super().handle_expect_100()

    def refuse(self, refusal: RefusalError) -> None:
        """Answer an error, then take in what the client still sends, so that it reads it."""
        error = {"error": refusal.code, "message": refusal.message}
        self.reply(refusal.status, error, refusal.headers)
        if not self.headers.get("Content-Length") and "Transfer-Encoding" not in self.headers:
            return
        with contextlib.suppress(OSError):  # the client left, or sends no more
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            drained, deadline = 0, time.monotonic() + BODY_SECONDS
            while drained < DRAIN_BYTES and time.monotonic() < deadline:
                if not (chunk := self.rfile.read1(65536)):
                    return
                drained += len(chunk)

    def reply(self, status: HTTPStatus, content: object, headers: Mapping[str, str] | None = None) -> None:
        """Answer JSON."""
        self.send("application/json", status, json.dumps(content).encode() + b"\n", headers or {})

    def send(self, kind: str, status: HTTPStatus, content: bytes, headers: Mapping[str, str]) -> None:
        """Write one whole answer."""
        self.send_response(status)
        fixed = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
        }
        for name, value in {**fixed, **headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself (bad lines, unknown methods), as JSON."""
        del explain
        self.close_connection = True
        status = HTTPStatus(code)
        if not hasattr(self, "headers"):
            self.command, self.headers = self.command or "GET", self.MessageClass()
        self.reply(status, {"error": "bad-request", "message": message or status.phrase})


ROUTES: dict[str, dict[str, Callable[[Handler, Mapping[str, str]], None]]] = {
    "/": {"GET": Handler.home},
    "/healthz": {"GET": Handler.healthz},
    "/plan": {"POST": Handler.plan},
    "/counter": {"GET": Handler.counter},
}
