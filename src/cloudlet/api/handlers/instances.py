"""Instances: a user's running apps."""

from __future__ import annotations

from cloudlet.api import listing
from cloudlet.api.handlers.operations import accepted
from cloudlet.api.operation import Answer, Call, Text
from cloudlet.api.schemas.instances import (
    ConsoleQuery,
    InstanceBody,
    InstanceCreateBody,
    InstancesBody,
    InstancesQuery,
    InstanceUpdateBody,
    InstanceView,
    SaveBody,
)
from cloudlet.errors import ImpossibleError, RefusedError
from cloudlet.model import PublishedPort
from cloudlet.service.instances import Asked
from cloudlet.store.rows import APPS, INSTANCES, OPERATIONS, OVERLAYS, Instance, Operation, Overlay

_FIRST_FREE_PORT = 1024


def list(call: Call, query: InstancesQuery) -> InstancesBody:  # noqa: A001 (it is what it is called on the wire)
    """List instances."""
    rows, links = listing.page(call, INSTANCES, query, "/v1/instances")
    return InstancesBody(instances=[_view(call, row) for row in rows], links=links)


def create(call: Call, body: InstanceCreateBody) -> Answer:
    """Start an app for the caller.

    The operation has ended well when the app answers; the instance then says where.
    """
    if again := call.again(OPERATIONS):
        return accepted(call, again)
    wanted = body.instance
    if len(wanted.model_fields_set & {*wanted.SOURCES}) != 1:
        raise ImpossibleError(f"give exactly one of {', '.join(wanted.SOURCES)}")
    if wanted.url and not call.allows("publisher", None):
        # The site would ask for members what they cannot reach themselves.
        raise RefusedError("only a publisher may have an overlay fetched from elsewhere")
    if any(0 < port.port < _FIRST_FREE_PORT for port in wanted.ports) and not call.everything:
        raise RefusedError(f"ports below {_FIRST_FREE_PORT} are the operator's", hint="choose another")
    app = listing.seen(call, APPS, wanted.app_id) if wanted.app_id else None
    lease = wanted.lease_seconds or (app.descriptor.get("lease_seconds") if app else None)
    asked = Asked(
        project_id=call.who.project_id,
        user_id=call.who.user_id,
        name=wanted.name or "",
        app=app,
        overlay=listing.seen(call, OVERLAYS, wanted.overlay_id) if wanted.overlay_id else None,
        url=wanted.url,
        ports=[PublishedPort(port.guest_port, host_port=port.port) for port in wanted.ports],
        lease_seconds=lease,
        metadata=wanted.metadata,
        request_id=call.request_id,
    )
    _, operation = call.site.instances.create(asked, call.remember, call.transfers.one)
    return accepted(call, operation)


def show(call: Call, instance: Instance) -> InstanceBody:
    """Show an instance and where it is reached."""
    return InstanceBody(instance=_view(call, instance))


def update(call: Call, instance: Instance, body: InstanceUpdateBody) -> InstanceBody:
    """Renew the lease of an instance, or change its name or metadata."""
    wanted = body.instance
    changes = wanted.model_dump(include={"name", "metadata"}, exclude_none=True)
    if changes:
        instance = call.site.instances.describe(instance, **changes)
    if wanted.lease_seconds is not None:
        instance = call.site.instances.renew(instance, wanted.lease_seconds)
    return InstanceBody(instance=_view(call, instance))


def delete(call: Call, instance: Instance) -> Answer:
    """End an instance."""
    return accepted(call, call.site.instances.delete(instance))


def pause(call: Call, instance: Instance) -> InstanceBody:
    """Stop the CPUs of an instance; its memory stays where it is."""
    return InstanceBody(instance=_view(call, call.site.instances.pause(instance)))


def resume(call: Call, instance: Instance) -> InstanceBody | Answer:
    """Let an instance go on that is paused or suspended."""
    done = call.site.instances.resume(instance)
    return accepted(call, done) if isinstance(done, Operation) else InstanceBody(instance=_view(call, done))


def suspend(call: Call, instance: Instance) -> Answer:
    """Write an instance to disk, and free its memory."""
    return accepted(call, call.site.instances.suspend(instance))


def save(call: Call, instance: Instance, body: SaveBody) -> Answer:
    """Make an overlay of what the user has changed."""
    if again := call.again(OPERATIONS):
        return accepted(call, again)
    overlay = Overlay(project_id=instance.project_id, user_id=instance.user_id, name=body.overlay.name)
    return accepted(call, call.site.instances.save(instance, overlay, call.remember))


def console_log(call: Call, instance: Instance, query: ConsoleQuery) -> Text:
    """Show the end of what an instance wrote to its serial console."""
    return Text(call.site.instances.console_log(instance, query.length))


def _view(call: Call, instance: Instance) -> InstanceView:
    return InstanceView.of(instance, call.site.keeping.known(instance.id))
