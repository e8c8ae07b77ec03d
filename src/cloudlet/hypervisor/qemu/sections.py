"""The list of device sections in a device state: which devices, in which version.

QEMU's stream does not say how long a section is, so the list is read by its frame: every section
begins with its type, number, name, instance and version and ends with a footer that repeats the number.
The list guards against a state that another machine made, before QEMU is given a byte of it. It is no
barrier against a state that was made to deceive: that is what signatures and confinement are for.
"""

from __future__ import annotations

import re
import struct
from collections import Counter

from cloudlet.errors import CorruptError, MismatchError
from cloudlet.hypervisor.driver import Sections
from cloudlet.overlay.root import DeviceSection

_FULL, _END = 0x04, 0x00
_HEADER = re.compile(rb"\x04(....)([\x01-\x7f])", re.DOTALL)


def read_sections(device_state: bytes) -> Sections:
    """The sections of a device state as QEMU wrote it.

    :raises CorruptError: the state is not a sequence of device sections.
    """
    sections = []
    position = 0
    while position < len(device_state) and device_state[position] != _END:
        number, entry, position = _read_header(device_state, position)
        sections.append(entry)
        position = _find_end(device_state, position, number)
    if not sections or position >= len(device_state):
        raise CorruptError("the device state ends within a section")
    return tuple(sections)


def check_sections(device_state: bytes, expected: Sections) -> None:
    """Whether a device state holds exactly the sections of the base; each version of QEMU has its own order.

    :raises MismatchError: it does not; the first difference is named.
    """
    found, wanted = Counter(read_sections(device_state)), Counter(expected)
    for section in found - wanted:
        raise MismatchError(f"the device state has {_text(section)}, which the base has not")
    for section in wanted - found:
        raise MismatchError(f"the device state lacks {_text(section)}, which the base has")


def _read_header(state: bytes, position: int) -> tuple[int, DeviceSection, int]:
    match = _HEADER.match(state, position)
    if not match:
        raise CorruptError(f"no device section at byte {position} of the device state")
    (number,) = struct.unpack(">I", match[1])
    start = match.end()
    name = state[start : start + match[2][0]]
    end = start + len(name)
    if len(state) < end + 8 or not all(0x20 <= byte < 0x7F for byte in name):
        raise CorruptError(f"no device section at byte {position} of the device state")
    instance, version = struct.unpack_from(">II", state, end)
    return number, DeviceSection(name.decode("ascii"), instance, version), end + 8


def _find_end(state: bytes, position: int, number: int) -> int:
    footer = b"\x7e" + struct.pack(">I", number)
    while (found := state.find(footer, position)) >= 0:
        after = found + len(footer)
        # A footer's bytes may occur by chance within a section: a section or the end must follow.
        if (after == len(state) - 1 and state[after] == _END) or _is_header(state, after):
            return after
        position = found + 1
    raise CorruptError(f"device section {number} has no end")


def _is_header(state: bytes, position: int) -> bool:
    try:
        _read_header(state, position)
    except CorruptError:
        return False
    return True


def _text(section: DeviceSection) -> str:
    return f"device section {section.name} (instance {section.instance}, version {section.version})"
