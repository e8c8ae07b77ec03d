"""The blobs of a site: files named by their content, and who needs each of them.

A blob belongs to overlays (holder ``overlay:ID``) and is used by instances and by who reads it
(``instance:ID``, ``use:PROCESS:ID``). What was uploaded is kept until nobody holds it any more. What can be
fetched again is only cached: when there are more bytes than the limit, what was not used for longest goes,
but nothing that is in use.

The file has its name before the row that speaks of it, and loses it after that row is gone. So a crash leaves
at most a file of which no row speaks, which :meth:`BlobStore.reap` removes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from blake3 import blake3
from sqlalchemy.engine import Connection

from cloudlet.errors import CorruptError, NotFoundError
from cloudlet.hypervisor.records import folder_lock, start_time_of
from cloudlet.store import tables
from cloudlet.store.database import Database
from cloudlet.store.rows import new_id, now

_CHUNK = 1 << 20
_OWNER, _USE = "overlay:", "use:"

# Written once: to write a query costs more than to answer it.
_KEY: sa.BindParameter[str] = sa.bindparam("key")
_REFERENCES = tables.blob_references
_TOUCHED = sa.update(tables.blobs).where(tables.blobs.c.digest == _KEY).values(used_at=sa.bindparam("moment"))
_HELD = sa.select(_REFERENCES.c.holder).where(
    _REFERENCES.c.digest == _KEY, _REFERENCES.c.holder == sa.bindparam("who")
)
_HOLD = sa.insert(_REFERENCES)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with a blob."""

    digest: str
    what: str


