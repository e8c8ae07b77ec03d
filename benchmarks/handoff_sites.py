"""Two sites that are served and are each other's peers, over a wire; and one instance that goes across it.

Both have the same base. The near one has the application; whether the far one may use its overlay is said
for each hand-off. Ports of instances are published at an address of each site's own, under the same numbers,
so that a user knows beforehand where the instance will be.
"""

from __future__ import annotations

import json
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import apps
from benchmarks.handoff_client import INTERVAL, Address, Using, using
from benchmarks.lab import Lab
from benchmarks.site_served import (
    CORES,
    MEMBER,
    OPERATOR,
    PUBLISHER,
    Caller,
    Served,
    serving,
    without_images,
)
from benchmarks.wire import Wire, wire
from cloudlet.errors import FailedError
from cloudlet.hypervisor.records import cpu_seconds_of, records
from cloudlet.keeper.handle import Keepers
from cloudlet.keeper.order import KeeperState
from cloudlet.model import MEBIBYTE
from cloudlet.settings import Settings

NEAR, FAR = "127.0.0.1", "127.0.0.2"
"""Where the sites publish ports."""
COUNT_PORT, HTTP_PORT = 9094, 9093
LOOK_BEFORE, LOOK_AFTER = 0.5, 1.5
"""Seconds in which the user asks before and after."""
_BUSY_SECONDS = 3.0
"""So long a busy guest has been busy when it is handed off."""
_ASK_SECONDS, _READY_SECONDS, _SPARE_SECONDS = 300.0, 60.0, 120.0
_PAUSE = 0.02


@dataclass(frozen=True, slots=True)
class Load:
    """What the application does, and holds besides, when it is handed off."""

    busy_mib: int = 0
    """MiB that it overwrites per second."""
    alloc_mib: int = 0
    disk_mib: int = 0

    def begin(self, url: str) -> None:
        """Have an application do it, as it has done for a while when this returns."""
        if self.alloc_mib:
            ask(f"{url}/alloc?mib={self.alloc_mib}")
        if self.disk_mib:
            ask(f"{url}/disk?mib={self.disk_mib}")
        ask(f"{url}/busy?mib={self.busy_mib}")
        time.sleep(_BUSY_SECONDS if self.busy_mib else 1.0)


IDLE = Load()


@dataclass(frozen=True, slots=True)
class Site:
    """A site that is served, and who uses it."""

    served: Served
    settings: Settings
    address: str

    @property
    def member(self) -> Caller:
        return Caller(self.served.url, MEMBER)

    @property
    def operator(self) -> Caller:
        return Caller(self.served.url, OPERATOR)

    def keeper(self, instance_id: str) -> int:
        """The process that keeps an instance; the one machine of this site."""
        owners = [record.owner.pid for _, record in records(self.settings.instances_dir) if record.owner]
        if len(owners) != 1:
            raise FailedError(f"{len(owners)} machines run at the site of instance {instance_id}")
        return owners[0]


@dataclass(frozen=True, slots=True)
class Moved:
    """One hand-off, as it was measured."""

    statistics: dict[str, Any]
    """As the source's keeper says."""
    operation_seconds: float
    """From the request to its operation's end."""
    carried_bytes: int
    """What the wire carried, both ways."""
    gap_seconds: float
    """The longest time in which a user was not answered who asks at both addresses."""
    old_gap_seconds: float
    """The same for one who asks only where the instance was."""
    source_cpu_seconds: float
    target_cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Sites:
    """The two, with their wire; ``app`` is the application's id at the near one."""

    near: Site
    far: Site
    wire: Wire
    app: str

    @contextmanager
    def instance(self, load: Load = IDLE) -> Iterator[dict[str, Any]]:
        """An instance at the near site with its load; ended, wherever it is, when the context is left."""
        ports = [{"guest_port": port, "port": free_port()} for port in (COUNT_PORT, HTTP_PORT)]
        member = self.near.member
        wanted = {"app_id": self.app, "ports": ports}
        begun = member("POST", "/v1/instances", {"instance": wanted})["operation"]
        instance_id = begun["resources"]["instance"]
        try:
            member.done(begun, _ASK_SECONDS)
            deadline = time.monotonic() + _READY_SECONDS
            while not (found := member("GET", f"/v1/instances/{instance_id}")["instance"])["timings"]:
                if time.monotonic() > deadline:
                    raise FailedError(f"instance {instance_id} is not ready")
                time.sleep(_PAUSE)
            load.begin(url_of(found))
            yield dict(found)
        finally:
            for site in (self.far, self.near):
                with suppress(FailedError):
                    site.member.delete(instance_id)

    def move(self, instance: dict[str, Any], **terms: Any) -> Moved:
        """Hand an instance from the near site to the far one while a user asks it.

        :raises FailedError: it did not go, or is not what it was.
        """
        held = ask(f"{url_of(instance)}/held")
        keeper = self.near.keeper(instance["id"])
        used, carried = cpu_seconds_of(keeper), self.wire.carried()
        with using(*self._addresses(instance, COUNT_PORT)) as user:
            time.sleep(LOOK_BEFORE)
            began = time.monotonic()
            handoff = self.hand_off(self.near, self.far, instance["id"], **terms)
            ended = time.monotonic()
            # Who still asks at the near one keeps it busy: what moving cost is known now.
            source, target = cpu_seconds_of(keeper), cpu_seconds_of(self.far.keeper(instance["id"]))
            carried = self.wire.carried() - carried
            time.sleep(LOOK_AFTER)
        check(user, held, f"http://{self.far.address}:{port_of(instance, HTTP_PORT)}")
        around = began, ended + LOOK_AFTER - 2 * INTERVAL
        return Moved(
            statistics=handoff["statistics"],
            operation_seconds=ended - began,
            carried_bytes=carried,
            gap_seconds=user.gap(*around),
            old_gap_seconds=user.gap(*around, where=0),
            source_cpu_seconds=source - used,
            target_cpu_seconds=target,
        )

    def hand_off(self, source: Site, target: Site, instance_id: str, **terms: Any) -> dict[str, Any]:
        """Hand an instance off, and wait until it runs there; the source's word on it."""
        peers = source.operator("GET", "/v1/peers")["peers"]
        if len(peers) != 1:
            raise FailedError(f"{source.address} has {len(peers)} peers")
        wanted = {"instance_id": instance_id, "peer_id": peers[0]["id"], **terms}
        operator = source.operator  # who may have it switch early, too
        begun = operator("POST", "/v1/handoffs", {"handoff": wanted})["operation"]
        done = operator.done(begun, terms.get("deadline_seconds", 60.0) + _SPARE_SECONDS)
        return dict(operator("GET", f"/v1/handoffs/{done['resources']['handoff']}")["handoff"])

    def _addresses(self, instance: dict[str, Any], guest_port: int) -> list[Address]:
        port = port_of(instance, guest_port)
        return [(self.near.address, port), (self.far.address, port)]


