"""Lines of JSON, some with bytes behind them, on a Unix socket: how keepers, nursery and site talk."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

LONGEST_LINE = 1 << 20
LONGEST_BODY = 8 << 20


class Line:
    """One end of a connection. One thread reads, and any number write."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._reader = connection.makefile("rb")

    def send(self, message: Mapping[str, Any], body: bytes = b"") -> None:
        """Send a message, and bytes that belong to it.

        :raises OSError: who should read it has gone.
        """
        if body:
            message = {**message, "size": len(body)}
        self.socket.sendall(json.dumps(message).encode() + b"\n" + body)

    def receive(self) -> dict[str, Any] | None:
        """The next message; None when there will be none.

        :raises TimeoutError: none came in the socket's time.
        """
        try:
            text = self._reader.readline(LONGEST_LINE)
            message = json.loads(text) if text.endswith(b"\n") else None
        except (ConnectionError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def body(self, message: Mapping[str, Any]) -> bytes:
        """The bytes that belong to a message, which was the last one.

        :raises EOFError: they do not come, or are too many.
        """
        size = message.get("size", 0)
        if not isinstance(size, int) or not 0 <= size <= LONGEST_BODY:
            raise EOFError(f"{size} bytes belong to a message")
        body = self._reader.read(size)
        if len(body) != size:
            raise EOFError(f"{len(body)} of {size} bytes came")
        return body

    def messages(self) -> Iterator[dict[str, Any]]:
        """The messages to the end."""
        while (message := self.receive()) is not None:
            yield message

    @property
    def closed(self) -> bool:
        """Whether the other end has gone; only where nothing is sent here that was not read."""
        try:
            return not self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self._reader.close()
        self.socket.close()
