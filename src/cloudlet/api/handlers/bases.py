"""Bases: those that are here, and their exported files, which come and go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cloudlet.api import listing
from cloudlet.api.handlers.operations import accepted
from cloudlet.api.operation import Answer, Call, Stream, Upload
from cloudlet.api.ranges import ranged
from cloudlet.api.schemas.bases import BaseBody, BaseCreateBody, BasesBody, BasesQuery, BaseView
from cloudlet.errors import ImpossibleError
from cloudlet.store.rows import BASES, OPERATIONS, Base


def list(call: Call, query: BasesQuery) -> BasesBody:  # noqa: A001 (it is what it is called on the wire)
    """List bases."""
    call.site.bases.find_new()
    rows, links = listing.page(call, BASES, query, "/v1/bases", shared=True)
    return BasesBody(bases=[BaseView.of(row) for row in rows], links=links)


def create(call: Call, body: BaseCreateBody) -> BaseBody | Answer:
    """Create the record of a base.

    Its exported file is uploaded next with PUT. With ``url`` it is fetched from there, and the answer is an
    operation.
    """
    wanted = body.base
    if not wanted.url and not wanted.name:
        raise ImpossibleError("give a name, or a url")
    base = Base(project_id=call.who.project_id, user_id=call.who.user_id, name=wanted.name or "")
    if wanted.url:
        begun = call.again(OPERATIONS) or call.site.bases.fetch(base, wanted.url, call.remember)
        return accepted(call, begun)
    return BaseBody(base=BaseView.of(call.again(BASES) or call.site.bases.create(base, call.remember)))


def show(base: Base) -> BaseBody:
    """Show a base."""
    return BaseBody(base=BaseView.of(base))


def delete(call: Call, base: Base) -> None:
    """Delete a base and its files."""
    call.site.bases.delete(base)


def upload(call: Call, base: Base, upload: Upload) -> Answer:
    """Upload the file of a base, all or from ``Upload-Offset`` on; the last byte begins its import."""
    return accepted(call, call.site.bases.upload(base, upload, upload.offset, upload.length))


def download(call: Call, base: Base) -> Stream:
    """Download the exported file of a base, all or a range.

    It is packed while it is sent, to the same bytes each time. At the first request all of it is packed once,
    to know how long it is, so that the answer may take a while.
    """
    with call.transfers.one():
        export = call.site.bases.export(base)
    part = ranged(call.headers, export.size, f'"{export.digest}"')

    @contextmanager
    def pieces() -> Iterator[Iterator[bytes]]:
        with call.transfers.one(worked_on=False), export.read(part.start, part.length) as read:
            yield read

    return Stream(pieces(), "application/octet-stream", part.length, part.status, part.headers)


def upload_offset(call: Call, base: Base) -> Answer:
    """Say in ``Upload-Offset`` how many bytes are here."""
    return Answer(status=200, headers={"Upload-Offset": str(call.site.bases.received(base))})
