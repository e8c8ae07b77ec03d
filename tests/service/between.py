"""A TLS server of another's between a client and a site: in front of it, or where it should not be."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Alter = Callable[[Any], Any]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    address_family = socket.AF_INET


@dataclass
class Between:
    """It passes on what it hears, and remembers it."""

    port: int
    site: str = ""
    """The URL of what is behind it."""
    alter: Alter = lambda said: said
    """Called with each JSON that is answered."""
    closes: bool = False
    """Whether it ends a connection after each answer."""
    heard: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Methods, paths and headers."""
    context: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def paths(self) -> list[str]:
        return [path.partition("?")[0] for _, path, _ in self.heard]

    def show(self, certificate: Path, key: Path) -> None:
        """Show a certificate to whoever connects from now on."""
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate, key)


@contextmanager
def between(certificate: Path, key: Path) -> Iterator[Between]:
    """Such a server, on a port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            assert found.context
            self.request = found.context.wrap_socket(self.request, server_side=True)
            super().setup()

        def _pass_on(self) -> None:
            found.heard.append((self.command, self.path, dict(self.headers.items())))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            connection = _to(found.site)
            try:
                headers = {name: value for name, value in self.headers.items() if name != "Host"}
                connection.request(self.command, self.path, body, headers)
                with connection.getresponse() as answer:
                    data, status, said = answer.read(), answer.status, answer.headers
            finally:
                connection.close()
            if said.get_content_type() == "application/json":
                data = json.dumps(found.alter(json.loads(data))).encode()
            self.send_response_only(status)
            for name in ("Content-Type", "Date"):
                if name in said:
                    self.send_header(name, said[name])
            self.send_header("Content-Length", str(len(data)))
            if found.closes:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = _pass_on  # noqa: N815 (they are called so)

        def log_message(self, *_: object) -> None:
            pass

        def finish(self) -> None:
            super().finish()
            self.request.close()

    class Server(_Server):
        def handle_error(self, *_: object) -> None:
            """Who does not go on with TLS is what some tests are about."""

    with Server(("127.0.0.1", 0), Handler) as server:
        found = Between(server.server_port)
        found.show(certificate, key)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


def _to(site: str) -> HTTPConnection:
    parts = urlsplit(site)
    assert parts.hostname
    if parts.scheme == "http":
        return HTTPConnection(parts.hostname, parts.port, timeout=30)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return HTTPSConnection(parts.hostname, parts.port, timeout=30, context=context)
