"""What goes into which frame: the pages that differ from the base, hot ones first.

The plan speaks in positions, the rows of a capture, and copies no page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from cloudlet.errors import UsageError
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.base import BasePages
from cloudlet.overlay.limits import FRAME_PAGES
from cloudlet.overlay.pagemap import Coverage, PageMap
from cloudlet.overlay.pages import Numbers, PageSource, Positions, Space, equal_rows

FRAME_PAGES_WRITTEN = 64
"""Pages of a frame, before it is cut (``pack.py``). A page can be used when its frame is there, and who waits
for one page gets its frame; 512 pages are 0.5 to 1 s at 10 Mbit/s. Measured against 512 pages: from 5 % more
bytes to 3 % fewer."""

COLD_SPACES = (Space.DISK, Space.RAM)
"""The order of the cold part; within a space it is that of the page numbers."""

HOT_LEVEL = 19
"""How hard what comes first is compressed, map and device state with it: it is little, and each byte of it
is waited for. Measured: a tenth fewer bytes than at level 3, for some seconds of the publisher's time."""

HOT_FRAMES = 440
"""Hot frames at most, so that their entries fit the root; hot pages beyond come with the cold."""

COLD_FRAMES = 49_152
"""Cold frames up to which frames are cut (``pack.py``): the root has room for their chunks beside the hot
frames. It is 4 GiB of what does not compress; whoever has more waits longer for a page."""

Hot = Sequence[tuple[Space, Numbers]]
"""Pages in the order in which a resuming guest first touches them."""


def changed_positions(space: Space, source: PageSource, base: BasePages) -> Positions:
    """The rows of a capture that differ from the same page of the base.

    :raises UsageError: the numbers do not increase, are beyond the machine or fit not the rows.
    """
    numbers = source.numbers
    if numbers.dtype != np.uint32 or source.data.shape != (numbers.size, PAGE_BYTES):
        raise UsageError(f"a capture of {numbers.size} {space.label}s has rows of shape {source.data.shape}")
    if (numbers[1:] <= numbers[:-1]).any() or (numbers.size and int(numbers[-1]) >= base.count(space)):
        raise UsageError(f"the {space.label}s of a capture are not in order or are beyond the machine")
    kept = [np.empty(0, np.intp)]
    for at in range(0, numbers.size, FRAME_PAGES):
        batch = slice(at, at + FRAME_PAGES)
        same = equal_rows(np.ascontiguousarray(source.data[batch]), base.read(space, numbers[batch]))
        kept.append(at + np.flatnonzero(~same))
    return np.concatenate(kept)


@dataclass(frozen=True, slots=True)
class FramePlan:
    """Frames as space and positions: the hot ones, then what is left of each space; and how many more of each
    there may become.
    """

    hot: tuple[tuple[Space, Positions], ...]
    cold: Mapping[Space, Positions]
    hot_room: int

    @classmethod
    def make(
        cls,
        sources: Mapping[Space, PageSource],
        changed: Mapping[Space, Positions],
        hot: Hot,
        most_hot: int,
    ) -> Self:
        """Hot pages that did not change, or are named again, are passed over."""
        left = {space: np.ones(source.numbers.size, np.bool_) for space, source in sources.items()}
        frames: list[tuple[Space, Positions]] = []
        for space, positions in _hot_frames(sources, changed, hot):
            if len(frames) == most_hot:
                break
            frames.append((space, positions))
            left[space][positions] = False
        cold = {space: positions[left[space][positions]] for space, positions in changed.items()}
        return cls(tuple(frames), cold, most_hot - len(frames))

    @property
    def cold_room(self) -> int:
        planned = sum(-(-positions.size // FRAME_PAGES_WRITTEN) for positions in self.cold.values())
        return max(0, COLD_FRAMES - planned)

    def cold_frames(self) -> Iterator[tuple[Space, Positions]]:
        """The cold frames in file order."""
        for space in COLD_SPACES:
            positions = self.cold[space]
            for at in range(0, positions.size, FRAME_PAGES_WRITTEN):
                yield space, positions[at : at + FRAME_PAGES_WRITTEN]


class FrameOrder:
    """Where in the file a page is expected, as a reader knows it from the map.

    The map names the frame of each hot page; cold ones have the order of :meth:`FramePlan.cold_frames`. That
    says what is likely and nothing that must be: a writer may do otherwise. Memory: 6 bytes per hot page.
    """

    def __init__(self, page_map: PageMap, coverage: Mapping[Space, Coverage]) -> None:
        self._hot = {space: coverage[space].hot_ranks() for space in coverage}
        self._hot_frames = {space: page_map.frames_of_hot(space) for space in coverage}
        self._firsts: dict[Space, int] = {}
        nth = sum(ranks.size for ranks in self._hot.values())
        for space in COLD_SPACES:
            self._firsts[space] = nth
            nth += coverage[space].pages - self._hot[space].size

    def nth(self, space: Space, rank: int) -> int:
        """The place of a cold page, given by its rank, among all pages of the file, in file order, from 0."""
        return self._firsts[space] + rank - self._hot_before(space, rank)

    def hot_frame(self, space: Space, rank: int) -> int:
        """Which of the hot frames, from 0, brings a hot page, given by its rank."""
        return int(self._hot_frames[space][self._hot_before(space, rank)])

    def _hot_before(self, space: Space, rank: int) -> int:
        return int(np.searchsorted(self._hot[space], np.uint32(rank)))


def _hot_frames(
    sources: Mapping[Space, PageSource], changed: Mapping[Space, Positions], hot: Hot
) -> Iterator[tuple[Space, Positions]]:
    """Stretches of the order of first touch; one that holds both spaces becomes two frames."""
    spaces, positions = _touched(sources, changed, hot)
    for at in range(0, positions.size, FRAME_PAGES_WRITTEN):
        stretch = slice(at, at + FRAME_PAGES_WRITTEN)
        for space in Space:
            members = positions[stretch][spaces[stretch] == space]
            if members.size:
                yield space, np.sort(members)


def _touched(
    sources: Mapping[Space, PageSource], changed: Mapping[Space, Positions], hot: Hot
) -> tuple[Positions, Positions]:
    """Spaces and positions of the changed pages in a hot list, each at its first mention."""
    spaces, positions = [np.empty(0, np.intp)], [np.empty(0, np.intp)]
    for space, numbers in hot:
        mine = changed[space]
        known = sources[space].numbers[mine]
        at = np.searchsorted(known, numbers)
        found = at < known.size
        found[found] = known[at[found]] == numbers[found]
        positions.append(mine[at[found]])
        spaces.append(np.full(positions[-1].size, space, np.intp))
    all_spaces, all_positions = np.concatenate(spaces), np.concatenate(positions)
    _, first = np.unique(all_positions * 8 + all_spaces, return_index=True)
    first.sort()
    return all_spaces[first], all_positions[first]
