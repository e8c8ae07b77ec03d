"""An instance's disk, read from outside: its own file, the layer's on which it may stand, and the base's.

QEMU's file tells only what the guest has written since the machine was started. What it never wrote is the
layer's, where there is one, else the base's.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cloudlet.errors import CorruptError
from cloudlet.hypervisor.driver import Layer
from cloudlet.hypervisor.qemu.qcow2 import held_blocks
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.base import read_places
from cloudlet.overlay.known import ZEROS
from cloudlet.overlay.pages import Numbers, Rows, runs_of
from cloudlet.sparse import data_ranges

_OWN, _LAYER = 0, 1


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks, in order, and where each is. All others are the base's, or the layer's if that was left out."""

    numbers: NDArray[np.int64]
    offsets: NDArray[np.int64]
    """In bytes, or `ZEROS`."""
    files: NDArray[np.int8]
    """In which file."""

    @property
    def written(self) -> NDArray[np.int64]:
        """Those that the machine itself has written."""
        return np.asarray(self.numbers[self.files == _OWN])


class InstanceDisk:
    """The files of a disk, open."""

    def __init__(self, own: Path, base: Path, layer: Layer | None, disk_bytes: int) -> None:
        self._own = own
        self._layer = layer
        self._disk_bytes = disk_bytes
        with ExitStack() as files:
            self._base = _open(files, base)
            self.descriptors = [_open(files, path) for path in (own, *([layer.disk] if layer else []))]
            """By the numbers in :attr:`Blocks.files`."""
            self._files = files.pop_all()
        nothing = np.empty(0, np.int64)
        self._under = held_blocks(layer.disk, disk_bytes) if layer else (nothing, nothing)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def look(self, *, with_layer: bool = True, settled: bool = True) -> Blocks:
        """The blocks that may differ from the base, or, without the layer's, from base and layer.

        A block that is zeros and was zeros in what is below it is passed over: a guest that trims its disk
        gives back all that is free.

        :param settled: the machine stands still. While it runs, this is what its file says now.
        :raises CorruptError: QEMU's file is not as QEMU writes it.
        """
        blocks, offsets = held_blocks(self._own, self._disk_bytes, settled=settled)
        files = np.full(len(blocks), _OWN, np.int8)
        under, places = self._under
        if with_layer and len(under):
            added = ~np.isin(under, blocks, assume_unique=True)
            blocks = np.concatenate((blocks, under[added]))
            offsets = np.concatenate((offsets, places[added]))
            files = np.concatenate((files, np.full(np.count_nonzero(added), _LAYER, np.int8)))
            order = np.argsort(blocks)
            blocks, offsets, files = blocks[order], offsets[order], files[order]
        kept = (offsets != ZEROS) | np.isin(blocks, under, assume_unique=True)
        kept |= self._filled_in_base(blocks, ~kept)
        return Blocks(blocks[kept], offsets[kept], files[kept])

    def read(self, blocks: Blocks, numbers: Numbers, rows: Rows, *, settled: bool = True) -> None:
        """Fill ``rows`` with blocks (sorted), whether they are among those that were looked at or not.

        :raises CorruptError: QEMU's file ends early; while the machine runs, such a block is not filled.
        """
        looked, at = _places_of(blocks.numbers, numbers)
        positions = np.arange(len(numbers))
        for number, descriptor in enumerate(self.descriptors):
            here = positions[looked][blocks.files[at] == number]
            _read(descriptor, blocks.offsets[at][blocks.files[at] == number], rows, here, settled=settled)
        below = positions[~looked]
        in_layer, at = _places_of(self._under[0], numbers[below])
        if in_layer.any():
            _read(self.descriptors[_LAYER], self._under[1][at], rows, below[in_layer])
        below = below[~in_layer]
        _read(self._base, numbers[below].astype(np.int64) * PAGE_BYTES, rows, below)

    def read_base(self, numbers: Numbers) -> Rows:
        """What these blocks are in the base."""
        rows = np.empty((len(numbers), PAGE_BYTES), np.uint8)
        _read(self._base, numbers.astype(np.int64) * PAGE_BYTES, rows, np.arange(len(numbers)))
        return rows

    def close(self) -> None:
        """Close the files. Can be called again."""
        self._files.close()

    def _filled_in_base(self, blocks: NDArray[np.int64], asked: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of the blocks ``asked`` hold data in the base; a file system may know smaller holes."""
        filled = np.zeros(len(blocks), np.bool_)
        for start, length in runs_of(blocks[asked].astype(np.uint32)).tolist():
            first = int(np.searchsorted(blocks, start))
            for held, size in data_ranges(self._base, start * PAGE_BYTES, (start + length) * PAGE_BYTES):
                low, high = held // PAGE_BYTES - start, -(-(held + size) // PAGE_BYTES) - start
                filled[first + low : first + high] = True
        return filled


def _places_of(blocks: NDArray[np.int64], numbers: Numbers) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Which of the numbers are among the blocks (both in order), and at which places these are there."""
    at = np.searchsorted(blocks, numbers)
    found = at < len(blocks)
    found[found] = blocks[at[found]] == numbers[found]
    return found, at[found]


def _read(
    descriptor: int,
    offsets: NDArray[np.int64],
    rows: Rows,
    positions: NDArray[np.intp],
    *,
    settled: bool = True,
) -> None:
    filled = offsets != ZEROS
    rows[positions[~filled]] = 0
    cut = read_places(descriptor, offsets[filled], rows, positions[filled])
    if cut is not None and settled:
        raise CorruptError("a file of the instance ends before its tables say", hint="stop the instance")


def _open(files: ExitStack, path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    files.callback(os.close, descriptor)
    return descriptor
