"""What a keeper is told to keep, and what it says of it: values that cross a socket and survive in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from cloudlet import errors
from cloudlet.control.delivery import PATIENCE
from cloudlet.errors import CloudletError, FailedError
from cloudlet.model import Endpoint, PublishedPort
from cloudlet.settings import Settings


@dataclass(frozen=True, slots=True)
class ArrivalOrder:
    """A machine that comes from another site."""

    handoff: str
    instance: str
    epoch: int
    """At the source."""
    seed: str
    """Of the digests: hexadecimal digits."""
    root: str
    """The overlay's, in base64: what the app is."""
    overlay: str
    """The overlay's identity."""
    holds: str
    """What the machine stands on here: ``base`` or ``overlay``."""
    generation_id: str
    paused: bool
    patience: float
    """Seconds without a word from the source until the copy is given up."""
    peer: Mapping[str, str]
    """The source, as :class:`cloudlet.keeper.correspondence.HttpPeer` needs it."""
    early: bool = False
    """Whether the machine may run before all of its memory is here."""


@dataclass(frozen=True, slots=True)
class Order:
    """A machine that is wanted."""

    source: str
    """The overlay: a path or an http(s) URL; nothing where the machine comes from another site."""
    ports: tuple[PublishedPort, ...] = ()
    allow_unsigned: bool = False
    use_image: bool = True
    patience: float = PATIENCE
    only_these: bool = False
    """Whether no other port of the app is published."""
    ready: str = ""
    """When the app answers, if it is not when its overlay says."""
    arrival: ArrivalOrder | None = None
    """Where it comes from, if it is another site."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        known = dict(data)
        known["ports"] = tuple(PublishedPort(**port) for port in known["ports"])
        if arrival := known.get("arrival"):
            known["arrival"] = ArrivalOrder(**arrival)
        return cls(**known)


class KeeperState(StrEnum):
    """What a keeper does, in this order."""

    STARTING = "starting"
    ARRIVING = "arriving"
    """The machine comes from another site, and does not run yet."""
    ANSWERING = "answering"
    """The application answers; the machine's identity is being renewed."""
    READY = "ready"
    MOVED = "moved"
    """The machine is another site's; who connects is shown the way for a while."""
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Status:
    """What a keeper says of its machine; the last one stays when it has ended."""

    state: KeeperState = KeeperState.STARTING
    paused: bool = False
    machine: str = ""
    """The instance's id with the hypervisor."""
    folder: str = ""
    """Where the hypervisor keeps it."""
    endpoints: tuple[Endpoint, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    received: int = 0
    total: int = 0
    """Bytes of the overlay."""
    start: str = ""
    """How the machine was started: hot, ready, full, or image."""
    renewed: bool = False
    handoff: Mapping[str, Any] | None = None
    """How far the machine is on its way to another site, or from one."""
    error: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        # A keeper may be of another version than its site.
        names = {entry.name for entry in fields(cls)}
        known = {name: value for name, value in data.items() if name in names}
        known["state"] = KeeperState(known["state"])
        known["endpoints"] = tuple(Endpoint(**endpoint) for endpoint in known["endpoints"])
        return cls(**known)

    def with_(self, **changes: Any) -> Status:
        return replace(self, **changes)


def describe(error: CloudletError) -> dict[str, str]:
    """An error as text, for another process."""
    return {"kind": type(error).__name__, "message": error.message, "hint": error.hint}


def raised(described: Mapping[str, str]) -> CloudletError:
    """The error that :func:`describe` described."""
    kind = getattr(errors, described.get("kind", ""), FailedError)
    if not (isinstance(kind, type) and issubclass(kind, CloudletError)):
        kind = FailedError
    return kind(described.get("message", ""), hint=described.get("hint"))


def settings_to_json(settings: Settings) -> dict[str, Any]:
    """A machine's settings, for another process."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
    }


def settings_from_json(data: Mapping[str, Any]) -> Settings:
    known: dict[str, Any] = {
        name: Path(value) if name.endswith("_dir") else tuple(value) if isinstance(value, list) else value
        for name, value in data.items()
    }
    return Settings(**known)
