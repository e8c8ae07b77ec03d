"""A real Redis server for tests: in a folder, on a port of its own, gone at the end."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEADLINE = 30.0


class Redis:
    """A server that can be killed, and started again with nothing in its memory."""

    def __init__(self, folder: Path) -> None:
        assert shutil.which("redis-server"), "Redis is missing: tools/setup test"
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = ["redis-server", "--port", str(self._port), "--bind", "127.0.0.1", "--save", ""]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log)
        deadline = time.monotonic() + DEADLINE
        while not self._answers():
            assert time.monotonic() < deadline, (self._folder / "redis.log").read_text()
            time.sleep(0.02)

    def kill(self) -> None:
        """End it at once; what it knew is gone."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16) == b"+PONG\r\n"
        except OSError:
            return False


@contextmanager
def redis(folder: Path) -> Iterator[Redis]:
    """A server that runs until the context is left."""
    server = Redis(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
