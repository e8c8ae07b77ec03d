"""The site itself: its versions, its health, its description."""

from __future__ import annotations

import cloudlet
from cloudlet.api import microversion
from cloudlet.api.handlers.operations import accepted
from cloudlet.api.operation import Answer, Call, Text
from cloudlet.api.schemas.common import Link
from cloudlet.api.schemas.site import (
    CloudletBody,
    CloudletUpdateBody,
    CloudletView,
    DrainBody,
    VersionBody,
    VersionsBody,
    VersionView,
)
from cloudlet.service import capacity
from cloudlet.store.rows import OPERATIONS, Owned


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
            fingerprint=site.peers.fingerprint,
            peers_url=site.peers.url,
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
    call.site.draining.become(body.cloudlet.state, _operator(call))
    return show(call)


def drain(call: Call, body: DrainBody) -> Answer:
    """Empty this cloudlet: it admits nothing new, and hands all instances that run off to its peers.

    The operation has ended well when it is decided what becomes of each; its ``output`` says that, and
    already while it goes on: ``handed_off``, ``stays`` (it found no place, and goes on here), ``in_doubt``,
    ``not_running``. To cancel it, or to have the cloudlet ``up`` again, keeps here what has not left.
    """
    if again := call.again(OPERATIONS):
        return accepted(call, again)
    wanted = body.drain.wanted()
    begun = call.site.draining.begin(wanted, _operator(call), call.remember, call.request_id)
    return accepted(call, begun)


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


def _operator(call: Call) -> Owned:
    """The site, on behalf of who calls."""
    return Owned(id=call.site.id, project_id=call.who.project_id, user_id=call.who.user_id)


def _version(call: Call) -> VersionView:
    return VersionView(
        id="v1.0",
        status="CURRENT",
        min_version=str(microversion.MIN),
        max_version=str(microversion.MAX),
        version=str(microversion.MAX),
        links=[Link(rel="self", href=f"{call.root}/v1/")],
    )
