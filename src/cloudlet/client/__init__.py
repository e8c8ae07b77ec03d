"""The client of a served site: an openstacksdk proxy, its resources, and the ways to reach a site.

On its own::

    with cloudlet.client.connect("http://127.0.0.1:8790", user="mia", password=...) as site:
        operation = site.wait_for_operation(site.create_instance(app_id=site.find_app("hello").id))
        print(site.get_instance(operation.resources["instance"]).endpoints)

or beside the other services of an ``openstack.connection.Connection``: after
``connection.add_service(CloudletService())`` it is ``connection.cloudlet``. What a site refuses is raised as
:mod:`cloudlet.errors` has it.
"""

from __future__ import annotations

from cloudlet.client.connection import connect, connect_cloud
from cloudlet.client.following import Endpoint
from cloudlet.client.proxy import Proxy
from cloudlet.client.service import CloudletService

__all__ = ["CloudletService", "Endpoint", "Proxy", "connect", "connect_cloud"]
