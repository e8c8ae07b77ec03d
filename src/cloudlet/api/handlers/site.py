"""The site itself: its versions, its health, its description."""

from __future__ import annotations

import cloudlet
from cloudlet.api import microversion
from cloudlet.api.operation import Answer, Call, Text
from cloudlet.api.schemas.common import Link
from cloudlet.api.schemas.site import (
    CloudletBody,
    CloudletUpdateBody,
    CloudletView,
    VersionBody,
    VersionsBody,
    VersionView,
)
from cloudlet.service import capacity
from cloudlet.store.rows import Owned


def versions(call: Call) -> VersionsBody:
    """Show the versions of the API."""
    return VersionsBody(versions=[_version(call)])


def version(call: Call) -> VersionBody:
    """Show this version of the API."""
    return VersionBody(version=_version(call))


def show(call: Call) -> CloudletBody:
    """Show this cloudlet: what it is, what it may give, what it has given."""
    site = call.site
    limits = site.options.limits
    state, used = site.database.read(
        lambda connection: (capacity.state(connection), capacity.used(connection))
    )
    machine = site.machine.hypervisor.machine(memory_bytes=1 << 20, disk_bytes=1 << 20)
    return CloudletBody(
        cloudlet=CloudletView(
            id=site.id,
            name=site.name,
            state=state,
            software_version=cloudlet.__version__,
            hypervisor=site.machine.hypervisor.name,
            accelerator=machine.accelerator,
            cpu_model=machine.cpu_model,
            limits={
                "instances": limits.instances,
                "memory_bytes": limits.memory_bytes,
                "cpus": limits.cpus,
                "disk_bytes": limits.disk_bytes,
            },
            used={
                "instances": used.instances,
                "memory_bytes": used.memory_bytes,
                "cpus": used.cpus,
                "disk_bytes": used.disk_bytes,
            },
        )
    )


def update(call: Call, body: CloudletUpdateBody) -> CloudletBody:
    """Have this cloudlet admit no new instance (``draining``), or admit them again (``up``).

    What is there goes on, can be renewed, paused, saved and deleted. A new instance, and one that is to come
    back from suspension, is refused until the site is up again.
    """
    by = Owned(id=call.site.id, project_id=call.who.project_id, user_id=call.who.user_id)
    call.site.database.write(lambda connection: capacity.become(connection, body.cloudlet.state, by))
    return show(call)


def openapi(call: Call) -> Text:
    """Show this API as OpenAPI 3.1."""
    return Text(call.document(), "application/json")


def healthcheck(call: Call) -> Answer:
    """Say whether the site can serve."""
    call.site.database.read(capacity.used)
    return Answer(status=204)


def metrics(call: Call) -> Text:
    """Show the figures of the site, for Prometheus."""
    return Text(call.figures(), "text/plain; version=0.0.4; charset=utf-8")


def _version(call: Call) -> VersionView:
    return VersionView(
        id="v1.0",
        status="CURRENT",
        min_version=str(microversion.MIN),
        max_version=str(microversion.MAX),
        version=str(microversion.MAX),
        links=[Link(rel="self", href=f"{call.root}/v1/")],
    )
