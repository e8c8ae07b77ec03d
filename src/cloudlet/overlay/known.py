"""What both ends of a hand-off hold: a base, or a base and an app's layer on it.

The layer of an image (``store/images.py``) is the pages that its app changed, in files of their own; which
page is where in them is for those who know these files to say (:class:`HeldPages`). Here both are one
machine, page by page. Descriptors stay the caller's, and several threads may read at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cloudlet.errors import CorruptError
from cloudlet.model import PAGE_BYTES, Machine
from cloudlet.overlay.base import BasePages, read_places
from cloudlet.overlay.pages import Numbers, Positions, Rows, Space

ZEROS = -1
"""In place of an offset: the page is all zeros, and in no file."""

_NOTHING = bytes(32)
"""In place of an overlay's identity, where there is none."""


class Pages(Protocol):
    """A whole machine's pages, as encoding against them and building on them needs them."""

    def count(self, space: Space) -> int:
        """Pages that the space has."""

    def read(self, space: Space, numbers: Numbers) -> Rows:
        """Copies of pages, in the order asked."""

    def read_into(self, space: Space, numbers: Numbers, rows: Rows, positions: Positions) -> None:
        """Put page ``numbers[i]`` into ``rows[positions[i]]``; ``positions`` increase.

        :raises CorruptError: a page is beyond the machine, or a file is cut short.
        """


@dataclass(frozen=True, slots=True)
class HeldPages:
    """Pages of one space that a file holds.

    ``numbers`` increase strictly. ``offsets`` says in bytes where in the file each page begins, or ``ZEROS``.
    Memory: 12 bytes per page.
    """

    numbers: Numbers
    offsets: NDArray[np.int64]
    descriptor: int

    def __post_init__(self) -> None:
        """:raises CorruptError: the pages are not in order, or one has no place."""
        if self.numbers.shape != self.offsets.shape or (self.numbers[1:] <= self.numbers[:-1]).any():
            raise CorruptError("the table of a layer's pages is not in order")
        if (self.offsets < ZEROS).any():
            raise CorruptError("the table of a layer's pages names a place that no file has")


@dataclass(frozen=True, slots=True)
class KnownPages:
    """A machine's pages as both ends have them: the layer's where it has one, else the base's."""

    base: BasePages
    layer: Mapping[Space, HeldPages] | None = None
    overlay_id: str = ""

    def __post_init__(self) -> None:
        """:raises CorruptError: the layer holds a page beyond the machine."""
        if (self.layer is None) != (not self.overlay_id):
            raise ValueError("a layer and the identity of its overlay go together")
        for space, held in (self.layer or {}).items():
            if held.numbers.size and int(held.numbers[-1]) >= self.count(space):
                raise CorruptError(f"the layer holds {space.label} {held.numbers[-1]}, beyond the machine")

    @property
    def identity(self) -> bytes:
        """64 bytes: the identity of the base, then that of the overlay, or zeros."""
        return bytes.fromhex(self.base.identity) + (bytes.fromhex(self.overlay_id) or _NOTHING)

    @property
    def machine(self) -> Machine:
        """The machine that base and layer are of."""
        return self.base.machine

    def count(self, space: Space) -> int:
        """Pages that the space has."""
        return self.base.count(space)

    def read(self, space: Space, numbers: Numbers) -> Rows:
        """Copies of pages, in the order asked."""
        rows = np.empty((numbers.size, PAGE_BYTES), np.uint8)
        self.read_into(space, numbers, rows, np.arange(numbers.size))
        return rows

    def read_into(self, space: Space, numbers: Numbers, rows: Rows, positions: Positions) -> None:
        """Put page ``numbers[i]`` into ``rows[positions[i]]``; one system call per run of pages in a file.

        ``positions`` increase.

        :raises CorruptError: a page is beyond the machine, or a file is cut short.
        """
        held = self.layer.get(space) if self.layer else None
        if held is None or not held.numbers.size or not numbers.size:
            self.base.read_into(space, numbers, rows, positions)
            return
        at = np.searchsorted(held.numbers, numbers)
        at[at == held.numbers.size] = 0
        here = held.numbers[at] == numbers
        self.base.read_into(space, numbers[~here], rows, positions[~here])
        numbers, positions, offsets = numbers[here], positions[here], held.offsets[at[here]]
        filled = offsets != ZEROS
        rows[positions[~filled]] = 0
        cut = read_places(held.descriptor, offsets[filled], rows, positions[filled])
        if cut is not None:
            raise CorruptError(f"the layer's file ends before {space.label} {numbers[filled][cut]}")
