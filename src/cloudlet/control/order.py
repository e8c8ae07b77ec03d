"""The order in which an overlay's pages are written, from what several trials have touched.

Up to the app's answer it is the order in which that needs them: nothing else is on the link then. What
comes behind depends on chance, such as where a guest's allocator stands when a client comes; so there the
pages come first that cost little to send. Whoever finds one of them later waits for a round trip, which is
longer than all of them take.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cloudlet.overlay.base import BasePages
from cloudlet.overlay.pages import PageSource, Space
from cloudlet.overlay.plan import Hot

SMALL_BYTES = 512
"""Bytes in which a page may differ from the base's and still count as one that costs little to send."""

Page = tuple[Space, int]


@dataclass(frozen=True, slots=True)
class Touched:
    """The pages that one trial has touched, in this order, and how many of them before the app answered."""

    pages: Sequence[Page]
    answered: int


def merged(trials: Sequence[Touched], small: Collection[Page]) -> list[Page]:
    """All pages, each once, by the median of its places in the trials that touched it.

    A page that few trials touched stands where those needed it.

    :param small: those that come first behind the app's answer.
    """
    places: dict[Page, list[tuple[int, bool]]] = {}
    for trial in trials:
        for place, page in enumerate(trial.pages):
            places.setdefault(page, []).append((place, place >= trial.answered))

    def key(page: Page) -> tuple[bool, bool, int]:
        place, later = statistics.median_low(places[page])
        return later, later and page not in small, place

    return sorted(places, key=key)


def almost_the_base(
    trials: Sequence[Touched], sources: Mapping[Space, PageSource], base: BasePages
) -> set[Page]:
    """Those of the touched pages that differ from the base's in few bytes."""
    touched = {page for trial in trials for page in trial.pages}
    small: set[Page] = set()
    for space, source in sources.items():
        numbers = np.array(sorted(number for of, number in touched if of is space), np.uint32)
        rows = source.data[np.searchsorted(source.numbers, numbers)]
        differ = np.count_nonzero(rows != base.read(space, numbers), axis=1)
        small.update((space, number) for number in numbers[differ <= SMALL_BYTES].tolist())
    return small


def stretches(order: Sequence[Page]) -> Hot:
    """An order as stretches of one space."""
    found: list[tuple[Space, list[int]]] = []
    for space, number in order:
        if not found or found[-1][0] is not space:
            found.append((space, []))
        found[-1][1].append(number)
    return [(space, np.array(numbers, np.uint32)) for space, numbers in found]
