"""What a hand-off is compared with: QEMU's own live migration, and a copy of what changed on the disk.

The same machine from the same overlay goes over the same wire to a plain QEMU with the same command line and
base, which is there before the clock starts. As libvirt does it: the disk is mirrored until both are equal,
over NBD, and from then on each write goes to both; then memory is migrated. The target is held back while the
memory of both is compared, and that time is taken off.
"""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import plain
from benchmarks.handoff_client import INTERVAL, using
from benchmarks.handoff_sites import (
    COUNT_PORT,
    FAR,
    HTTP_PORT,
    IDLE,
    LOOK_AFTER,
    LOOK_BEFORE,
    NEAR,
    Load,
    ask,
    check,
    free_port,
)
from benchmarks.lab import tool
from benchmarks.wire import Wire, wire
from cloudlet.control.site import Site
from cloudlet.control.start import Start
from cloudlet.control.synthesis import Request, synthesise
from cloudlet.errors import FailedError
from cloudlet.hypervisor.qemu.changed import Mapping, open_memory, read_rows
from cloudlet.hypervisor.qemu.instance import QemuInstance
from cloudlet.hypervisor.qemu.monitor import Monitor
from cloudlet.model import PAGE_BYTES, PublishedPort
from cloudlet.settings import Settings
from cloudlet.store.bases import Base
from cloudlet.transfer.source import open_source

DOWNTIME_MS = 100
"""What QEMU is asked to stop for at most: the pause that a hand-off is asked for, too."""
_AT_ONCE = 1 << 40
_BATCH = 1024
_PAUSE = 0.005


@dataclass(frozen=True, slots=True)
class Migrated:
    """One migration, as it was measured."""

    seconds: float
    """From the first command to the target running, less the time in which it was held back."""
    carried_bytes: int
    disk_bytes: int
    gap_seconds: float
    differing_pages: int
    """Of the guest's memory, when QEMU said that it was complete."""
    alive: bool
    """Whether the application then was what it was."""


def migrate(
    site: Site, overlay: Path, scratch: Path, mbit: float, load: Load = IDLE, seconds: float = 300.0
) -> Migrated | None:
    """Migrate an application over a wire of a rate; None if QEMU had not done so in time.

    :param overlay: of ``guests/counter``.
    :param scratch: a folder for the target's disk.
    :param seconds: longest time until it has.
    """
    ports = [(port, free_port()) for port in (COUNT_PORT, HTTP_PORT)]

    def at(address: str) -> list[PublishedPort]:
        return [PublishedPort(guest, address, host) for guest, host in ports]

    request = Request(ports=at(NEAR), start=Start.FULL, use_image=False)
    with ExitStack() as stack:
        source = stack.enter_context(open_source(str(overlay), io.BytesIO()))
        made = stack.enter_context(synthesise(site, source, request))
        near, base = made.instance, site.bases.get(made.root.base)
        assert isinstance(near, QemuInstance)
        disk, generation = scratch / "migrated.qcow2", near.generation_id()
        target = stack.enter_context(_target(site.settings, base, disk, at(FAR), generation))
        near_url, far_url = (f"http://{address}:{ports[1][1]}" for address in (NEAR, FAR))
        load.begin(near_url)
        held = ask(f"{near_url}/held")
        way = stack.enter_context(_Way.open(near.monitor, target.monitor, mbit))
        with using(*((address, ports[0][1]) for address in (NEAR, FAR))) as user:
            time.sleep(LOOK_BEFORE)
            began = time.monotonic()
            if not way.go(began + seconds):
                return None
            loaded = time.monotonic()
            differing = _differing(near, target)
            kept_back = time.monotonic() - loaded
            target.resume()
            ended = time.monotonic()
            time.sleep(LOOK_AFTER)
        alive = True
        try:
            check(user, held, far_url)
        except (OSError, HTTPException, FailedError):
            alive = False
        around = began, ended + LOOK_AFTER - 2 * INTERVAL
        return Migrated(
            seconds=ended - began - kept_back,
            carried_bytes=way.carried(),
            disk_bytes=way.disk_bytes,
            gap_seconds=user.gap(*around, held=kept_back),
            differing_pages=differing,
            alive=alive,
        )


@contextmanager
def _target(
    settings: Settings, base: Base, disk: Path, ports: list[PublishedPort], generation: str
) -> Iterator[QemuInstance]:
    """A plain QEMU that waits for a migration, and then for a word, with an empty disk on the base's."""
    image = base.image()
    disk.unlink(missing_ok=True)
    tool(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), str(base.machine.disk_bytes)])
    machine = plain.Plain(
        base.machine,
        disk,
        image.kernel,
        image.initrd,
        base.description.cmdline,
        backing=image.disk,
        generation_id=generation,
    )
    with plain.run(settings, machine, ports, extra=["-incoming", "defer", "-S"]) as instance:
        yield instance


