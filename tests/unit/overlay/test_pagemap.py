from __future__ import annotations

import struct
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlet.errors import CorruptError
from cloudlet.overlay.frames import FrameEntry, FrameKind, payload_bytes
from cloudlet.overlay.pagemap import Coverage, PageMap
from cloudlet.overlay.pages import Space, runs_of
from cloudlet.overlay.root import Root, Totals

from .world import APP, MACHINE, SECTIONS

SETS = st.sets(st.integers(0, 63), max_size=40)
Pairs = list[tuple[int, int]]


def numbers(*members: int) -> np.ndarray:
    return np.array(sorted(members), np.uint32)


def root(ram: int, disk: int, hot_ram: int = 0, hot_disk: int = 0) -> Root:
    """A root that declares so many pages; only what the map is held against is as it should be."""
    hot = tuple(
        FrameEntry(kind, 1, payload_bytes(pages, 0, 0), pages, 0, bytes(32))
        for kind, pages in ((FrameKind.RAM, hot_ram), (FrameKind.DISK, hot_disk))
    )
    totals = Totals(0, disk, 0, 0, ram)
    return Root(APP, "ab" * 32, "2026-11-24T23:00:00Z", SECTIONS, MACHINE, (), (), hot, (), totals)


@given(SETS, SETS, st.randoms(use_true_random=False))
def test_it_reads_what_it_writes(ram: set[int], disk: set[int], random: Random) -> None:
    hot_ram, hot_disk = ({n for n in sorted(all_) if random.random() < 0.5} for all_ in (ram, disk))
    page_map = PageMap(*(runs_of(numbers(*members)) for members in (ram, disk, hot_ram, hot_disk)))
    again = PageMap.decode(page_map.encode(), root(len(ram), len(disk), len(hot_ram), len(hot_disk)))
    for space in Space:
        assert again.runs(space).tolist() == page_map.runs(space).tolist()
        assert again.hot_runs(space).tolist() == page_map.hot_runs(space).tolist()


def encoded(ram: Pairs, hot: Pairs) -> bytes:
    pairs = b"".join(struct.pack("<II", *pair) for pair in (*ram, *hot))
    return struct.pack("<IIII", len(ram), 0, len(hot), 0) + pairs


@pytest.mark.parametrize(
    ("pairs", "total"),
    [
        ([(5, 2), (7, 1)], 3),
        ([(5, 2), (6, 2)], 4),
        ([(5, 2), (1, 1)], 3),
        ([(5, 0)], 0),
        ([(95, 2)], 2),
        ([(2**32 - 1, 2)], 2),
        ([(5, 2)], 3),
    ],
    ids=["touch", "overlap", "unsorted", "empty", "beyond", "wrap", "total"],
)
def test_a_bad_map_is_refused(pairs: Pairs, total: int) -> None:
    with pytest.raises(CorruptError, match="RAM page"):
        PageMap.decode(encoded(pairs, []), root(total, 0))
    with pytest.raises(CorruptError, match="hot RAM page"):
        PageMap.decode(encoded([(1, 90)], pairs), root(90, 0, total))


@pytest.mark.parametrize(
    "hot", [(0, 2), (4, 2), (5, 4), (8, 1), (9, 1), (19, 2), (21, 1)], ids=lambda pair: f"{pair[0]}+{pair[1]}"
)
def test_what_is_hot_comes(hot: tuple[int, int]) -> None:
    """Runs of 5 to 7 and of 10 to 19 come, and (5, 3), (6, 1), (10, 10) within them are hot."""
    runs = [(5, 3), (10, 10)]
    for good in [(5, 3), (6, 1), (10, 10)]:
        assert PageMap.decode(encoded(runs, [good]), root(13, 0, good[1])).hot_ram.tolist() == [list(good)]
    with pytest.raises(CorruptError, match="hot that does not come"):
        PageMap.decode(encoded(runs, [hot]), root(13, 0, hot[1]))


def test_nothing_is_hot_where_nothing_comes() -> None:
    with pytest.raises(CorruptError, match="hot that does not come"):
        PageMap.decode(encoded([], [(1, 1)]), root(0, 0, 1))


@pytest.mark.parametrize(
    "raw",
    [b"", b"\0" * 15, b"\0" * 17, struct.pack("<IIII", *[2**32 - 1] * 4)],
    ids=["none", "15", "17", "many"],
)
def test_its_size_fits_its_counts(raw: bytes) -> None:
    with pytest.raises(CorruptError):
        PageMap.decode(raw, root(0, 0))


def ram_coverage(members: set[int], hot: set[int] = frozenset()) -> Coverage:
    none = runs_of(numbers())
    return Coverage(PageMap(runs_of(numbers(*members)), none, runs_of(numbers(*hot)), none), Space.RAM)


def test_each_page_comes_exactly_once() -> None:
    coverage = ram_coverage({3, 4, 5, 9})
    coverage.claim(np.array([9, 4], np.uint32), "frame 1", hot=False)
    for bad, why in (
        (2, "not in the map"),
        (6, "not in the map"),
        (10, "not in the map"),
        (4, "second"),
    ):
        with pytest.raises(CorruptError, match=why):
            coverage.claim(numbers(bad), "frame 2", hot=False)
    with pytest.raises(CorruptError, match="second time"):
        coverage.claim(numbers(3, 3), "frame 3", hot=False)
    with pytest.raises(CorruptError, match="2 RAM pages of the map did not come"):
        coverage.check_complete()
    coverage.claim(numbers(3, 5), "frame 4", hot=False)
    coverage.check_complete()


def test_hot_pages_come_with_hot_frames_and_no_others() -> None:
    coverage = ram_coverage({3, 4, 5, 9}, {4, 5})
    assert coverage.hot_ranks().tolist() == [1, 2]
    assert [coverage.is_hot(rank) for rank in range(4)] == [False, True, True, False]
    with pytest.raises(CorruptError, match="is cold"):
        coverage.claim(numbers(4, 9), "frame 1", hot=True)
    with pytest.raises(CorruptError, match="is hot"):
        coverage.claim(numbers(3, 4), "frame 2", hot=False)
    assert not any(coverage.has_come(rank) for rank in range(4))
    coverage.claim(numbers(4, 5), "frame 1", hot=True)
    coverage.claim(numbers(3, 9), "frame 2", hot=False)
    coverage.check_complete()


@given(SETS, st.integers(0, 63))
def test_a_rank_is_the_place_among_the_pages_that_come(members: set[int], first: int) -> None:
    coverage = ram_coverage(members)
    assert coverage.pages == len(members)
    ranks = {member: rank for rank, member in enumerate(sorted(members))}
    for page in range(66):
        assert coverage.rank(page) == ranks.get(page)
    if first in members:
        assert coverage.claim(numbers(first), "frame 1", hot=False).tolist() == [ranks[first]]
    for page, rank in ranks.items():
        assert coverage.has_come(rank) == (page == first)


def test_nothing_comes_of_an_empty_map() -> None:
    coverage = ram_coverage(set())
    coverage.check_complete()
    with pytest.raises(CorruptError):
        coverage.claim(numbers(0), "frame 1", hot=False)
