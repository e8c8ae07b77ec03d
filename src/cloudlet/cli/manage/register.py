"""``cloudlet-manage register``: make a site known to Keystone, so that clients find it in the catalogue."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

import openstack
from cliff.lister import Lister
from keystoneauth1 import exceptions as keystone
from openstack import exceptions as sdk

from cloudlet.api.microversion import SERVICE_TYPE
from cloudlet.cli.manage.command import ManageCommand
from cloudlet.errors import FailedError, RefusedError, UsageError

if TYPE_CHECKING:
    from openstack.connection import Connection
    from openstack.identity.v3._proxy import Proxy
    from openstack.identity.v3.service import Service

INTERFACES = ("public", "internal", "admin")
ROLES = ("publisher", "member", "reader")
"""Those that the policy knows, besides Keystone's own admin."""
_IMPLIED = ("publisher", "member")
"""Who has the first role has the second too."""
_CHANGED, _MADE, _THERE = "changed", "made", "there already"

Row = tuple[str, str, str]


class Register(ManageCommand, Lister):
    """Register the site in Keystone: its service, its endpoints, and the roles that its policy knows.

    What is there already is left alone; an endpoint with another URL is corrected. Who does it is said by
    OS_CLOUD, or by OS_AUTH_URL, OS_USERNAME and so on, as for the OpenStack client.

    Example: cloudlet-manage register --url https://edge1.example.org:8790 --region RegionOne
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--url", required=True, type=_url, metavar="URL", help="where clients reach the site"
        )
        parser.add_argument(
            "--region", metavar="NAME", help="the region of its endpoints (default: OS_REGION_NAME)"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], list[Row]]:
        with _keystone() as cloud:
            region = parsed_args.region or cloud.config.get_region_name()
            if not region:
                raise UsageError("no region", hint="give --region, such as RegionOne")
            return ("what", "value", "is"), list(
                _register(cast("Proxy", cloud.identity), parsed_args.url, region)
            )


def _register(identity: Proxy, url: str, region: str) -> Iterator[Row]:
    found = list(identity.services(type=SERVICE_TYPE))
    service = found[0] if found else identity.create_service(type=SERVICE_TYPE, name=SERVICE_TYPE)
    yield "service", str(service.id), _THERE if found else _MADE
    for interface in INTERFACES:
        yield f"{interface} endpoint", url, _endpoint(identity, service, interface, url, region)
    roles = {}
    for name in ROLES:
        there = next(identity.roles(name=name), None)
        roles[name] = there or identity.create_role(name=name)
        yield "role", name, _THERE if there else _MADE
    prior, implied = (roles[name].id for name in _IMPLIED)
    answer = identity.put(f"/roles/{prior}/implies/{implied}")
    if answer.status_code != HTTPStatus.CONFLICT:  # which means that it is so already
        sdk.raise_from_response(answer)


def _endpoint(identity: Proxy, service: Service, interface: str, url: str, region: str) -> str:
    """Have an endpoint; what it needed."""
    there = next(identity.endpoints(service_id=service.id, interface=interface, region_id=region), None)
    if there is None:
        identity.create_endpoint(service_id=service.id, interface=interface, region_id=region, url=url)
        return _MADE
    if there.url == url:
        return _THERE
    identity.update_endpoint(there, url=url)
    return _CHANGED


@contextmanager
def _keystone() -> Iterator[Connection]:
    """A connection of whom the environment names; what Keystone refuses becomes an error of ours."""
    try:
        with openstack.connect(app_name="cloudlet-manage") as cloud:
            yield cloud
    except (sdk.ConfigException, keystone.MissingRequiredOptions, keystone.MissingAuthPlugin) as error:
        raise UsageError(f"who registers? {error}", hint="set OS_CLOUD or OS_AUTH_URL and so on") from error
    except (sdk.ForbiddenException, keystone.Unauthorized, keystone.Forbidden) as error:
        raise RefusedError(f"Keystone: {error}", hint="do it as the cloud's administrator") from error
    except (sdk.SDKException, keystone.ClientException) as error:
        raise FailedError(f"Keystone: {error}", hint="is it up, and its address right?") from error


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} is no URL, such as https://edge1.example.org:8790")
    return text.rstrip("/")
