"""The map: which pages an overlay brings, and the count that each of them comes exactly once.

Memory: 12 bytes per run and one byte per page that the overlay brings, whatever the machine's size.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cloudlet.errors import CorruptError
from cloudlet.model import Machine
from cloudlet.overlay.pages import Numbers, Runs, Space
from cloudlet.overlay.root import Totals

_HEAD = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class PageMap:
    """Runs of the pages that come, sorted, neither touching nor overlapping."""

    ram: Runs
    disk: Runs

    def encode(self) -> bytes:
        pairs = np.concatenate((self.ram, self.disk)).astype("<u4")
        return _HEAD.pack(len(self.ram), len(self.disk)) + pairs.tobytes()

    @classmethod
    def decode(cls, raw: bytes, machine: Machine, totals: Totals) -> Self:
        """Read the concatenated map frames.

        :raises CorruptError: not well formed, beyond the machine, or not as the totals say.
        """
        if len(raw) < _HEAD.size:
            raise CorruptError("the map ends before its first run")
        ram_runs, disk_runs = _HEAD.unpack_from(raw)
        if len(raw) != _HEAD.size + 8 * (ram_runs + disk_runs):
            raise CorruptError(
                f"the map counts {ram_runs + disk_runs} runs, which do not fit its {len(raw)} bytes"
            )
        pairs = np.frombuffer(raw, "<u4", offset=_HEAD.size).reshape(-1, 2)
        ram, disk = pairs[:ram_runs], pairs[ram_runs:]
        _check(ram, machine.ram_pages, totals.ram_pages, Space.RAM)
        _check(disk, machine.disk_blocks, totals.disk_pages, Space.DISK)
        return cls(ram, disk)

    def runs(self, space: Space) -> Runs:
        return self.ram if space is Space.RAM else self.disk


def _check(runs: Runs, most: int, declared: int, space: Space) -> None:
    starts = runs[:, 0].astype(np.int64)
    ends = starts + runs[:, 1]
    if (runs[:, 1] == 0).any() or (starts[1:] <= ends[:-1]).any():
        raise CorruptError(f"the map's runs of {space.label}s are empty, touch, overlap or are not sorted")
    if runs.size and int(ends[-1]) > most:
        raise CorruptError(f"the map brings {space.label} {int(ends[-1]) - 1}, the machine has {most}")
    if (brought := int((ends - starts).sum())) != declared:
        raise CorruptError(f"the map brings {brought} {space.label}s, the root says {declared}")


class Coverage:
    """Ticks off the pages of one space as they come."""

    def __init__(self, runs: Runs, space: Space) -> None:
        self._space = space
        self._starts = np.ascontiguousarray(runs[:, 0])
        self._lengths = np.ascontiguousarray(runs[:, 1])
        self._before = (np.cumsum(self._lengths, dtype=np.uint64) - self._lengths).astype(np.uint32)
        self._seen: NDArray[np.bool_] = np.zeros(int(self._lengths.sum(dtype=np.uint64)), np.bool_)

    def claim(self, numbers: Numbers, where: str) -> None:
        """Mark pages as come.

        :raises CorruptError: one is not in the map, or has come before.
        """
        run = np.searchsorted(self._starts, numbers, side="right") - 1
        inside = run >= 0
        run[~inside] = 0
        if not self._starts.size or not (inside & (numbers - self._starts[run] < self._lengths[run])).all():
            raise CorruptError(f"{where} brings a {self._space.label} that is not in the map")
        rank = self._before[run] + (numbers - self._starts[run])
        if self._seen[rank].any() or np.unique(rank).size != rank.size:
            raise CorruptError(f"{where} brings a {self._space.label} a second time")
        self._seen[rank] = True

    def check_complete(self) -> None:
        """:raises CorruptError: a page of the map has not come."""
        missing = self._seen.size - int(np.count_nonzero(self._seen))
        if missing:
            raise CorruptError(f"{missing} {self._space.label}s of the map did not come")
