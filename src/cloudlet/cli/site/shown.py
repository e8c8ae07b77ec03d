"""How what a site has is shown: as fields for people, as the wire's own values with ``-f json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from cliff.columns import FormattableColumn

from cloudlet.cli.command import printable
from cloudlet.model import format_bytes

if TYPE_CHECKING:
    from cloudlet.client.resources import (
        App,
        Base,
        Cloudlet,
        Event,
        Handoff,
        Instance,
        Operation,
        Overlay,
        Peer,
    )

T = TypeVar("T")
Shown = Mapping[str, Any]
Columns = tuple[Sequence[str], Sequence[Any]]
Table = tuple[Sequence[str], Iterator[Sequence[Any]]]


class Fields(FormattableColumn[Mapping[str, Any]]):
    """Names and values."""

    def human_readable(self) -> str:
        return printable(", ".join(f"{name}={_text(value)}" for name, value in (self._value or {}).items()))

    def machine_readable(self) -> dict[str, Any]:
        return dict(self._value or {})


class Endpoints(FormattableColumn[Sequence[Mapping[str, Any]]]):
    """Where ports are reached."""

    def human_readable(self) -> str:
        return "\n".join(f"{entry['url']} (port {entry['guest_port']})" for entry in self._value)

    def machine_readable(self) -> list[dict[str, Any]]:
        return [dict(entry) for entry in self._value]


class Steps(FormattableColumn[Sequence[Mapping[str, Any]]]):
    """How far an operation is."""

    def human_readable(self) -> str:
        return "\n".join(_step(step) for step in self._value)

    def machine_readable(self) -> list[dict[str, Any]]:
        return [dict(step) for step in self._value]


class Fingerprint(FormattableColumn[str]):
    """A fingerprint, as people compare it."""

    def human_readable(self) -> str:
        return grouped(self._value)

    def machine_readable(self) -> str:
        return str(self._value)


def grouped(fingerprint: str) -> str:
    """A fingerprint in groups of four."""
    return ":".join(fingerprint[at : at + 4] for at in range(0, len(fingerprint), 4))


def columns(values: Shown) -> Columns:
    """Fields, as cliff wants those of one thing."""
    return tuple(values), tuple(_clean(value) for value in values.values())


def table(names: Sequence[str], rows: Iterable[T], shown: Callable[[T], Shown]) -> Table:
    """Some fields of many things, as cliff wants them."""
    return names, (tuple(_clean(shown(row)[name]) for name in names) for row in rows)


def instance(row: Instance) -> Shown:
    """An instance."""
    return {
        "id": row.id,
        "name": row.name,
        "state": row.state,
        "endpoint": row.endpoint,
        "endpoints": Endpoints(row.endpoints),
        "app_id": row.app_id,
        "overlay_id": row.overlay_id,
        "base_identity": row.base_identity,
        "memory_bytes": row.memory_bytes,
        "disk_bytes": row.disk_bytes,
        "cpus": row.cpus,
        "properties": Fields(row.metadata),
        "timings": Fields(row.timings),
        "arrival": Fields(row.arrival or {}),
        "lease_seconds": row.lease_seconds,
        "expires_at": row.expires_at,
        "epoch": row.epoch,
        "moved_to": Fields(row.moved_to or {}),
        "restarts": row.restarts,
        "error": _error(row.error),
        **_owned(row),
    }


def app(row: App) -> Shown:
    """An app."""
    return {
        "id": row.id,
        "name": row.name,
        "version": row.version,
        "summary": row.summary,
        "public": row.public,
        "overlay_id": row.overlay_id,
        "restart": row.restart,
        "lease_seconds": row.lease_seconds,
        "early_hand_off": bool(row.handoff["early"]),
        **_owned(row),
    }


def overlay(row: Overlay) -> Shown:
    """An overlay."""
    said = row.description or {}
    inside = said.get("app", {})
    return {
        "id": row.id,
        "name": row.name,
        "state": row.state,
        "public": row.public,
        "app": inside.get("name"),
        "version": inside.get("version"),
        "size": row.size,
        "digest": row.digest,
        "identity": row.identity,
        "base_identity": row.base_identity,
        "url": row.url,
        "memory_bytes": said.get("memory_bytes"),
        "disk_bytes": said.get("disk_bytes"),
        "hot_bytes": said.get("hot_bytes"),
        "signed_by": said.get("signed_by"),
        "error": _error(row.error),
        **_owned(row),
    }


def base(row: Base) -> Shown:
    """A base."""
    said = row.description or {}
    machine = said.get("machine", {})
    return {
        "id": row.id,
        "name": row.name,
        "state": row.state,
        "identity": row.identity,
        "size": row.size,
        "memory_bytes": machine.get("memory_bytes"),
        "disk_bytes": machine.get("disk_bytes"),
        "machine": Fields(machine),
        "ready": said.get("ready"),
        "error": _error(row.error),
        **_owned(row),
    }


def operation(row: Operation) -> Shown:
    """An operation."""
    return {
        "id": row.id,
        "kind": row.kind,
        "state": row.state,
        "resources": Fields(row.resources),
        "steps": Steps(row.steps),
        "output": Fields(row.output or {}),
        "error": _error(row.error),
        "request_id": row.request_id,
        **_owned(row),
    }


def event(row: Event) -> Shown:
    """An event."""
    return {
        "number": row.number,
        "time": row.time,
        "kind": row.kind,
        "resource_id": row.resource_id,
        "user_id": row.user_id,
        "detail": Fields(row.detail),
    }


def handoff(row: Handoff, instance: str, peer: str) -> Shown:
    """A hand-off, and what its instance and its peer are called."""
    return {
        "id": row.id,
        "instance": instance,
        "instance_id": row.instance_id,
        "direction": row.direction,
        "peer": peer,
        "peer_id": row.peer_id,
        "state": row.state,
        "epoch": row.epoch,
        "forecast": Fields(row.forecast or {}),
        "statistics": Fields(row.statistics),
        "moved_to": Fields(row.moved_to or {}),
        "error": _error(row.error),
        **_owned(row),
    }


def peer(row: Peer) -> Shown:
    """A peer."""
    return {
        "id": row.id,
        "name": row.name,
        "url": row.url,
        "state": row.state,
        "fingerprint": Fingerprint(row.fingerprint),
        "public_key": row.public_key,
        "certificate": row.certificate,
        "capabilities": Fields(row.capabilities),
        "seen_at": row.seen_at,
        "error": _error(row.error),
        **_owned(row),
    }


def cloudlet(row: Cloudlet) -> Shown:
    """The site."""
    return {
        "id": row.id,
        "name": row.name,
        "state": row.state,
        "software_version": row.software_version,
        "hypervisor": row.hypervisor,
        "accelerator": row.accelerator,
        "cpu_model": row.cpu_model,
        "fingerprint": Fingerprint(row.fingerprint),
        "peers_url": row.peers_url,
        "limits": Fields(row.limits),
        "used": Fields(row.used),
    }


def _owned(row: App | Base | Handoff | Instance | Operation | Overlay | Peer) -> Shown:
    return {
        "project_id": row.project_id,
        "user_id": row.user_id,
        "created_at": row.created_at,
        "updated_at": row.updated_at,
    }


def _error(error: Mapping[str, str] | None) -> str | None:
    return error["detail"] if error else None


def _step(step: Mapping[str, Any]) -> str:
    took = f", {step['seconds']:.2f} s" if step["seconds"] is not None else ""
    total = step["bytes_total"]
    moved = f", {format_bytes(step['bytes_done'])} of {format_bytes(total)}" if total else ""
    return f"{step['name']}: {step['state']}{took}{moved}"


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _clean(value: Any) -> Any:
    """Text in which others have a say must not steer a terminal."""
    return printable(value) if isinstance(value, str) else value
