"""Reading the base: its pages of RAM and its disk blocks, by descriptor.

Pages are read with ``preadv`` straight into the caller's rows and not through a mapping, so that
the memory of the process does not grow with what it has read. The descriptors stay the caller's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cloudlet.errors import CorruptError
from cloudlet.model import PAGE_BYTES, Machine
from cloudlet.overlay.pages import Numbers, Positions, Rows, Space
from cloudlet.overlay.root import DeviceSection

_MOST_VECTORS = 1024
"""Linux' IOV_MAX."""


@dataclass(frozen=True, slots=True)
class BasePages:
    """A base VM as the engine sees it: what it is, and where its bytes are.

    ``ram_fd`` is the flat image of guest RAM, ``disk_fd`` the raw disk; both may be sparse. Several
    threads may read at once.
    """

    identity: str
    machine: Machine
    device_sections: tuple[DeviceSection, ...]
    ram_fd: int
    disk_fd: int

    def ram(self, numbers: Numbers) -> Rows:
        """Copies of RAM pages, in the order asked."""
        return self.read(Space.RAM, numbers)

    def disk(self, numbers: Numbers) -> Rows:
        """Copies of disk blocks, in the order asked."""
        return self.read(Space.DISK, numbers)

    def read(self, space: Space, numbers: Numbers) -> Rows:
        rows = np.empty((numbers.size, PAGE_BYTES), np.uint8)
        self.read_into(space, numbers, rows, np.arange(numbers.size))
        return rows

    def count(self, space: Space) -> int:
        """Pages that the space has."""
        return self.machine.ram_pages if space is Space.RAM else self.machine.disk_blocks

    def read_into(self, space: Space, numbers: Numbers, rows: Rows, positions: Positions) -> None:
        """Put page ``numbers[i]`` into ``rows[positions[i]]``; one system call per run of numbers.

        ``positions`` increase.

        :raises CorruptError: a page is beyond the machine, or the base's file is cut short.
        """
        if not numbers.size:
            return
        if int(numbers.max()) >= self.count(space):
            raise CorruptError(f"{space.label} {int(numbers.max())} is beyond the base's {self.count(space)}")
        descriptor = self.ram_fd if space is Space.RAM else self.disk_fd
        missing = read_rows(descriptor, numbers, rows, positions)
        if missing is not None:
            raise CorruptError(f"the base's file ends before {space.label} {missing}")


def read_rows(descriptor: int, numbers: Numbers, rows: Rows, positions: Positions) -> int | None:
    """Put the file's page ``numbers[i]`` into ``rows[positions[i]]``, with a system call per run of numbers.

    ``positions`` increase. The result is the number of a page before which the file ends, if there is one.
    """
    cut = read_places(descriptor, numbers.astype(np.int64) * PAGE_BYTES, rows, positions)
    return None if cut is None else int(numbers[cut]) + 1


def read_places(descriptor: int, offsets: NDArray[np.int64], rows: Rows, positions: Positions) -> int | None:
    """Put the page that begins at byte ``offsets[i]`` of a file into ``rows[positions[i]]``.

    ``positions`` increase; pages that follow each other in the file take one system call. The result is the
    last ``i`` of a stretch within which the file ends, if there is one.
    """
    room = rows.data.cast("B")
    places = positions.tolist()
    for first, after in _stretches(offsets):
        if places[after - 1] - places[first] == after - 1 - first:
            at = places[first] * PAGE_BYTES
            vectors = [room[at : at + (after - first) * PAGE_BYTES]]
        else:
            vectors = [room[p * PAGE_BYTES : (p + 1) * PAGE_BYTES] for p in places[first:after]]
        if os.preadv(descriptor, vectors, int(offsets[first])) != (after - first) * PAGE_BYTES:
            return after - 1
    return None


def _stretches(offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """From and to of stretches of pages that follow each other in the file, short enough for one call."""
    if not offsets.size:
        return
    breaks = np.flatnonzero(np.diff(offsets) != PAGE_BYTES) + 1
    edges = [0, *breaks.tolist(), offsets.size]
    for first, after in pairwise(edges):
        for at in range(first, after, _MOST_VECTORS):
            yield at, min(at + _MOST_VECTORS, after)
