"""The link between the demo's two cloudlets: two network namespaces, or relayed ports of this machine.

With namespaces, each cloudlet has one of its own: a pair of virtual cards joins them, shaped by the kernel
(``tc ... tbf``), and each has another one to this machine, where the user is. Where that needs rights or
programs that are not here, both are processes on loopback addresses, and ``benchmarks/wire.py`` is the link.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.handoff_sites import FAR, NEAR, free_port
from benchmarks.wire import Wire, wire

PEERS_PORT = 8791
_SPACES = "cloudlet-demo-near", "cloudlet-demo-far"
_OUTER = "cloudlet-near", "cloudlet-far"
"""This machine's cards to them: the kernel allows 15 characters."""
_INNER, _LINK = "user0", "link0"
_USERS, _LINKS = ("198.18.101", "198.18.102"), ("198.18.103.1", "198.18.103.2")
"""Of the range for tests of networks (RFC 2544)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a cloudlet is."""

    prefix: tuple[str, ...]
    """What its command begins with."""
    address: str
    """Where its users reach it."""
    peers_listen: str
    peers_url: str


class Link(Protocol):
    """Two places, and what joins them."""

    what: str
    """For people."""
    near: Place
    far: Place

    def carried(self) -> int:
        """Bytes, both ways together, since it is there."""

    def cut(self, seconds: float) -> None:
        """Nothing goes over it for so long."""


@contextmanager
def link(mbit: int) -> Iterator[Link]:
    """A link of so many Mbit/s; nothing of it is left afterwards."""
    if _can_make_namespaces():
        with _namespaces(mbit) as made:
            yield made
    else:
        with _loopback(mbit) as relayed:
            yield relayed


@dataclass(frozen=True, slots=True)
class _Namespaces:
    what: str
    near: Place
    far: Place

    def carried(self) -> int:
        found = json.loads(_run("ip", "-n", _SPACES[0], "-s", "-j", "link", "show", "dev", _LINK))
        counts: dict[str, Any] = found[0]["stats64"]
        return int(counts["tx"]["bytes"]) + int(counts["rx"]["bytes"])

    def cut(self, seconds: float) -> None:
        _run("ip", "-n", _SPACES[0], "link", "set", _LINK, "down")
        time.sleep(seconds)
        _run("ip", "-n", _SPACES[0], "link", "set", _LINK, "up")


@dataclass(frozen=True, slots=True)
class _Loopback:
    what: str
    near: Place
    far: Place
    wire: Wire

    def carried(self) -> int:
        return self.wire.carried()

    def cut(self, seconds: float) -> None:
        self.wire.cut()
        time.sleep(seconds)
        self.wire.mend()


def _can_make_namespaces() -> bool:
    if os.geteuid() or not all(shutil.which(program) for program in ("ip", "tc", "nsenter")):
        return False
    try:
        with _two_spaces():
            return True
    except subprocess.CalledProcessError:
        return False


@contextmanager
def _namespaces(mbit: int) -> Iterator[Link]:
    with _two_spaces():
        _run("ip", "-n", _SPACES[0], "link", "add", _LINK, "type", "veth", "peer", "name", _LINK,
             "netns", _SPACES[1])  # fmt: skip
        for space, address in zip(_SPACES, _LINKS, strict=True):
            _up(space, _LINK, f"{address}/24")
            _run("tc", "-n", space, "qdisc", "add", "dev", _LINK, "root", "tbf", "rate", f"{mbit}mbit",
                 "burst", "32kb", "latency", "50ms")  # fmt: skip
        places = []
        for space, outer, users, own in zip(_SPACES, _OUTER, _USERS, _LINKS, strict=True):
            _run("ip", "link", "add", outer, "type", "veth", "peer", "name", _INNER, "netns", space)
            _run("ip", "address", "add", f"{users}.1/24", "dev", outer)
            _run("ip", "link", "set", outer, "up")
            _up(space, _INNER, f"{users}.2/24")
            _run("ip", "-n", space, "link", "set", "lo", "up")
            listen = f"{own}:{PEERS_PORT}"
            inside = ("nsenter", f"--net=/run/netns/{space}", "--")
            places.append(Place(inside, f"{users}.2", listen, f"https://{listen}"))
        # Who has asked at the near one is shown the way to the far one's users' address.
        for space, other, users in zip(_SPACES, reversed(_LINKS), reversed(_USERS), strict=True):
            _run("ip", "-n", space, "route", "add", f"{users}.0/24", "via", other)
        yield _Namespaces(f"two network namespaces, {mbit} Mbit/s by tc", *places)


@contextmanager
def _two_spaces() -> Iterator[None]:
    """Both, new; a run that was killed may have left some."""
    _remove()
    try:
        for space in _SPACES:
            _run("ip", "netns", "add", space)
        yield
    finally:
        _remove()


def _remove() -> None:
    """Remove both namespaces, and all cards with them."""
    for space, outer in zip(_SPACES, _OUTER, strict=True):
        with suppress(subprocess.CalledProcessError):
            _run("ip", "link", "delete", outer)
        with suppress(subprocess.CalledProcessError):
            _run("ip", "netns", "delete", space)


@contextmanager
def _loopback(mbit: int) -> Iterator[Link]:
    ports = [free_port() for _ in range(2)]
    listens = [f"{address}:{port}" for address, port in zip((NEAR, FAR), ports, strict=True)]
    with wire([(FAR, ports[1])], [(NEAR, ports[0])], mbit) as between:
        ends = between.back[0], between.there[0]
        near, far = (
            Place((), address, listen, f"https://127.0.0.1:{end}")
            for address, listen, end in zip((NEAR, FAR), listens, ends, strict=True)
        )
        yield _Loopback(f"two processes on loopback addresses, a relay of {mbit} Mbit/s", near, far, between)


def _up(space: str, card: str, address: str) -> None:
    _run("ip", "-n", space, "address", "add", address, "dev", card)
    _run("ip", "-n", space, "link", "set", card, "up")


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
