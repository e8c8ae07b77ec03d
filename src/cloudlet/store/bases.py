"""The bases of a site: each a folder named by its content, complete or not there.

``base.json`` describes the base; the digest of its description is the base's identity, and the
description pins every file by its digest. So two sites that hold the same base know it, and a base
that was changed anywhere is another base. A base's files are never written to again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from cloudlet.errors import (
    ConflictError,
    CorruptError,
    IntegrityError,
    LimitError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from cloudlet.hypervisor.driver import BaseImage
from cloudlet.hypervisor.records import Workspace, folder_lock, reap
from cloudlet.model import LARGEST_DISK_BYTES, MEBIBYTE, PAGE_BYTES, Machine, Readiness
from cloudlet.overlay import canonical
from cloudlet.overlay.base import BasePages
from cloudlet.overlay.canonical import Fields
from cloudlet.overlay.index import PageIndex
from cloudlet.overlay.limits import DEVICE_BYTES
from cloudlet.overlay.pages import Runs
from cloudlet.overlay.root import DeviceSection, read_machine, read_sections
from cloudlet.sparse import Progress, data_ranges, digest_file

FORMAT = 1
DISK, RAM, DEVICE_STATE = "disk.raw", "ram", "device-state"
KERNEL, INITRD, UEFI_VARS = "kernel", "initrd", "uefi-vars.fd"
FILES = (DISK, RAM, DEVICE_STATE, KERNEL, INITRD, UEFI_VARS)
_INDEX = "page-index"
_DOCUMENT = "base.json"
_NEW = ".new-"
"""How the name of a folder begins that somebody works in."""
_LARGEST_BOOT_FILE = 512 * MEBIBYTE
_MOST_BYTES = {DISK: LARGEST_DISK_BYTES, RAM: LARGEST_DISK_BYTES, DEVICE_STATE: DEVICE_BYTES}
_MEMBERS = ("format", "machine", "sections", "cmdline", "ready", "guest", "files")
_IDENTITY = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LIKE_AN_IDENTITY = re.compile(r"[0-9A-Fa-f]{16,}")
# These two become parts of QEMU's options, where a comma would begin another one.
_MACHINE_TYPE = re.compile(r"(pc-q35-[0-9]+\.[0-9]+|fake-[0-9]+)")
_CPU_MODEL = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Guest:
    """What is known of the guest in a base."""

    agent: bool
    """The QEMU guest agent answers."""
    clone_agent: bool
    """It has our clone agent, which renews a clone's identity in one call."""
    quiet: bool
    """It has our script that makes captures small."""

    def to_json(self) -> dict[str, bool]:
        return {"agent": self.agent, "clone_agent": self.clone_agent, "quiet": self.quiet}

    @classmethod
    def from_json(cls, guest: Fields) -> Guest:
        return cls(guest.truth("agent"), guest.truth("clone_agent"), guest.truth("quiet"))


