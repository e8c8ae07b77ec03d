"""Bases: those that are here, and new ones from exported files."""

from __future__ import annotations

from cloudlet.api import listing
from cloudlet.api.handlers.operations import accepted
from cloudlet.api.operation import Answer, Call, Upload
from cloudlet.api.schemas.bases import BaseBody, BaseCreateBody, BasesBody, BasesQuery, BaseView
from cloudlet.store.rows import BASES, Base


def list(call: Call, query: BasesQuery) -> BasesBody:  # noqa: A001 (it is what it is called on the wire)
    """List bases."""
    call.site.bases.find_new()
    rows, links = listing.page(call, BASES, query, "/v1/bases", shared=True)
    return BasesBody(bases=[BaseView.of(row) for row in rows], links=links)


def create(call: Call, body: BaseCreateBody) -> BaseBody:
    """Create the record of a base, whose exported file is uploaded next with PUT."""
    if again := call.again(BASES):
        return BaseBody(base=BaseView.of(again))
    base = Base(project_id=call.who.project_id, user_id=call.who.user_id, name=body.base.name)
    return BaseBody(base=BaseView.of(call.site.bases.create(base, call.remember)))


def show(base: Base) -> BaseBody:
    """Show a base."""
    return BaseBody(base=BaseView.of(base))


def delete(call: Call, base: Base) -> None:
    """Delete a base and its files."""
    call.site.bases.delete(base)


def upload(call: Call, base: Base, upload: Upload) -> Answer:
    """Upload the file of a base, all or from ``Upload-Offset`` on; the last byte begins its import."""
    return accepted(call, call.site.bases.upload(base, upload, upload.offset, upload.length))


def upload_offset(call: Call, base: Base) -> Answer:
    """Say in ``Upload-Offset`` how many bytes are here."""
    return Answer(status=200, headers={"Upload-Offset": str(call.site.bases.received(base))})
