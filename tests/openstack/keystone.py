"""A real Keystone for tests: one process in a folder, with a database of its own, ended at the end.

It is installed by ``tools/setup test``, in ``.setup/keystone``.
"""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keystoneauth1.adapter import Adapter
from keystoneauth1.identity import v3
from keystoneauth1.session import Session

INSTALLED = Path(__file__).parents[2] / ".setup" / "keystone" / "bin" / "python"
REGION = "RegionOne"
PASSWORD = "a password of tests"
DEADLINE = 60.0
_CONFIGURATION = """
[database]
connection = sqlite:///{folder}/keystone.sqlite
[fernet_tokens]
key_repository = {folder}/keys
[fernet_receipts]
key_repository = {folder}/keys
[credential]
key_repository = {folder}/keys
[identity]
password_hash_rounds = 4
"""


@dataclass
class Keystone:
    """A Keystone, which can be stopped and started again."""

    folder: Path
    port: int = 0
    process: subprocess.Popen[str] | None = None
    _admin: Adapter | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v3"

    def start(self, **environment: str) -> None:
        """Start it, or start it again, and wait until it answers."""
        assert INSTALLED.exists(), "Keystone is missing: tools/setup test"
        program = Path(__file__).with_name("keystone_process.py")
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [INSTALLED, "-I", program, self.folder, str(self.port)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**_without_openstack(), **environment}, cwd=self.folder,
            )  # fmt: skip
        assert self.process.stdout
        said = self.process.stdout.readline()
        assert said, (self.folder / "log").read_text()[-2000:]
        self.port = int(said)

    def stop(self, number: int = signal.SIGKILL) -> None:
        """End it in the middle of whatever it does."""
        if process := self.process:
            process.send_signal(number)
            process.wait(DEADLINE)
            assert process.stdout
            process.stdout.close()
        self.process = None

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Have it take connections and answer nothing."""
        assert self.process
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    @property
    def admin(self) -> Adapter:
        """The cloud's administrator, calling Keystone."""
        if self._admin is None:
            self._admin = Adapter(self.session("admin", "admin"), endpoint_override=self.url)
        return self._admin

    def session(self, user: str, project: str | None, **more: Any) -> Session:
        """A user's session, in a project or, with None, in no scope at all."""
        scope = {"project_name": project, "project_domain_name": "Default"} if project else {"unscoped": True}
        password = self.password if user == "admin" else PASSWORD
        auth = v3.Password(
            self.url, username=user, password=password, user_domain_name="Default", **scope, **more
        )
        return Session(auth)

    def token(self, user: str, project: str) -> str:
        """A new token of a user in a project."""
        return str(self.session(user, project).get_token())

    @property
    def password(self) -> str:
        """The administrator's."""
        return (self.folder / "password").read_text()

    def have_user(self, name: str, project: str, *roles: str) -> None:
        """Have a user with roles in a project; all of them are made if they are not there."""
        where = self._have("project", project)
        who = self._have("user", name, password=PASSWORD)
        for role in roles:
            self.admin.put(f"/projects/{where}/users/{who}/roles/{self._have('role', role)}")

    def _have(self, noun: str, name: str, **more: object) -> str:
        """The id of what has this name."""
        if found := self.admin.get(f"/{noun}s", params={"name": name}).json()[f"{noun}s"]:
            return str(found[0]["id"])
        return str(self.admin.post(f"/{noun}s", json={noun: {"name": name, **more}}).json()[noun]["id"])

    def revoke(self, token: str) -> None:
        """Revoke a token."""
        self.admin.delete("/auth/tokens", headers={"X-Subject-Token": token})

    def environment(self, user: str = "admin", project: str = "admin") -> dict[str, str]:
        """What a user has in the environment for the OpenStack client and others."""
        return {
            "OS_AUTH_URL": self.url,
            "OS_USERNAME": user,
            "OS_PASSWORD": self.password if user == "admin" else PASSWORD,
            "OS_PROJECT_NAME": project,
            "OS_USER_DOMAIN_NAME": "Default",
            "OS_PROJECT_DOMAIN_NAME": "Default",
            "OS_REGION_NAME": REGION,
        }

    def authtoken(self, **more: object) -> str:
        """What a service has in its configuration; :meth:`have_service_user` before."""
        lines = {
            "auth_type": "password",
            "auth_url": self.url,
            "username": "cloudlet",
            "password": PASSWORD,
            "project_name": "service",
            "user_domain_name": "Default",
            "project_domain_name": "Default",
            **more,
        }
        return "\n".join(
            ["[keystone_authtoken]", *(f"{name} = {value}" for name, value in lines.items()), ""]
        )

    def have_service_user(self) -> None:
        """Have the user as whom a service asks whether a token is valid."""
        self.have_user("cloudlet", "service", "service")


@contextmanager
def keystone(folder: Path) -> Iterator[Keystone]:
    """A Keystone with an administrator and nothing else."""
    keys = folder / "keys"
    keys.mkdir(mode=0o700)
    for name in ("0", "1"):
        (keys / name).write_bytes(base64.urlsafe_b64encode(os.urandom(32)))
        (keys / name).chmod(0o600)
    (folder / "password").write_text(secrets.token_hex(16))
    (folder / "keystone.conf").write_text(_CONFIGURATION.format(folder=folder))
    with _started(folder) as found:
        yield found


@contextmanager
def copy_of(original: Keystone, folder: Path) -> Iterator[Keystone]:
    """A Keystone that knows what another knows, at an address of its own."""
    shutil.copytree(original.folder, folder)
    (folder / "keystone.conf").write_text(_CONFIGURATION.format(folder=folder))
    with _started(folder) as found:
        for endpoint in found.admin.get("/endpoints").json()["endpoints"]:
            if endpoint["url"] == original.url:
                found.admin.patch(f"/endpoints/{endpoint['id']}", json={"endpoint": {"url": found.url}})
        yield found


@contextmanager
def _started(folder: Path) -> Iterator[Keystone]:
    found = Keystone(folder)
    try:
        found.start()
        yield found
    finally:
        found.stop()


def until(true: Callable[[], bool]) -> None:
    """Ask until it is true."""
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.05)


def _without_openstack() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("OS_")}
