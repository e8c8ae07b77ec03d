"""A real Keystone for the session, and a site in its catalogue for a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import requests
from keystoneauth1.adapter import Adapter

from cloudlet.settings import read_files
from tests.openstack.keystone import REGION, Keystone, keystone
from tests.service.conftest import Caller, Made, Running, hashed, made, options_in, serving

__all__ = ["hashed", "made"]

USERS = {
    "paula": ("shop", "publisher"),
    "mia": ("shop", "member"),
    "rita": ("shop", "reader"),
    "max": ("other", "member"),
}


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keystone]:
    """A Keystone with the user of services."""
    with keystone(tmp_path_factory.mktemp("keystone")) as found:
        found.have_service_user()
        yield found


@dataclass
class Registered:
    """A served site that is in a catalogue."""

    cloud: Keystone
    running: Running

    def adapter(self, user: str = "mia", project: str = "shop") -> Adapter:
        """A user, who knows nothing of the site but what the catalogue says."""
        return adapter(self.cloud.session(user, project))

    def caller(self, token: str | None) -> Caller:
        """Somebody with a token."""
        return caller(self.running.call.url, token)

    def as_(self, user: str, project: str = "shop") -> Caller:
        return self.caller(self.cloud.token(user, project))


def adapter(session: object) -> Adapter:
    return Adapter(
        session, service_type="cloudlet", interface="public", region_name=REGION, raise_exc=False,
        connect_retries=0, status_code_retries=0,
    )  # fmt: skip


def caller(url: str, token: str | None) -> Caller:
    session = requests.Session()
    session.trust_env = False
    if token is not None:
        session.headers["X-Auth-Token"] = token
    return Caller(url, None, session)


@contextmanager
def serving_with(
    cloud: Keystone, folder: Path, made: Made, hashed: str, **authtoken: object
) -> Iterator[Running]:
    """Serve a site whose callers show tokens of a Keystone."""
    file = folder / "cloudlet.conf"
    file.write_text(cloud.authtoken(**authtoken))
    options = options_in(folder, made, hashed)
    with serving(replace(options, auth_strategy="keystone", keystone=read_files(str(file)))) as running:
        yield running
