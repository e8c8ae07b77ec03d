"""What a guest waits for, told as it comes and to whoever has not heard of it."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from cloudlet.control.filling import WantedPages, Wish
from cloudlet.overlay.pages import PageBatch, Space
from tests.unit.overlay.world import MACHINE


def numbers(*pages: int) -> np.ndarray:
    return np.array(pages, np.uint32)


def came(*pages: int, space: Space = Space.RAM) -> PageBatch:
    return PageBatch(space, numbers(*pages), np.zeros((len(pages), 4096), np.uint8))


@pytest.fixture
def pages() -> WantedPages:
    made = WantedPages(replace(MACHINE))
    made.lack(numbers(3, 4, 5, 90))
    return made


def test_only_what_is_missing_is_wanted(pages: WantedPages) -> None:
    pages.want(Space.RAM, numbers(2, 3, 6))
    pages.want(Space.DISK, numbers(4))
    assert pages.ask(0, 0) == Wish(missing=4, pages=[3], after=1)


def test_it_is_told_once_unless_it_is_asked_for_again(pages: WantedPages) -> None:
    pages.want(Space.RAM, numbers(5))
    first = pages.ask(0, 0)
    assert first.pages == [5]
    assert pages.ask(first.after, 0).pages == []
    assert pages.ask(0, 0) == first, "the answer may have been lost"


def test_what_has_come_is_not_wanted_any_more(pages: WantedPages) -> None:
    pages.want(Space.RAM, numbers(3, 4))
    pages.came(came(4))
    pages.came(came(3, space=Space.DISK))
    assert pages.ask(0, 0) == Wish(missing=3, pages=[3], after=2)


def test_who_asks_waits_until_there_is_something(pages: WantedPages) -> None:
    heard: list[Wish] = []
    asking = threading.Thread(target=lambda: heard.append(pages.ask(0, 20.0)))
    asking.start()
    pages.want(Space.RAM, numbers(90))
    asking.join(20.0)
    assert heard == [Wish(missing=4, pages=[90], after=1)]


def test_a_change_of_another_kind_is_an_answer_too(pages: WantedPages) -> None:
    pages.note()
    assert pages.ask(0, 20.0) == Wish(missing=4, pages=[], after=1)
