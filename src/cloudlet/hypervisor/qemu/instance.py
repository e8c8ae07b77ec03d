"""One machine that runs: pause, resume, capture, optical drive, the end.

The object is a view of the instance's folder and processes. A later process that adopts the instance from its
record has the same view, but for what its owner holds open: the layer's files, the published ports.
"""

from __future__ import annotations

import filecmp
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from cloudlet.errors import FailedError, RefusedError
from cloudlet.hypervisor.connections import cut_connections
from cloudlet.hypervisor.driver import BaseCapture, Capture, Layer, Listener, Paging, RunState
from cloudlet.hypervisor.qemu import capture, changed, launch, page_server, ramblocks, sections, stream
from cloudlet.hypervisor.qemu.agent import QemuGuestAgent
from cloudlet.hypervisor.qemu.capture import PagesBelow
from cloudlet.hypervisor.qemu.changed import Mapping
from cloudlet.hypervisor.qemu.digest import digest_machine
from cloudlet.hypervisor.qemu.disk import InstanceDisk
from cloudlet.hypervisor.qemu.layer import OpenLayer
from cloudlet.hypervisor.qemu.monitor import Monitor
from cloudlet.hypervisor.qemu.network import guest_accepts
from cloudlet.hypervisor.qemu.rounds import QemuRounds
from cloudlet.hypervisor.qemu.sockets import connect
from cloudlet.hypervisor.records import ProcessId, Record, Workspace, cpu_seconds_of
from cloudlet.model import Endpoint, Machine
from cloudlet.overlay.limits import DEVICE_BYTES
from cloudlet.overlay.pages import Numbers
from cloudlet.sparse import copy_data

DISK = "disk.qcow2"
UEFI_VARS = "uefi-vars.fd"
RAM_PAGES, DISK_BLOCKS = "ram.pages", "disk.blocks"
"""What a capture leaves in the instance's folder."""
_ENDING_SECONDS = 2.0
_ARRIVAL_SECONDS = 60.0
"""Longest time without a page, for a capture that waits for them."""
_LOOK_SECONDS = 0.05
_ANNOUNCEMENTS = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
"""How often a machine says where it is now, and after how many milliseconds: as after a migration."""
_STATES = {
    "running": RunState.RUNNING,
    "inmigrate": RunState.INCOMING,
    "prelaunch": RunState.PAUSED,
}


