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
from cloudlet.overlay.pages import PageSource
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
        self, base: BaseImage, ports: Sequence[PublishedPort] = (), *, name: str = "", overlay_id: str = ""
    ) -> Incoming:
        """Start a private instance of a base, waiting for what differs from the base."""

    def instances(self) -> list[Instance]:
        """The instances of this state folder that are alive, whoever started them."""

    def reap(self) -> list[str]:
        """Remove what dead owners left: processes, sockets, files. The ids of what was removed."""
