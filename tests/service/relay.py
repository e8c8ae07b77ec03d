"""A port in front of a site whose connections break where a test wants it, and something large to send."""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cloudlet.control.publishing import create_overlay
from cloudlet.control.site import Site
from cloudlet.settings import Settings
from tests.service.conftest import Made

_LARGE = 1 << 20


@dataclass
class Relay:
    """Carries bytes up to a site and down from it; ``cuts`` are used up one after the other."""

    target: tuple[str, int] | str
    """A host and a port, or the path of a Unix socket."""
    cuts: list[tuple[str, int]] = field(default_factory=list)
    """A direction, ``up`` or ``down``, and the bytes that a connection carries that way before it is cut."""
    ends: bool = False
    """Whether it accepts no more with the first cut."""
    cut: int = 0
    """How many connections were cut."""
    carried: Counter[str] = field(default_factory=Counter)
    _listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if isinstance(self.target, str):
                    server = socket.socket(socket.AF_UNIX)
                    server.connect(self.target)
                else:
                    server = socket.create_connection(self.target)
                for ends in ((client, server, "up"), (server, client, "down")):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def close(self) -> None:
        """Accept no more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _carry(self, source: socket.socket, target: socket.socket, way: str) -> None:
        passed = 0
        with suppress(OSError):
            while piece := source.recv(1 << 16):
                allowed = self._allowed(way, passed, len(piece))
                target.sendall(piece[:allowed])
                passed += allowed
                with self._lock:
                    self.carried[way] += allowed
                if allowed < len(piece):
                    break
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()

    def _allowed(self, way: str, passed: int, more: int) -> int:
        with self._lock:
            if self.cuts and self.cuts[0][0] == way and passed + more > self.cuts[0][1]:
                self.cut += 1
                if self.ends:
                    self.close()
                return max(0, self.cuts.pop(0)[1] - passed)
        return more


@contextmanager
def relayed(target: tuple[str, int] | str, *cuts: tuple[str, int], ends: bool = False) -> Iterator[Relay]:
    """A relay to a site until the context is left."""
    relay = Relay(target, list(cuts), ends)
    thread = threading.Thread(target=relay.serve)
    thread.start()
    try:
        yield relay
    finally:
        relay.close()
        thread.join()


def address(url: str) -> tuple[str, int]:
    """Host and port of a site."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)


def large_overlay(made: Made, folder: Path) -> Path:
    """An overlay that is sent in several pieces."""
    site = Site.open(Settings(made.cache, folder / "state", made.keys, hypervisor="fake"))
    (folder / "recipe").mkdir()
    (folder / "recipe" / "data").write_bytes(os.urandom(_LARGE))
    (folder / "recipe" / "recipe.yaml").write_text(
        "{name: large, version: '2', files: [{from: data, to: /data}], ready: 'http:8080/', "
        "ports: [{port: 8080}]}"
    )
    overlay = folder / "large.overlay"
    create_overlay(
        site, site.bases.get(made.base_id), folder / "recipe", overlay, build_folder=folder / "build",
        sign=site.keys.signer(), say=lambda text: None,
    )  # fmt: skip
    return overlay
