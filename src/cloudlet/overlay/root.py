"""The root: what an overlay is, for which base, and the table of its parts. A signature signs it.

Everything that a reader must know before the first page stands here: the application, the machine,
the list of device sections, the frames up to the hot ones and the index chunks of the others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, NamedTuple, Self

from cloudlet.errors import CorruptError, LimitError, MismatchError, UsageError
from cloudlet.model import PAGE_BYTES, GuestPort, Machine, Readiness
from cloudlet.overlay import canonical
from cloudlet.overlay.canonical import Fields
from cloudlet.overlay.frames import ChunkEntry, FrameEntry, FrameKind
from cloudlet.overlay.limits import DEVICE_BYTES, MAP_BYTES, ROOT_BYTES

_AGENT = Readiness.parse("agent")
_APP = ("name", "version", "summary", "ports", "ready", "publish")


class DeviceSection(NamedTuple):
    """One section of QEMU's device state: it must be the base's, by name, instance and version."""

    name: str
    instance: int
    version: int


class Publish(StrEnum):
    """When an instance's endpoint is given out: when all is ready, or as soon as the app answers.

    Its ports are bound from the start: a client who knows them already is answered whenever the app does.
    """

    READY = "ready"
    ANSWERING = "answering"


@dataclass(frozen=True, slots=True)
class App:
    """The application as its publisher describes it; all texts are single lines."""

    name: str
    version: str = ""
    summary: str = ""
    ports: tuple[GuestPort, ...] = ()
    ready: Readiness = _AGENT
    publish: Publish = Publish.READY

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": self.version,
            "summary": self.summary,
            "ports": [{"name": port.name, "port": port.port} for port in self.ports],
            "ready": str(self.ready),
            "publish": self.publish.value,
        }

    def check(self) -> None:
        """Whether readers will take it: what a publisher wants to know before the work.

        :raises CorruptError: they will not.
        """
        App.from_json(Fields(self.to_json(), "app", _APP))

    @classmethod
    def from_json(cls, app: Fields) -> Self:
        ports = [Fields(p, f"{app.where}.ports", ("name", "port")) for p in app.list("ports")]
        try:
            ready = Readiness.parse(app.text("ready"))
            publish = Publish(app.text("publish"))
        except (UsageError, ValueError, RecursionError, OverflowError) as error:
            raise CorruptError(f"{app.where}.ready or .publish: {error}") from error
        return cls(
            app.text("name", 128),
            app.text("version", 128),
            app.text("summary"),
            tuple(GuestPort(p.integer("port", 1, 65535), p.text("name", 128)) for p in ports),
            ready,
            publish,
        )


@dataclass(frozen=True, slots=True)
class Totals:
    """What all parts add up to: bytes of device state, pages, frames, literals."""

    device_bytes: int
    disk_pages: int
    frames: int
    literals: int
    ram_pages: int

    @property
    def pages(self) -> int:
        return self.ram_pages + self.disk_pages

    @classmethod
    def from_json(cls, totals: Fields) -> Self:
        return cls(**{field.name: totals.integer(field.name) for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class Root:
    """A root; :meth:`decode` has checked all that can be checked without the parts."""

    app: App
    base: str
    created: str
    device_sections: tuple[DeviceSection, ...]
    machine: Machine
    map_frames: tuple[FrameEntry, ...]
    device_frames: tuple[FrameEntry, ...]
    hot_frames: tuple[FrameEntry, ...]
    chunks: tuple[ChunkEntry, ...]
    totals: Totals

    @property
    def listed_frames(self) -> tuple[FrameEntry, ...]:
        """The frames that the root itself pins, in file order: map, device, hot."""
        return self.map_frames + self.device_frames + self.hot_frames

    @property
    def parts_bytes(self) -> int:
        """Bytes of everything after the signature."""
        chunks = sum(chunk.table_bytes + chunk.size for chunk in self.chunks)
        return sum(entry.size for entry in self.listed_frames) + chunks

    def encode(self) -> bytes:
        """The canonical bytes.

        :raises LimitError: larger than a root may be.
        """
        data = canonical.encode(
            {
                "app": self.app.to_json(),
                "base": self.base,
                "created": self.created,
                "device_sections": self.device_sections,
                "frames": {
                    "map": [entry.to_json() for entry in self.map_frames],
                    "device": [entry.to_json() for entry in self.device_frames],
                    "hot": [entry.to_json() for entry in self.hot_frames],
                },
                "index": [chunk.to_json() for chunk in self.chunks],
                "machine": self.machine.to_json(),
                "totals": asdict(self.totals),
            }
        )
        if len(data) > ROOT_BYTES:
            raise LimitError(f"the root has {len(data)} bytes; {ROOT_BYTES} are allowed")
        return data

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read and check a root.

        :raises CorruptError: not in canonical form, or it contradicts itself.
        :raises LimitError: it declares more than a reader accepts.
        """
        names = (
            "app",
            "base",
            "created",
            "device_sections",
            "frames",
            "index",
            "machine",
            "totals",
        )
        top = Fields(canonical.decode(data, "the root"), "root", names)
        tables = top.fields("frames", ("map", "device", "hot"))
        root = cls(
            App.from_json(top.fields("app", _APP)),
            top.digest("base").hex(),
            top.time("created"),
            read_sections(top, "device_sections"),
            read_machine(top),
            _table(tables, "map", {FrameKind.MAP}),
            _table(tables, "device", {FrameKind.DEVICE}),
            _table(tables, "hot", {FrameKind.RAM, FrameKind.DISK}),
            tuple(ChunkEntry.from_json(v, f"index chunk {at}") for at, v in enumerate(top.list("index"))),
            Totals.from_json(top.fields("totals", (field.name for field in fields(Totals)))),
        )
        root._check_sums()
        if root.encode() != data:
            raise CorruptError("the root is not in canonical form")
        return root

    def check_base(self, identity: str, machine: Machine, device_sections: tuple[DeviceSection, ...]) -> None:
        """:raises MismatchError: this overlay is not for that base."""
        if identity != self.base:
            raise MismatchError(f"the overlay is made for base {self.base}, not {identity}")
        check_machines(self.machine, machine, self.device_sections, device_sections)

    def _check_sums(self) -> None:
        if not self.map_frames or not self.device_frames:
            raise CorruptError("the root declares no map or no device state")
        if sum(entry.raw_size for entry in self.map_frames) > MAP_BYTES:
            raise LimitError(f"the root declares more than {MAP_BYTES} bytes of map")
        device_bytes = sum(entry.raw_size for entry in self.device_frames)
        if device_bytes > DEVICE_BYTES:
            raise LimitError(f"the root declares more than {DEVICE_BYTES} bytes of device state")
        bringing: list[FrameEntry | ChunkEntry] = [*self.hot_frames, *self.chunks]
        sums = {
            "device_bytes": (device_bytes, self.totals.device_bytes),
            "frames": (
                len(self.listed_frames) + sum(chunk.frames for chunk in self.chunks),
                self.totals.frames,
            ),
            "literals": (sum(part.literals for part in bringing), self.totals.literals),
            "pages": (sum(part.pages for part in bringing), self.totals.pages),
        }
        for name, (found, declared) in sums.items():
            if found != declared:
                raise CorruptError(f"the root declares {declared} {name} in all, its parts have {found}")
        for name, declared, most in (
            ("ram_pages", self.totals.ram_pages, self.machine.ram_pages),
            ("disk_pages", self.totals.disk_pages, self.machine.disk_blocks),
        ):
            if declared > most:
                raise LimitError(f"the root declares {declared} {name}, the machine has {most}")


