"""Pages and their numbers: the plain values that the rest of the engine hands around.

A page is 4096 bytes of guest RAM or of the disk (there also called a block). Page numbers are
``uint32``, content is a ``(n, 4096)`` array of bytes. Runs are ``(r, 2)`` arrays of start and
length.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cloudlet.model import PAGE_BYTES

Numbers = NDArray[np.uint32]
"""Page numbers, one dimension."""

Rows = NDArray[np.uint8]
"""Contents of pages, shape ``(n, 4096)``."""

Runs = NDArray[np.uint32]
"""Start and length of runs of page numbers, shape ``(r, 2)``."""

Positions = NDArray[np.intp]
"""Positions in one of the above."""


class Space(IntEnum):
    """What a page is a page of. The values are those of the frame kinds in the file."""

    RAM = 3
    DISK = 4

    @property
    def label(self) -> str:
        return "RAM page" if self is Space.RAM else "disk block"


@dataclass(frozen=True, slots=True)
class PageBatch:
    """Pages of one space with their content; ``data[i]`` is the page ``numbers[i]``.

    The arrays are only lent: whoever keeps them beyond the call copies them.
    """

    space: Space
    numbers: Numbers
    data: Rows


@dataclass(frozen=True, slots=True)
class PageSource:
    """Pages that a capture found: strictly increasing numbers, and rows, maybe a memory map."""

    numbers: Numbers
    data: Rows

    @classmethod
    def empty(cls) -> Self:
        return cls(np.empty(0, np.uint32), np.empty((0, PAGE_BYTES), np.uint8))


def runs_of(numbers: Numbers) -> Runs:
    """The runs of consecutive numbers in a strictly increasing sequence."""
    if not numbers.size:
        return np.empty((0, 2), np.uint32)
    first = np.flatnonzero(np.concatenate(([True], np.diff(numbers) != 1)))
    lengths = np.diff(np.append(first, numbers.size))
    return np.column_stack((numbers[first], lengths)).astype(np.uint32)


def numbers_of(runs: Runs) -> Numbers:
    """The page numbers in runs, the inverse of :func:`runs_of`."""
    lengths = runs[:, 1].astype(np.int64)
    starts = runs[:, 0].astype(np.int64)
    before = np.cumsum(lengths) - lengths
    return np.asarray(np.arange(lengths.sum()) + np.repeat(starts - before, lengths), np.uint32)


def zero_rows(rows: Rows) -> NDArray[np.bool_]:
    """Which pages hold only zeros."""
    return np.asarray(~rows.view(np.uint64).any(axis=1), np.bool_)


def equal_rows(one: Rows, other: Rows) -> NDArray[np.bool_]:
    """Which pages are equal, row by row; compared eight bytes at a time."""
    return np.asarray((one.view(np.uint64) == other.view(np.uint64)).all(axis=1), np.bool_)
