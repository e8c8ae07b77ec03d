"""Which disk images may be converted: those that are one file and lead ``qemu-img`` to no other.

An image comes from anywhere, and several formats can name further files: a backing file, a data file,
extents. ``qemu-img`` would open these, as whoever runs it, and their content would become part of a
base. What ``qemu-img info`` itself would open is refused by the image's first bytes, before it is asked;
the rest by what it says.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloudlet.errors import UsageError

FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc")
_VMDK_KINDS = ("monolithicSparse", "streamOptimized")
_QCOW2, _VMDK = b"QFI\xfb", b"KDMV"
_EXTERNAL_DATA = 1 << 2
_HINT = "make one file of it where it is trusted: qemu-img convert -O qcow2"


def check_header(image: Path) -> None:
    """Refuse what names other files in its first bytes.

    :raises UsageError: it does.
    """
    with image.open("rb") as file:
        head = file.read(512)
    if head.startswith(_QCOW2) and len(head) >= 104:
        version, backing = struct.unpack_from(">IQ", head, 4)
        if backing:
            raise UsageError(f"{image} needs another file, its backing file", hint=_HINT)
        if version >= 3 and struct.unpack_from(">Q", head, 72)[0] & _EXTERNAL_DATA:
            raise UsageError(f"{image} needs another file, its data file", hint=_HINT)
    # A sparse extent without a size of its own is a descriptor, which lists files.
    without_size = head.startswith(_VMDK) and head[12:20] == bytes(8)
    if without_size or _is_descriptor(head):
        raise UsageError(f"{image} is a list of other files", hint=_HINT)


def _is_descriptor(head: bytes) -> bool:
    """What ``qemu-img`` takes for a vmdk's descriptor: after comments and empty lines, a version."""
    lines = [line for line in head.splitlines() if line.strip() and not line.startswith((b"#", b" "))]
    return head.startswith(b"# Disk DescriptorFile") or (bool(lines) and lines[0].startswith(b"version="))


def check_info(image: Path, info: Mapping[str, Any]) -> None:
    """Refuse by what ``qemu-img info`` says.

    :raises UsageError: its format is not one of ours, it needs another file, or it is encrypted.
    """
    kind = info["format"]
    if kind not in FORMATS:
        raise UsageError(f"{image} is of format {kind}", hint=f"taken are {', '.join(FORMATS)}")
    details = info.get("format-specific", {}).get("data", {})
    if info.get("encrypted") or details.get("encrypt"):
        raise UsageError(f"{image} is encrypted", hint="decrypt it first: qemu-img convert")
    for name, what in (("backing-filename", info), ("full-backing-filename", info), ("data-file", details)):
        if other := what.get(name):
            raise UsageError(f"{image} needs another file ({other})", hint=_HINT)
    if details.get("data-file-raw"):
        raise UsageError(f"{image} needs another file, its data file", hint=_HINT)
    if kind == "vmdk" and details.get("create-type") not in _VMDK_KINDS:
        raise UsageError(f"{image} is a vmdk of type {details.get('create-type')}", hint=_HINT)
