"""Whether capturing the guest's RAM captures all memory that counts.

Only the guest's RAM is captured. A machine has other blocks of memory: firmware, option ROMs, ACPI
tables, and with other devices more (a graphics card's, say). The new QEMU that a capture is resumed in
fills them itself, so they must be as in a machine that has not run yet. That is looked at, not assumed:
QEMU's migration with shared RAM left out gives exactly these blocks, before the first instruction and
again at capture. A block that differs, or a new one, would be lost unnoticed: the capture is refused.

Format of the stream: QEMU's ``migration/ram.c``, version 4 of the section ``ram``, capability
``x-ignore-shared``.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from collections.abc import Mapping
from typing import BinaryIO

from blake3 import blake3

from cloudlet.errors import FailedError, RefusedError
from cloudlet.hypervisor.qemu.machine import RAM_BLOCK
from cloudlet.hypervisor.qemu.monitor import Monitor
from cloudlet.model import PAGE_BYTES

_REBUILT = ("/rom@etc/acpi/", "/rom@etc/table-loader", "system.flash1")
"""Beginnings of the names of blocks that may differ: tables that QEMU makes anew whenever the firmware
asks for them, and the UEFI variables, whose file is captured beside the disk."""

_ZERO, _SIZES, _PAGE, _END, _SAME_BLOCK = 0x02, 0x04, 0x08, 0x10, 0x20
_SECONDS = 20.0
_MOST_BYTES = 256 << 20

Digests = Mapping[str, str]
"""Digest of each block's content by its name."""


def digests(monitor: Monitor) -> Digests:
    """The other blocks of a machine that does not run. The monitor can resume it as after a pause."""
    reading, writing = os.pipe()
    try:
        try:
            monitor.send_descriptor(writing, "ram-blocks")
        finally:
            os.close(writing)
        found: dict[str, str] = {}
        reader = threading.Thread(
            target=_drain, args=(os.fdopen(reading, "rb"), found), name="ram-blocks", daemon=True
        )
        reader.start()
        monitor.execute(
            "migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}]
        )
        monitor.execute("migrate", uri="fd:ram-blocks")
        _wait_completed(monitor)
        reader.join(_SECONDS)
    finally:
        monitor.execute(
            "migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": False}]
        )
    if not found:
        raise FailedError("QEMU did not list its memory blocks")
    return found


def check(fresh: Digests, captured: Digests) -> None:
    """Whether the captured machine's other blocks are those of the fresh one.

    :raises RefusedError: a block would be lost.
    """
    lost = [
        name
        for name in sorted(fresh.keys() | captured.keys())
        if fresh.get(name) != captured.get(name) and not name.startswith(_REBUILT)
    ]
    if lost:
        raise RefusedError(f"the machine has memory that a capture does not hold: {', '.join(lost)}")


def read_blocks(stream: BinaryIO) -> dict[str, str]:
    """The digests of all blocks in a migration stream, the shared RAM left out."""
    _skip_head(stream)
    sizes = _read_sizes(stream)
    others = {name: size for name, size in sizes.items() if name != RAM_BLOCK}
    if sum(others.values()) > _MOST_BYTES:
        raise FailedError(f"QEMU lists {sum(others.values())} bytes of other memory")
    contents = {name: bytearray(size) for name, size in others.items()}
    _read_pages(stream, contents)
    return {name: blake3(content).hexdigest() for name, content in contents.items()}


def _drain(stream: BinaryIO, found: dict[str, str]) -> None:
    """Read and close the stream; where it ends early nothing is found, of which who waits has to tell."""
    with stream, contextlib.suppress(FailedError):
        found.update(read_blocks(stream))
        while stream.read(1 << 16):  # the devices: they are captured elsewhere
            pass


def _wait_completed(monitor: Monitor) -> None:
    deadline = time.monotonic() + _SECONDS
    while (status := monitor.execute("query-migrate").get("status")) != "completed":
        if status == "failed" or time.monotonic() > deadline:
            raise FailedError(f"QEMU did not give its memory blocks: {status}")
        time.sleep(0.005)


def _skip_head(stream: BinaryIO) -> None:
    """Up to the body of the section ``ram``."""
    _exactly(stream, 8)
    kind = _exactly(stream, 1)
    if kind == b"\x07":
        _exactly(stream, _number(stream, ">I"))
        kind = _exactly(stream, 1)
    while kind == b"\x05":  # a subsection: its name, version, and a list of capabilities
        _exactly(stream, _number(stream, ">B"))
        _number(stream, ">I")
        for _ in range(_number(stream, ">I")):
            _exactly(stream, _number(stream, ">B"))
        kind = _exactly(stream, 1)
    _number(stream, ">I")
    name = _exactly(stream, _number(stream, ">B"))
    _exactly(stream, 8)
    if kind != b"\x01" or name != b"ram":
        raise FailedError(f"QEMU's stream begins with the section {name!r}")


def _read_sizes(stream: BinaryIO) -> dict[str, int]:
    total = _number(stream, ">Q")
    if not total & _SIZES:
        raise FailedError("QEMU's stream does not begin with the sizes of its blocks")
    left, sizes = total & ~(PAGE_BYTES - 1), {}
    while left > 0:
        name = _exactly(stream, _number(stream, ">B")).decode()
        sizes[name] = _number(stream, ">Q")
        _number(stream, ">Q")  # where it is in the guest
        left -= sizes[name]
    return sizes


def _read_pages(stream: BinaryIO, contents: dict[str, bytearray]) -> None:
    kind, name = b"\x01", ""
    while True:
        while not (header := _number(stream, ">Q")) & _END:
            if not header & _SAME_BLOCK:
                name = _exactly(stream, _number(stream, ">B")).decode()
            offset = header & ~(PAGE_BYTES - 1)
            if header & _ZERO:
                page = _exactly(stream, 1) * PAGE_BYTES
            elif header & _PAGE:
                page = _exactly(stream, PAGE_BYTES)
            else:
                raise FailedError(f"QEMU's stream has a page of kind {header & (PAGE_BYTES - 1):#x}")
            contents[name][offset : offset + PAGE_BYTES] = page
        _exactly(stream, 5)  # the footer
        if kind == b"\x03":
            return
        kind = _exactly(stream, 1)
        _number(stream, ">I")
        if kind not in (b"\x02", b"\x03"):
            raise FailedError(f"QEMU's stream has a section of type {kind!r} among its memory")


def _number(stream: BinaryIO, form: str) -> int:
    (value,) = struct.unpack(form, _exactly(stream, struct.calcsize(form)))
    return int(value)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise FailedError("QEMU's stream ends early")
    return data
