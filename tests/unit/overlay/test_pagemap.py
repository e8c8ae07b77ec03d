from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlet.errors import CorruptError
from cloudlet.overlay.pagemap import Coverage, PageMap
from cloudlet.overlay.pages import Space, runs_of
from cloudlet.overlay.root import Totals

from .world import MACHINE

SETS = st.sets(st.integers(0, 63), max_size=40)


def numbers(*members: int) -> np.ndarray:
    return np.array(members, np.uint32)


@given(SETS, SETS)
def test_it_reads_what_it_writes(ram: set[int], disk: set[int]) -> None:
    page_map = PageMap(runs_of(numbers(*sorted(ram))), runs_of(numbers(*sorted(disk))))
    again = PageMap.decode(page_map.encode(), MACHINE, Totals(0, len(disk), 0, 0, len(ram)))
    assert again.ram.tolist() == page_map.ram.tolist()
    assert again.disk.tolist() == page_map.disk.tolist()


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
def test_a_bad_map_is_refused(pairs: list[tuple[int, int]], total: int) -> None:
    raw = struct.pack("<II", len(pairs), 0) + b"".join(struct.pack("<II", *p) for p in pairs)
    with pytest.raises(CorruptError):
        PageMap.decode(raw, MACHINE, Totals(0, 0, 0, 0, total))


@pytest.mark.parametrize("raw", [b"", b"\0" * 7, b"\0" * 9, struct.pack("<II", 2**32 - 1, 2**32 - 1)])
def test_its_size_fits_its_counts(raw: bytes) -> None:
    with pytest.raises(CorruptError):
        PageMap.decode(raw, MACHINE, Totals(0, 0, 0, 0, 0))


def test_each_page_comes_exactly_once() -> None:
    coverage = Coverage(runs_of(numbers(3, 4, 5, 9)), Space.RAM)
    coverage.claim(numbers(9, 4), "frame 1")
    for bad, why in (
        (2, "not in the map"),
        (6, "not in the map"),
        (10, "not in the map"),
        (4, "second"),
    ):
        with pytest.raises(CorruptError, match=why):
            coverage.claim(numbers(bad), "frame 2")
    with pytest.raises(CorruptError, match="second time"):
        coverage.claim(numbers(3, 3), "frame 3")
    with pytest.raises(CorruptError, match="2 RAM pages of the map did not come"):
        coverage.check_complete()
    coverage.claim(numbers(3, 5), "frame 4")
    coverage.check_complete()


def test_nothing_comes_of_an_empty_map() -> None:
    coverage = Coverage(runs_of(numbers()), Space.DISK)
    coverage.check_complete()
    with pytest.raises(CorruptError):
        coverage.claim(numbers(0), "frame 1")
