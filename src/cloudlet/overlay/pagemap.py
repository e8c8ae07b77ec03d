"""The map: which pages an overlay brings, which of them are hot and in which frame, and the count that
each comes once.

Memory: 12 bytes per run, one byte per page that the overlay brings and two per hot page, whatever the
machine's size.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cloudlet.errors import CorruptError
from cloudlet.overlay.pages import Numbers, Runs, Space, numbers_of, runs_of
from cloudlet.overlay.root import Root

_HEAD = struct.Struct("<IIII")
_HOT, _COME = 1, 2


def _none() -> Runs:
    return np.empty((0, 2), np.uint32)


def _no_frames() -> NDArray[np.uint16]:
    return np.empty(0, np.uint16)


@dataclass(frozen=True, slots=True)
class PageMap:
    """Runs of the pages that come, and of those that come with the hot frames; each sorted, neither touching
    nor overlapping.
    """

    ram: Runs
    disk: Runs
    hot_ram: Runs = field(default_factory=_none)
    hot_disk: Runs = field(default_factory=_none)
    hot_frames: NDArray[np.uint16] = field(default_factory=_no_frames)
    """For each hot page, those of RAM first and in order, which of the hot frames brings it, from 0."""

    @classmethod
    def of(cls, pages: Mapping[Space, Numbers], hot: Sequence[tuple[Space, Numbers]]) -> Self:
        """The map of an overlay with these pages, in order, and these hot frames."""
        hot_runs, hot_frames = {}, [_no_frames()]
        for space in Space:
            mine = [(frame, numbers) for frame, (of, numbers) in enumerate(hot) if of is space]
            numbers = np.concatenate([np.empty(0, np.uint32), *(numbers for _, numbers in mine)])
            frames = np.repeat([frame for frame, _ in mine], [numbers.size for _, numbers in mine])
            order = np.argsort(numbers)
            hot_runs[space] = runs_of(numbers[order])
            hot_frames.append(frames[order].astype(np.uint16))
        return cls(
            ram=runs_of(pages[Space.RAM]),
            disk=runs_of(pages[Space.DISK]),
            hot_ram=hot_runs[Space.RAM],
            hot_disk=hot_runs[Space.DISK],
            hot_frames=np.concatenate(hot_frames),
        )

    def encode(self) -> bytes:
        tables = (self.ram, self.disk, self.hot_ram, self.hot_disk)
        pairs = np.concatenate(tables).astype("<u4")
        return _HEAD.pack(*map(len, tables)) + pairs.tobytes() + self.hot_frames.astype("<u2").tobytes()

    @classmethod
    def decode(cls, raw: bytes, root: Root) -> Self:
        """Read the concatenated map frames of the overlay with this root.

        :raises CorruptError: not well formed, beyond the machine, or not as the root says.
        """
        if len(raw) < _HEAD.size:
            raise CorruptError("the map ends before its first run")
        counts = _HEAD.unpack_from(raw)
        hot_pages = sum(entry.pages for entry in root.hot_frames)
        if len(raw) != _HEAD.size + 8 * sum(counts) + 2 * hot_pages:
            raise CorruptError(
                f"the map counts {sum(counts)} runs and {hot_pages} hot pages, "
                f"which do not fit its {len(raw)} bytes"
            )
        pairs = np.frombuffer(raw, "<u4", 2 * sum(counts), _HEAD.size).reshape(-1, 2)
        hot_frames = np.frombuffer(raw, "<u2", hot_pages, len(raw) - 2 * hot_pages)
        ram, disk, hot_ram, hot_disk = np.split(pairs, np.cumsum(counts[:-1]))
        page_map = cls(ram, disk, hot_ram, hot_disk, hot_frames)
        for space, most, declared in (
            (Space.RAM, root.machine.ram_pages, root.totals.ram_pages),
            (Space.DISK, root.machine.disk_blocks, root.totals.disk_pages),
        ):
            hot = [entry.pages if entry.kind.space is space else 0 for entry in root.hot_frames]
            _check(page_map.runs(space), most, declared, space.label)
            _check(page_map.hot_runs(space), most, sum(hot), f"hot {space.label}")
            if not _within(page_map.hot_runs(space), page_map.runs(space)):
                raise CorruptError(f"the map calls a {space.label} hot that does not come")
            if np.bincount(page_map.frames_of_hot(space), minlength=len(hot)).tolist() != hot:
                raise CorruptError(f"the map gives a hot frame other {space.label}s than the root says")
        return page_map

    def runs(self, space: Space) -> Runs:
        return self.ram if space is Space.RAM else self.disk

    def hot_runs(self, space: Space) -> Runs:
        return self.hot_ram if space is Space.RAM else self.hot_disk

    def frames_of_hot(self, space: Space) -> NDArray[np.uint16]:
        """The hot frames of a space's hot pages, in order."""
        of_ram = int(self.hot_ram[:, 1].sum())
        return self.hot_frames[:of_ram] if space is Space.RAM else self.hot_frames[of_ram:]


