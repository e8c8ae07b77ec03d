"""When a machine resumes: every reason for each of the three starts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from cloudlet.control.start import FULL_SECONDS, Choice, Start, choose
from cloudlet.overlay.pages import Space
from cloudlet.overlay.root import Root
from tests.unit.overlay.world import World, page, unsigned

OBSTACLE = "/dev/fuse is missing: modprobe fuse"
RATE = 1e6
"""Bytes per second."""


@pytest.fixture(scope="module")
def root() -> Root:
    """The root of an overlay that says what is hot."""
    world = World()
    try:
        hot = [(Space.RAM, np.array([3], np.uint32))]
        data, _ = world.create({3: page(3), 5: page(5)}, {}, hot=hot)
    finally:
        world.close()
    return unsigned(data).root


def test_what_is_asked_for_is_done(root: Root) -> None:
    for start in Start:
        assert choose(start, root, 10**9, RATE, "") == Choice(start, "it was asked for")


@pytest.mark.parametrize("asked", [None, Start.HOT, Start.READY])
def test_where_it_cannot_be_early_it_is_full_and_says_what_would_help(
    asked: Start | None, root: Root
) -> None:
    choice = choose(asked, root, 10**9, RATE, OBSTACLE)
    assert choice == Choice(Start.FULL, "this site cannot start early", OBSTACLE)


def test_full_needs_no_reason(root: Root) -> None:
    assert choose(Start.FULL, root, 10**9, RATE, OBSTACLE) == Choice(Start.FULL, "it was asked for")


def test_an_overlay_that_does_not_say_what_is_first_waits_for_all(root: Root) -> None:
    plain = replace(root, hot_frames=())
    choice = choose(None, plain, 10**9, RATE, "")
    assert (choice.start, choice.why) == (Start.FULL, "the overlay does not say what is needed first")
    assert "cloudlet overlay reorder" in choice.hint
    assert choose(Start.HOT, plain, 10**9, RATE, "") == Choice(Start.HOT, "it was asked for")


@pytest.mark.parametrize(
    ("rest", "rate", "start"),
    [
        (int(RATE * FULL_SECONDS * 0.9), RATE, Start.FULL),
        (int(RATE * FULL_SECONDS * 1.1), RATE, Start.HOT),
        (10**9, math.inf, Start.FULL),
        (10**9, None, Start.HOT),
        (0, None, Start.HOT),
    ],
    ids=["soon", "later", "local", "unknown", "little and unknown"],
)
def test_the_rest_decides(rest: int, rate: float | None, start: Start, root: Root) -> None:
    choice = choose(None, root, rest, rate, "")
    assert (choice.start, choice.hint) == (start, "")


def test_what_is_here_still_has_to_be_built(root: Root) -> None:
    many = replace(root, totals=replace(root.totals, ram_pages=1 << 20))
    assert choose(None, many, 0, math.inf, "").start is Start.HOT
