"""The contract of a hypervisor: boot a disk, capture a base, resume a private instance, capture it.

Two drivers fulfil it, :mod:`cloudlet.hypervisor.qemu` and :mod:`cloudlet.hypervisor.fake`; one suite
of tests (``tests/contract``) runs on both. The stories in ``cloudlet.control`` know only this module.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from cloudlet.model import Accelerator, Endpoint, Firmware, Machine, PublishedPort
from cloudlet.overlay.apply import Sink
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import Numbers, PageSource, Space
from cloudlet.overlay.root import DeviceSection

Sections = tuple[DeviceSection, ...]
"""Device sections in the order of the stream."""


class RunState(StrEnum):
    """What a virtual machine is doing, as its hypervisor sees it."""

    INCOMING = "incoming"
    RUNNING = "running"
    PAUSED = "paused"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Boot:
    """A disk and how to start it from nothing. The disk is written to."""

    machine: Machine
    disk: Path
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    uefi_vars: Path | None = None
    optical: Path | None = None
    """An ISO image for the optical drive, such as a cloud-init seed."""


@dataclass(frozen=True, slots=True)
class BaseImage:
    """A captured base, as files: all that is needed to resume private instances of it."""

    base_id: str
    machine: Machine
    ram: Path
    disk: Path
    device_state: Path
    sections: Sections
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    uefi_vars: Path | None = None


@dataclass(frozen=True, slots=True)
class BaseCapture:
    """What capturing a freshly booted machine gives. The disk is the one it was booted with."""

    ram: Path
    device_state: bytes
    sections: Sections
    pause_seconds: float


@dataclass(frozen=True, slots=True)
class Capture:
    """The pages of a paused private instance that may differ from its base, and its devices.

    The page sources live in files of the instance's directory: use them before it is stopped.
    """

    ram: PageSource
    disk: PageSource
    device_state: bytes
    sections: Sections
    pause_seconds: float
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each step within the pause."""


@dataclass(frozen=True, slots=True)
class Layer:
    """An app's pages as files: what an instance stands on besides its base, instead of loading them.

    Whole and verified, or (:class:`Arriving`) still being written. Never changed by an instance.
    """

    overlay_id: str
    pages: PageMap
    ram: Path
    """As large as the guest's RAM, each page at its place; the rest is holes."""
    disk: Path
    """The blocks, as the driver wants them."""


@dataclass(frozen=True, slots=True)
class Paging:
    """How far an instance is whose pages arrive while it runs. Seconds; pages of RAM and disk together."""

    pages: int
    missing: int
    bytes: int
    """Of the overlay, in all."""
    received: int
    complete: bool
    reads: int = 0
    """How often the guest asked for pages."""
    stalls: int = 0
    """How often it had to wait for one."""
    longest_stall: float = 0.0
    waited: float = 0.0
    waiting_since: float | None = None
    """On the monotonic clock, where it waits now."""


Wanted = Callable[[Space, Numbers], None]
"""Told which pages a guest waits for; called from a thread of the driver."""


class GuestAgent(Protocol):
    """Commands inside a guest, over a channel that needs no network."""

    def ping(self, timeout: float) -> bool:
        """Whether the agent answers within ``timeout`` seconds."""

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float,
        stdin: bytes = b"",
        output: Callable[[bytes], None] | None = None,
    ) -> tuple[int, bytes]:
        """Run a program to its end; its exit status and its output (standard output and error, joined)."""