class QemuInstance:
    """A machine of this driver. ``workspace`` is None where another process owns it."""

    def __init__(
        self,
        directory: Path,
        record: Record,
        machine: Machine,
        workspace: Workspace | None = None,
        process: subprocess.Popen[bytes] | None = None,
        ram: int = -1,
        layer: OpenLayer | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self.directory = directory
        self.record = record
        self.machine = machine
        self._workspace = workspace
        self._process = process
        self._ram = ram
        self._layer = layer
        self._listeners = list(listeners)
        self._monitor: Monitor | None = None
        self._received: PagesBelow | None = None
        self.fresh_blocks: ramblocks.Digests = {}
        """Memory besides the guest's RAM as it was before a machine that was booted ran."""

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return self.record.endpoints

    @property
    def console_log(self) -> Path:
        return self.directory / "console.log"

    @property
    def agent(self) -> QemuGuestAgent:
        return QemuGuestAgent(self.directory / "agent.sock")

    @property
    def layer(self) -> Layer | None:
        return self._layer.layer if self._layer else None

    def stands_on(self, ram: Path, received: Numbers) -> None:
        """Some of the pages that the guest has not written have come from another site.

        :param ram: the file that holds these, and those of the layer.
        """
        self._received = PagesBelow(received, ram)

    @property
    def listeners(self) -> tuple[Listener, ...]:
        return tuple(self._listeners)

    @property
    def monitor(self) -> Monitor:
        """The connection to QEMU, made when it is first needed."""
        if self._monitor is None:
            self._monitor = Monitor(self.directory / "monitor.sock")
        return self._monitor

    def state(self) -> RunState:
        if not self.record.machine or not self.record.machine.alive():
            return RunState.GONE
        try:
            status = self.monitor.execute("query-status")["status"]
        except FailedError:
            # A QEMU that is ending closes its monitor before its process is gone.
            if self.wait(_ENDING_SECONDS):
                return RunState.GONE
            raise
        return _STATES.get(status, RunState.PAUSED)

    def pause(self) -> None:
        self.monitor.execute("stop")

    def resume(self) -> None:
        self.monitor.execute("cont")

    def begin_resume(self) -> Callable[[], None]:
        return self.monitor.begin("cont")

    def prepare_pause(self) -> None:
        self.monitor.prepare()

    def open_console(self) -> socket.socket:
        return connect(self.directory / "console.sock", timeout=10.0)

    def accepts(self, endpoint: Endpoint, timeout: float) -> bool:
        network = self.record.network
        return network is not None and guest_accepts(network.pid, endpoint, timeout)

    def take_listeners(self) -> list[Listener]:
        """Hand the listening sockets over: they are the caller's and survive :meth:`stop`."""
        taken, self._listeners = self._listeners, []
        return taken

    def hold_connections(self, hold: bool) -> None:
        """Have the network process stand still, or go on: what it does not accept waits in the kernel."""
        if self.record.network:
            self.record.network.send_signal(signal.SIGSTOP if hold else signal.SIGCONT)

    def cut_connections(self) -> None:
        if self.record.network:
            cut_connections(self.record.network.pid, {port.host_port for port in self.endpoints})

    def generation_id(self) -> str:
        return str(self.monitor.execute("query-vm-generation-id")["guid"])

    def announce(self) -> None:
        self.monitor.execute("announce-self", **_ANNOUNCEMENTS)

    def cpu_seconds(self) -> float:
        return cpu_seconds_of(self._machine_process().pid)

    def insert_optical(self, image: Path) -> None:
        descriptor = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        try:
            name, _ = self.monitor.add_descriptor(descriptor)
        finally:
            os.close(descriptor)
        file = {"driver": "file", "filename": name, "locking": "off"}
        self.monitor.execute("blockdev-add", driver="raw", node_name="inserted", read_only=True, file=file)
        self.monitor.execute("blockdev-open-tray", id="optical0", force=True)
        self.monitor.execute("blockdev-insert-medium", id="optical0", node_name="inserted")
        self.monitor.execute("blockdev-close-tray", id="optical0")

    def eject_optical(self) -> None:
        """Empty the drive and close it, as it was before; nothing happens if it is empty."""
        self.monitor.execute("blockdev-open-tray", id="optical0", force=True)
        for device in self.monitor.execute("query-block"):
            if device.get("qdev") == "optical0" and device.get("inserted"):
                node = device["inserted"]["node-name"]
                self.monitor.execute("blockdev-remove-medium", id="optical0")
                self.monitor.execute("blockdev-del", node_name=node)
        self.monitor.execute("blockdev-close-tray", id="optical0")

    def shut_down(self, timeout: float) -> bool:
        self.monitor.execute("system_powerdown")
        return self.wait(timeout)

    def capture_base(self, ram: Path) -> BaseCapture:
        began = time.perf_counter()
        self.pause()
        state = self._device_state()
        pause_seconds = time.perf_counter() - began
        ramblocks.check(self.fresh_blocks, ramblocks.digests(self.monitor))
        with ram.open("wb") as target, self._ram_path().open("rb") as source:
            target.truncate(self.machine.memory_bytes)
            copy_data(source.fileno(), target.fileno())
        return BaseCapture(ram, state, sections.read_sections(state), pause_seconds)

    def capture(self) -> Capture:
        mapping, layer = self._looked_at()
        with self._open_disk(layer) as disk:
            laps = _Laps()
            self.pause()
            laps("stop")
            state = self._device_state()
            laps("device state")
            numbers = changed.private_pages(mapping)
            laps("page map")
            with self._spool(RAM_PAGES) as ram:
                changed.read_pages(mapping, numbers, ram)
            laps("memory")
            with self._spool(DISK_BLOCKS) as spool:
                blocks = capture.copy_disk(disk, spool)
            laps("disk")
        if below := self._below(layer):
            # What never changes can be fetched when the machine need not be waited for any more.
            numbers = capture.add_below(self.directory / RAM_PAGES, numbers, below)
        return Capture(
            ram=capture.spooled(self.directory / RAM_PAGES, numbers),
            disk=capture.spooled(self.directory / DISK_BLOCKS, blocks),
            device_state=state,
            sections=sections.read_sections(state),
            pause_seconds=sum(laps.seconds.values()),
            seconds=laps.seconds,
        )

    def rounds(self, *, with_layer: bool) -> QemuRounds:
        mapping, layer = self._looked_at()
        with ExitStack() as on_error:
            disk = on_error.enter_context(self._open_disk(layer))
            received = self._received.numbers if self._received else None
            rounds = QemuRounds(mapping, disk, layer if with_layer else None, self._stand_still, received)
            on_error.pop_all()
            return rounds

    def digest(self) -> bytes:
        layer = self._whole_layer()
        mapping = self._mapping()
        with self._open_disk(layer) as disk, self._ram_path().open("rb", buffering=0) as ram:
            return digest_machine(mapping, ram.fileno(), disk)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end of the machine or of its network, without which it is of no use to anybody."""
        if not self.record.machine:
            return True
        poller = select.poll()
        with ExitStack() as stack:
            for process in self.record.processes:
                try:
                    descriptor = os.pidfd_open(process.pid)
                except ProcessLookupError:
                    return True
                stack.callback(os.close, descriptor)
                if not process.alive():
                    return True
                poller.register(descriptor, select.POLLIN)
            return bool(poller.poll(None if timeout is None else timeout * 1000))

    def stop(self) -> None:
        if self._monitor:
            self._monitor.close()
            self._monitor = None
        for process in self.record.processes:
            process.kill()
        try:
            if self._process:
                self._process.wait(10.0)
        except subprocess.TimeoutExpired as error:
            raise FailedError(f"QEMU {self._process.pid if self._process else ''} does not end") from error
        finally:
            if self._ram >= 0:
                os.close(self._ram)
                self._ram = -1
            if self._layer:
                self._layer.close()
            for _, listener in self.take_listeners():
                listener.close()
            if self._workspace:
                self._workspace.remove()

    def last_words(self) -> str:
        """What QEMU said at its end, for an error message."""
        return launch.last_words(self.directory)

    def _looked_at(self) -> tuple[Mapping, Layer | None]:
        """What is needed of a machine whose changes are to be read, done while it runs.

        :raises RefusedError: its memory may not be read, or its UEFI variables were changed.
        :raises FailedError: QEMU does not answer, pages do not come, or only its owner can.
        """
        self._machine_process()
        if not self.record.detail["backing"]:
            raise FailedError(f"instance {self.id} was booted: capture it as a base")
        layer = self._whole_layer()  # first: a monitor may wait for pages as its guest does
        self.monitor.execute("query-status")
        self._check_uefi_vars()
        return self._mapping(), layer

    def _mapping(self) -> Mapping:
        return changed.find_mapping(self._machine_process().pid, self._ram_path(), self.machine.memory_bytes)

    def _open_disk(self, layer: Layer | None) -> InstanceDisk:
        base = Path(self.record.detail["backing"])
        return InstanceDisk(self.directory / DISK, base, layer, self.machine.disk_bytes)

    def _stand_still(self) -> bytes:
        """Pause the machine; its device state."""
        self.pause()
        self._check_uefi_vars()
        return self._device_state()

    def _machine_process(self) -> ProcessId:
        if not self.record.machine or not self.record.machine.alive():
            raise FailedError(f"instance {self.id} is gone: {self.last_words()}")
        return self.record.machine

    def _ram_path(self) -> Path:
        """The machine's RAM file, as its owner holds it."""
        if self._ram >= 0:
            return Path(f"/proc/self/fd/{self._ram}")
        owner = self.record.owner
        if not owner or not owner.alive():
            raise FailedError(f"the owner of instance {self.id} is gone", hint="cloudlet ps")
        return Path(f"/proc/{owner.pid}/fd/{self.record.ram_descriptor}")

    def _check_uefi_vars(self) -> None:
        """An overlay does not carry UEFI variables: they must be the base's.

        :raises RefusedError: the guest has changed them.
        """
        base = self.record.detail.get("uefi_vars")
        if base and not filecmp.cmp(base, self.directory / UEFI_VARS, shallow=False):
            raise RefusedError(
                "the guest has changed its UEFI variables, which an overlay does not carry",
                hint="make that change in the base: cloudlet base import",
            )

    def _device_state(self) -> bytes:
        path = self.directory / "device.state"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            name, number = self.monitor.add_descriptor(descriptor)
        finally:
            os.close(descriptor)
        try:
            self.monitor.execute("xen-save-devices-state", filename=name, live=False)
        finally:
            self.monitor.execute("remove-fd", fdset_id=number)
        with path.open("rb") as file:
            saved = file.read(DEVICE_BYTES + 1)
        if len(saved) > DEVICE_BYTES:
            raise RefusedError(f"the device state has more than {DEVICE_BYTES} bytes")
        return stream.device_sections(saved)

    def _whole_layer(self) -> Layer | None:
        """The layer on which this machine stands, with all its pages: wait for those on their way.

        :raises FailedError: nothing came for a while, or only the machine's owner has the layer.
        """
        stands_on_more = self.record.detail.get("layer") or self.record.pages
        if stands_on_more and not (self._layer or self._received):
            raise FailedError(f"only the owner of instance {self.id} can capture it")
        if self.record.pages:
            self._wait_for_pages()
        return self._layer.layer if self._layer else None

    def _wait_for_pages(self) -> None:
        last, since = -1, time.monotonic()
        while not (paging := self._paging()).complete:
            if paging.missing != last:
                last, since = paging.missing, time.monotonic()
            elif time.monotonic() > since + _ARRIVAL_SECONDS:
                raise FailedError(
                    f"instance {self.id} cannot be captured: {paging.missing} of its pages do not come",
                    hint="wait until its overlay has arrived",
                )
            if self.wait(_LOOK_SECONDS):
                raise FailedError(f"instance {self.id} ended before its overlay had arrived")

    def _below(self, layer: Layer | None) -> PagesBelow | None:
        """The pages of RAM that are not the base's, as far as the guest has not written them."""
        of_layer = PagesBelow.of(layer) if layer else None
        if not self._received:
            return of_layer
        numbers = self._received.numbers
        if of_layer:
            numbers = np.union1d(numbers, of_layer.numbers).astype(np.uint32)
        return PagesBelow(numbers, self._received.ram)

    def _paging(self) -> Paging:
        if paging := page_server.read_progress(self.directory):
            return paging
        raise FailedError(f"what has come of instance {self.id} cannot be read, so it cannot be captured")

    @contextmanager
    def _spool(self, name: str) -> Iterator[int]:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        descriptor = os.open(self.directory / name, flags, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


class _Laps:
    """Seconds between moments."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
