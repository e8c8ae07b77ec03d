from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cloudlet.errors import MismatchError
from cloudlet.overlay.diff import compare
from cloudlet.overlay.pages import Space

from .world import World, page, unsigned


def test_pages_are_compared_by_content(world: World) -> None:
    first = {1: page(1), 2: page(2), 3: page(3), 4: page(1), 5: np.zeros(4096, np.uint8)}
    second = {2: page(2), 3: page(9), 4: page(1), 5: np.zeros(4096, np.uint8), 6: page(6)}
    one = world.create(first, {7: page(5)}, hot=[(Space.RAM, np.array([4], np.uint32))])[0]
    other = world.create(second, {7: page(5), 8: page(5)}, device=b"another")[0]
    found = compare(unsigned(one), unsigned(other), world.base)
    assert found.ram.only_first.tolist() == [1]
    assert found.ram.only_second.tolist() == [6]
    assert found.ram.equal.tolist() == [2, 4, 5]
    assert found.ram.different.tolist() == [3]
    assert found.disk.equal.tolist() == [7]
    assert found.disk.only_second.tolist() == [8]
    assert not found.device_state_equal
    assert (found.first_bytes, found.second_bytes) == (len(one), len(other))


def test_an_overlay_is_equal_to_itself(world: World, small: bytes) -> None:
    found = compare(unsigned(small), unsigned(small), world.base)
    assert found.device_state_equal
    for space in (found.ram, found.disk):
        assert space.equal.size > 0
        assert space.only_first.size + space.only_second.size + space.different.size == 0


def test_both_must_be_of_the_base(world: World, small: bytes) -> None:
    with pytest.raises(MismatchError):
        compare(unsigned(small), unsigned(small), replace(world.base, identity="cd" * 32))
