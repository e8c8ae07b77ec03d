"""The service as openstacksdk looks for it: type ``cloudlet``, version 1."""

from __future__ import annotations

from openstack.connection import Connection
from openstack.service_description import ServiceDescription

from cloudlet.client.faults import translated
from cloudlet.client.proxy import Proxy
from cloudlet.errors import NotFoundError

SERVICE_TYPE = "cloudlet"


class CloudletService(ServiceDescription[Proxy]):
    """For ``connection.add_service``; ``connection.cloudlet`` is then the site."""

    def __init__(self) -> None:
        super().__init__(SERVICE_TYPE, {"1": Proxy})


def site_of(connection: Connection, place: str) -> Proxy:
    """The site that a connection leads to.

    :param place: where that is, for people.
    :raises LostError: no cloudlet is there.
    :raises NotFoundError: the cloud has none.
    """
    service = CloudletService()
    with translated(place):
        connection.add_service(service)
        site: Proxy = service.__get__(connection, type(connection))
    # Where a catalogue has no such service openstacksdk gives something else, which fails when it is used.
    if not isinstance(site, Proxy):
        raise NotFoundError(f"{place} has no service of type {SERVICE_TYPE}", hint="ask who runs it")
    site.place = place
    return site
