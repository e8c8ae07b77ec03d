"""The digest of a whole QEMU machine that stands still, from its process's memory and its disk's files.

What the process has in its memory is read there, whatever the kernel says of whose page it is: so this
finds, too, what looking for private pages would have missed. What it does not have is read from the file
that it has mapped, since a look through the process would give memory to every hole of that file.
"""

from __future__ import annotations

import os

import numpy as np

from cloudlet.errors import FailedError
from cloudlet.hypervisor.digest import MachineDigest
from cloudlet.hypervisor.qemu import changed
from cloudlet.hypervisor.qemu.changed import Mapping
from cloudlet.hypervisor.qemu.disk import InstanceDisk
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.pages import equal_rows

_BATCH = 1024
"""Pages at a time: 4 MiB."""


def digest_machine(mapping: Mapping, ram: int, disk: InstanceDisk) -> bytes:
    """See :class:`~cloudlet.hypervisor.digest.MachineDigest`.

    :param ram: the file that the machine has mapped as its RAM.
    """
    digest = MachineDigest()
    _add_ram(digest, mapping, ram)
    _add_disk(digest, disk)
    return digest.digest()


def _add_ram(digest: MachineDigest, mapping: Mapping, ram: int) -> None:
    mapped = changed.mapped_pages(mapping)
    room = np.empty((_BATCH, PAGE_BYTES), np.uint8)
    with changed.open_memory(mapping.pid) as memory:
        for at in range(0, mapping.pages, _BATCH):
            rows = np.empty((min(_BATCH, mapping.pages - at), PAGE_BYTES), np.uint8)
            if os.preadv(ram, [rows.data], at * PAGE_BYTES) != rows.size:
                raise FailedError("the file of the machine's RAM ends early")
            first, after = np.searchsorted(mapped, (at, at + len(rows)))
            numbers = mapped[first:after]
            changed.read_rows(memory, mapping, numbers, room[: len(numbers)])
            rows[numbers - at] = room[: len(numbers)]
            digest.add_ram(rows)


def _add_disk(digest: MachineDigest, disk: InstanceDisk) -> None:
    blocks = disk.look()
    room = np.empty((_BATCH, PAGE_BYTES), np.uint8)
    for at in range(0, len(blocks.numbers), _BATCH):
        numbers = blocks.numbers[at : at + _BATCH].astype(np.uint32)
        rows = room[: len(numbers)]
        disk.read(blocks, numbers, rows)
        differing = ~equal_rows(rows, disk.read_base(numbers))
        digest.add_blocks(numbers[differing], rows[differing])
