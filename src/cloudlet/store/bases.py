"""The bases of a site: each a folder named by its content, complete or not there.

``base.json`` describes the base; the digest of its description is the base's identity, and the
description pins every file by its digest. So two sites that hold the same base know it, and a base
that was changed anywhere is another base. A base's files are never written to again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from cloudlet.errors import ConflictError, CorruptError, NotFoundError, RefusedError, UsageError
from cloudlet.hypervisor.driver import BaseImage
from cloudlet.hypervisor.records import Workspace, folder_lock, reap
from cloudlet.model import PAGE_BYTES, Machine, Readiness
from cloudlet.overlay import canonical
from cloudlet.overlay.base import BasePages
from cloudlet.overlay.index import PageIndex
from cloudlet.overlay.pages import Runs
from cloudlet.overlay.root import DeviceSection
from cloudlet.sparse import Progress, data_ranges, digest_file

FORMAT = 1
DISK, RAM, DEVICE_STATE = "disk.raw", "ram", "device-state"
KERNEL, INITRD, UEFI_VARS = "kernel", "initrd", "uefi-vars.fd"
FILES = (DISK, RAM, DEVICE_STATE, KERNEL, INITRD, UEFI_VARS)
_INDEX = "page-index"
_DOCUMENT = "base.json"
_NEW = ".new-"
"""How the name of a folder begins that somebody works in."""


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
    def from_json(cls, data: dict[str, Any]) -> Description:
        """Read a description.

        :raises CorruptError: it is not one.
        """
        try:
            if data["format"] != FORMAT:
                raise CorruptError(f"the base has format {data['format']}, this program reads {FORMAT}")
            if not set(data["files"]) <= set(FILES) or not {DISK, RAM, DEVICE_STATE} <= set(data["files"]):
                raise CorruptError("the base lists other files than a base has")
            return cls(
                machine=Machine.from_json(data["machine"]),
                sections=tuple(DeviceSection(*section) for section in data["sections"]),
                cmdline=data["cmdline"],
                ready=Readiness.parse(data["ready"]),
                guest=Guest(**data["guest"]),
                files={name: (int(size), str(digest)) for name, (size, digest) in data["files"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise CorruptError(f"the base's description is damaged: {error!r}") from error

    @property
    def identity(self) -> str:
        return blake3(canonical.encode(self.to_json())).hexdigest()


@dataclass(frozen=True, slots=True)
class Base:
    """A base that is here."""

    path: Path
    name: str
    created: str
    """UTC, ISO 8601."""
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

    def all(self) -> list[Base]:
        """All bases, oldest first."""
        found = [self._read(path.parent) for path in self.folder.glob(f"*/{_DOCUMENT}")]
        return sorted((base for base in found if base), key=lambda base: (base.created, base.id))

    def find(self, reference: str) -> Base:
        """The base with this name or this beginning of its identity; of several with a name the newest.

        :raises NotFoundError: none.
        :raises ConflictError: the beginning of an identity fits several.
        """
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
        """Take the files in ``folder`` (of this file system) as a base; one that is here already stays."""
        identity = description.identity
        target = self.folder / identity
        with folder_lock(self.folder):
            if not (target / _DOCUMENT).exists():
                shutil.rmtree(target, ignore_errors=True)
                staged = folder / "adopted"
                staged.mkdir(mode=0o755)
                for file in description.files:
                    (folder / file).rename(staged / file)
                    (staged / file).chmod(0o444)
                document = {"name": name, "created": created, "description": description.to_json()}
                (staged / _DOCUMENT).write_text(json.dumps(document, indent=1))
                staged.rename(target)
            elif (base := self._read(target)) and base.name != name:
                document = {"name": name, "created": created, "description": description.to_json()}
                temporary = folder / _DOCUMENT
                temporary.write_text(json.dumps(document, indent=1))
                temporary.replace(target / _DOCUMENT)
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
            document = json.loads((path / _DOCUMENT).read_text())
            description = Description.from_json(document["description"])
            return Base(path, str(document["name"]), str(document["created"]), description)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, CorruptError) as error:
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
