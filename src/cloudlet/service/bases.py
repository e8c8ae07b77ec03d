"""The way of a base into the site, and the bases that are there already.

A base's files are kept by :class:`cloudlet.store.bases.BaseStore`, which the command line works with too; its
rows say who brought it. A base that is found without a row, since somebody built it here, gets one.

The bytes of an export come by an upload, or are fetched from a URL; from there on both are the same.
"""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sqlalchemy.engine import Connection

from cloudlet.errors import CloudletError, ConflictError, CorruptError, NotFoundError, UsageError
from cloudlet.keeper.order import describe
from cloudlet.service import capacity
from cloudlet.service.uploads import Body, Uploads
from cloudlet.service.work import operation
from cloudlet.store import bases as files
from cloudlet.store import journal
from cloudlet.store.exchange import Export, import_base
from cloudlet.store.retries import Remember, forget
from cloudlet.store.rows import (
    BASES,
    INSTANCES,
    OPERATIONS,
    SITE,
    Base,
    FileState,
    Operation,
    OperationState,
)

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

_TAKES_BYTES = (FileState.QUEUED, FileState.UPLOADING, FileState.REJECTED)
_OPEN = (OperationState.PENDING, OperationState.RUNNING)
_NAMESPACE = uuid.UUID("3f0c8a0e-5b3a-4c1c-9f57-6a1d3c1d2b11")

Progress = Callable[[int, int], None]


