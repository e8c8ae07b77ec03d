"""The process behind the port: its bounded threads, and what it remembers.

Stands between the socket and `service`, which answers the requests.
"""

from __future__ import annotations

import secrets
import socketserver
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from . import solver
from .query import RefusalError

if TYPE_CHECKING:
    from .instance import Instance

MAX_CONNECTIONS = 16


class Planner:
    """What the process remembers: readiness, the counter, the last plan. In memory only."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.process = secrets.token_hex(8)
        self.last: tuple[Instance, solver.Plan] | None = None
        self._turn = threading.Lock()
        self._count = 0
        self._count_lock = threading.Lock()

    def count(self) -> int:
        """Add one and return the sum."""
        with self._count_lock:
            self._count += 1
            return self._count

    def plan(self, instance: Instance, budget: solver.Budget, seed: int) -> solver.Plan:
        """Plan now, or refuse if another plan is being computed."""
        if not self._turn.acquire(blocking=False):
            raise RefusalError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "busy",
                "another plan is being computed: ask again",
                Retry_After="2",
            )
        try:
            plan = solver.plan(instance, budget, seed)
            self.last = instance, plan
        except solver.NoPlanError as error:
            raise RefusalError(HTTPStatus.SERVICE_UNAVAILABLE, "no-plan", str(error)) from error
        finally:
            self._turn.release()
        return plan


class Server(ThreadingHTTPServer):
    """A thread per connection, at most MAX_CONNECTIONS of them; the rest get 503 at once."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.planner = Planner()
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of the host's name, which hangs without a DNS."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread if a slot is free."""
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        body = b'{"error": "busy", "message": "too many connections: ask again"}\n'
        head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nRetry-After: 2"
        request.settimeout(1)
        try:
            request.sendall(
                f"HTTP/1.1 503 Service Unavailable\r\n{head}\r\nConnection: close\r\n\r\n".encode() + body
            )
        except OSError:
            pass  # the client left: nothing to tell it
        finally:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection and give its slot back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()
