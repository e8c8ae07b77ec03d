"""Sites that serve, each a process of its own on a core of its own; and a user of them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import requests

from benchmarks.lab import CHECKOUT, Lab
from benchmarks.site_load import Job, Loaded
from cloudlet.api.identity import OPERATOR as OPERATOR_USER
from cloudlet.api.identity import User, hash_of, write_users
from cloudlet.control.bases import BaseRequest, import_image
from cloudlet.control.publishing import create_overlay
from cloudlet.control.site import Site
from cloudlet.errors import FailedError
from cloudlet.hypervisor.records import cpu_seconds_of
from cloudlet.keeper.handle import Keepers
from cloudlet.model import MEBIBYTE
from cloudlet.settings import Settings

CORES = sorted(os.sched_getaffinity(0))
SERVER, CLIENTS = {CORES[0]}, {CORES[-1]}
"""The core of a server that is measured, and that of all others: clients, and the machines' processes."""
PROJECT = "shop"
PUBLISHER, MEMBER, OPERATOR = "paula", "mia", "olga"
_ROLES = {
    PUBLISHER: {"publisher", "member", "reader"},
    MEMBER: {"member", "reader"},
    OPERATOR: OPERATOR_USER.roles,
}
_PASSWORD = "a password of benchmarks"
_RECIPE = """
name: hello
version: "1"
files:
  - {from: filler, to: /filler}
run:
  - echo hello > /www/index.html
ready: http:8080/
ports:
  - name: web
    port: 8080
"""
_SECONDS = 60.0
"""Longest wait for what takes a moment."""
_PAUSE = 0.02


@dataclass(frozen=True, slots=True)
class Served:
    """A process that serves."""

    url: str
    pid: int

    def cpu(self) -> float:
        """CPU seconds that it has used, all threads together; those of other processes are not in it."""
        return cpu_seconds_of(self.pid)

    def children(self) -> list[int]:
        """The processes that it has started itself: a site's is its nursery."""
        found = Path(f"/proc/{self.pid}/task").glob("*/children")
        return [int(pid) for path in found for pid in path.read_text().split()]


@dataclass
class Caller:
    """A user of a site."""

    url: str
    name: str = MEMBER
    session: requests.Session = field(default_factory=requests.Session)

    @property
    def authorization(self) -> str:
        """What the user shows."""
        return basic(self.name, _PASSWORD)

    def __call__(self, method: str, path: str, body: Any = None, data: bytes | None = None) -> Any:
        """Ask, and what is answered.

        :raises FailedError: it is not well.
        """
        answer = self.session.request(
            method, self.url + path, json=body, data=data, timeout=_SECONDS,
            headers={"Authorization": self.authorization},
        )  # fmt: skip
        if answer.status_code >= 300:
            raise FailedError(f"{method} {path}: {answer.status_code}: {answer.text[:300]}")
        return answer.json() if answer.content else None

    def publish(self, overlay: Path, name: str) -> str:
        """Put an overlay on the site, and an app of it; the app's id."""
        made = self("POST", "/v1/overlays", {"overlay": {"name": name, "public": True}})["overlay"]
        self("PUT", f"/v1/overlays/{made['id']}/file", data=overlay.read_bytes())
        app = {"name": name, "version": "1", "components": [{"overlay_id": made["id"]}]}
        return str(self("POST", "/v1/apps", {"app": app})["app"]["id"])

    def done(self, operation: Mapping[str, Any], seconds: float = _SECONDS) -> dict[str, Any]:
        """Wait until an operation has succeeded; what it says then.

        :param seconds: longest wait.
        :raises FailedError: it has not.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = self("GET", f"/v1/operations/{operation['id']}?wait=20")["operation"]
            if found["state"] not in ("pending", "running"):
                break
        if found["state"] != "succeeded":
            raise FailedError(f"{found['kind']}: {found['state']}: {found['error']}")
        return dict(found)

    def started(self, app: str) -> dict[str, Any]:
        """An instance of an app, as it is when it answers."""
        begun = self("POST", "/v1/instances", {"instance": {"app_id": app}})["operation"]
        return dict(self("GET", f"/v1/instances/{self.done(begun)['resources']['instance']}")["instance"])

    def instances(self) -> list[dict[str, Any]]:
        """All of the user's."""
        return list(self("GET", "/v1/instances?limit=1000")["instances"])

    def settle(self) -> None:
        """Wait until nothing is being done with instances."""
        for state in ("pending", "running"):
            for operation in self("GET", f"/v1/operations?state={state}&limit=1000")["operations"]:
                self.done(operation)

    def delete(self, instance_id: str) -> None:
        """End an instance."""
        self.done(self("DELETE", f"/v1/instances/{instance_id}")["operation"])


def basic(name: str, password: str) -> str:
    """The header of a user with a password."""
    return f"Basic {b64encode(f'{name}:{password}'.encode()).decode()}"


@dataclass(frozen=True, slots=True)
class FakeSite:
    """A site on the fake driver, with an app of which nothing runs yet."""

    served: Served
    call: Caller
    app: str
    overlay: str
    """Its overlay's id."""
    database: Path