class BlobStore:
    """The folder of all blobs, and the rows that speak of them; ``limit`` is for what is only cached."""

    def __init__(self, database: Database, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._database = database

    def staging(self, name: str) -> Path:
        """Where bytes are collected that are to become a blob; the file system is the blobs'."""
        folder = self.folder / "incoming"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder / name

    def adopt(self, path: Path, digest: str, holder: str, *, kept: bool) -> None:
        """Take a file, whose content has this digest, as a blob. One that is here already serves as well."""
        size = path.stat().st_size
        with path.open("rb") as file:
            os.fsync(file.fileno())
        target = self._path(digest)
        with folder_lock(self.folder):
            target.parent.mkdir(exist_ok=True, mode=0o700)
            path.chmod(0o444)
            path.replace(target)
            self._database.write(lambda connection: self._record(connection, digest, size, holder, kept))
        self.make_room()

    def record(self, digest: str, holder: str, *, kept: bool) -> None:
        """Have a row and a holder for a blob that has its name already. Can be done again.

        :raises NotFoundError: it is not here.
        """
        with folder_lock(self.folder):
            try:
                size = self._path(digest).stat().st_size
            except FileNotFoundError as error:
                raise NotFoundError(f"blob {digest[:16]} is not here") from error
            self._database.write(lambda connection: self._record(connection, digest, size, holder, kept))

    def hold(self, connection: Connection, digest: str, holder: str) -> None:
        """Have a blob held by one more.

        :raises NotFoundError: it is not here.
        """
        done = connection.execute(_TOUCHED, {"key": digest, "moment": now()})
        if not done.rowcount:
            raise NotFoundError(f"blob {digest[:16]} is not here")
        if connection.execute(_HELD, {"key": digest, "who": holder}).first() is None:
            connection.execute(_HOLD, {"digest": digest, "holder": holder})

    @contextmanager
    def in_use(self, digest: str) -> Iterator[Path]:
        """The blob's file, which stays until the context is left.

        :raises NotFoundError: it is not here.
        """
        holder = f"{_USE}{_this_process()}:{new_id()}"
        self._database.write(lambda connection: self.hold(connection, digest, holder))
        try:
            yield self._path(digest)
        finally:
            self.release(holder)

    def release(self, holder: str) -> None:
        """End what somebody holds; a blob that nobody holds any more is removed."""
        for digest in self._database.write(lambda connection: _let_go(connection, holder)):
            self._remove_unless(digest, _holders)

    def path(self, digest: str) -> Path | None:
        """Where a blob is; None if it is not here. Nothing keeps it there: see :meth:`in_use`."""
        path = self._path(digest)
        return path if path.exists() else None

    def holders(self, digest: str) -> list[str]:
        """Who holds a blob, such as ``overlay:ID``."""
        return self._database.read(lambda connection: _holders(connection, digest))

    def bytes(self, *, cached: bool = False) -> int:
        """Bytes of all blobs, or of those that are only cached."""
        size = sa.func.coalesce(sa.func.sum(tables.blobs.c.size), 0)
        query = sa.select(size).where(sa.not_(tables.blobs.c.kept)) if cached else sa.select(size)
        return int(self._database.read(lambda connection: connection.execute(query).scalar_one()))

    def make_room(self) -> list[str]:
        """Remove cached blobs until they keep to the limit; their digests."""
        blobs = tables.blobs
        query = sa.select(blobs.c.digest, blobs.c.size).where(sa.not_(blobs.c.kept)).order_by(blobs.c.used_at)
        cached = self._database.read(lambda connection: connection.execute(query).all())
        excess = sum(size for _, size in cached) - self.limit
        removed = []
        for digest, size in cached:
            if excess <= 0:
                break
            if self._remove_unless(digest, _users):
                removed.append(digest)
                excess -= size
        return removed

    def verify(self, progress: Progress | None = None) -> list[Damage]:
        """Read all blobs; what is damaged, missing, or spoken of by no row."""
        blobs = tables.blobs
        query = sa.select(blobs.c.digest, blobs.c.size).order_by(blobs.c.digest)
        rows = self._database.read(lambda connection: connection.execute(query).all())
        found, done, total = [], 0, sum(size for _, size in rows)
        for digest, size in rows:
            path = self._path(digest)
            if not path.exists():
                found.append(Damage(digest, "missing"))
            elif path.stat().st_size != size or digest_of(path) != digest:
                found.append(Damage(digest, "damaged"))
            done += size
            if progress:
                progress(done, total)
        known = {digest for digest, _ in rows}
        return found + [
            Damage(path.name, "not in the database") for path in self._files() if path.name not in known
        ]

    def reap(self) -> list[str]:
        """Remove what crashes left: files of which no row speaks, and uses of processes that are no more."""
        self._database.write(_end_lost_uses)
        with folder_lock(self.folder):
            # An overlay may say whose bytes it is before they have a row.
            query = sa.union(
                sa.select(tables.blobs.c.digest),
                sa.select(tables.overlays.c.digest).where(tables.overlays.c.digest.is_not(None)),
            )
            known = set(self._database.read(lambda connection: connection.execute(query).scalars().all()))
            orphans = [path for path in self._files() if path.name not in known]
            for path in orphans:
                path.unlink()
        return [path.name for path in orphans]

    def _record(self, connection: Connection, digest: str, size: int, holder: str, kept: bool) -> None:
        blobs = tables.blobs
        known = connection.execute(
            sa.select(blobs.c.kept).where(blobs.c.digest == digest)
        ).scalar_one_or_none()
        if known is None:
            connection.execute(sa.insert(blobs).values(digest=digest, size=size, used_at=now(), kept=kept))
        elif kept and not known:
            connection.execute(sa.update(blobs).where(blobs.c.digest == digest).values(kept=True))
        self.hold(connection, digest, holder)

    def _remove_unless(self, digest: str, needed: Callable[[Connection, str], list[str]]) -> bool:
        def forget(connection: Connection) -> bool:
            mine = tables.blobs.c.digest == digest
            if connection.execute(sa.select(tables.blobs).where(mine).with_for_update()).first() is None:
                return False
            if needed(connection, digest):
                return False
            connection.execute(
                sa.delete(tables.blob_references).where(tables.blob_references.c.digest == digest)
            )
            connection.execute(sa.delete(tables.blobs).where(mine))
            return True

        with folder_lock(self.folder):
            if not self._database.write(forget):
                return False
            with suppress(FileNotFoundError):
                self._path(digest).unlink()
        return True

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9a-f][0-9a-f]/*"))

    def _path(self, digest: str) -> Path:
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise CorruptError(f"{digest!r} is not a digest")
        return self.folder / digest[:2] / digest


def digest_of(path: Path) -> str:
    """The digest under which a file would be a blob: BLAKE3 of its bytes, in hexadecimal digits."""
    digest = blake3()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _holders(connection: Connection, digest: str) -> list[str]:
    references = tables.blob_references
    query = sa.select(references.c.holder).where(references.c.digest == digest)
    return list(connection.execute(query).scalars())


def _users(connection: Connection, digest: str) -> list[str]:
    return [holder for holder in _holders(connection, digest) if not holder.startswith(_OWNER)]


def _let_go(connection: Connection, holder: str) -> list[str]:
    references = tables.blob_references
    mine = references.c.holder == holder
    digests = list(connection.execute(sa.select(references.c.digest).where(mine)).scalars())
    connection.execute(sa.delete(references).where(mine))
    return digests


def _end_lost_uses(connection: Connection) -> None:
    holder = tables.blob_references.c.holder
    for use in connection.execute(sa.select(holder).where(holder.startswith(_USE))).scalars().all():
        if not _lives(use.removeprefix(_USE).partition(":")[0]):
            connection.execute(sa.delete(tables.blob_references).where(holder == use))


def _this_process() -> str:
    """A name of this process that no other gets, not even one with its number."""
    return f"{os.getpid()}-{start_time_of(os.getpid())}"


def _lives(process: str) -> bool:
    pid, _, started = process.partition("-")
    try:
        return str(start_time_of(int(pid))) == started
    except (ValueError, ProcessLookupError):
        return False
