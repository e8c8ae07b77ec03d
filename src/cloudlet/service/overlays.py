"""The way of an overlay into the site: a record, its bytes, their verification, a blob.

Bytes come by an upload, which may be cut and goes on where it was, or from a URL. An overlay is active when
all of it has been verified: every frame by its digest, the root by a signature that the site trusts.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection

from cloudlet.errors import (
    CloudletError,
    ConflictError,
    FailedError,
    IntegrityError,
    NotFoundError,
    TooLargeError,
    UnreachableError,
)
from cloudlet.keeper.order import Order, describe
from cloudlet.model import format_bytes
from cloudlet.overlay.apply import verify_only
from cloudlet.overlay.reader import OverlayReader
from cloudlet.overlay.root import Root
from cloudlet.service import capacity
from cloudlet.service.uploads import Body, Uploads
from cloudlet.service.work import operation
from cloudlet.store import journal
from cloudlet.store.blobs import digest_of
from cloudlet.store.retries import Remember, forget
from cloudlet.store.rows import (
    INSTANCES,
    OPERATIONS,
    OVERLAYS,
    App,
    FileState,
    Operation,
    OperationState,
    Overlay,
)
from cloudlet.transfer.networks import Networks
from cloudlet.transfer.source import open_source

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

_PIECE = 256 << 10
_LARGEST = 1 << 40
_REMEMBERED_ROOTS = 64
_PEEK_SECONDS = 5.0
"""Longest wait for the head of an overlay elsewhere: its caller waits too."""
_UNKNOWN = 64 << 20
"""Reserved at a time where a server does not say how much there is to come."""
_TAKES_BYTES = (FileState.QUEUED, FileState.UPLOADING, FileState.REJECTED)

Progress = Callable[[int, int], None]


class Overlays:
    """The overlays of a site."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site
        self._uploads = Uploads(self._staged, site.alone)
        self._roots: dict[tuple[str | None, int], Root] = {}
        """Roots that were verified, by the digest of their bytes and the keys that were trusted then."""

    def create(self, overlay: Overlay, remember: Remember = forget) -> Overlay:
        """Write the record of an overlay whose bytes are to be uploaded, or fetched when they are needed.

        :raises UsageError: its URL leads where it may not.
        """
        if overlay.url:
            self._site.options.fetch_networks.check(overlay.url, "overlay.url")

        def insert(connection: Connection) -> Overlay:
            OVERLAYS.insert(connection, overlay)
            remember(connection, overlay.id)
            journal.emit(connection, "overlay", "queued", overlay, name=overlay.name)
            return overlay

        return self._site.database.write(insert)

    def received(self, overlay: Overlay) -> int:
        """How many bytes of an upload are here: where the next one has to go on."""
        if overlay.state is FileState.ACTIVE:
            return overlay.size or 0
        return self._uploads.received(overlay.id)

    def upload(self, overlay: Overlay, body: Body, offset: int, length: int) -> Overlay:
        """Take the bytes of an overlay from ``offset`` to its end; the last one makes it active.

        :param length: how many bytes the client promised.
        :raises ConflictError: it is uploaded already, or just now, or the offset is not where that ended.
        :raises TooLargeError: it is more than the project may upload; no byte was read.
        :raises TruncatedError: the client was cut off; what came is kept.
        :raises IntegrityError: it is not an overlay that may run here; nothing of it is kept.
        """
        if overlay.url:
            raise ConflictError(
                f"overlay {overlay.id} comes from {overlay.url}", hint="create another for an upload"
            )
        with self._uploads.alone(overlay.id):
            self._begin(overlay.id, offset, length)
            file = self._uploads.take(overlay.id, body, offset, length)
            try:
                return self.finish(overlay.id, file)
            except IntegrityError as error:
                self.reject(overlay.id, error)
                file.unlink(missing_ok=True)
                raise
            except Exception:
                self._become(overlay.id, FileState.UPLOADING)
                raise

    def finish(self, overlay_id: str, file: Path, progress: Progress | None = None) -> Overlay:
        """Verify a file and make it the overlay's bytes. Can be done again.

        :raises IntegrityError: it is not an overlay that may run here.
        :raises TooLargeError: it was saved here, and is more than the project may have.
        """
        overlay = self._become(overlay_id, FileState.VERIFYING)
        if file.exists():
            root, identity, signed_by = self._verified(file, progress)
            size, digest = file.stat().st_size, digest_of(file)
            # Before the file has its name: a crash in between leaves a row that knows it.
            self._describe(
                overlay_id,
                size=size,
                digest=digest,
                identity=identity,
                base_identity=root.base,
                description={**_described(root), "signed_by": signed_by},
            )
            self._site.blobs.adopt(file, digest, f"overlay:{overlay_id}", kept=overlay.url is None)
        elif overlay.digest and self._site.blobs.path(overlay.digest):
            # It had its name when there was a crash, and perhaps no row yet.
            self._site.blobs.record(overlay.digest, f"overlay:{overlay_id}", kept=overlay.url is None)
        else:
            raise FailedError("the bytes of the overlay have gone", hint="upload it again")

        def note(connection: Connection) -> Overlay:
            done = OVERLAYS.update(connection, overlay_id, state=FileState.ACTIVE, error=None)
            journal.emit(connection, "overlay", "active", done, name=done.name, size=done.size)
            return done

        return self._site.database.write(note)

    def reject(self, overlay_id: str, error: CloudletError) -> None:
        """Say that an overlay cannot be used, and why."""

        def note(connection: Connection) -> None:
            done = OVERLAYS.update(connection, overlay_id, state=FileState.REJECTED, error=describe(error))
            journal.emit(connection, "overlay", "rejected", done, name=done.name, error=done.error)

        with suppress(NotFoundError):  # it was deleted meanwhile
            self._site.database.write(note)

    def not_fetched(self, overlay_id: str, error: CloudletError) -> None:
        """Say that the bytes of an overlay did not come; they may be asked for again."""
        with suppress(NotFoundError):
            self._become(overlay_id, FileState.QUEUED, error=describe(error))

    def find_left(self) -> None:
        """At the start: what was being verified when the site was killed can be sent on, or is whole."""

        def read(connection: Connection) -> tuple[list[Overlay], set[str]]:
            states = (OperationState.PENDING, OperationState.RUNNING)
            busy = {one.resources.get("overlay", "") for one in OPERATIONS.list(connection, state=states)}
            return OVERLAYS.list(connection, state=FileState.VERIFYING), busy

        left, busy = self._site.database.read(read)
        for overlay in left:
            if overlay.id in busy:
                continue
            with suppress(ConflictError), self._uploads.alone(overlay.id):  # else another process is at it
                whole = overlay.digest and self._site.blobs.path(overlay.digest)
                here = FileState.UPLOADING if self.received(overlay) else FileState.QUEUED
                self._become(overlay.id, FileState.ACTIVE if whole else here)

    def delete(self, overlay: Overlay) -> None:
        """Remove an overlay and its bytes.

        :raises ConflictError: instances run from it.
        """

        def remove(connection: Connection) -> None:
            if used := INSTANCES.count(connection, overlay_id=overlay.id):
                raise ConflictError(
                    f"{used} instances run from overlay {overlay.id}", hint="delete them first"
                )
            OVERLAYS.delete(connection, overlay.id)
            journal.emit(connection, "overlay", "deleted", overlay, name=overlay.name)

        self._site.database.write(remove)
        self._site.blobs.release(f"overlay:{overlay.id}")
        self._staged(overlay.id).unlink(missing_ok=True)

    def order(self, overlay_id: str, order: Order) -> Order:
        """The order with the place where the overlay's bytes are: here, or where they come from."""
        overlay = self._site.database.read(lambda connection: OVERLAYS.get(connection, overlay_id))
        if overlay.digest and (path := self._site.blobs.path(overlay.digest)):
            return replace(order, source=str(path))
        if overlay.url:
            return replace(order, source=overlay.url)
        raise ConflictError(f"overlay {overlay_id} is {overlay.state}", hint="upload its bytes first")

    def prestage(self, connection: Connection, overlay: Overlay, owner: App) -> Operation:
        """Have an overlay brought here before it is needed; submit the operation when it is committed.

        :raises ConflictError: its bytes are neither here nor anywhere else.
        """
        if overlay.state is not FileState.ACTIVE and not overlay.url:
            raise ConflictError(f"overlay {overlay.id} is {overlay.state}", hint="upload its bytes first")
        return self._site.work.add(
            connection, operation("app.prestage", owner, {"overlay": overlay.id, "app": owner.id})
        )

    def peek(self, url: str) -> tuple[Root, str]:
        """The root and the identity of the overlay at a URL or path, verified; no more than its head is read.

        :raises IntegrityError: it may not run here.
        :raises UnreachableError: nobody answers there.
        """
        try:
            networks = self._site.options.fetch_networks
            with open_source(url, io.BytesIO(), patience=_PEEK_SECONDS, networks=networks) as source:
                # However often a byte comes: the head is short.
                ends = threading.Timer(2 * _PEEK_SECONDS, source.close)
                ends.start()
                try:
                    reader = OverlayReader(source, self._site.machine.keys.verify)
                    return reader.root, reader.identity
                finally:
                    ends.cancel()
        except FailedError as error:
            raise UnreachableError(error.message, hint=error.hint) from error

    def root(self, overlay: Overlay) -> Root:
        """The root of an overlay of the site, verified.

        :raises ConflictError: its bytes are neither here nor elsewhere.
        """
        known = (overlay.digest, self._site.machine.keys.stamp())
        if overlay.digest and self._site.blobs.path(overlay.digest):
            if found := self._roots.get(known):
                return found
            if len(self._roots) >= _REMEMBERED_ROOTS:
                self._roots.clear()
        root = self.peek(self.order(overlay.id, Order(source="")).source)[0]
        if overlay.digest:
            self._roots[known] = root
        return root

    def _become(self, overlay_id: str, state: FileState, **changes: Any) -> Overlay:
        return self._site.database.write(
            lambda connection: OVERLAYS.update(connection, overlay_id, state=state, **changes)
        )

    def _describe(self, overlay_id: str, *, size: int, **known: Any) -> None:
        """Write what is known of verified bytes; those of a saved machine count from here on."""

        def describe(connection: Connection) -> None:
            capacity.lock(connection)  # first: what was read before it may be old
            overlay = OVERLAYS.get(connection, overlay_id)
            if overlay.url is None and overlay.size is None:
                capacity.admit_upload(connection, self._site.options.limits, overlay.project_id, size)
            OVERLAYS.update(connection, overlay_id, size=size, **known)

        self._site.database.write(describe)

    def _verified(self, file: Path, progress: Progress | None) -> tuple[Root, str, str | None]:
        with file.open("rb") as stream:
            reader = OverlayReader(stream, self._site.machine.keys.verify)
            verify_only(reader, progress)
        return reader.root, reader.identity, reader.signed_by

    def _begin(self, overlay_id: str, offset: int, length: int) -> Overlay:
        """Reserve what is to come, in the transaction that sees what there is."""
        if offset + length > _LARGEST:
            raise TooLargeError(f"an overlay of {format_bytes(offset + length)} is more than any may have")

        def begin(connection: Connection) -> Overlay:
            capacity.lock(connection)  # first: what was read before it may be old
            overlay = OVERLAYS.get(connection, overlay_id)
            if overlay.state not in _TAKES_BYTES:
                raise ConflictError(f"overlay {overlay_id} is {overlay.state}", hint="create another")
            self._uploads.check(overlay_id, offset)
            counted = overlay.size or 0
            replaces = counted if overlay.state is not FileState.REJECTED else 0
            capacity.admit_upload(
                connection, self._site.options.limits, overlay.project_id, offset + length, replaces
            )
            return OVERLAYS.update(
                connection, overlay_id, state=FileState.UPLOADING, size=offset + length, error=None
            )

        return self._site.database.write(begin)

    def _staged(self, overlay_id: str) -> Path:
        return self._site.blobs.staging(f"upload-{overlay_id}")


