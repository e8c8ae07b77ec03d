"""Two real sites between which a hand-off can fail, and an instance that goes to and fro.

They reach each other through gates (``gate.py``); each has a disk of its own that can be full, a clock that
can be wrong, and a third site as a peer. Who watches the guests knows nothing of that (``watching.py``).
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from tests.service.conftest import Made
from tests.service.gate import Gate, gated
from tests.service.two_sites import PeerSite, add_peer, peer_site
from tests.service.watching import AnyUser, Guest, Observer, User, guests_below, watching

GRACE = 1
PATIENCE = 30
"""Longer than a site takes to be there again, also on a machine that has much else to do."""
SOON, SETTLED_SECONDS = 45.0, 90.0
"""Upper bounds: this long only where a machine has much else to do."""
_CLOCK = "CLOUDLET_TESTED_CLOCK"
_SITECUSTOMIZE = f'''
"""The clock of a site under test is off by what a file says."""

import os
import time

_now, _file = time.time, os.environ.get("{_CLOCK}", "")


def _shifted():
    try:
        with open(_file) as said:
            return _now() + float(said.read())
    except (OSError, ValueError):
        return _now()


time.time = _shifted
'''


class World:
    """Two sites, the gates before them, and an instance that goes to and fro."""

    settings: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Of both sites, by group, besides what all have."""
    state_mib = 96
    """What there is room for in the state folder of each."""

    def __init__(self, sites: Sequence[PeerSite], gates: Sequence[Gate], keys: Mapping[str, Path]) -> None:
        self.sites = tuple(sites)
        self.gates = tuple(gates)
        self.ids = [str(about(site)["id"]) for site in sites]
        self.machines = [site.settings for site in sites]
        self.stranger = keys
        """The id of a site that is a peer of both, and its keys."""
        self.instance: dict[str, Any] | None = None
        self.at = 0
        self.observer: Observer[Any]
        self.user: AnyUser
        self._apps: list[dict[str, Any]] = []

    @property
    def folder(self) -> Path:
        return self.sites[0].folder.parent

    def publish(self, made: Made) -> None:
        self._apps = [site.call.publish(made.overlay) for site in self.sites]

    def guests(self, which: int | None = None) -> list[Guest]:
        """The guests of a site, or of both."""
        return guests_below(self.folder if which is None else self.sites[which].folder)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Have an observer and a user until the context is left."""
        user = User(self.folder)
        self.observer, self.user = Observer(self.folder, guests_below), user
        with watching(self.observer.run, user.run):
            yield

    def bring_to(self, which: int) -> dict[str, Any]:
        """Have the instance run at a site, a new one if there is none."""
        if self.instance is None:
            self.at = which
            self.instance = self.sites[which].call.start(self._apps[which])
            self.user.begin()
        if self.at != which:
            self.sites[self.at].hand_off(self.instance)
            self.at = which
            self.instance = self.sites[which].call.instance(self.instance["id"])
        self._wait_alone(self.instance["id"], which)
        return self.instance

    def lost(self) -> None:
        """The instance has failed, as it had to: the next one is a new one."""
        assert self.instance
        for site in self.sites:
            path = f"/v1/instances/{self.instance['id']}"
            if site.call("GET", path).status_code == 200:
                site.call.done(site.call.delete(path))
        self.instance = None

    def _wait_alone(self, instance_id: str, which: int) -> None:
        """Wait until nothing of it is left at the other site."""
        folder = self.machines[1 - which].keepers_dir / instance_id

        def alone() -> bool:
            known = self.sites[1 - which].call("GET", f"/v1/instances/{instance_id}")
            failed = known.status_code == 200 and known.json()["instance"]["state"] == "failed"
            return failed or not folder.exists()

        wait_for(alone, SOON, f"{folder} is still there")


class Worlds:
    """Two sites for any number of cells; others after something was not as it had to be."""

    def __init__(self, folder: Path, made: Made, hashed: str, kind: type[World] = World) -> None:
        self._folder, self._made, self._hashed, self._kind = folder, made, hashed, kind
        self._stack = ExitStack()
        self._count = 0
        self._world: World | None = None

    def __enter__(self) -> Worlds:
        return self

    def __exit__(self, *_: object) -> None:
        self.forget()

    def get(self) -> World:
        """Two sites."""
        if self._world is None:
            self._count += 1
            place = self._folder / f"{self._count}"
            place.mkdir(parents=True)
            self._world = self._stack.enter_context(world(place, self._made, self._hashed, self._kind))
        return self._world

    def at(self) -> int | None:
        """At which site the instance is, if there is one."""
        return self._world.at if self._world and self._world.instance else None

    def forget(self) -> None:
        """End the sites, and all that is left of them."""
        self._world = None
        self._stack.close()


@contextmanager
def world(folder: Path, made: Made, hashed: str, kind: type[World] = World) -> Iterator[World]:
    """Two sites that are peers, each with a small disk of its own and a clock that can be wrong."""
    (folder / "clocks").mkdir()
    (folder / "clocks" / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    settings = {**kind.settings, "peers": {"grace_seconds": GRACE, "patience_seconds": PATIENCE}}
    with ExitStack() as stack:
        for name in "ab":
            stack.enter_context(small_disk(folder / name / "state", kind.state_mib))
        sites = []
        for name in "ab":
            with clock_of(folder / name):
                sites.append(stack.enter_context(peer_site(folder / name, made, hashed, **settings)))
        stack.enter_context(room_at_the_end(sites))
        ids = {}
        with peer_site(folder / "stranger", made, hashed) as other:
            for site in sites:
                ids[add_peer(site, other)] = other.settings.keys_dir
        gates = [stack.enter_context(gated(address(site))) for site in sites]
        for here, there, gate in ((0, 1, gates[1]), (1, 0, gates[0])):
            sites[here].peer_id = add_peer(sites[here], sites[there])
            url = {"peer": {"url": f"https://127.0.0.1:{gate.port}"}}
            sites[here].call.patch(f"/v1/peers/{sites[here].peer_id}", url)
        made_world = kind(sites, gates, ids)
        made_world.publish(made)
        stack.enter_context(made_world.watched())
        yield made_world


@contextmanager
def room_at_the_end(sites: Sequence[PeerSite]) -> Iterator[None]:
    """When the context is left there is room again on the sites' disks, so that all can be ended."""
    try:
        yield
    finally:
        for site in sites:
            free(site)


