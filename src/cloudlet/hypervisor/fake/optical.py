"""What an ISO 9660 image holds, read by its Joliet tree (names in UCS-2), which our images have.

Source: ECMA-119 for the structures, Microsoft's Joliet specification for the supplementary descriptor.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

_SECTOR = 2048
_SUPPLEMENTARY, _LAST = 2, 255
_FOLDER = 0x02


def read_image(path: Path) -> dict[str, bytes]:
    """The files of an image by their paths, such as ``0/word``.

    :raises ValueError: it is no image, or has no Joliet tree.
    """
    image = path.read_bytes()
    for sector in range(16, len(image) // _SECTOR):
        descriptor = image[sector * _SECTOR : (sector + 1) * _SECTOR]
        if descriptor[1:6] != b"CD001" or descriptor[0] == _LAST:
            break
        if descriptor[0] == _SUPPLEMENTARY and descriptor[88:90] == b"%/":
            start, length = struct.unpack_from("<I4xI", descriptor, 156 + 2)
            return dict(_walk(image, start, length, ""))
    raise ValueError(f"{path.name} is not an ISO image with a Joliet tree")


def _walk(image: bytes, start: int, length: int, above: str) -> Iterator[tuple[str, bytes]]:
    folder = image[start * _SECTOR : start * _SECTOR + length]
    position = 0
    while position < len(folder):
        size = folder[position]
        if size == 0:  # Records do not cross sectors.
            position = (position // _SECTOR + 1) * _SECTOR
            continue
        where, bytes_ = struct.unpack_from("<I4xI", folder, position + 2)
        raw = folder[position + 33 : position + 33 + folder[position + 32]]
        if raw not in (b"\0", b"\1"):  # the folder itself, and the one above
            name = above + raw.decode("utf-16-be").removesuffix(";1")
            if folder[position + 25] & _FOLDER:
                yield from _walk(image, where, bytes_, f"{name}/")
            else:
                yield name, image[where * _SECTOR : where * _SECTOR + bytes_]
        position += size
