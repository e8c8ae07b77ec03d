"""The order of the pages that several trials have touched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cloudlet.control.order import Page, Touched, almost_the_base, merged, stretches
from cloudlet.overlay.pages import PageSource, Space
from tests.unit.overlay.world import World, near, noise, page, source


def ram(*numbers: int) -> list[Page]:
    return [(Space.RAM, number) for number in numbers]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def test_one_trial_is_its_own_order() -> None:
    assert merged([Touched(ram(5, 3, 9), 3)], ()) == ram(5, 3, 9)


def test_the_middle_place_of_a_page_counts() -> None:
    trials = [Touched(ram(1, 2, 3, 4), 4), Touched(ram(4, 1, 2, 3), 4), Touched(ram(1, 2, 3, 4), 4)]
    assert merged(trials, ()) == ram(1, 2, 3, 4)


def test_what_one_trial_touched_stands_where_that_needed_it() -> None:
    trials = [Touched(ram(1, 2, 3, 4), 4), Touched(ram(1, 7, 2, 3, 4), 5), Touched(ram(1, 2, 3, 4), 4)]
    assert merged(trials, ()) == ram(1, 2, 7, 3, 4)


def test_behind_the_answer_what_costs_little_comes_first() -> None:
    touched = Touched(ram(1, 2, 3, 4, 5, 6), 2)
    assert merged([touched], ram(1, 4, 6)) == ram(1, 2, 4, 6, 3, 5)


def test_before_the_answer_it_does_not() -> None:
    assert merged([Touched(ram(3, 2, 1), 3)], ram(1)) == ram(3, 2, 1)


def test_what_most_trials_needed_for_the_answer_is_before_it() -> None:
    before, behind = Touched(ram(1, 2, 3), 2), Touched(ram(1, 3, 2), 2)
    assert merged([before, before, behind], ()) == ram(1, 2, 3)


def test_pages_that_are_almost_the_bases(world: World) -> None:
    ram_source = source({3: near(world.ram[3]), 4: noise(1)[0], 5: page(77)})
    sources = {Space.RAM: ram_source, Space.DISK: source({2: near(world.disk[2])})}
    touched = [*ram(4, 3), (Space.DISK, 2)]
    assert almost_the_base([Touched(touched, 0)], sources, world.base) == {*ram(3), (Space.DISK, 2)}


def test_nothing_touched_is_nothing(world: World) -> None:
    sources = {Space.RAM: source({3: page(1)}), Space.DISK: PageSource.empty()}
    assert almost_the_base([Touched([], 0)], sources, world.base) == set()
    assert merged([Touched([], 0)], ()) == []


def test_stretches_of_one_space() -> None:
    order = [*ram(4, 3), (Space.DISK, 2), *ram(9)]
    found = [(space, numbers.tolist()) for space, numbers in stretches(order)]
    assert found == [(Space.RAM, [4, 3]), (Space.DISK, [2]), (Space.RAM, [9])]
