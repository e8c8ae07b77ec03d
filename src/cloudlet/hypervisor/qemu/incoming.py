"""One machine that is being filled: the sink that the overlay engine hands verified pages to.

QEMU waits with an open migration stream; its RAM is already the base's. RAM pages go into the stream as
they come, disk blocks into the instance's disk. The stream is a pipe of a few frames, so that the next
frame is verified and decompressed while QEMU loads this one. QEMU lets the machine run by itself when
the device state has come, and closes its end of the pipe; the monitor then tells whether it really runs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import time
from collections.abc import Iterator

from cloudlet.errors import CapacityError, FailedError
from cloudlet.hypervisor.driver import BaseImage, RunState
from cloudlet.hypervisor.qemu import changed, sections, stream
from cloudlet.hypervisor.qemu.instance import QemuInstance
from cloudlet.hypervisor.qemu.memory import ComingRam
from cloudlet.hypervisor.qemu.network import NetworkProcess
from cloudlet.hypervisor.qemu.qcow2 import Qcow2Writer
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import PageBatch, Space, numbers_of

_PIPE_BYTES = (8 << 20, 1 << 20)
"""Sizes of the pipe to ask for; the first needs a right that root has."""
_NETWORK_SECONDS = 20.0
_STALL_SECONDS = 60.0
"""Longest time QEMU may take no bytes."""


class Starting:
    """What a started machine still waits for before it is given anything: its network and its base's RAM.

    QEMU needs longer for its own start than these do, and maps the memory file while it is being filled.
    """

    def __init__(self, instance: QemuInstance, network: NetworkProcess, ram: ComingRam | None = None) -> None:
        self._instance = instance
        self._network = network
        self._ram = ram

    def wait(self) -> None:
        """Wait until both are there, and look whether QEMU is.

        :raises RefusedError: the user may not have a network, or may not read the machine's memory.
        :raises CapacityError: there is not enough memory.
        """
        wait_network(self._instance, self._network)
        if self._ram:
            self._ram.wait()
        self.close()

    def close(self) -> None:
        """Hold nothing of them any more. Can be called again."""
        self._network.release()
        if self._ram:
            self._ram.join()


def wait_network(instance: QemuInstance, network: NetworkProcess) -> None:
    """Wait until a started machine has its network, and look whether it is still there."""
    network.wait_ready(time.monotonic() + _NETWORK_SECONDS)
    assert instance.record.machine
    try:
        changed.check_access(instance.record.machine.pid)
    except FailedError as error:
        raise FailedError(f"QEMU did not start: {instance.last_words() or error}") from error


class Stream:
    """The migration stream of one QEMU that waits for it."""

    def __init__(self, instance: QemuInstance, base: BaseImage, pipe: int, firmware: bytes) -> None:
        self.patience = _STALL_SECONDS
        self._instance = instance
        self._base = base
        self._pipe = pipe
        self._firmware = firmware
        os.set_blocking(pipe, False)
        for size in _PIPE_BYTES:
            with contextlib.suppress(PermissionError):
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, size)
                break

    def open(self) -> None:
        """Send all that comes before the first page."""
        machine = self._base.machine
        self.send(stream.opening(machine.machine_type, machine.memory_bytes, self._firmware))

    def send(self, content: bytes | memoryview) -> None:
        """Send some of the stream.

        :raises FailedError: QEMU ended, or takes nothing.
        """
        view = memoryview(content)
        poller = select.poll()
        poller.register(self._pipe, select.POLLOUT)
        while view:
            try:
                view = view[os.write(self._pipe, view) :]
            except BlockingIOError:
                if not poller.poll(self.patience * 1000):
                    raise FailedError(f"QEMU takes no memory for {self.patience:.0f} s") from None
            except BrokenPipeError:
                raise self.refusal() from None

    def load_devices(self, device_state: bytes) -> None:
        """Send the devices, and wait until QEMU has loaded them and closed its end.

        :raises MismatchError: the device state is not one of the base's machine; QEMU has not seen it.
        :raises FailedError: QEMU did not load it.
        """
        sections.check_sections(device_state, self._base.sections)
        self.send(stream.closing(device_state))
        poller = select.poll()
        poller.register(self._pipe, 0)  # only that the reader closed
        if not poller.poll(self.patience * 1000):
            raise FailedError(f"QEMU did not load the devices within {self.patience:.0f} s")
        self.close()

    def refusal(self) -> FailedError:
        """What QEMU said when it ended."""
        self._instance.wait(2.0)
        said = self._instance.last_words() or "it said nothing"
        return FailedError(f"QEMU did not take the machine: {said}")

    def close(self) -> None:
        """Close our end. Can be called again."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1


class QemuIncoming:
    """See :class:`cloudlet.hypervisor.driver.Incoming`."""

    def __init__(self, instance: QemuInstance, target: Stream, disk: Qcow2Writer, starting: Starting) -> None:
        self.instance = instance
        self.stream = target
        self._disk = disk
        self._starting = starting

    def begin(self, page_map: PageMap) -> None:
        """Announce the pages that will come: the disk's tables are written now."""
        self._starting.wait()
        with full_disk_is_capacity():
            self._disk.announce(numbers_of(page_map.runs(Space.DISK)))
        self.stream.open()

    def pages(self, batch: PageBatch) -> None:
        """Load verified pages."""
        if batch.space is Space.RAM:
            self.stream.send(stream.pages(batch.numbers, batch.data))
        else:
            with full_disk_is_capacity():
                self._disk.write(batch.numbers, batch.data)

    def finish(self, device_state: bytes) -> None:
        """Load the devices; the machine runs when this returns.

        :raises MismatchError: the device state is not one of the base's machine; QEMU has not seen it.
        :raises FailedError: QEMU refused the device state.
        """
        self._disk.close()
        self.stream.load_devices(device_state)
        if not self._was_taken():
            raise self.stream.refusal()

    def abort(self) -> None:
        """Give up: nothing of the instance is left."""
        self.stream.close()
        self._disk.close()
        self._starting.close()
        self.instance.stop()

    def _was_taken(self) -> bool:
        """Whether the machine lives: QEMU closes its end when it runs, but also when it is about to exit."""
        try:
            return self.instance.state() not in (RunState.GONE, RunState.INCOMING)
        except FailedError:
            return False


def no_room_for_a_layer() -> contextlib.AbstractContextManager[None]:
    """The same for the files of an app's pages."""
    return full_disk_is_capacity("the app's pages", "free space in the cache folder, or set --cache-dir")


@contextlib.contextmanager
def full_disk_is_capacity(
    what: str = "the instance's disk", hint: str = "free space in the state folder, or set --state-dir"
) -> Iterator[None]:
    """Turn a full file system into the error that says so."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapacityError(f"no room for {what}", hint=hint) from error
        raise
