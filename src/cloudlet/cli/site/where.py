"""Which site is meant: what the command line says, else the environment, else the one that is served here."""

from __future__ import annotations

import argparse
import getpass
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cloudlet.errors import NotFoundError, UsageError
from cloudlet.settings import Settings

if TYPE_CHECKING:  # it takes a second to load, and only commands that talk to a site need it
    from cloudlet.client.proxy import Proxy


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options that say which site, and who calls."""
    group = parser.add_argument_group("commands that talk to a site")
    group.add_argument(
        "--site",
        metavar="URL|unix:PATH",
        help="where the site is (Env: CLOUDLET_SITE; default: the Unix socket of 'cloudlet serve' here)",
    )
    group.add_argument(
        "--os-cloud",
        metavar="NAME",
        help="the cloud of clouds.yaml whose site it is; envvars: as the environment says (Env: OS_CLOUD)",
    )
    group.add_argument("--user", metavar="NAME", help="who calls (Env: CLOUDLET_USER)")
    group.add_argument(
        "--password-file",
        metavar="FILE",
        type=Path,
        help="a file with the user's password (Env: CLOUDLET_PASSWORD, the password itself)",
    )
    group.add_argument(
        "--os-cacert",
        metavar="FILE",
        help="the certificates to trust, a PEM file, where the site's is not signed by one that this machine "
        "trusts (Env: OS_CACERT)",
    )


class ClientManager:
    """The client of the site that is meant; connected when it is asked for."""

    def __init__(self, options: argparse.Namespace, settings: Callable[[], Settings]) -> None:
        self._options = options
        self._settings = settings
        self._cloudlet: Proxy | None = None

    @property
    def cloudlet(self) -> Proxy:
        """The site.

        :raises CloudletError: it is not there, or what says where is wrong.
        """
        if self._cloudlet is None:
            _log_calls(self._options.debug)
            self._cloudlet = self._connected()
        return self._cloudlet

    def close(self) -> None:
        """Let go of the connection, if there is one."""
        if self._cloudlet is not None:
            self._cloudlet.close()

    def _connected(self) -> Proxy:
        from cloudlet.client import connect, connect_cloud

        options, environment = self._options, os.environ
        site, cloud = options.site, options.os_cloud
        if not site and not cloud:
            site, cloud = environment.get("CLOUDLET_SITE"), environment.get("OS_CLOUD")
        trusted = options.os_cacert or environment.get("OS_CACERT")
        if trusted and not Path(trusted).is_file():
            raise NotFoundError(f"{trusted} is not there", hint="--os-cacert names a file of certificates")
        if cloud and not site:
            return connect_cloud(cloud, trusted)
        user = options.user or environment.get("CLOUDLET_USER")
        site = site or f"unix:{self._settings().state_dir / 'api.sock'}"
        password = self._password(user) if user else None
        return connect(site, user=user, password=password, verify=trusted or True)

    def _password(self, user: str) -> str:
        if file := self._options.password_file:
            try:
                return str(file.read_text(encoding="utf-8")).rstrip("\n")
            except FileNotFoundError as error:
                raise NotFoundError(f"{file} is not there", hint="--password-file names a file") from error
        if (password := os.environ.get("CLOUDLET_PASSWORD")) is not None:
            return password
        if not sys.stdin.isatty():
            raise UsageError(
                f"the password of {user} is missing", hint="give --password-file, or set CLOUDLET_PASSWORD"
            )
        return getpass.getpass(f"Password of {user}: ")


def _log_calls(debug: bool) -> None:
    """With ``--debug`` show each call on standard error; else only what our own errors do not say."""
    logger = logging.getLogger("keystoneauth")
    logger.setLevel(logging.DEBUG if debug else logging.ERROR)
    if debug:
        logger.propagate = False
        logger.addHandler(logging.StreamHandler())
