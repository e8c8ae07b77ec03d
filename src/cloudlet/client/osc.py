"""The plug-in of the OpenStack client: ``openstack cloudlet NOUN VERB``, for the clouds that it knows.

The commands are those of ``cloudlet.cli.site``; ``pyproject.toml`` has them in ``openstack.cloudlet.v1``.
"""

from __future__ import annotations

import argparse
from typing import Protocol

from openstack.connection import Connection
from osc_lib import utils

from cloudlet.client.proxy import Proxy
from cloudlet.client.service import SERVICE_TYPE, site_of

DEFAULT_API_VERSION = "1"
API_VERSION_OPTION = "os_cloudlet_api_version"
API_NAME = SERVICE_TYPE
API_VERSIONS = ("1",)


class Clients(Protocol):
    """What the OpenStack client's own client manager has for us."""

    sdk_connection: Connection


def make_client(instance: Clients) -> Proxy:
    """The site that the OpenStack client was told to use."""
    connection = instance.sdk_connection
    return site_of(connection, str(getattr(connection.session.auth, "endpoint", None) or "this cloud"))


def build_option_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The hook for options of our own."""
    parser.add_argument(
        "--os-cloudlet-api-version",
        metavar="<cloudlet-api-version>",
        default=utils.env("OS_CLOUDLET_API_VERSION"),
        help=f"Cloudlet API version, default={DEFAULT_API_VERSION} (Env: OS_CLOUDLET_API_VERSION)",
    )
    return parser
