"""The nouns of a cloudlet, as values: what a machine is, when it is ready, what it publishes.

Everything here is immutable, knows how to become JSON and how to be read back, and knows nothing of
files, processes or the network. A capture is bound to its :class:`Machine`: two machines that differ
in any field cannot exchange captures.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

from cloudlet.errors import UsageError

PAGE_BYTES = 4096
"""Size of a guest page and of a disk block, in bytes: the unit of every delta."""

MEBIBYTE = 1 << 20
GIBIBYTE = 1 << 30

LARGEST_DISK_BYTES = 4 << 40
"""The largest disk that a machine may have, in bytes: 4 TiB."""


class Accelerator(StrEnum):
    """Who executes the guest's instructions. Part of a capture: KVM state does not run under TCG."""

    KVM = "kvm"
    TCG = "tcg"


class Firmware(StrEnum):
    """What runs before the guest's kernel."""

    BIOS = "bios"
    UEFI = "uefi"


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine a capture was made on; all of it is fixed once captured."""

    machine_type: str
    accelerator: Accelerator
    cpu_model: str
    cpus: int
    memory_bytes: int
    disk_bytes: int
    firmware: Firmware = Firmware.BIOS
    layout: int = 1
    """Version of the device layout (``hypervisor/qemu/machine.py``): addresses never move within one."""

    @property
    def ram_pages(self) -> int:
        return self.memory_bytes // PAGE_BYTES

    @property
    def disk_blocks(self) -> int:
        return self.disk_bytes // PAGE_BYTES

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        known = dict(data)
        known["accelerator"] = Accelerator(known["accelerator"])
        known["firmware"] = Firmware(known["firmware"])
        return cls(**known)

    def differences(self, other: Machine) -> list[str]:
        """The fields in which two machines differ, as ``name: this, not that``."""
        mine, theirs = self.to_json(), other.to_json()
        return [f"{name}: {mine[name]}, not {theirs[name]}" for name in mine if mine[name] != theirs[name]]


class ReadinessKind(StrEnum):
    """How a guest shows that it is ready."""

    AGENT = "agent"
    TCP = "tcp"
    HTTP = "http"
    SERIAL = "serial"


@dataclass(frozen=True, slots=True)
class Readiness:
    """A rule that says when a guest is ready: ``agent``, ``tcp:22``, ``http:8080/path``, ``serial:REGEX``."""

    kind: ReadinessKind
    port: int = 0
    path: str = ""
    pattern: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a rule.

        :raises UsageError: the text is not one of the four forms.
        """
        kind, _, rest = text.partition(":")
        if kind == "agent" and not rest:
            return cls(ReadinessKind.AGENT)
        if kind == "tcp" and re.fullmatch(r"[0-9]{1,5}", rest) and 0 < int(rest) < 65536:
            return cls(ReadinessKind.TCP, port=int(rest))
        if kind == "http" and (match := re.fullmatch(r"([0-9]{1,5})(/[\x21-\x7e]*)?", rest)):
            port = int(match[1])
            if 0 < port < 65536:
                return cls(ReadinessKind.HTTP, port=port, path=match[2] or "/")
        if kind == "serial" and rest:
            try:
                # As it will be used: on the bytes of a console, where \u means nothing.
                re.compile(rest.encode(), re.MULTILINE)
            except (re.error, OverflowError, RecursionError, ValueError) as error:
                raise UsageError(f"readiness rule {text!r}: {error}") from error
            return cls(ReadinessKind.SERIAL, pattern=rest)
        raise UsageError(
            f"readiness rule {text!r} is not understood",
            hint="use agent, tcp:22, http:8080/healthz or serial:REGEX",
        )

    def __str__(self) -> str:
        match self.kind:
            case ReadinessKind.AGENT:
                return "agent"
            case ReadinessKind.TCP:
                return f"tcp:{self.port}"
            case ReadinessKind.HTTP:
                return f"http:{self.port}{self.path}"
            case ReadinessKind.SERIAL:
                return f"serial:{self.pattern}"


@dataclass(frozen=True, slots=True)
class GuestPort:
    """A TCP port on which the application listens inside the guest."""

    port: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class PublishedPort:
    """A guest's TCP port, published on an address of the host; host port 0 means any free one."""

    guest_port: int
    host: str = "127.0.0.1"
    host_port: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a published port is reached."""

    guest_port: int
    host: str
    host_port: int
    name: str = ""

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.host_port}"


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Read a size such as ``512M`` or ``8G`` (powers of 1024), in bytes.

    :raises UsageError: the text is not a size.
    """
    match = re.fullmatch(r"(\d{1,18})\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"{text!r} is not a size", hint="write 512M or 8G")
    return int(match[1]) * _UNITS[match[2].upper()]


def parse_rate(text: str) -> float:
    """Read a network rate such as ``10M`` (10 Mbit/s, powers of 1000), in bytes per second.

    :raises UsageError: the text is not a rate above zero.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMG]?)(?:bit/s)?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UsageError(f"{text!r} is not a rate", hint="write 10M for 10 Mbit/s")
    return float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[match[2].upper()] / 8


def format_bytes(count: float) -> str:
    """A number of bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
