"""The site itself: its versions, its health, its description."""

from __future__ import annotations

import cloudlet
from cloudlet.api import microversion
from cloudlet.api.operation import Answer, Call, Text
from cloudlet.api.schemas.common import Link
from cloudlet.api.schemas.site import CloudletBody, CloudletView, VersionBody, VersionsBody, VersionView
from cloudlet.service import capacity


def versions(call: Call) -> VersionsBody:
    """Show the versions of the API."""
    return VersionsBody(versions=[_version(call)])


def version(call: Call) -> VersionBody:
    """Show this version of the API."""
    return VersionBody(version=_version(call))


def show(call: Call) -> CloudletBody:
    """Show this cloudlet: what it is, what it may give, what it has given."""
    site = call.site
    limits, used = site.options.limits, site.database.read(capacity.used)
    machine = site.machine.hypervisor.machine(memory_bytes=1 << 20, disk_bytes=1 << 20)
    return CloudletBody(
        cloudlet=CloudletView(
            id=site.id,
            name=site.name,
            state="up",
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
