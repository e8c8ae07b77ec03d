"""One fake machine that is being filled: verified pages go straight into its files.

Its process is there from the start and waits; it maps the files when the device state has come. What comes
from another site comes again and again, and then stays paused; else it is the same.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np

from cloudlet.errors import CapacityError
from cloudlet.hypervisor.driver import BaseImage
from cloudlet.hypervisor.fake.devices import check_state
from cloudlet.hypervisor.fake.instance import DISK, RAM, FakeInstance
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import PageBatch, Space
from cloudlet.sparse import write_at


class _Filled:
    """What both ways to fill a machine have in common."""

    def __init__(self, instance: FakeInstance, base: BaseImage) -> None:
        self.instance = instance
        self._base = base
        self._files: dict[Space, BinaryIO] = {}

    def pages(self, batch: PageBatch) -> None:
        """Load pages; of one that comes again the last content counts."""
        rows = np.ascontiguousarray(batch.data)
        with full_disk_is_capacity():
            for number, row in zip(batch.numbers.tolist(), rows, strict=True):
                write_at(self._files[batch.space].fileno(), row.data, number * PAGE_BYTES)

    def abort(self) -> None:
        """Give up: nothing of the instance is left."""
        self._close()
        self.instance.stop()

    def _open(self) -> None:
        for space, name in ((Space.RAM, RAM), (Space.DISK, DISK)):
            self._files[space] = (self.instance.directory / name).open("r+b", buffering=0)

    def _load(self, device_state: bytes, *, run: bool) -> None:
        """Load the devices.

        :raises MismatchError: the device state is not one of the base's machine, which has not seen it.
        :raises FailedError: the machine is gone, or refused the device state.
        """
        state = check_state(device_state, self._base.sections)
        self._close()
        self.instance.tell("load", state=state, run=run)

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}


class FakeIncoming(_Filled):
    """See :class:`cloudlet.hypervisor.driver.Incoming`."""

    def begin(self, page_map: PageMap) -> None:
        """Announce the pages that will come."""
        self._open()

    def finish(self, device_state: bytes) -> None:
        """Load the devices; the machine runs when this returns."""
        self._load(device_state, run=True)


class FakeReceiving(_Filled):
    """See :class:`cloudlet.hypervisor.driver.Receiving`."""

    def begin(self) -> None:
        """Wait until pages can be taken."""
        self._open()

    def load(self, device_state: bytes) -> None:
        """Load the devices; the machine is complete and paused when this returns."""
        self._load(device_state, run=False)


@contextmanager
def full_disk_is_capacity(what: str = "disk") -> Iterator[None]:
    """Turn a full file system into the error that says so."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapacityError(
                f"no room for the instance's {what}",
                hint="free space in the state folder, or set --state-dir",
            ) from error
        raise
