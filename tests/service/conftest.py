"""A site on the fake driver: machines start in a tenth of a second, all else is as it is in earnest."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import requests

from cloudlet.api.identity import OPERATOR, User, hash_of, write_users
from cloudlet.api.service import build, server_of
from cloudlet.control.bases import BaseRequest, import_image
from cloudlet.control.publishing import create_overlay
from cloudlet.control.site import Site
from cloudlet.hypervisor.records import processes_of, records
from cloudlet.keeper.folder import is_kept
from cloudlet.keeper.handle import Keepers
from cloudlet.model import MEBIBYTE
from cloudlet.service.options import Listening, Options, read_options
from cloudlet.service.site import ServedSite
from cloudlet.service.steps import Observer
from cloudlet.settings import Settings, read_files
from cloudlet.transfer.networks import Networks

DEADLINE = 60.0
RECIPE = """
name: hello
version: "1"
run:
  - echo hello > /www/index.html
ready: http:8080/
ports:
  - name: web
    port: 8080
"""
PASSWORD = "a password of tests"
USERS = {
    "root": OPERATOR.roles,
    "paula": frozenset({"publisher", "member", "reader"}),
    "mia": frozenset({"member", "reader"}),
    "max": frozenset({"member", "reader"}),
    "rita": frozenset({"reader"}),
}
"""The users of a site under test, and their roles; all are in one project."""


@dataclass(frozen=True)
class Made:
    """What publishers bring: a base in a cache folder, a key ring, a signed overlay."""

    cache: Path
    keys: Path
    base_id: str
    overlay: Path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A base and an overlay of fake machines."""
    return make(tmp_path_factory.mktemp("made"))


def make(folder: Path) -> Made:
    """Make a base and an overlay of fake machines in a folder."""
    folder.mkdir(exist_ok=True)
    settings = Settings(folder / "cache", folder / "state", folder / "keys", hypervisor="fake")
    site = Site.open(settings)
    site.keys.generate()
    (folder / "raw").write_bytes(bytes(4 * MEBIBYTE))
    base = import_image(site, BaseRequest("fake-base", 4 * MEBIBYTE), folder / "raw", lambda text: None)
    (folder / "recipe").mkdir()
    (folder / "recipe" / "recipe.yaml").write_text(RECIPE)
    overlay = folder / "hello.overlay"
    create_overlay(
        site, base, folder / "recipe", overlay, build_folder=folder / "build", sign=site.keys.signer(),
        say=lambda text: None,
    )  # fmt: skip
    return Made(settings.cache_dir, settings.keys_dir, base.id, overlay)


@pytest.fixture
def options(made: Made, hashed: str, tmp_path: Path) -> Options:
    """Settings of a site with a state of its own."""
    return options_in(tmp_path, made, hashed)