@contextmanager
def sites(lab: Lab, app: apps.App) -> Iterator[Sites]:
    """Two sites with an application, the far one with its overlay, until the context is left."""
    overlay = apps.overlay_of(lab, app)
    near_port, far_port = free_port(), free_port()
    with (
        tempfolder(lab, "handoff") as folder,
        wire([(FAR, far_port)], [(NEAR, near_port)]) as between,
        _site(lab, folder / "near", NEAR, near_port, between.back[0]) as near,
        _site(lab, folder / "far", FAR, far_port, between.there[0]) as far,
    ):
        for site in (near, far):
            app_id = Caller(site.served.url, PUBLISHER).publish(overlay, app.key)
            if site is near:
                near_app = app_id
        for here, there in ((near, far), (far, near)):
            about = there.operator("GET", "/v1/cloudlets/self")["cloudlet"]
            peer = {"url": about["peers_url"], "fingerprint": about["fingerprint"]}
            here.operator("POST", "/v1/peers", {"peer": peer})
        both = Sites(near, far, between, near_app)
        _warm(both)
        yield both


def settle(settings: Settings, instance_id: str) -> None:
    """Wait until an instance that has come to a site can leave it again: its clock is set first.

    :param settings: the site's.
    """
    keepers = Keepers(settings, lambda *_: None)
    deadline = time.monotonic() + _READY_SECONDS
    try:
        while (status := keepers.status(instance_id)) is None or status.state is not KeeperState.READY:
            if time.monotonic() > deadline:
                raise FailedError(f"instance {instance_id} is not ready")
            time.sleep(_PAUSE)
    finally:
        keepers.close()


def check(user: Using, held: dict[str, Any], url: str) -> None:
    """Whether an application is what it was: what it holds, and what it has counted.

    :raises FailedError: it is not.
    """
    if (now := ask(f"{url}/held")) != held:
        raise FailedError(f"the application holds {now} instead of {held}")
    if not user.kept_counting():
        raise FailedError("the application has counted something twice, or nothing")


def ask(url: str, timeout: float = _ASK_SECONDS) -> dict[str, Any]:
    """What the application answers."""
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        document: dict[str, Any] = json.load(answer)
        return document


def port_of(instance: dict[str, Any], guest_port: int) -> int:
    """Where a port of an instance is published, at whichever site."""
    (port,) = (place["port"] for place in instance["endpoints"] if place["guest_port"] == guest_port)
    return int(port)


def url_of(instance: dict[str, Any]) -> str:
    """Where an instance at the near site is told things."""
    return f"http://{NEAR}:{port_of(instance, HTTP_PORT)}"


def free_port() -> int:
    """A port that is free at both addresses."""
    while True:
        with socket.create_server((NEAR, 0)) as one, suppress(OSError):
            port: int = one.getsockname()[1]
            with socket.create_server((FAR, port)):
                return port


@contextmanager
def tempfolder(lab: Lab, name: str) -> Iterator[Path]:
    """A folder of this run that is gone afterwards."""
    folder = lab.scratch / name
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def _site(lab: Lab, folder: Path, address: str, port: int, wire_port: int) -> Iterator[Site]:
    """A site that trusts the publisher, and is reached by its peer over the wire."""
    keys = folder / "keys"
    (keys / "trusted").mkdir(parents=True)
    for key in (lab.settings.keys_dir / "trusted").glob("*.pub"):
        shutil.copy(key, keys / "trusted" / f"publisher-{key.name}")
    settings = replace(without_images(lab.settings, folder), keys_dir=keys)
    peers = {"listen": f"{address}:{port}", "url": f"https://127.0.0.1:{wire_port}", "grace_seconds": 10}
    with serving(settings, folder, set(CORES), api={"publish_address": address}, peers=peers) as served:
        yield Site(served, settings, address)


def _warm(both: Sites) -> None:
    """Go there and back, on each way once: files are read, and the app's image is made at both sites."""
    with ExitStack() as stack:
        instance = stack.enter_context(both.instance())
        for way in ("overlay", "nothing"):
            for here, there in ((both.near, both.far), (both.far, both.near)):
                both.hand_off(here, there, instance["id"], overlay=way)
                settle(there.settings, instance["id"])


def mib(count: float) -> float:
    return count / MEBIBYTE
