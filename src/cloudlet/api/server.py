"""The HTTP server inside ``cloudlet serve``: threads, a socket that is private or encrypted, an end.

A connection that is idle costs no thread, nor does one on which nothing has come yet. One that sends, waits
or reads slowly costs one, and there can be many; but only ``threads`` requests are worked on at a time, and
who waits or transfers is not counted among them (:class:`cloudlet.api.operation.Desk`). The thread that
accepts waits for nobody: TLS begins in the thread that a client's first byte costs.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from wsgiref.types import WSGIApplication

from cheroot.connections import ConnectionManager
from cheroot.errors import FatalSSLAlert
from cheroot.makefile import StreamReader, StreamWriter
from cheroot.server import HTTPConnection, HTTPRequest
from cheroot.ssl import Adapter
from cheroot.workers.threadpool import ThreadPool
from cheroot.wsgi import Server as CherootServer
from oslo_log import log

from cloudlet.errors import ConflictError, RefusedError
from cloudlet.service.options import Listening

LOG = log.getLogger(__name__)
_HEADER_BYTES = 64 << 10
_SILENT_SECONDS = 10
"""Longest time between two bytes of a request or of an answer."""
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 16 << 20
_NOWHERE = bytearray(64 << 10)
"""Where bytes go that nobody reads: the same place for all."""
_CALM_SECONDS = 10.0
"""So long after the last thread that was missing, those too many begin to go."""
_SPARE = 256
"""Threads for clients that are slow."""
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_PAUSE_SECONDS = 0.1
"""So long nobody is accepted after there was no room for one."""
_TOLD_SECONDS = 60.0
"""Between two words about that."""
_NOT_TLS = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n"
    b"Content-Length: 34\r\n\r\nthis port speaks TLS: use https://\n"
)


class _Request(HTTPRequest):
    """A request whose body may be left unread: it is never collected, and its sender gets the answer."""

    _unread = False

    def send_headers(self) -> None:
        self._unread = self.chunked_read or getattr(self.rfile, "remaining", 0) > 0
        if self._unread:
            self.close_connection = True
        super().send_headers()

    def respond(self) -> None:
        super().respond()
        if self._unread:
            _linger(self.conn.socket)


class _Connection(HTTPConnection):
    RequestHandlerClass = _Request

    def communicate(self) -> bool:
        """Answer what has come; whether the connection stays open."""
        if not isinstance(self.socket, ssl.SSLSocket):
            return bool(super().communicate())  # type: ignore[no-untyped-call]
        if self.socket.version() is None and not self._greeted():
            return False
        # What is decrypted already wakes nobody who watches the socket.
        while goes_on := bool(super().communicate()):  # type: ignore[no-untyped-call]
            if not self.socket.pending():
                break
        return goes_on

    def _greeted(self) -> bool:
        """Begin TLS; false if the client does not, or does not as it should."""
        try:
            self.socket.do_handshake()
        except OSError as error:
            LOG.debug("no TLS with %s: %s", self.remote_addr, error)
            if getattr(error, "reason", "") == "HTTP_REQUEST":
                self._answer_plainly()
            return False
        return True

    def _answer_plainly(self) -> None:
        """Tell who does not know it that this port speaks TLS."""
        self.socket = socket.socket(fileno=self.socket.detach())
        self.socket.settimeout(_SILENT_SECONDS)
        with suppress(OSError):
            self.socket.sendall(_NOT_TLS)
            _linger(self.socket)


def _linger(connection: socket.socket) -> None:
    """A connection closed with bytes unread is reset, and the answer with it: read on for a while."""
    deadline = time.monotonic() + _LINGER_SECONDS
    with suppress(OSError):
        if not isinstance(connection, ssl.SSLSocket):
            connection.shutdown(socket.SHUT_WR)
        connection.settimeout(_LINGER_SECONDS)
        left = _LINGER_BYTES
        while left > 0 and time.monotonic() < deadline and (came := connection.recv_into(_NOWHERE)):
            left -= came


class _Encrypted(Adapter):
    """How a connection is encrypted: with what ``context`` is when it comes."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context

    def bind(self, sock: socket.socket) -> socket.socket:
        return sock

    def wrap(self, sock: socket.socket) -> tuple[ssl.SSLSocket, dict[str, str]]:
        try:
            return self.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False), {}
        except (OSError, ValueError) as error:  # it is gone already
            raise FatalSSLAlert(*error.args) from error

    def get_environ(self) -> dict[str, str]:
        return {}

    def makefile(self, sock: socket.socket, mode: str = "r", bufsize: int = -1) -> Any:
        return (StreamReader if "r" in mode else StreamWriter)(sock, mode, bufsize)