class _Way:
    """From one QEMU's monitor to the other's: a stream of memory, and one of the disk, on one wire."""

    def __init__(self, near: Monitor, far: Monitor, between: Wire, memory: socket.socket) -> None:
        """A way over a wire whose first port leads to ``memory``, and whose second to the far end's disk."""
        self.disk_bytes = 0
        self.carried = between.carried
        self._near, self._far = near, far
        self._memory = memory
        self._memory_port, self._disk_port = between.there

    @classmethod
    @contextmanager
    def open(cls, near: Monitor, far: Monitor, mbit: float) -> Iterator[_Way]:
        """The way, over a wire of so many Mbit/s; the far end offers its disk."""
        with socket.create_server((FAR, 0)) as memory, socket.create_server((FAR, 0)) as disk:
            far.send_descriptor(disk.fileno(), "disk-in")
            far.execute("nbd-server-start", addr={"type": "fd", "data": {"str": "disk-in"}})
            far.execute(
                "block-export-add", type="nbd", id="disk", node_name="disk0", name="disk", writable=True
            )
            with wire([memory.getsockname(), disk.getsockname()], mbit=mbit) as between:
                yield cls(near, far, between, memory)

    def go(self, deadline: float) -> bool:
        """Have the machine go; whether it is complete at the far end before the deadline."""
        if not self._mirror(deadline):
            return False
        self.disk_bytes = self.carried()
        self._connect_memory()
        pausing = [{"capability": "pause-before-switchover", "state": True}]
        self._near.execute("migrate-set-capabilities", capabilities=pausing)
        self._near.execute("migrate-set-parameters", max_bandwidth=_AT_ONCE, downtime_limit=DOWNTIME_MS)
        self._near.execute("migrate", uri="fd:memory-out")
        if not self._wait(lambda: self._status() == "pre-switchover", deadline):
            return False
        self._near.execute("block-job-cancel", device="mirror")
        self._wait(lambda: not self._near.execute("query-block-jobs"), deadline)
        self._far.execute("nbd-server-stop")
        self._near.execute("migrate-continue", state="pre-switchover")
        return self._wait(lambda: self._status() == "completed", deadline) and self._wait(
            lambda: self._far.execute("query-status")["status"] != "inmigrate", deadline
        )

    def _mirror(self, deadline: float) -> bool:
        """Mirror what the machine has changed on its disk, until that is the same at both ends."""
        with socket.create_connection((NEAR, self._disk_port)) as connection:
            self._near.send_descriptor(connection.fileno(), "disk-out")
        server = {"type": "fd", "str": "disk-out"}
        self._near.execute("blockdev-add", driver="nbd", node_name="far", server=server, export="disk")
        self._near.execute(
            "blockdev-mirror", job_id="mirror", device="disk0", target="far", sync="top",
            copy_mode="write-blocking",
        )  # fmt: skip
        return self._wait(lambda: self._jobs()[0]["ready"], deadline)

    def _connect_memory(self) -> None:
        """Give each QEMU its end of a connection for memory."""
        with socket.create_connection((NEAR, self._memory_port)) as connection:
            came, _ = self._memory.accept()
            with came:
                self._far.send_descriptor(came.fileno(), "memory-in")
            self._far.execute("migrate-incoming", uri="fd:memory-in")
            self._near.send_descriptor(connection.fileno(), "memory-out")

    def _jobs(self) -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = self._near.execute("query-block-jobs")
        if not jobs:
            raise FailedError("QEMU has given up mirroring the disk")
        return jobs

    def _status(self) -> str:
        found = self._near.execute("query-migrate")
        if found["status"] in ("failed", "cancelled"):
            raise FailedError(f"QEMU has not migrated: {found.get('error-desc', found['status'])}")
        return str(found["status"])

    @staticmethod
    def _wait(until: Callable[[], bool], deadline: float) -> bool:
        while not until():
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE)
        return True


def _differing(near: QemuInstance, far: QemuInstance) -> int:
    """How many pages of two machines' memory differ."""
    one, other = _memory_of(near), _memory_of(far)
    rows = [np.empty((_BATCH, PAGE_BYTES), np.uint8) for _ in range(2)]
    count = 0
    with open_memory(one.pid) as near_memory, open_memory(other.pid) as far_memory:
        for at in range(0, one.pages, _BATCH):
            numbers = np.arange(at, min(at + _BATCH, one.pages), dtype=np.uint32)
            read_rows(near_memory, one, numbers, rows[0][: numbers.size])
            read_rows(far_memory, other, numbers, rows[1][: numbers.size])
            count += int((rows[0] != rows[1])[: numbers.size].any(axis=1).sum())
    return count


def _memory_of(instance: QemuInstance) -> Mapping:
    """Where a QEMU has its guest's memory: the one place that has its size."""
    assert instance.record.machine
    pid, size = instance.record.machine.pid, instance.machine.memory_bytes
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        first, last = (int(address, 16) for address in line.split()[0].split("-"))
        if last - first == size:
            found.append(first)
    if len(found) != 1:
        raise FailedError(f"{len(found)} places of QEMU {pid} may be its guest's memory")
    return Mapping(pid, found[0], size // PAGE_BYTES)