def _check(runs: Runs, most: int, declared: int, what: str) -> None:
    starts = runs[:, 0].astype(np.int64)
    ends = starts + runs[:, 1]
    if (runs[:, 1] == 0).any() or (starts[1:] <= ends[:-1]).any():
        raise CorruptError(f"the map's runs of {what}s are empty, touch, overlap or are not sorted")
    if runs.size and int(ends[-1]) > most:
        raise CorruptError(f"the map brings {what} {int(ends[-1]) - 1}, the machine has {most}")
    if (brought := int((ends - starts).sum())) != declared:
        raise CorruptError(f"the map brings {brought} {what}s, the root says {declared}")


def _within(some: Runs, runs: Runs) -> bool:
    """Whether each of some runs, which are well formed as the others are, lies in one of the others."""
    run = np.searchsorted(runs[:, 0], some[:, 0], side="right") - 1
    if (run < 0).any():
        return False
    inside = some[:, 0] - runs[run, 0]
    return bool((inside.astype(np.int64) + some[:, 1] <= runs[run, 1]).all())


class Coverage:
    """Ticks off the pages of one space as they come."""

    def __init__(self, page_map: PageMap, space: Space) -> None:
        self._space = space
        # An empty run in front: every page is then in a run or behind one.
        runs = np.concatenate((np.zeros((1, 2), np.uint32), page_map.runs(space)))
        self._starts = np.ascontiguousarray(runs[:, 0])
        self._lengths = np.ascontiguousarray(runs[:, 1])
        self._before = (np.cumsum(self._lengths, dtype=np.uint64) - self._lengths).astype(np.uint32)
        self._marks: NDArray[np.uint8] = np.zeros(int(self._lengths.sum(dtype=np.uint64)), np.uint8)
        self._marks[self._ranks(numbers_of(page_map.hot_runs(space)))[0]] = _HOT

    @property
    def pages(self) -> int:
        """Pages that come in all."""
        return self._marks.size

    def rank(self, page: int) -> int | None:
        """The page's place among those that come, in order of numbers; ``None`` if it is not one of them."""
        ranks, inside = self._ranks(np.array([page], np.uint32))
        return int(ranks[0]) if inside[0] else None

    def hot_ranks(self) -> Numbers:
        """The ranks of the hot pages, sorted."""
        return np.flatnonzero(self._marks & _HOT).astype(np.uint32)

    def is_hot(self, rank: int) -> bool:
        """Whether a page, by its rank, comes with the hot frames."""
        return bool(self._marks[rank] & _HOT)

    def has_come(self, rank: int) -> bool:
        """Whether a page, by its rank, was claimed."""
        return bool(self._marks[rank] & _COME)

    def claim(self, numbers: Numbers, where: str, *, hot: bool) -> Numbers:
        """Mark the pages of a frame as come; the result is their ranks.

        :raises CorruptError: one is not in the map, has come before, or is hot and the frame not, or the
            other way round.
        """
        ranks, inside = self._ranks(numbers)
        if not inside.all():
            raise CorruptError(f"{where} brings a {self._space.label} that is not in the map")
        marks, expected = self._marks[ranks], _HOT if hot else 0
        ordered = (ranks[1:] > ranks[:-1]).all()
        if (marks & _COME).any() or not (ordered or np.unique(ranks).size == ranks.size):
            raise CorruptError(f"{where} brings a {self._space.label} a second time")
        if (marks != expected).any():
            other = "hot" if not hot else "cold"
            raise CorruptError(f"{where} brings a {self._space.label} that the map says is {other}")
        self._marks[ranks] = expected | _COME
        return ranks

    def check_complete(self) -> None:
        """:raises CorruptError: a page of the map has not come."""
        missing = self._marks.size - int(np.count_nonzero(self._marks & _COME))
        if missing:
            raise CorruptError(f"{missing} {self._space.label}s of the map did not come")

    def _ranks(self, numbers: Numbers) -> tuple[Numbers, NDArray[np.bool_]]:
        """The rank of each page, and whether it comes at all; where it does not the rank means nothing."""
        run = np.searchsorted(self._starts, numbers, side="right") - 1
        within = numbers - self._starts[run]
        return self._before[run] + within, within < self._lengths[run]
