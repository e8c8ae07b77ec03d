from __future__ import annotations

import os
import time
from dataclasses import replace

import numpy as np
import pytest

from cloudlet.errors import CorruptError, MismatchError
from cloudlet.overlay.index import PageIndex, digest_rows
from cloudlet.overlay.pages import Space

from .world import MACHINE, World, page

NONE = np.empty((0, 2), np.uint32)


def look(index: PageIndex, seeds: list[int]) -> list[tuple[Space, int] | None]:
    rows = np.stack([page(seed) for seed in seeds])
    found = index.lookup(digest_rows(rows, range(len(seeds))))
    each = zip(found.hit.tolist(), found.space.tolist(), found.page.tolist(), strict=True)
    return [(Space(space), number) if hit else None for hit, space, number in each]


def test_pages_of_both_spaces_are_found(world: World) -> None:
    assert look(world.index, [1007, 2009, 5]) == [(Space.RAM, 7), (Space.DISK, 9), None]


def test_zero_pages_are_left_out(world: World) -> None:
    assert len(world.index) == 64 + 42


def test_only_the_data_of_the_disk_is_read(world: World) -> None:
    index = PageIndex.build(world.base, np.array([[3, 2], [9, 1]], np.uint32))
    found = look(index, [2002, 2003, 2004, 2005, 2009])
    assert found == [None, (Space.DISK, 3), (Space.DISK, 4), None, (Space.DISK, 9)]


def test_a_huge_sparse_disk_costs_only_its_data(world: World) -> None:
    disk = os.memfd_create("disk")
    try:
        os.truncate(disk, 1 << 43)
        os.pwrite(disk, page(9).tobytes(), (1 << 43) - 4096)
        base = replace(world.base, disk_fd=disk, machine=replace(MACHINE, disk_bytes=1 << 43))
        index = PageIndex.build(base, np.array([[(1 << 31) - 1, 1]], np.uint32))
        assert look(index, [9]) == [(Space.DISK, (1 << 31) - 1)]
    finally:
        os.close(disk)


def test_the_number_of_entries_can_be_bounded(world: World) -> None:
    assert len(PageIndex.build(world.base, NONE, most=10)) == 10


def test_an_empty_index_finds_nothing(world: World) -> None:
    empty = PageIndex.build(world.base, NONE, most=0)
    assert look(empty, [1000]) == [None]
    with saved(empty) as fd:
        assert look(PageIndex.load(fd, world.base.identity), [1000]) == [None]


class saved:  # noqa: N801
    """An index as a file."""

    def __init__(self, index: PageIndex, cut: int | None = None) -> None:
        self.fd = os.memfd_create("index")
        with os.fdopen(os.dup(self.fd), "wb") as file:
            index.save(file)
        if cut is not None:
            os.truncate(self.fd, cut)

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def test_it_is_saved_and_loaded(world: World) -> None:
    with saved(world.index) as fd:
        loaded = PageIndex.load(fd, world.base.identity)
    assert look(loaded, [1007, 2009, 5]) == look(world.index, [1007, 2009, 5])


def test_loading_a_large_one_is_quick(world: World) -> None:
    count = 2_000_000
    zeros = np.zeros(count, np.uint64)
    large = PageIndex("ab" * 32, zeros, zeros, zeros.astype(np.uint32), zeros.astype(np.uint8))
    with saved(large) as fd:
        started = time.perf_counter()
        loaded = PageIndex.load(fd, "ab" * 32)
        assert time.perf_counter() - started < 0.1
        assert len(loaded) == count


def test_it_belongs_to_one_base(world: World) -> None:
    with saved(world.index) as fd, pytest.raises(MismatchError):
        PageIndex.load(fd, "cd" * 32)


@pytest.mark.parametrize("cut", [0, 5, 48, 100])
def test_a_cut_index_is_refused(world: World, cut: int) -> None:
    with saved(world.index, cut) as fd, pytest.raises(CorruptError):
        PageIndex.load(fd, world.base.identity)