def check_machines(
    machine: Machine,
    base_machine: Machine,
    sections: tuple[DeviceSection, ...],
    base_sections: tuple[DeviceSection, ...],
) -> None:
    """:raises MismatchError: a capture of ``machine`` cannot stand on the base's."""
    if differences := machine.differences(base_machine):
        raise MismatchError(f"the overlay's machine differs from the base's: {'; '.join(differences)}")
    # Their order is that of the QEMU that wrote them.
    found, wanted = Counter(sections), Counter(base_sections)
    if unlike := sorted((found - wanted) + (wanted - found)):
        raise MismatchError(f"the overlay's device sections differ from the base's: {unlike}")


def _table(tables: Fields, name: str, kinds: set[FrameKind]) -> tuple[FrameEntry, ...]:
    entries = tuple(FrameEntry.from_json(v, f"{name} frame {at}") for at, v in enumerate(tables.list(name)))
    if any(entry.kind not in kinds for entry in entries):
        raise CorruptError(f"the root lists a frame of another kind under {name!r}")
    return entries


def read_sections(top: Fields, key: str) -> tuple[DeviceSection, ...]:
    """A list of device sections, in order.

    :raises CorruptError: it is not one.
    """
    return tuple(_section(value) for value in top.list(key))


def _section(value: Any) -> DeviceSection:
    name, instance, version = canonical.row(value, "device section", 3)
    return DeviceSection(
        canonical.line(name, "device section"),
        canonical.integer(instance, "device section"),
        canonical.integer(version, "device section"),
    )


def read_machine(top: Fields) -> Machine:
    """The member ``machine``; its fields are checked by the types that the dataclass declares.

    :raises CorruptError: it is not a machine.
    :raises LimitError: it has more pages than page numbers reach.
    """
    names = [field.name for field in fields(Machine)]
    raw = top.fields("machine", names)
    whole = {field.name for field in fields(Machine) if field.type in (int, "int")}
    values = {n: raw.integer(n, 1) if n in whole else raw.text(n, 128) for n in names}
    try:
        machine = Machine.from_json(values)
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptError(f"{raw.where} is not a machine: {error}") from error
    if machine.memory_bytes % PAGE_BYTES or machine.disk_bytes % PAGE_BYTES:
        raise CorruptError(f"{raw.where}: memory and disk are not whole pages")
    if max(machine.ram_pages, machine.disk_blocks) > 1 << 32:
        raise LimitError(f"{raw.where}: more than 2^32 pages")
    return machine
