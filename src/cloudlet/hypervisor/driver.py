"""The contract of a hypervisor: boot a disk, capture a base, resume a private instance, capture it.

Two drivers fulfil it, :mod:`cloudlet.hypervisor.qemu` and :mod:`cloudlet.hypervisor.fake`; one suite
of tests (``tests/contract``) runs on both. The stories in ``cloudlet.control`` know only this module.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from cloudlet.model import Accelerator, Endpoint, Firmware, Machine, PublishedPort
from cloudlet.overlay.apply import Sink
from cloudlet.overlay.known import HeldPages
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import Numbers, PageBatch, PageSource, Rows, Space
from cloudlet.overlay.root import DeviceSection

Sections = tuple[DeviceSection, ...]
"""Device sections in the order of the stream."""

Listener = tuple[Endpoint, socket.socket]
"""A published port and its listening socket, which does not block."""


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


class Rounds(Protocol):
    """A machine's pages, read again and again while it runs. Used by one thread.

    Before :meth:`settle` what is read may be torn, and what the guest has just written to its disk may not
    be there yet. Everything from here on is exact once the machine is settled.
    """

    def held(self, space: Space) -> Numbers:
        """The pages that may differ from what the other end holds, in order; of RAM always all of them.

        What was told once is told again, also where it no longer differs.
        """

    def read(self, space: Space, numbers: Numbers, rows: Rows) -> None:
        """Fill ``rows`` (n, 4096), which is contiguous, with these pages (in order, some hundreds at most).

        :raises FailedError: the machine is gone.
        """

    def pass_over_layer(self) -> None:
        """Hold no longer what only the layer brings: it was looked at, and does not change."""

    def settle(self) -> tuple[bytes, Sections]:
        """Have the machine stand still, which it may do already: its device state and the sections of that.

        After an error it may stand still, too.

        :raises RefusedError: it has changed its UEFI variables.
        """

    def close(self) -> None:
        """Let go of the machine, which goes on or stands still. Can be called again."""


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
    def listeners(self) -> tuple[Listener, ...]:
        """The published ports' sockets, which the owner holds beside who serves them; none if adopted."""

    @property
    def layer(self) -> Layer | None:
        """What the machine stands on besides its base, as its owner knows it."""

    @property
    def console_log(self) -> Path: ...

    @property
    def agent(self) -> GuestAgent | None: ...

    def state(self) -> RunState: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def begin_resume(self) -> Callable[[], None]:
        """Have it run, and do not wait until it says so: that does what is returned, as :meth:`resume`."""

    def prepare_pause(self) -> None:
        """It is to be paused in a moment, and at once then."""

    def open_console(self) -> socket.socket:
        """A connection with the guest's serial console; one at a time."""

    def accepts(self, endpoint: Endpoint, timeout: float) -> bool:
        """Whether the guest itself takes a connection of a published port within ``timeout`` seconds."""

    def take_listeners(self) -> list[Listener]:
        """Take the listening sockets over: they survive :meth:`stop`, and the caller closes them."""

    def hold_connections(self, hold: bool) -> None:
        """Whether new connections wait in the kernel instead of reaching the guest; old ones stand still."""

    def cut_connections(self) -> None:
        """End the connections that its ports have, as far as this process may; new ones come or wait."""

    def generation_id(self) -> str:
        """The VM generation ID that the guest has; empty where the machine has none."""

    def announce(self) -> None:
        """Tell switches where the machine's card is now."""

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

    def rounds(self, *, with_layer: bool) -> Rounds:
        """Read the pages of a private instance while it runs.

        It waits for pages that are still on their way to the machine.

        :param with_layer: the pages of its layer count, too, since the other end has the base only.
        :raises RefusedError: it has changed its UEFI variables, or this process may not look.
        :raises FailedError: it is gone, pages do not come, or only its owner can do this.
        """

    def digest(self) -> bytes:
        """The digest of a private instance that stands still: 32 bytes, the same for equal RAM and disk.

        BLAKE3 over all RAM, as the hypervisor has it, then over number and content of each block of the
        disk that differs from the base's: whatever the machine stands on.
        """

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


class Receiving(Protocol):
    """A machine that comes from another site: filled again and again, loaded once, and then paused."""

    @property
    def instance(self) -> Instance: ...

    def begin(self) -> None:
        """Wait until pages can be taken."""

    def pages(self, batch: PageBatch) -> None:
        """Load pages, in any order; of a page that comes again the last one counts."""

    def load(self, device_state: bytes) -> None:
        """All has come: load the devices. The machine is then complete, and paused.

        :raises MismatchError: the device state is not one of the base's machine, which has not seen it.
        :raises FailedError: the machine is gone, or refused the device state.
        """

    def abort(self) -> None:
        """Give up: nothing of the instance is left. Can be called again, and after an error."""


class ReceivingEarly(Receiving, Protocol):
    """A machine that comes from another site and may run before all of its RAM is there.

    Once :meth:`lack` has been called, pages come from another thread than :meth:`Receiving.load` is in.
    """

    def lack(self, numbers: Numbers) -> None:
        """These pages of RAM are still to come, once each: whoever reads one waits for it."""

    def complete(self) -> None:
        """All pages have come."""

    def progress(self) -> Paging:
        """How far it is; asks nothing of the machine."""

    def sever(self) -> None:
        """No further page will come: the machine ends. From any thread; :meth:`abort` is still to follow."""


class LayerSink(Sink, Protocol):
    """Writes an app's layer from its overlay, with no machine."""

    def close(self) -> None:
        """Close the files, complete or not. Can be called again."""


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

    def receive(
        self,
        base: BaseImage,
        ports: Sequence[PublishedPort] = (),
        *,
        name: str = "",
        overlay_id: str = "",
        layer: Layer | None = None,
        generation_id: str = "",
    ) -> Receiving:
        """Start a private instance of a base, and a whole layer, that goes on with what another site sends.

        :param generation_id: the machine's VM generation ID, which it keeps; a new one where it is empty.
        :raises UsageError: it is not one.
        """

    def receive_early(
        self,
        base: BaseImage,
        wanted: Wanted,
        ports: Sequence[PublishedPort] = (),
        *,
        name: str = "",
        overlay_id: str = "",
        layer: Layer | None = None,
        generation_id: str = "",
    ) -> ReceivingEarly:
        """As :meth:`receive`, for a machine that may run before all of its RAM is there.

        :param wanted: told which pages it waits for then.
        :raises RefusedError: no machine can do so here (:meth:`early_obstacle`).
        """

    def layer_pages(
        self, layer: Layer, machine: Machine
    ) -> AbstractContextManager[Mapping[Space, HeldPages]]:
        """Where in a whole layer's files its pages are; the files are open as long as the context."""

    def layer_sink(self, base: BaseImage, layer: Layer) -> LayerSink:
        """Write the new files of a layer."""

    def instances(self) -> list[Instance]:
        """The instances of this state folder that are alive, whoever started them."""

    def reap(self) -> list[str]:
        """Remove what dead owners left: processes, sockets, files. The ids of what was removed."""
