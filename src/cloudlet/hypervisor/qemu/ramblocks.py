"""Which blocks of memory a machine has, and whether capturing its RAM captures all that counts.

Only the guest's RAM is captured. The other blocks must be ones that a fresh QEMU fills by itself in the
same way: firmware, option ROMs, tables that are rebuilt when the firmware asks for them. A machine with
any other block (a graphics card's memory, say) would lose its content unnoticed: it is refused.
"""

from __future__ import annotations

import re

from cloudlet.errors import RefusedError
from cloudlet.hypervisor.qemu.machine import RAM_BLOCK
from cloudlet.hypervisor.qemu.monitor import Monitor

_REBUILT = re.compile(
    r"pc\.bios|pc\.rom|system\.flash[01]|/rom@(?:etc|genroms)/[\w./-]+|(?:genroms/)?[\w-]+\.(?:bin|rom)"
)
"""Blocks with the same content in every QEMU that is started alike. ``system.flash1`` are the UEFI
variables, whose file is captured beside the disk."""


def names(monitor: Monitor) -> list[str]:
    """The names of all memory blocks of a machine."""
    lines = monitor.human("info ramblock").splitlines()[1:]
    return [line.split()[0] for line in lines if line.strip()]


def check(monitor: Monitor) -> None:
    """Whether the guest's RAM is all that has to be captured.

    :raises RefusedError: there is a block that a fresh start would not have again.
    """
    unknown = [name for name in names(monitor) if name != RAM_BLOCK and not _REBUILT.fullmatch(name)]
    if unknown:
        raise RefusedError(f"the machine has memory that a capture does not hold: {', '.join(unknown)}")
