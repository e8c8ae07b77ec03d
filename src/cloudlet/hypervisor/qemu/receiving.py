"""One machine that comes from another site: its pages come again and again, until it is loaded, paused.

As in :mod:`cloudlet.hypervisor.qemu.incoming`, RAM goes into QEMU's open migration stream, in which a later
page replaces an earlier one. Nobody knows which blocks of the disk will come, so their places are given out
as they do; their tables are written before the devices are loaded, which is when QEMU reads them.
"""

from __future__ import annotations

from cloudlet.errors import FailedError
from cloudlet.hypervisor.driver import RunState
from cloudlet.hypervisor.qemu import stream
from cloudlet.hypervisor.qemu.incoming import Starting, Stream, full_disk_is_capacity
from cloudlet.hypervisor.qemu.instance import QemuInstance
from cloudlet.hypervisor.qemu.qcow2 import GrowingQcow2
from cloudlet.overlay.pages import PageBatch, Space


class QemuReceiving:
    """See :class:`cloudlet.hypervisor.driver.Receiving`."""

    def __init__(
        self, instance: QemuInstance, target: Stream, disk: GrowingQcow2, starting: Starting
    ) -> None:
        self.instance = instance
        self._stream = target
        self._disk = disk
        self._starting = starting

    def begin(self) -> None:
        """Wait for the network and the base's RAM, and open the stream."""
        self._starting.wait()
        self._stream.open()
        self.instance.state()  # the monitor's first answer takes longest, and is not for the pause

    def pages(self, batch: PageBatch) -> None:
        """Load pages; of one that comes again the last content counts."""
        if not batch.numbers.size:
            return
        if batch.space is Space.RAM:
            self._stream.send(stream.pages(batch.numbers, batch.data))
        else:
            with full_disk_is_capacity():
                self._disk.write(batch.numbers, batch.data)

    def load(self, device_state: bytes) -> None:
        """Load the devices; the machine is complete and paused when this returns.

        :raises MismatchError: the device state is not one of the base's machine; QEMU has not seen it.
        :raises FailedError: QEMU refused the device state.
        """
        load_and_stay(self.instance, self._stream, self._disk, device_state)

    def abort(self) -> None:
        """Give up: nothing of the instance is left."""
        self._stream.close()
        self._disk.close()
        self._starting.close()
        self.instance.stop()


def load_and_stay(instance: QemuInstance, target: Stream, disk: GrowingQcow2, device_state: bytes) -> None:
    """Write the disk's tables and load the devices; the machine is complete then, and paused.

    :raises MismatchError: the device state is not one of the base's machine; QEMU has not seen it.
    :raises FailedError: QEMU refused the device state.
    """
    instance.monitor.prepare()  # it was given back if nobody has asked for a while
    with full_disk_is_capacity():
        disk.finish()
    disk.close()
    target.load_devices(device_state)
    if not _is_paused(instance):
        raise target.refusal()


def _is_paused(instance: QemuInstance) -> bool:
    """Whether the machine lives: QEMU closes its end when all is loaded, but also when it gives up."""
    try:
        return instance.state() is RunState.PAUSED
    except FailedError:
        return False