class _Connections(ConnectionManager):
    """Those that are open. While there is no room for another they are served, and expire, as always."""

    _told = float("-inf")

    def _from_server_socket(self, server_socket: socket.socket) -> HTTPConnection | None:
        accepting: Any = super()  # cheroot tells nobody of this
        try:
            accepted: HTTPConnection | None = accepting._from_server_socket(server_socket)
            return accepted
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            if time.monotonic() - self._told > _TOLD_SECONDS:
                self._told = time.monotonic()
                LOG.error("nobody can connect until others have gone: %s", error)
            time.sleep(_PAUSE_SECONDS)
            return None


class Server(CherootServer):
    """A server of an application; :meth:`serve` returns when :meth:`stop` was called."""

    ConnectionClass = _Connection

    def __init__(
        self,
        listening: Listening,
        app: WSGIApplication,
        *,
        threads: int,
        busy: int,
        tls: ssl.SSLContext | None = None,
        shared: bool = False,
    ) -> None:
        """Listen; nobody is served yet.

        :param threads: how many requests are worked on at a time.
        :param busy: how many more may wait, or transfer.
        :param tls: what to speak TLS with.
        :param shared: whether other processes listen at the same place, each for some of the clients.
        :raises ConflictError: that is not possible there.
        """
        address: Any = str(listening.path) if listening.path else (listening.host, listening.port)
        super().__init__(
            address, app, numthreads=threads, server_name="cloudlet", timeout=_SILENT_SECONDS,
            request_queue_size=256, shutdown_timeout=2, reuse_port=shared,
        )  # fmt: skip
        self.software = "cloudlet"
        self.max_request_header_size = _HEADER_BYTES
        most = threads + busy + _SPARE
        self.requests = _Threads(self, threads, most)
        self.keep_alive_conn_limit = most
        if tls:
            self.ssl_adapter = _Encrypted(tls)
        try:
            self.prepare()
        except OSError as error:
            raise ConflictError(
                f"cannot listen at {_shown(address)}: {error}", hint="name another"
            ) from error

    @property
    def where(self) -> str:
        """Where it listens, as a URL."""
        if isinstance(self.bind_addr, str):
            return f"unix:{self.bind_addr}"
        host, port = self.bind_addr[:2]
        scheme = "https" if self.ssl_adapter else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def renew(self, tls: ssl.SSLContext) -> None:
        """Show another certificate to whoever connects from now on."""
        if self.ssl_adapter:
            self.ssl_adapter.context = tls

    def prepare(self) -> None:
        super().prepare()
        self._connections.close()  # type: ignore[has-type]  # there are none yet
        self._connections = _Connections(self)

    def process_conn(self, conn: HTTPConnection) -> None:
        """Have a thread answer a connection; a new one when its first byte is there."""
        if conn.last_used is None:
            self._connections.put(conn)
        else:
            super().process_conn(conn)

    def error_log(self, msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
        LOG.log(level, "%s", msg, exc_info=traceback)

    def bind_unix_socket(self, path: str) -> None:
        """Bind a socket that only its owner can open, from the first moment on."""
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_dead(place)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        self.socket = listener

    def stop(self) -> None:
        super().stop()
        if isinstance(self.bind_addr, str):
            Path(self.bind_addr).unlink(missing_ok=True)


class _Queue(queue.Queue[Any]):
    """Whoever takes a connection is not idle from the same moment on."""

    def _get(self) -> Any:
        taken = super()._get()
        if isinstance(taken, HTTPConnection):
            threading.current_thread().conn = taken  # type: ignore[attr-defined]
        return taken


class _Threads(ThreadPool):
    """Threads that become more while clients keep them from other clients."""

    _grown = 0.0

    def __init__(self, server: CherootServer, least: int, most: int) -> None:
        super().__init__(server, min=least, max=most)
        self._queue = _Queue()
        self.get = self._queue.get
        self._putting = threading.Lock()

    def grow(self, amount: int) -> None:
        """Begin more threads. The pool's own way waits for each, for ever for one that was told to end."""
        pool: Any = self  # cheroot tells nobody of these
        pool._clear_dead_threads()
        room = self.max - len(pool._threads)
        for _ in range(min(amount, room)):
            pool._threads.append(pool._spawn_worker())

    def put(self, connection: Any) -> None:
        with self._putting:
            # In this order: who is taken meanwhile is counted twice, and not as one who waits for nobody.
            missing = self.qsize + 1 - (idle := self.idle)
            if missing > 0:
                self._grown = time.monotonic()
                self.grow(missing)
            elif idle > self.min and time.monotonic() - self._grown > _CALM_SECONDS:
                self.shrink(idle // 2)
            super().put(connection)


def _remove_dead(place: Path) -> None:
    """Remove the socket of a server that was killed."""
    if not place.is_socket():
        if place.exists():
            raise RefusedError(f"{place} is not a socket", hint="name another place")
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(place))
        except OSError:
            place.unlink(missing_ok=True)
            return
    raise ConflictError(
        f"somebody serves at {place} already", hint="stop that, or name another with --listen"
    )


def _shown(address: Any) -> str:
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"
