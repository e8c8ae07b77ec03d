"""Two sites that are served as an operator serves them, and are each other's peers."""

from __future__ import annotations

import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloudlet.settings import Settings, load
from tests.service.conftest import Caller, Made, end_machines
from tests.service.served import Served, served, settings_file

_PORTS = (20_000, 32_000)
"""Below those that Linux gives to who asks for none."""


@dataclass
class PeerSite:
    """A served site that has a peer; it listens at the same ports whenever it is started."""

    file: Path
    """Its settings."""
    served: Served
    peer_id: str = ""
    """The id of its peer, as it is called here: that of the other site."""
    _runs: ExitStack = field(default_factory=ExitStack)

    @property
    def folder(self) -> Path:
        """Where all of it is."""
        return self.file.parent

    @property
    def call(self) -> Caller:
        """Its operator."""
        return self.served.call

    @property
    def log(self) -> Path:
        """What the server says; that of the last start."""
        return self.served.log

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The server."""
        return self.served.process

    @property
    def settings(self) -> Settings:
        return load(str(self.file))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send the server a signal, and wait for its end; the exit status. Its machines go on."""
        return self.served.end(number)

    def start(self) -> None:
        """Start the server again, where it has ended."""
        self._runs.close()
        self.served = self._runs.enter_context(served(self.file))

    def hand_off(self, instance: Mapping[str, Any], **terms: Any) -> dict[str, Any]:
        """Have an instance handed off to its peer, and wait until it runs there; the operation."""
        wanted = {"instance_id": instance["id"], "peer_id": self.peer_id, **terms}
        return self.call.done(self.call.post("/v1/handoffs", {"handoff": wanted}))


@contextmanager
def two_sites(
    folder: Path, made: Made, hashed: str, **groups: Mapping[str, Any]
) -> Iterator[tuple[PeerSite, PeerSite]]:
    """Two served sites in a folder, each with a key of its own, that trust the publisher and each other.

    When the context is left, the servers and all machines of both are ended.

    :param groups: settings of both, as for :func:`tests.service.served.settings_file`.
    """
    with (
        peer_site(folder / "a", made, hashed, **groups) as first,
        peer_site(folder / "b", made, hashed, **groups) as second,
    ):
        first.peer_id, second.peer_id = add_peer(first, second), add_peer(second, first)
        yield first, second


@contextmanager
def peer_site(folder: Path, made: Made, hashed: str, **groups: Mapping[str, Any]) -> Iterator[PeerSite]:
    """A served site that peers can reach."""
    trusted = folder / "keys" / "trusted"
    trusted.mkdir(parents=True)
    for key in (made.keys / "trusted").glob("*.pub"):
        shutil.copy(key, trusted / f"publisher-{key.name}")
    usual = {
        "api": {"listen": f"127.0.0.1:{free_port()}", "users_file": folder / "users"},
        "peers": {"listen": f"127.0.0.1:{free_port()}", "grace_seconds": 5},
    }
    given = {name: {**usual.get(name, {}), **groups.get(name, {})} for name in usual.keys() | groups.keys()}
    own = Made(made.cache, folder / "keys", made.base_id, made.overlay)
    file = settings_file(folder, own, hashed, **given)
    with ExitStack() as runs:
        site = PeerSite(file, runs.enter_context(served(file)), _runs=runs)
        try:
            yield site
        finally:
            runs.close()
            end_machines(site.settings)


def add_peer(here: PeerSite, there: PeerSite) -> str:
    """Have a site trust another one; its id as a peer."""
    about = there.call.get("/v1/cloudlets/self")["cloudlet"]
    peer = {"url": about["peers_url"], "fingerprint": about["fingerprint"]}
    return str(here.call.post("/v1/peers", {"peer": peer})["peer"]["id"])


def free_port() -> int:
    """A port that is free, and none that the kernel gives to connections meanwhile."""
    while True:
        with suppress(OSError), socket.create_server(("127.0.0.1", random.randrange(*_PORTS))) as listener:
            return int(listener.getsockname()[1])