def download(
    url: str,
    file: Path,
    networks: Networks,
    progress: Progress,
    reserve: Callable[[int], None] = lambda _: None,
) -> None:
    """Bring a file here from a URL, on from where an earlier try ended.

    :param networks: where the URL may lead.
    :param reserve: called with the bytes that the file will have, before they are written; may refuse them.
    """
    with open_source(url, io.BytesIO(), networks=networks) as source, file.open("ab", buffering=0) as out:
        # Its last byte comes again: a server that is asked for what is behind its end refuses that.
        done = max(0, out.seek(0, io.SEEK_END) - 1)
        out.truncate(done)
        source.seek(done)
        reserved = 0
        while piece := memoryview(source.read(_PIECE)):
            done += len(piece)
            if done > reserved:
                reserved = max(done, source.total or done + _UNKNOWN)
                reserve(reserved)
            while piece:
                piece = piece[out.write(piece) :]
            progress(done, source.total or 0)


def _described(root: Root) -> dict[str, Any]:
    """What users want to know of an overlay."""
    return {
        "app": root.app.to_json(),
        "created": root.created,
        "memory_bytes": root.machine.memory_bytes,
        "disk_bytes": root.machine.disk_bytes,
        "cpus": root.machine.cpus,
        "pages": root.totals.pages,
        "hot_bytes": sum(entry.size for entry in root.hot_frames),
    }
