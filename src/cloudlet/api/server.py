"""The HTTP server inside ``cloudlet serve``: threads, a socket that is private or encrypted, an end.

A connection that is idle costs no thread. One that sends, waits or reads slowly costs one, and there can be
many; but only ``threads`` requests are worked on at a time, and who waits or transfers is not counted among
them (:class:`cloudlet.api.operation.Desk`).
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from wsgiref.types import WSGIApplication

from cheroot.server import HTTPConnection, HTTPRequest
from cheroot.ssl.builtin import BuiltinSSLAdapter
from cheroot.workers.threadpool import ThreadPool
from cheroot.wsgi import Server as CherootServer

from cloudlet.errors import ConflictError, RefusedError, UsageError
from cloudlet.service.options import Options

_HEADER_BYTES = 64 << 10
_SILENT_SECONDS = 10
"""Longest time between two bytes of a request or of an answer."""
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 16 << 20
_PIECE = 64 << 10
_SPARE = 256
"""Threads for clients that are slow."""


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
            self._linger()

    def _linger(self) -> None:
        """A connection closed with bytes unread is reset, and the answer with it: read on for a while."""
        connection = self.conn.socket
        deadline = time.monotonic() + _LINGER_SECONDS
        with suppress(OSError):
            if not isinstance(connection, ssl.SSLSocket):
                connection.shutdown(socket.SHUT_WR)
            connection.settimeout(_LINGER_SECONDS)
            left = _LINGER_BYTES
            while left > 0 and time.monotonic() < deadline and (piece := connection.recv(_PIECE)):
                left -= len(piece)


class _Connection(HTTPConnection):
    RequestHandlerClass = _Request


class Server(CherootServer):
    """A server of an application; :meth:`serve` returns when :meth:`stop` was called."""

    ConnectionClass = _Connection

    def __init__(self, options: Options, app: WSGIApplication) -> None:
        listening = options.listening
        address: Any = str(listening.path) if listening.path else (listening.host, listening.port)
        super().__init__(
            address, app, numthreads=options.threads, server_name="cloudlet", timeout=_SILENT_SECONDS,
            request_queue_size=256, shutdown_timeout=2,
        )  # fmt: skip
        self.software = "cloudlet"
        self.max_request_header_size = _HEADER_BYTES
        most = options.threads + options.waiters + options.transfers + _SPARE
        self.requests = _Threads(self, min=options.threads, max=most)
        if options.tls:
            self.ssl_adapter = _tls(*options.tls)
        try:
            self.prepare()
        except OSError as error:
            raise ConflictError(
                f"cannot listen at {_shown(address)}: {error}", hint="name another with --listen"
            ) from error

    @property
    def where(self) -> str:
        """Where it listens, as a URL."""
        if isinstance(self.bind_addr, str):
            return f"unix:{self.bind_addr}"
        host, port = self.bind_addr[:2]
        scheme = "https" if self.ssl_adapter else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

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


class _Threads(ThreadPool):
    """Threads that become more while clients keep them from other clients."""

    def put(self, connection: Any) -> None:
        if self.idle <= self.qsize:
            self.grow(1)
        super().put(connection)


def _tls(certificate: Path, key: Path) -> BuiltinSSLAdapter:
    try:
        adapter = BuiltinSSLAdapter(str(certificate), str(key))
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"tls_certificate, tls_key: {error}", hint="both are PEM files") from error
    adapter.context.minimum_version = ssl.TLSVersion.TLSv1_2
    return adapter


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