@pytest.fixture(scope="module")
def module_options(made: Made, hashed: str, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Settings of a site that the tests of a module share."""
    return options_in(tmp_path_factory.mktemp("site"), made, hashed)


def options_in(folder: Path, made: Made, hashed: str) -> Options:
    """Settings of a site whose state is in a folder."""
    here = ("127.0.0.0/8",)
    settings = Settings(made.cache, folder / "state", made.keys, hypervisor="fake", fetch_networks=here)
    found = replace(read_options(read_files("/dev/null"), settings), webhook_networks=Networks(here))
    listening = Listening(host="127.0.0.1", port=0)
    users = folder / "users"
    write_users(users, [User(name, hashed, "shop", roles) for name, roles in USERS.items()])
    return replace(found, listening=listening, auth_strategy="http_basic", users_file=users, workers=8)


@pytest.fixture(scope="session")
def hashed() -> str:
    """The hash of the users' password, which takes a while to make."""
    return hash_of(PASSWORD)


@dataclass
class Caller:
    """Somebody who calls a site over HTTP."""

    url: str
    name: str | None = "root"
    session: requests.Session = field(default_factory=requests.Session)

    def __call__(self, method: str, path: str, body: Any = None, **more: Any) -> requests.Response:
        """Make a request; what the answer is is the caller's business."""
        auth = (self.name, PASSWORD) if self.name else None
        given = {"json": body} if body is not None else {}
        return self.session.request(method, self.url + path, auth=auth, timeout=DEADLINE, **given, **more)

    def get(self, path: str, **more: Any) -> Any:
        return self._good(self("GET", path, **more))

    def post(self, path: str, body: Any = None, **more: Any) -> Any:
        return self._good(self("POST", path, body, **more))

    def patch(self, path: str, body: Any) -> Any:
        return self._good(self("PATCH", path, body))

    def delete(self, path: str) -> Any:
        return self._good(self("DELETE", path))

    def as_(self, name: str | None) -> Caller:
        """Another user, on connections of their own."""
        return Caller(self.url, name)

    def ended(self, operation: Mapping[str, Any]) -> dict[str, Any]:
        """Wait for the end of an operation; what it is then."""
        deadline = time.monotonic() + DEADLINE
        while True:
            found = self.get(f"/v1/operations/{operation['id']}?wait=20")["operation"]
            if found["state"] not in ("pending", "running"):
                return dict(found)
            assert time.monotonic() < deadline, found

    def done(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        """Wait until an operation has succeeded."""
        ended = self.ended(answer["operation"])
        assert ended["state"] == "succeeded", json.dumps(ended, indent=1)
        return ended

    def publish(self, overlay: Path, *, name: str = "hello", public: bool = True) -> dict[str, Any]:
        """Put an overlay and an app of it on the site; the app."""
        created = self.post("/v1/overlays", {"overlay": {"name": name, "public": public}})["overlay"]
        uploaded = self("PUT", f"/v1/overlays/{created['id']}/file", data=overlay.read_bytes())
        assert uploaded.status_code == 200, uploaded.text
        app = {"name": name, "version": "1", "public": public, "components": [{"overlay_id": created["id"]}]}
        return dict(self.post("/v1/apps", {"app": app})["app"])

    def start(self, app: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """An instance of an app, as it is when it answers."""
        operation = self.done(self.post("/v1/instances", {"instance": {"app_id": app["id"], **more}}))
        return self.instance(operation["resources"]["instance"])

    def instance(self, instance_id: str) -> dict[str, Any]:
        return dict(self.get(f"/v1/instances/{instance_id}")["instance"])

    def events(self, **query: Any) -> list[dict[str, Any]]:
        """All events that the caller sees."""
        return list(self.get("/v1/events", params={"after": 0, "limit": 1000, **query})["events"])

    def wait_event(self, kind: str, resource_id: str) -> dict[str, Any]:
        """Wait for an event about something."""
        query = {"after": 0, "wait": 30, "kind": kind, "resource_id": resource_id}
        events = self.get("/v1/events", params=query)["events"]
        assert events, f"no {kind} came"
        return dict(events[0])

    @staticmethod
    def _good(answer: requests.Response) -> Any:
        assert answer.status_code < 300, f"{answer.status_code}: {answer.text}"
        return answer.json() if answer.content else None


@dataclass
class Running:
    """A site that is served in this process."""

    site: ServedSite
    call: Caller


@contextmanager
def serving(options: Options, observe: Observer = lambda *_: None) -> Iterator[Running]:
    """Serve a site until the context is left; its machines go on."""
    site = ServedSite.open(options, observe)
    try:
        server = server_of(site.options, build(site))
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield Running(site, Caller(server.where))
        finally:
            site.news.close()
            server.stop()
            thread.join()
    finally:
        site.close()


def end_machines(settings: Settings) -> None:
    """End all machines of a site that is not served. (One that is would start some of them again.)"""
    keepers = Keepers(settings, lambda *_: None)
    try:
        for folder in settings.keepers_dir.glob("*"):
            keepers.end(folder.name)
    finally:
        keepers.close()
    nothing_runs(settings)


def nothing_runs(settings: Settings) -> None:
    """No keeper, machine, folder of either, or process is left of a site."""
    assert [folder for folder in settings.keepers_dir.glob("*") if is_kept(folder)] == []
    assert records(settings.instances_dir) == []
    assert [process for path in settings.instances_dir.glob("*") for process in processes_of(path)] == []


@pytest.fixture
def running(options: Options) -> Iterator[Running]:
    """A served site; at its end nothing may be left but what its rows say."""
    with serving(options) as running:
        yield running
        for instance in running.call.get("/v1/instances?limit=1000")["instances"]:
            if instance["state"] != "deleting":
                running.call.done(running.call.delete(f"/v1/instances/{instance['id']}"))
    nothing_runs(options.machine)
    assert list(options.machine.keepers_dir.glob("*")) == []


@pytest.fixture
def call(running: Running) -> Caller:
    """The operator of a served site."""
    return running.call