@dataclass(frozen=True, slots=True)
class Description:
    """What a base is, apart from the names and dates that a site gives it."""

    machine: Machine
    sections: tuple[DeviceSection, ...]
    cmdline: str
    ready: Readiness
    guest: Guest
    files: Mapping[str, tuple[int, str]]
    """Size in bytes and digest of each file."""

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "machine": self.machine.to_json(),
            "sections": [list(section) for section in self.sections],
            "cmdline": self.cmdline,
            "ready": str(self.ready),
            "guest": self.guest.to_json(),
            "files": {name: list(entry) for name, entry in self.files.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> Description:
        """Read a description; whoever wrote it is not trusted, for it may have come in an export.

        :raises CorruptError: it is not one, or it contradicts itself.
        :raises LimitError: it declares more than a base may have.
        """
        if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
            raise CorruptError(f"the base has format {data['format']!r}, this program reads {FORMAT}")
        top = Fields(data, "description", _MEMBERS)
        cmdline = top.text("cmdline", 2048)
        if len(cmdline.encode()) > 2048:
            raise CorruptError("description.cmdline is longer than 2048 bytes")
        try:
            ready = Readiness.parse(top.text("ready"))
        except UsageError as error:
            raise CorruptError(f"description.ready: {error.message}") from error
        description = cls(
            machine=read_machine(top),
            sections=read_sections(top, "sections"),
            cmdline=cmdline,
            ready=ready,
            guest=Guest.from_json(top.fields("guest", ("agent", "clone_agent", "quiet"))),
            files=_files(data["files"]),
        )
        description._check_machine()
        if description.to_json() != data:
            raise CorruptError("description.ready is not written as this program writes it")
        return description

    def _check_machine(self) -> None:
        if not _MACHINE_TYPE.fullmatch(self.machine.machine_type):
            raise CorruptError(f"description.machine: no machine type {self.machine.machine_type!r} is known")
        if not _CPU_MODEL.fullmatch(self.machine.cpu_model):
            raise CorruptError(f"description.machine: {self.machine.cpu_model!r} is not a CPU model")
        for name, bytes_of_machine in ((RAM, self.machine.memory_bytes), (DISK, self.machine.disk_bytes)):
            if self.files[name][0] != bytes_of_machine:
                raise CorruptError(
                    f"{name} of the base has {self.files[name][0]} bytes, its machine {bytes_of_machine}"
                )

    @property
    def identity(self) -> str:
        return blake3(canonical.encode(self.to_json())).hexdigest()


def _files(value: Any) -> dict[str, tuple[int, str]]:
    if not isinstance(value, dict) or not {DISK, RAM, DEVICE_STATE} <= value.keys() <= set(FILES):
        raise CorruptError("the base lists other files than a base has")
    files = {}
    for name, entry in value.items():
        size, digest = canonical.row(entry, f"{name} of the base", 2)
        files[name] = (
            canonical.integer(size, f"the size of {name}"),
            canonical.digest(digest, f"the digest of {name}").hex(),
        )
        if size > (most := _MOST_BYTES.get(name, _LARGEST_BOOT_FILE)):
            raise LimitError(f"{name} of the base declares {size} bytes, {most} are allowed")
    return files


def check_name(name: str) -> str:
    """A name that a base may have: one that can be typed, and that nobody takes for an identity.

    :raises UsageError: it is not one.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be a base's name",
            hint="give --name: up to 64 letters, digits, dots, underscores and dashes",
        )
    if _LIKE_AN_IDENTITY.fullmatch(name):
        raise UsageError(f"{name!r} looks like the id of a base", hint="give another --name")
    return name


@dataclass(frozen=True, slots=True)
class Base:
    """A base that is here."""

    path: Path
    name: str
    created: str
    """When it was captured, as who captured it says: UTC, ISO 8601."""
    adopted: int
    """When it was taken in here under its name, in nanoseconds of this machine's clock."""
    description: Description

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def machine(self) -> Machine:
        return self.description.machine

    def image(self) -> BaseImage:
        """The base as a hypervisor wants it."""
        return BaseImage(
            base_id=self.id,
            machine=self.machine,
            ram=self.path / RAM,
            disk=self.path / DISK,
            device_state=self.path / DEVICE_STATE,
            sections=self.description.sections,
            kernel=self._file(KERNEL),
            initrd=self._file(INITRD),
            cmdline=self.description.cmdline,
            uefi_vars=self._file(UEFI_VARS),
        )

    @contextmanager
    def pages(self) -> Iterator[BasePages]:
        """The base as the overlay engine wants it, its files open."""
        ram = _open(self.path / RAM)
        try:
            disk = _open(self.path / DISK)
            try:
                yield BasePages(self.id, self.machine, self.description.sections, ram, disk)
            finally:
                os.close(disk)
        finally:
            os.close(ram)

    def index(self, progress: Progress | None = None) -> PageIndex:
        """Where contents are found in the base; made at the first call, then kept as a file."""
        path = self.path / _INDEX
        if not path.exists():
            with self.pages() as pages:
                index = PageIndex.build(pages, _data_runs(pages.disk_fd), progress=progress)
            with Workspace.create(self.path.parent, prefix=_NEW) as workspace:
                temporary = workspace.path / _INDEX
                with temporary.open("wb") as file:
                    index.save(file)
                temporary.replace(path)
        descriptor = _open(path)
        try:
            return PageIndex.load(descriptor, self.id)
        finally:
            os.close(descriptor)

    def bytes_on_disk(self) -> int:
        """Bytes the base takes on this machine's disk."""
        return sum(path.stat().st_blocks * 512 for path in self.path.iterdir())

    def _file(self, name: str) -> Path | None:
        return self.path / name if name in self.description.files else None


class BaseStore:
    """The folder of all bases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, tuple[tuple[int, int], Base]] = {}
        """What was read before, with what tells whether it is still the same file."""

    def all(self) -> list[Base]:
        """All bases, the one that was taken in last at the end."""
        found = [self._read(path.parent) for path in self.folder.glob(f"*/{_DOCUMENT}")]
        return sorted((base for base in found if base), key=lambda base: (base.adopted, base.id))

    def get(self, identity: str) -> Base:
        """The base with exactly this identity, whatever names there are.

        :raises NotFoundError: it is not here.
        """
        base = self._read(self.folder / identity) if _IDENTITY.fullmatch(identity) else None
        if base is None:
            raise NotFoundError(f"base {identity} is not here", hint="cloudlet base import FILE")
        return base

    def find(self, reference: str) -> Base:
        """The base with this identity, else with this name, else with this beginning of its identity.

        Of several with a name it is the one that was taken in here last, whatever date an export carried.

        :raises NotFoundError: none.
        :raises ConflictError: the beginning of an identity fits several.
        """
        with suppress(NotFoundError):
            return self.get(reference)
        bases = self.all()
        if named := [base for base in bases if base.name == reference]:
            return named[-1]
        matching = [base for base in bases if len(reference) >= 4 and base.id.startswith(reference)]
        if len(matching) > 1:
            raise ConflictError(f"{reference} fits {len(matching)} bases", hint="give more of the identity")
        if not matching:
            known = ", ".join(sorted({base.name for base in bases})) or "none"
            raise NotFoundError(
                f"there is no base {reference!r} here (bases: {known})",
                hint="cloudlet base build, or cloudlet base import FILE",
            )
        return matching[0]

    def workspace(self) -> Workspace:
        """A folder to make a base in; when it is left it is gone, with all that runs for it."""
        return Workspace.create(self.folder, prefix=_NEW)

    def describe(
        self,
        folder: Path,
        *,
        machine: Machine,
        sections: tuple[DeviceSection, ...],
        cmdline: str,
        ready: Readiness,
        guest: Guest,
        progress: Progress | None = None,
    ) -> Description:
        """The description of the files in ``folder``, which are read for their digests."""
        files = {}
        for name in FILES:
            if (folder / name).exists():
                descriptor = _open(folder / name)
                try:
                    files[name] = (os.fstat(descriptor).st_size, digest_file(descriptor, progress))
                finally:
                    os.close(descriptor)
        return Description(machine, sections, cmdline, ready, guest, files)

    def adopt(self, folder: Path, description: Description, name: str, created: str) -> Base:
        """Take the files in ``folder`` (of this file system) as a base; one that is here already stays.

        The base has its name as of now: what other base was taken in under it before yields
        (:meth:`find`). The time of modification of ``base.json`` records that moment.

        :param created: when it was captured; of a base that is here already the date stays.
        :raises UsageError: no base may have that name.
        """
        check_name(name)
        identity = description.identity
        target = self.folder / identity
        with folder_lock(self.folder):
            here = self._read(target)
            document = {
                "name": name,
                "created": here.created if here else created,
                "description": description.to_json(),
            }
            if here:
                temporary = folder / _DOCUMENT
                temporary.write_text(json.dumps(document, indent=1))
                temporary.replace(target / _DOCUMENT)
            else:
                shutil.rmtree(target, ignore_errors=True)
                staged = folder / "adopted"
                staged.mkdir(mode=0o755)
                for file in description.files:
                    (folder / file).rename(staged / file)
                    (staged / file).chmod(0o444)
                (staged / _DOCUMENT).write_text(json.dumps(document, indent=1))
                staged.rename(target)
        adopted = self._read(target)
        assert adopted
        return adopted

    def delete(self, base: Base, used_by: list[str]) -> None:
        """Remove a base.

        :raises ConflictError: instances use it.
        """
        if used_by:
            raise ConflictError(
                f"base {base.name} is used by {', '.join(used_by)}", hint=f"cloudlet stop {used_by[0]} first"
            )
        # Renamed first: a base that is half removed must not look like one.
        doomed = self.folder / f".deleted-{base.id[:16]}"
        with folder_lock(self.folder):
            shutil.rmtree(doomed, ignore_errors=True)
            base.path.rename(doomed)
            shutil.rmtree(doomed)

    def verify(self, base: Base, progress: Progress | None = None) -> None:
        """Read all of a base and compare it with its description.

        :raises CorruptError: a file is not what it was.
        """
        for name, (size, digest) in base.description.files.items():
            descriptor = _open(base.path / name)
            try:
                if os.fstat(descriptor).st_size != size or digest_file(descriptor, progress) != digest:
                    raise CorruptError(f"{name} of base {base.name} was changed", hint="import it again")
            finally:
                os.close(descriptor)
        if base.description.identity != base.id:
            raise CorruptError(f"base {base.name} is not the base that its folder says")

    def reap(self) -> list[str]:
        """Remove what killed builds and imports left."""
        if not self.folder.exists():
            return []
        removed = reap(self.folder)
        if doomed := list(self.folder.glob(".deleted-*")):
            with suppress(RefusedError), folder_lock(self.folder):
                for left in doomed:
                    shutil.rmtree(left, ignore_errors=True)
        return removed

    def _read(self, path: Path) -> Base | None:
        try:
            with (path / _DOCUMENT).open(encoding="utf-8") as file:
                status = os.fstat(file.fileno())
                which = status.st_ino, status.st_mtime_ns
                if (known := self._known.get(path)) and known[0] == which:
                    return known[1]
                document = json.load(file)
            created = canonical.time(document["created"], "created")
            description = Description.from_json(document["description"])
            base = Base(path, str(document["name"]), created, status.st_mtime_ns, description)
            self._known[path] = which, base
            return base
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError, IntegrityError) as error:
            raise CorruptError(
                f"{path / _DOCUMENT} is damaged", hint=f"remove {path}, and import or build the base again"
            ) from error


def _data_runs(descriptor: int) -> Runs:
    ranges = [
        (start // PAGE_BYTES, -(-(start + length) // PAGE_BYTES) - start // PAGE_BYTES)
        for start, length in data_ranges(descriptor)
    ]
    return np.array(ranges, np.uint32).reshape(-1, 2)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is missing", hint="import or build the base again") from error
