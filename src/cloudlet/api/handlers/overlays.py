"""Overlays: a record, then its bytes; downloaded with ranges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from cloudlet.api import listing
from cloudlet.api.operation import Answer, Call, Stream, Upload
from cloudlet.api.ranges import ranged
from cloudlet.api.schemas.overlays import (
    OverlayBody,
    OverlayCreateBody,
    OverlaysBody,
    OverlaysQuery,
    OverlayView,
)
from cloudlet.errors import ConflictError, RefusedError
from cloudlet.store.rows import OVERLAYS, FileState, Overlay

_PIECE = 256 << 10


def list(call: Call, query: OverlaysQuery) -> OverlaysBody:  # noqa: A001 (it is what it is called on the wire)
    """List overlays."""
    rows, links = listing.page(call, OVERLAYS, query, "/v1/overlays")
    return OverlaysBody(overlays=[OverlayView.of(row) for row in rows], links=links)


def create(call: Call, body: OverlayCreateBody) -> OverlayBody:
    """Create the record of an overlay.

    Its bytes are uploaded next with PUT, or are at ``url``, from where they are fetched when they are needed.
    """
    if (body.overlay.public or body.overlay.url) and not call.allows("publisher", None):
        raise RefusedError("only a publisher may make an overlay public, or have one fetched from elsewhere")
    if again := call.again(OVERLAYS):
        return OverlayBody(overlay=OverlayView.of(again))
    wanted = body.overlay
    overlay = Overlay(
        project_id=call.who.project_id,
        user_id=call.who.user_id,
        name=wanted.name,
        url=wanted.url,
        public=wanted.public,
    )
    return OverlayBody(overlay=OverlayView.of(call.site.overlays.create(overlay, call.remember)))


def show(overlay: Overlay) -> OverlayBody:
    """Show an overlay."""
    return OverlayBody(overlay=OverlayView.of(overlay))


def delete(call: Call, overlay: Overlay) -> None:
    """Delete an overlay and its bytes."""
    call.site.overlays.delete(overlay)


def upload(call: Call, overlay: Overlay, upload: Upload) -> OverlayBody:
    """Upload the bytes of an overlay, all or from ``Upload-Offset`` on.

    An upload that was cut off goes on where HEAD says. The last byte makes the overlay active, if all of it
    can be verified.
    """
    return OverlayBody(
        overlay=OverlayView.of(call.site.overlays.upload(overlay, upload, upload.offset, upload.length))
    )


def upload_offset(call: Call, overlay: Overlay) -> Answer:
    """Say in ``Upload-Offset`` how many bytes are here."""
    headers = {"Upload-Offset": str(call.site.overlays.received(overlay))}
    if overlay.state is FileState.ACTIVE and overlay.size is not None:
        headers |= {
            "Content-Length": str(overlay.size),
            "Accept-Ranges": "bytes",
            "ETag": f'"{overlay.digest}"',
        }
    return Answer(status=200, headers=headers)


def download(call: Call, overlay: Overlay) -> Stream:
    """Download the bytes of an overlay, all or a range."""
    if overlay.digest is None or overlay.size is None:
        raise ConflictError(f"overlay {overlay.id} is {overlay.state}", hint="its bytes are not here")
    digest, size = overlay.digest, overlay.size
    part = ranged(call.headers, size, f'"{digest}"')

    @contextmanager
    def pieces() -> Iterator[Iterator[bytes]]:
        with ExitStack() as stack:
            stack.enter_context(call.transfers.one(worked_on=False))
            path = stack.enter_context(call.site.blobs.in_use(digest))
            file = stack.enter_context(path.open("rb"))
            file.seek(part.start)
            yield _read(file.read, part.length)

    return Stream(pieces(), "application/octet-stream", part.length, part.status, part.headers)


def _read(read: object, length: int) -> Iterator[bytes]:
    assert callable(read)
    while length:
        piece = read(min(_PIECE, length))
        if not piece:
            return
        length -= len(piece)
        yield piece
