"""The way of a base into the site, and the bases that are there already.

A base's files are kept by :class:`cloudlet.store.bases.BaseStore`, which the command line works with too; its
rows say who brought it. A base that is found without a row, since somebody built it here, gets one.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection

from cloudlet.errors import CloudletError, ConflictError, CorruptError
from cloudlet.keeper.order import describe
from cloudlet.service.uploads import Body, Uploads
from cloudlet.service.work import operation
from cloudlet.store import bases as files
from cloudlet.store import journal
from cloudlet.store.exchange import import_base
from cloudlet.store.retries import Remember, forget
from cloudlet.store.rows import (
    BASES,
    INSTANCES,
    OPERATIONS,
    Base,
    FileState,
    Operation,
    OperationState,
)

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

_TAKES_BYTES = (FileState.QUEUED, FileState.UPLOADING, FileState.REJECTED)
_SITE = "00000000-0000-0000-0000-000000000000"
"""Who owns what was here before anybody came."""
_NAMESPACE = uuid.UUID("3f0c8a0e-5b3a-4c1c-9f57-6a1d3c1d2b11")

Progress = Callable[[int, int], None]


class Bases:
    """The bases of a site."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site
        self._uploads = Uploads(lambda base_id: site.blobs.staging(f"base-{base_id}"))

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
        """Write the record of a base whose file is to be uploaded."""

        def insert(connection: Connection) -> Base:
            BASES.insert(connection, row)
            remember(connection, row.id)
            journal.emit(connection, "base", "queued", row, name=row.name)
            return row

        return self._site.database.write(insert)

    def received(self, row: Base) -> int:
        """How many bytes of an upload are here."""
        return self._uploads.received(row.id)

    def upload(self, row: Base, body: Body, offset: int, length: int) -> Operation:
        """Take the bytes of a base's file from ``offset`` to its end; the last one begins its import.

        :raises ConflictError: it is here already, or the offset is not where the last upload ended.
        :raises TruncatedError: the client was cut off; what came is kept.
        """

        def state(connection: Connection, state: FileState) -> None:
            BASES.update(connection, row.id, where={"state": _TAKES_BYTES}, state=state, size=offset + length)

        with self._uploads.alone(row.id):
            self._site.database.write(lambda connection: state(connection, FileState.UPLOADING))
            self._uploads.take(row.id, body, offset, length)

        def begin(connection: Connection) -> Operation:
            state(connection, FileState.VERIFYING)
            return self._site.work.add(connection, operation("base.import", row, {"base": row.id}))

        begun = self._site.database.write(begin)
        self._site.work.submit(begun)
        return begun

    def unpack(self, base_id: str, progress: Progress) -> None:
        """Make the uploaded file of a base a base. Can be done again.

        :raises IntegrityError: it is not whole, or not one.
        """
        row = self._site.database.read(lambda connection: BASES.get(connection, base_id))
        if row.state is FileState.ACTIVE:
            return
        file = self._site.blobs.staging(f"base-{base_id}")
        base = import_base(self._site.machine.bases, file, row.name, progress)
        if base is None:
            raise CorruptError("this is not an exported base", hint="make it with: cloudlet base export")

        def note(connection: Connection) -> None:
            other = BASES.find(connection, identity=base.id)
            if other and other.user_id != _SITE:
                raise ConflictError(f"this base is here already, as {other.name}, {other.id}")
            if other:  # found here before its row said so
                BASES.delete(connection, other.id)
            done = BASES.update(
                connection, base_id, state=FileState.ACTIVE, identity=base.id, size=base.bytes_on_disk(),
                description=describe_base(base), error=None,
            )  # fmt: skip
            journal.emit(connection, "base", "active", done, name=done.name)

        self._site.database.write(note)
        file.unlink(missing_ok=True)

    def find_left(self) -> None:
        """At the start: what a crash left between its last byte and its import can be sent on."""

        def note(connection: Connection) -> None:
            states = (OperationState.PENDING, OperationState.RUNNING)
            busy = {one.resources.get("base") for one in OPERATIONS.list(connection, state=states)}
            for row in BASES.list(connection, state=FileState.VERIFYING):
                if row.id not in busy:
                    BASES.update(connection, row.id, state=FileState.UPLOADING)

        self._site.database.write(note)

    def reject(self, base_id: str, error: CloudletError) -> None:
        """Say that a base cannot be used, and why."""

        def note(connection: Connection) -> None:
            done = BASES.update(connection, base_id, state=FileState.REJECTED, error=describe(error))
            journal.emit(connection, "base", "rejected", done, name=done.name, error=done.error)

        self._site.database.write(note)
        self._site.blobs.staging(f"base-{base_id}").unlink(missing_ok=True)

    def delete(self, row: Base) -> None:
        """Remove a base.

        :raises ConflictError: instances stand on it.
        """

        def remove(connection: Connection) -> None:
            if row.identity and (used := INSTANCES.count(connection, base_identity=row.identity)):
                raise ConflictError(f"{used} instances stand on base {row.name}", hint="delete them first")
            BASES.delete(connection, row.id)
            journal.emit(connection, "base", "deleted", row, name=row.name)

        self._site.database.write(remove)
        if row.identity:
            self._site.machine.images.delete_of_base(row.identity)
            self._site.machine.bases.delete(self._site.machine.bases.get(row.identity), [])

    @staticmethod
    def _row(base: files.Base) -> Base:
        # The same id wherever it is found, so that two who find it at once do not make two rows.
        return Base(
            id=str(uuid.uuid5(_NAMESPACE, base.id)),
            project_id=_SITE,
            user_id=_SITE,
            name=base.name,
            state=FileState.ACTIVE,
            identity=base.id,
            size=base.bytes_on_disk(),
            description=describe_base(base),
        )


def describe_base(base: files.Base) -> dict[str, Any]:
    """What users want to know of a base."""
    return {
        "created": base.created,
        "machine": base.machine.to_json(),
        "guest": base.description.guest.to_json(),
        "ready": str(base.description.ready),
    }
