"""The digest of a whole machine that stands still, the same at each site and on whatever it stands there."""

from __future__ import annotations

import numpy as np
from blake3 import blake3

from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.pages import Numbers, Rows

_BLOCK = np.dtype([("number", "<u4"), ("content", np.uint8, PAGE_BYTES)])


class MachineDigest:
    """BLAKE3 over all RAM, then over number and content of each disk block that differs from the base's."""

    def __init__(self) -> None:
        self._hash = blake3(max_threads=blake3.AUTO)

    def add_ram(self, rows: Rows) -> None:
        """Add the next pages of RAM; all of it, in order, before the first block."""
        self._hash.update(np.ascontiguousarray(rows).data.cast("B"))

    def add_blocks(self, numbers: Numbers, rows: Rows) -> None:
        """Add blocks, in order."""
        blocks = np.empty(len(numbers), _BLOCK)
        blocks["number"], blocks["content"] = numbers, rows
        self._hash.update(blocks.tobytes())

    def digest(self) -> bytes:
        """32 bytes."""
        return self._hash.digest()