@contextmanager
def fake_site(lab: Lab, name: str, filler_mib: int = 0, cores: set[int] = SERVER) -> Iterator[FakeSite]:
    """A site whose machines have no virtual machine, on the server's core; they are on the other.

    :param filler_mib: how much the app's overlay has to carry besides the app.
    """
    folder = lab.scratch / name
    settings = Settings(folder / "cache", folder / "state", folder / "keys", hypervisor="fake")
    overlay = fake_overlay(settings, folder, random.Random(lab.seed).randbytes(filler_mib * MEBIBYTE))
    with serving(settings, folder, cores) as served:
        for child in served.children():
            os.sched_setaffinity(child, CLIENTS)
        app = Caller(served.url, PUBLISHER).publish(overlay, "hello")
        call = Caller(served.url)
        (component,) = call("GET", f"/v1/apps/{app}")["app"]["components"]
        database = settings.state_dir / "site.sqlite"
        yield FakeSite(served, call, app, component["overlay_id"], database)


def fake_overlay(settings: Settings, folder: Path, filler: bytes) -> Path:
    """A base and an overlay of fake machines, in a site's folders."""
    site = Site.open(settings)
    site.keys.generate()
    with (folder / "raw").open("wb") as disk:
        disk.truncate(4 * MEBIBYTE + 2 * len(filler))  # one half is not for files
    base = import_image(site, BaseRequest("fake", 4 * MEBIBYTE), folder / "raw", lambda _: None)
    (folder / "recipe").mkdir()
    (folder / "recipe" / "recipe.yaml").write_text(_RECIPE)
    (folder / "recipe" / "filler").write_bytes(filler)
    overlay = folder / "hello.overlay"
    create_overlay(
        site, base, folder / "recipe", overlay, build_folder=folder / "build", sign=site.keys.signer(),
        say=lambda _: None,
    )  # fmt: skip
    return overlay


@contextmanager
def serving(
    settings: Settings, folder: Path, cores: set[int], **more: Mapping[str, object]
) -> Iterator[Served]:
    """``cloudlet serve`` with SQLite, passwords and the usual policy; nothing of it is left afterwards.

    Limits are higher than anything that is measured; all else is as it is where nobody configures it.

    :param more: settings by group, if somebody does.
    """
    users = folder / "users"
    hashed = hash_of(_PASSWORD)
    write_users(users, [User(name, hashed, PROJECT, frozenset(roles)) for name, roles in _ROLES.items()])
    config, log = folder / "cloudlet.conf", folder / "serve.log"
    groups: dict[str, dict[str, object]] = {
        "DEFAULT": {
            "cache_dir": settings.cache_dir, "state_dir": settings.state_dir, "keys_dir": settings.keys_dir,
            "hypervisor": settings.hypervisor,
        },
        "api": {"users_file": users},
        "limits": {"instances": 1 << 20, "memory_mib": 1 << 30, "cpus": 1 << 20},
    }  # fmt: skip
    for name, options in more.items():
        groups.setdefault(name, {}).update(options)
    config.write_text(
        "".join(
            f"[{name}]\n" + "".join(f"{option} = {value}\n" for option, value in options.items())
            for name, options in groups.items()
        )
    )
    command = [sys.executable, "-m", "cloudlet.cli.app", "--config-file", str(config)]
    with ExitStack() as stack:
        with log.open("wb") as errors, on_cores(cores):
            process = subprocess.Popen(
                [*command, "serve", "--listen", "127.0.0.1:0"], stdout=subprocess.DEVNULL, stderr=errors
            )
        stack.callback(_end_instances, settings)
        stack.callback(_end, process)
        yield Served(_where(process, log), process.pid)


@contextmanager
def program(name: str, *arguments: str, cores: set[int]) -> Iterator[tuple[Served, subprocess.Popen[str]]]:
    """A program of this package that serves, and says where; it is killed in the end."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    with on_cores(cores):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT
        )
    with process:
        try:
            assert process.stdout
            yield Served(process.stdout.readline().strip(), process.pid), process
        finally:
            process.kill()


def loaded(job: Job) -> Loaded:
    """Do a job by clients in a process of their own, on their core."""
    with on_cores(CLIENTS):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.site_load"],
            input=json.dumps(asdict(job)), stdout=subprocess.PIPE, text=True, cwd=CHECKOUT, check=True,
        )  # fmt: skip
    return Loaded(**json.loads(done.stdout))


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """What is started meanwhile has these cores, and so have its own children."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def without_images(settings: Settings, folder: Path) -> Settings:
    """Settings with the same bases and keys, that know no app yet."""
    cache = folder / "cache"
    cache.mkdir(parents=True)
    (cache / "bases").symlink_to(settings.bases_dir)
    return replace(settings, cache_dir=cache, state_dir=folder / "state")


def _where(process: subprocess.Popen[bytes], log: Path) -> str:
    """The URL that a site says on its standard error."""
    deadline = time.monotonic() + _SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        url, whole, _ = log.read_text().partition("serving at ")[2].partition(";")
        if whole:
            return url
        time.sleep(_PAUSE)
    raise FailedError(f"cloudlet serve does not serve: {log.read_text()[-500:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_instances(settings: Settings) -> None:
    """End what runs of a site that is not served any more."""
    keepers = Keepers(settings, lambda *_: None)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(keepers.end, [path.name for path in settings.keepers_dir.glob("*")]))
    finally:
        keepers.close()
