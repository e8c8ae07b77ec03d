from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest

from cloudlet.errors import CorruptError
from cloudlet.overlay.pages import Space

from .world import World


@pytest.mark.parametrize("numbers", [[], [5], [3, 4, 5], [9, 2, 3, 1], [4, 4, 4], [0, 95]])
def test_pages_come_in_the_order_asked(world: World, numbers: list[int]) -> None:
    assert (world.base.ram(np.array(numbers, np.uint32)) == world.ram[numbers]).all()


def test_rows_between_are_left_alone(world: World) -> None:
    rows = np.full((8, 4096), 9, np.uint8)
    positions = np.array([1, 3, 4, 7])
    world.base.read_into(Space.DISK, np.array([2, 3, 4, 5], np.uint32), rows, positions)
    assert (rows[positions] == world.disk[2:6]).all()
    assert (rows[[0, 2, 5, 6]] == 9).all()


def test_a_run_longer_than_the_kernel_takes_at_once(world: World) -> None:
    numbers = np.tile(np.arange(96, dtype=np.uint32), 20)
    assert (world.base.ram(numbers) == world.ram[numbers]).all()


def test_a_page_beyond_the_machine_is_refused(world: World) -> None:
    with pytest.raises(CorruptError, match="RAM page 96 is beyond the base's 96"):
        world.base.ram(np.array([1, 96], np.uint32))


def test_a_file_that_is_cut_is_found(world: World) -> None:
    short = os.memfd_create("short")
    try:
        os.truncate(short, 4096 * 10 + 5)
        base = replace(world.base, disk_fd=short)
        with pytest.raises(CorruptError, match="ends before disk block 12"):
            base.disk(np.array([9, 10, 11], np.uint32))
    finally:
        os.close(short)