@contextmanager
def small_disk(place: Path, room_mib: int) -> Iterator[None]:
    """A folder with little room: only root can make it."""
    place.mkdir(parents=True)
    size = f"size={room_mib}m,mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "cloudlet-test", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@contextmanager
def clock_of(folder: Path) -> Iterator[None]:
    """Whatever is started within has the clock of a site."""
    paths = [str(folder.parent / "clocks"), os.environ.get("PYTHONPATH", "")]
    given = {_CLOCK: str(folder / "clock"), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def free(site: PeerSite) -> None:
    (site.folder / "state" / "filler").unlink(missing_ok=True)


def wait_for(until: Callable[[], bool], seconds: float, what: str, found: Any = "") -> None:
    """Wait until something is so, looking closely: what is looked for may last for a moment only."""
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, f"{what} {found() if callable(found) else found}".strip()
        time.sleep(0.003 if seconds < SETTLED_SECONDS else 0.1)


def about(site: PeerSite) -> dict[str, Any]:
    """What a site says of itself."""
    return dict(site.call.get("/v1/cloudlets/self")["cloudlet"])


def address(site: PeerSite) -> tuple[str, int]:
    """Where a site's peers reach it."""
    parts = urlsplit(about(site)["peers_url"])
    assert parts.hostname and parts.port
    return parts.hostname, parts.port