class Instance(Protocol):
    """A virtual machine that this driver started, or one it adopted from its record."""

    @property
    def id(self) -> str: ...

    @property
    def directory(self) -> Path: ...

    @property
    def endpoints(self) -> tuple[Endpoint, ...]: ...

    @property
    def console_log(self) -> Path: ...

    @property
    def agent(self) -> GuestAgent | None: ...

    def state(self) -> RunState: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def open_console(self) -> socket.socket:
        """A connection with the guest's serial console; one at a time."""

    def accepts(self, endpoint: Endpoint, timeout: float) -> bool:
        """Whether the guest itself takes a connection of a published port within ``timeout`` seconds."""

    def cpu_seconds(self) -> float:
        """CPU time the machine has used on this host."""

    def insert_optical(self, image: Path) -> None:
        """Put an ISO image into the optical drive."""

    def eject_optical(self) -> None: ...

    def shut_down(self, timeout: float) -> bool:
        """Press the power button and wait; whether the machine went off by itself in ``timeout`` seconds."""

    def capture_base(self, ram: Path) -> BaseCapture:
        """Capture a machine that was booted, its RAM to the file ``ram``; it does not run on."""

    def capture(self) -> Capture:
        """Pause a private instance and capture what it changed; it stays paused."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the machine is gone; whether it is."""

    def stop(self) -> None:
        """End the machine at once and remove all that is its own. Can be called again."""


class Incoming(Sink, Protocol):
    """A private instance that is being filled: first the map, then pages, then the device state.

    It is a sink of the overlay engine; :meth:`Sink.finish` lets the machine run.
    """

    @property
    def instance(self) -> Instance: ...

    def abort(self) -> None:
        """Give up: nothing of the instance is left. Can be called again, and after an error."""


class Arriving(Incoming, Protocol):
    """A private instance that may run before its pages have come, which they do in any order.

    One thread hands over pages, from the beginning on, while another is in :meth:`begin` and :meth:`start`,
    which may need some of them. :meth:`Sink.finish` tells that all have come, and lets nothing run.
    """

    def start(self, device_state: bytes) -> None:
        """Load the devices and let the machine run."""

    def received(self, done: int, total: int) -> None:
        """Note how many bytes of the overlay have come, for :meth:`progress`."""

    def progress(self) -> Paging:
        """How far it is; asks nothing of the machine."""

    def touched(self) -> list[tuple[Space, Numbers]]:
        """The pages the guest has read so far, in the order of first touch, if that is recorded."""

    def sever(self) -> None:
        """No further page will come: the machine ends. From any thread; :meth:`abort` is still to follow."""


class Hypervisor(Protocol):
    """A driver."""

    @property
    def name(self) -> str: ...

    def machine(
        self, *, memory_bytes: int, disk_bytes: int, cpus: int = 1, firmware: Firmware = Firmware.BIOS
    ) -> Machine:
        """The machine this driver gives a new base here, accelerator and CPU model decided."""

    def accelerator(self) -> Accelerator: ...

    def check(self, machine: Machine) -> None:
        """Whether a capture of ``machine`` can run here.

        :raises MismatchError: it cannot; nothing has been started.
        """

    def boot(self, boot: Boot, ports: Sequence[PublishedPort] = (), *, name: str = "") -> Instance:
        """Start a machine from its disk, with memory that can be captured as a base."""

    def resume(
        self,
        base: BaseImage,
        ports: Sequence[PublishedPort] = (),
        *,
        name: str = "",
        overlay_id: str = "",
        layer: Layer | None = None,
    ) -> Incoming:
        """Start a private instance of a base, waiting for what differs from the base.

        With a whole ``layer`` it waits for what differs from both, and shares the layer's pages with all such
        instances; only drivers that can start early (:meth:`early_obstacle`) can do that.
        """

    def early_obstacle(self) -> str:
        """Why no machine can run here before its pages have come, and what would help; empty where it can."""

    def resume_early(
        self,
        base: BaseImage,
        layer: Layer,
        wanted: Wanted,
        ports: Sequence[PublishedPort] = (),
        *,
        name: str = "",
        record_touched: bool = False,
    ) -> Arriving:
        """Start a private instance of a base whose pages arrive: they go to the layer's new files."""

    def instances(self) -> list[Instance]:
        """The instances of this state folder that are alive, whoever started them."""

    def reap(self) -> list[str]:
        """Remove what dead owners left: processes, sockets, files. The ids of what was removed."""