class Bases:
    """The bases of a site."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site
        self._packing = threading.Lock()
        self._uploads = Uploads(lambda base_id: site.blobs.staging(f"base-{base_id}"), site.alone)

    def find_new(self) -> None:
        """Give a row to each base that has none, and take it from those whose files have gone."""
        here = {base.id: base for base in self._site.machine.bases.all()}

        def note(connection: Connection) -> None:
            # Again: an import may have ended since.
            here = {base.id: base for base in self._site.machine.bases.all()}
            rows = {str(row.identity): row for row in BASES.list(connection, state=FileState.ACTIVE)}
            for identity in here.keys() - rows.keys():
                BASES.insert(connection, self._row(here[identity]))
            for identity in rows.keys() - here.keys():
                BASES.delete(connection, rows[identity].id)

        known = self._site.database.read(lambda connection: BASES.list(connection, state=FileState.ACTIVE))
        if {row.identity for row in known} != here.keys():
            self._site.database.write(note)

    def create(self, row: Base, remember: Remember = forget) -> Base:
        """Write the record of a base whose file is to be uploaded.

        :raises UsageError: no base may have that name.
        """
        files.check_name(row.name)

        def insert(connection: Connection) -> Base:
            self._insert(connection, row)
            remember(connection, row.id)
            return row

        return self._site.database.write(insert)

    def fetch(self, row: Base, url: str, remember: Remember = forget) -> Operation:
        """Write the record of a base, and have its file brought here from a URL.

        :param row: without a name it is called as the file says.
        :raises UsageError: no base may have that name, or the URL leads where it may not.
        """
        self._site.options.fetch_networks.check(url, "base.url")
        named = bool(row.name)
        row = replace(row, name=files.check_name(row.name) if named else _name_in(url))

        def begin(connection: Connection) -> Operation:
            self._insert(connection, row)
            fetching = operation("base.fetch", row, {"base": row.id}, url=url, named=named)
            begun = self._site.work.add(connection, fetching)
            remember(connection, begun.id)
            return begun

        begun = self._site.database.write(begin)
        self._site.work.submit(begun)
        return begun

    def received(self, row: Base) -> int:
        """How many bytes of an upload are here."""
        return self._uploads.received(row.id)

    def upload(self, row: Base, body: Body, offset: int, length: int) -> Operation:
        """Take the bytes of a base's file from ``offset`` to its end; the last one begins its import.

        :raises ConflictError: it is here already, or the offset is not where the last upload ended.
        :raises TooLargeError: it is more than the site takes of bases; no byte was read.
        :raises TruncatedError: the client was cut off; what came is kept.
        """

        def reserve(connection: Connection) -> None:
            capacity.lock(connection)
            before = BASES.get(connection, row.id)
            if before.state not in _TAKES_BYTES:
                raise ConflictError(f"base {row.id} is {before.state}", hint="create another")
            if _open_on(connection, row.id):
                raise ConflictError(f"base {row.id} is being fetched", hint="cancel that, or create another")
            self._uploads.check(row.id, offset)
            self._reserve(connection, before, offset + length)

        def begin(connection: Connection) -> Operation:
            where = {"state": FileState.UPLOADING}
            BASES.update(connection, row.id, where=where, state=FileState.VERIFYING)
            return self._site.work.add(connection, operation("base.import", row, {"base": row.id}))

        with self._uploads.alone(row.id):
            self._site.database.write(reserve)
            self._uploads.take(row.id, body, offset, length)
            begun = self._site.database.write(begin)
        self._site.work.submit(begun)
        return begun

    def reserve(self, base_id: str, size: int) -> None:
        """Have so many bytes of a base counted that is being fetched.

        :raises TooLargeError: it is more than the site takes of bases.
        """

        def reserve(connection: Connection) -> None:
            capacity.lock(connection)
            self._reserve(connection, BASES.get(connection, base_id), size)

        self._site.database.write(reserve)

    def staged(self, base_id: str) -> Path:
        """Where the file of a base is until it is unpacked."""
        return self._site.blobs.staging(f"base-{base_id}")

    def unpack(self, base_id: str, progress: Progress, *, named: bool = True) -> None:
        """Make the file of a base that has come a base. Can be done again.

        :param named: the row says what it is called, and not the file.
        :raises IntegrityError: it is not whole, or not one.
        """
        row = self._site.database.read(lambda connection: BASES.get(connection, base_id))
        if row.state is FileState.ACTIVE:
            return
        self._site.database.write(
            lambda connection: BASES.update(connection, base_id, state=FileState.VERIFYING)
        )
        file = self.staged(base_id)
        # A base that is here keeps its name, and its owner: who brings it again adds nothing to it.
        name = row.name if named else None
        base = import_base(self._site.machine.bases, file, name, progress, rename=False)
        if base is None:
            raise CorruptError("this is not an exported base", hint="make it with: cloudlet base export")

        def note(connection: Connection) -> None:
            other = BASES.find(connection, identity=base.id)
            if other and other.user_id != SITE:
                raise ConflictError(f"this base is here already, as {other.name}, {other.id}")
            owner: dict[str, Any] = {}
            if other:
                BASES.delete(connection, other.id)
                owner = {"project_id": SITE, "user_id": SITE}
            done = BASES.update(
                connection, base_id, state=FileState.ACTIVE, name=base.name, identity=base.id,
                size=base.bytes_on_disk(), description=describe_base(base), error=None, **owner,
            )  # fmt: skip
            journal.emit(connection, "base", "active", done, name=done.name)

        self._site.database.write(note)
        file.unlink(missing_ok=True)

    def find_left(self) -> None:
        """At the start: what a crash left between its last byte and its import can be sent on."""

        def note(connection: Connection) -> None:
            busy = {one.resources.get("base") for one in OPERATIONS.list(connection, state=_OPEN)}
            for row in BASES.list(connection, state=FileState.VERIFYING):
                if row.id not in busy:
                    BASES.update(connection, row.id, state=FileState.UPLOADING)

        self._site.database.write(note)

    def reject(self, base_id: str, error: CloudletError) -> None:
        """Say that a base cannot be used, and why."""
        said = {name: _without_secrets(text) for name, text in describe(error).items()}

        def note(connection: Connection) -> None:
            with suppress(NotFoundError):  # it was deleted meanwhile
                done = BASES.update(connection, base_id, state=FileState.REJECTED, error=said)
                journal.emit(connection, "base", "rejected", done, name=done.name, error=done.error)

        self._site.database.write(note)
        self.staged(base_id).unlink(missing_ok=True)

    def export(self, row: Base) -> Export:
        """A base as the file that another site can import; the first time all of it is packed for that.

        :raises ConflictError: it is not whole yet.
        :raises NotFoundError: its files are gone.
        """
        if row.state is not FileState.ACTIVE or not row.identity:
            raise ConflictError(f"base {row.id} is {row.state}", hint="wait until it is active")
        base = self._site.machine.bases.get(row.identity)
        if kept := Export.kept(base):
            return kept
        with self._packing:  # it takes a processor: not several at a time
            return Export.of(base)

    def delete(self, row: Base) -> None:
        """Remove a base; what is being done with it is cancelled.

        :raises ConflictError: instances stand on it.
        """

        def remove(connection: Connection) -> list[Operation]:
            if row.identity and (used := INSTANCES.count(connection, base_identity=row.identity)):
                raise ConflictError(f"{used} instances stand on base {row.name}", hint="delete them first")
            BASES.delete(connection, row.id)
            journal.emit(connection, "base", "deleted", row, name=row.name)
            return _open_on(connection, row.id)

        for begun in self._site.database.write(remove):
            with suppress(ConflictError):  # it has just ended
                self._site.work.cancel(begun.id)
        self.staged(row.id).unlink(missing_ok=True)
        if row.identity:
            self._site.machine.images.delete_of_base(row.identity)
            self._site.machine.bases.delete(self._site.machine.bases.get(row.identity), [])

    def _reserve(self, connection: Connection, before: Base, size: int) -> None:
        """Have so many bytes counted that are on their way, under the lock of what is admitted."""
        replaces = 0 if before.state is FileState.REJECTED else before.size or 0
        capacity.admit_base(connection, self._site.options.limits, size, replaces)
        BASES.update(connection, before.id, state=FileState.UPLOADING, size=size, error=None)

    @staticmethod
    def _insert(connection: Connection, row: Base) -> None:
        BASES.insert(connection, row)
        journal.emit(connection, "base", "queued", row, name=row.name)

    @staticmethod
    def _row(base: files.Base) -> Base:
        # The same id wherever it is found, so that two who find it at once do not make two rows.
        return Base(
            id=str(uuid.uuid5(_NAMESPACE, base.id)),
            project_id=SITE,
            user_id=SITE,
            name=base.name,
            state=FileState.ACTIVE,
            identity=base.id,
            size=base.bytes_on_disk(),
            description=describe_base(base),
        )


def _open_on(connection: Connection, base_id: str) -> list[Operation]:
    """What is being done with a base, or is about to be."""
    return [one for one in OPERATIONS.list(connection, state=_OPEN) if one.resources.get("base") == base_id]


def _name_in(url: str) -> str:
    """What to call a base at a URL until its file says it."""
    try:
        return files.check_name(urlsplit(url).path.rpartition("/")[2].removesuffix(".base"))
    except (UsageError, ValueError):
        return "base"


def _without_secrets(text: str) -> str:
    """A text that everybody may read: of URLs that are in it, who and what opens them is left out."""
    return re.sub(r"(https?://)(?:[^/\s@]*@)?([^\s?]*)(?:\?\S*)?", r"\1\2", text)


def describe_base(base: files.Base) -> dict[str, Any]:
    """What users want to know of a base."""
    return {
        "created": base.created,
        "machine": base.machine.to_json(),
        "guest": base.description.guest.to_json(),
        "ready": str(base.description.ready),
    }
