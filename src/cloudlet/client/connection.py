"""Ways to a site: a URL with user and password, a Unix socket, or a cloud of ``clouds.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openstack.config
from keystoneauth1.http_basic import HTTPBasicAuth
from keystoneauth1.noauth import NoAuth
from keystoneauth1.plugin import BaseAuthPlugin
from keystoneauth1.session import Session
from openstack.connection import Connection

import cloudlet
from cloudlet.client.faults import LostError, translated
from cloudlet.client.proxy import Proxy
from cloudlet.client.service import site_of
from cloudlet.client.unix import UnixAdapter
from cloudlet.errors import UsageError

_UNIX = "unix:"
_HTTP = ("http://", "https://")
_HERE = "http://localhost"
"""What a site on a Unix socket is called in URLs."""


def connect(
    endpoint: str, *, user: str | None = None, password: str | None = None, verify: bool | str = True
) -> Proxy:
    """A site by its address.

    :param endpoint: ``http://HOST:PORT``, ``https://HOST:PORT`` or ``unix:PATH``.
    :param user: who calls; without, nobody in particular, as a Unix socket's owner needs not say more.
    :param verify: whether to verify the site's certificate, or a file of certificates to trust.
    :raises UsageError: that is not an address.
    :raises LostError: no cloudlet is there.
    """
    return _site_at(session_of(endpoint, user, password, verify), endpoint)


def connect_beside(session: Session, endpoint: str) -> Proxy:
    """Another site, with the credentials of a session and what that trusts, but connections of its own.

    :param endpoint: ``http://HOST:PORT`` or ``https://HOST:PORT``.
    :raises UsageError: that is not an address.
    :raises LostError: no cloudlet is there.
    """
    if not endpoint.startswith(_HTTP):
        raise UsageError(f"{endpoint!r} is not a site", hint="write http://HOST:PORT")
    beside = Session(
        session.auth, verify=session.verify, cert=session.cert, app_name="cloudlet",
        app_version=cloudlet.__version__,
    )  # fmt: skip
    return _site_at(beside, endpoint, {"cloudlet_endpoint_override": endpoint})


def connect_cloud(name: str, cacert: str | None = None) -> Proxy:
    """A site by the name of a cloud in ``clouds.yaml``; ``envvars`` means what ``OS_...`` variables say.

    :param cacert: a file of certificates to trust; else what is said there.
    :raises UsageError: there is no such cloud.
    """
    with translated(f"cloud {name}"):
        try:
            given: dict[str, Any] = {"cacert": cacert} if cacert else {}
            region = openstack.config.OpenStackConfig().get_one(cloud=name, **given)
        except openstack.exceptions.ConfigException as error:
            raise UsageError(str(error), hint="name a cloud that is in clouds.yaml") from error
    return site_of(Connection(config=region), f"cloud {name}")


def session_of(
    endpoint: str, user: str | None = None, password: str | None = None, verify: bool | str = True
) -> Session:
    """A session of keystoneauth for a site by its address; see :func:`connect`."""
    unix = Path(endpoint.removeprefix(_UNIX)) if endpoint.startswith(_UNIX) else None
    if not unix and not endpoint.startswith(_HTTP):
        raise UsageError(f"{endpoint!r} is not a site", hint="write http://HOST:PORT or unix:PATH")
    where = _HERE if unix else endpoint.rstrip("/")
    auth: BaseAuthPlugin = HTTPBasicAuth(where, user, password) if user else NoAuth(where)
    session = Session(auth, verify=verify, app_name="cloudlet", app_version=cloudlet.__version__)
    if unix:
        session.session.trust_env = False  # a proxy for HTTP is not one for this
        session.mount(f"{_HERE}/", UnixAdapter(unix))
    return session


def _site_at(session: Session, endpoint: str, config: Mapping[str, Any] | None = None) -> Proxy:
    try:
        return site_of(Connection(session=session, **(config or {})), endpoint)
    except LostError:
        if endpoint.startswith("https://"):  # who looks for a service does not say why none was found
            with translated(endpoint):
                session.get(endpoint, authenticated=False, raise_exc=False)
        raise
