from __future__ import annotations

import struct
from collections.abc import Sequence
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
RAM, DISK = FrameKind.RAM, FrameKind.DISK


def numbers(*members: int) -> np.ndarray:
    return np.array(sorted(members), np.uint32)


def root(ram: int, disk: int, *hot: tuple[FrameKind, int]) -> Root:
    """A root that declares so many pages, and hot frames of a kind and of so many pages; only what the map is
    held against is as it should be.
    """
    entries = tuple(FrameEntry(k, 1, payload_bytes(pages, 0, 0), pages, 0, bytes(32)) for k, pages in hot)
    totals = Totals(0, disk, 0, 0, ram)
    return Root(APP, "ab" * 32, "2026-11-24T23:00:00Z", SECTIONS, MACHINE, (), (), entries, (), totals)


@given(SETS, SETS, st.randoms(use_true_random=False))
def test_it_reads_what_it_writes(ram: set[int], disk: set[int], random: Random) -> None:
    """Hot pages are in any of six frames, of RAM and of the disk by turns."""
    hot_ram, hot_disk = ({n for n in sorted(all_) if random.random() < 0.5} for all_ in (ram, disk))
    frames = [random.choice((0, 2, 4)) for _ in hot_ram] + [random.choice((1, 3, 5)) for _ in hot_disk]
    runs = [runs_of(numbers(*members)) for members in (ram, disk, hot_ram, hot_disk)]
    page_map = PageMap(*runs, np.array(frames, np.uint16))
    hot = [((RAM, DISK)[frame % 2], frames.count(frame)) for frame in range(6)]
    again = PageMap.decode(page_map.encode(), root(len(ram), len(disk), *hot))
    for space, of_space in ((Space.RAM, frames[: len(hot_ram)]), (Space.DISK, frames[len(hot_ram) :])):
        assert again.runs(space).tolist() == page_map.runs(space).tolist()
        assert again.hot_runs(space).tolist() == page_map.hot_runs(space).tolist()
        assert again.frames_of_hot(space).tolist() == of_space


def encoded(ram: Pairs, hot: Pairs, hot_frames: Sequence[int]) -> bytes:
    """A map of RAM pages only."""
    pairs = b"".join(struct.pack("<II", *pair) for pair in (*ram, *hot))
    head = struct.pack("<IIII", len(ram), 0, len(hot), 0)
    return head + pairs + struct.pack(f"<{len(hot_frames)}H", *hot_frames)


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
        PageMap.decode(encoded(pairs, [], []), root(total, 0))
    with pytest.raises(CorruptError, match="hot RAM page"):
        PageMap.decode(encoded([(1, 90)], pairs, [0] * total), root(90, 0, (RAM, total)))


@pytest.mark.parametrize(
    "hot", [(0, 2), (4, 2), (5, 4), (8, 1), (9, 1), (19, 2), (21, 1)], ids=lambda pair: f"{pair[0]}+{pair[1]}"
)
def test_what_is_hot_comes(hot: tuple[int, int]) -> None:
    """Runs of 5 to 7 and of 10 to 19 come, and (5, 3), (6, 1), (10, 10) within them are hot."""
    runs = [(5, 3), (10, 10)]
    for good in [(5, 3), (6, 1), (10, 10)]:
        page_map = PageMap.decode(encoded(runs, [good], [0] * good[1]), root(13, 0, (RAM, good[1])))
        assert page_map.hot_ram.tolist() == [list(good)]
    with pytest.raises(CorruptError, match="hot that does not come"):
        PageMap.decode(encoded(runs, [hot], [0] * hot[1]), root(13, 0, (RAM, hot[1])))


def test_nothing_is_hot_where_nothing_comes() -> None:
    with pytest.raises(CorruptError, match="hot that does not come"):
        PageMap.decode(encoded([], [(1, 1)], [0]), root(0, 0, (RAM, 1)))


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([0, 0, 2, 2], "other RAM pages than the root says"),
        ([0, 2, 2, 2], "other RAM pages than the root says"),
        ([0, 0, 0, 3], "other RAM pages than the root says"),
        ([0, 0, 0, 65535], "other RAM pages than the root says"),
        ([0, 0, 0, 1], "other RAM pages than the root says"),
        ([], "4 hot pages, which do not fit"),
        ([0, 0, 2], "4 hot pages, which do not fit"),
        ([0, 0, 0, 2, 0], "4 hot pages, which do not fit"),
        ([0, 0, 0, 2, 0, 0, 0, 0], "4 hot pages, which do not fit"),
    ],
    ids=["less", "more", "after-the-last", "beyond", "disk", "none", "short", "long", "a-run-long"],
)
def test_the_frames_of_hot_pages_are_as_the_root_says(frames: list[int], why: str) -> None:
    """Frame 0 brings three pages of RAM, frame 2 one; frame 1 is of the disk, of which nothing comes."""
    hot = ((RAM, 3), (DISK, 0), (RAM, 1))
    page_map = PageMap.decode(encoded([(5, 8)], [(5, 3), (9, 1)], [0, 2, 0, 0]), root(8, 0, *hot))
    assert page_map.frames_of_hot(Space.RAM).tolist() == [0, 2, 0, 0]
    assert page_map.frames_of_hot(Space.DISK).tolist() == []
    with pytest.raises(CorruptError, match=why):
        PageMap.decode(encoded([(5, 8)], [(5, 3), (9, 1)], frames), root(8, 0, *hot))


def test_a_hot_page_comes_in_a_frame_of_its_space() -> None:
    """One page of RAM and one of the disk, each in the other's frame: the counts alone would fit."""
    one = np.array([[4, 1]], np.uint32)
    right, wrong = (PageMap(one, one, one, one, np.array(at, np.uint16)).encode() for at in ([0, 1], [1, 0]))
    there = root(1, 1, (RAM, 1), (DISK, 1))
    assert PageMap.decode(right, there).frames_of_hot(Space.DISK).tolist() == [1]
    with pytest.raises(CorruptError, match="other RAM pages"):
        PageMap.decode(wrong, there)


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
