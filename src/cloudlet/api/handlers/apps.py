"""Apps: published by their developers, started by users."""

from __future__ import annotations

from collections.abc import Iterable

from cloudlet.api import listing
from cloudlet.api.handlers.operations import accepted
from cloudlet.api.operation import Answer, Call
from cloudlet.api.schemas.apps import (
    AppBody,
    AppCreateBody,
    AppsBody,
    AppsQuery,
    AppUpdateBody,
    AppView,
    Component,
)
from cloudlet.store.rows import APPS, OVERLAYS, App


def list(call: Call, query: AppsQuery) -> AppsBody:  # noqa: A001 (it is what it is called on the wire)
    """List apps."""
    rows, links = listing.page(call, APPS, query, "/v1/apps")
    return AppsBody(apps=[AppView.of(row) for row in rows], links=links)


def create(call: Call, body: AppCreateBody) -> AppBody:
    """Publish an app."""
    if again := call.again(APPS):
        return AppBody(app=AppView.of(again))
    wanted = body.app
    _see_overlays(call, wanted.components)
    app = App(
        project_id=call.who.project_id,
        user_id=call.who.user_id,
        name=wanted.name,
        version=wanted.version,
        public=wanted.public,
        descriptor=wanted.descriptor(),
    )
    return AppBody(app=AppView.of(call.site.apps.create(app, call.remember)))


def show(app: App) -> AppBody:
    """Show an app."""
    return AppBody(app=AppView.of(app))


def update(call: Call, app: App, body: AppUpdateBody) -> AppBody:
    """Change an app; what runs of it stays as it is."""
    _see_overlays(call, body.app.components or ())
    changes = body.app.model_dump(mode="json", include=body.app.model_fields_set, exclude_none=True)
    public = changes.pop("public", None)
    return AppBody(app=AppView.of(call.site.apps.update(app, public, changes)))


def delete(call: Call, app: App) -> None:
    """Withdraw an app."""
    call.site.apps.delete(app)


def prestage(call: Call, app: App) -> Answer:
    """Bring what the app needs here before somebody asks for it."""
    return accepted(call, call.site.apps.prestage(app))


def _see_overlays(call: Call, components: Iterable[Component]) -> None:
    """Whether the caller may see what an app is to be made of."""
    for component in components:
        listing.seen(call, OVERLAYS, component.overlay_id)
