"""The incoming migration stream of an unmodified QEMU, written by hand.

Format: QEMU's ``migration/savevm.c`` and ``migration/ram.c``, stream version 3 without capabilities.
Header, configuration section (the machine's type), one RAM section with the BIOS and only the pages that
differ from what is already mapped, then the device sections of a capture, verbatim. QEMU loads a page as it
arrives, and later pages overwrite earlier ones. When it has read the last byte it closes its end.

All integers are big-endian. Pages are written as rows of a numpy array, one copy per page.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from cloudlet.errors import CorruptError
from cloudlet.hypervisor.qemu.machine import FIRMWARE_BLOCK, RAM_BLOCK
from cloudlet.model import PAGE_BYTES

_MAGIC = b"QEVM\0\0\0\x03"
_CONFIGURATION, _SECTION_START, _SECTION_PART, _SECTION_END = b"\x07", b"\x01", b"\x02", b"\x03"
_FOOTER, _DESCRIPTION = b"\x7e", b"\x06"
_RAM_SECTION = 0x7FFFFFF0
"""A section number that no device section uses."""
_FLAG_SIZES, _FLAG_PAGE, _FLAG_END, _FLAG_SAME_BLOCK = 0x04, 0x08, 0x10, 0x20

_ROW = np.dtype([("header", ">u8"), ("page", np.uint8, PAGE_BYTES)])


def opening(machine_type: str, ram_bytes: int, firmware: bytes = b"") -> bytes:
    """All that comes before the first page.

    :param firmware: what the BIOS's memory holds. A QEMU that waits for a stream leaves it empty, unlike
        one that starts a machine; the guest would find nothing there when it reboots.
    """
    name = machine_type.encode()
    blocks = {RAM_BLOCK: ram_bytes} | ({FIRMWARE_BLOCK: len(firmware)} if firmware else {})
    sizes = b"".join(
        bytes([len(block)]) + block.encode() + struct.pack(">Q", size) for block, size in blocks.items()
    )
    rows = np.frombuffer(firmware, np.uint8).reshape(-1, PAGE_BYTES)
    return b"".join(
        (
            _MAGIC,
            _CONFIGURATION, struct.pack(">I", len(name)), name,
            _SECTION_START, struct.pack(">I", _RAM_SECTION), b"\x03ram", struct.pack(">II", 0, 4),
            struct.pack(">Q", sum(blocks.values()) | _FLAG_SIZES), sizes,
            _end_of_part(),
            pages(np.arange(len(rows), dtype=np.uint32), rows, FIRMWARE_BLOCK) if firmware else b"",
        )
    )  # fmt: skip


def pages(numbers: np.ndarray[Any, Any], data: np.ndarray[Any, Any], block: str = RAM_BLOCK) -> memoryview:
    """A part with the pages ``data`` (n, 4096) at the page numbers ``numbers`` (n)."""
    # Only the first page names its block; the others carry "same block" and so make rows of one size.
    first = (
        struct.pack(">Q", int(numbers[0]) * PAGE_BYTES | _FLAG_PAGE) + bytes([len(block)]) + block.encode()
    )
    head = _SECTION_PART + struct.pack(">I", _RAM_SECTION) + first
    end = _end_of_part()
    part = np.empty(len(head) + PAGE_BYTES + (len(numbers) - 1) * _ROW.itemsize + len(end), np.uint8)
    part[: len(head)] = np.frombuffer(head, np.uint8)
    part[len(head) : len(head) + PAGE_BYTES] = data[0]
    rows = part[len(head) + PAGE_BYTES : -len(end)].view(_ROW)
    rows["header"] = numbers[1:].astype(np.uint64) * PAGE_BYTES | np.uint64(_FLAG_PAGE | _FLAG_SAME_BLOCK)
    rows["page"] = data[1:]
    part[-len(end) :] = np.frombuffer(end, np.uint8)
    return part.data


def closing(device_state: bytes) -> bytes:
    """All that comes after the last page: the end of RAM, the devices, and an empty description of them."""
    description = b"{}"
    return b"".join(
        (
            _SECTION_END, struct.pack(">I", _RAM_SECTION), _end_of_part(),
            device_state,
            _DESCRIPTION, struct.pack(">I", len(description)), description,
        )
    )  # fmt: skip


def device_sections(saved: bytes) -> bytes:
    """The device sections in what ``xen-save-devices-state`` wrote: without header and configuration.

    :raises CorruptError: it is not such a file.
    """
    if saved[:8] != _MAGIC:
        raise CorruptError("the device state does not begin as QEMU's streams do")
    position = 8
    if saved[8:9] == _CONFIGURATION:
        if len(saved) < 13:
            raise CorruptError("the device state ends within its configuration")
        (length,) = struct.unpack_from(">I", saved, 9)
        position = 13 + length
        if saved[position : position + 1] == b"\x05":
            raise CorruptError("the device state was saved with migration capabilities on")
    return saved[position:]


def _end_of_part() -> bytes:
    return struct.pack(">Q", _FLAG_END) + _FOOTER + struct.pack(">I", _RAM_SECTION)
