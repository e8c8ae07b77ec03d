"""Comparing two overlays of one base: which pages each brings, and whether they bring the same.

Both are applied to a sink that keeps digests instead of pages, so that two ways of saying the same
content count as equal. Memory: 20 bytes per page of each, beside what applying takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloudlet.overlay.apply import apply
from cloudlet.overlay.base import BasePages
from cloudlet.overlay.index import digest_rows
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import Numbers, PageBatch, Space
from cloudlet.overlay.reader import OverlayReader


@dataclass(frozen=True, slots=True)
class SpaceDifference:
    """Sorted page numbers: brought by one only, or by both with equal or different content."""

    only_first: Numbers
    only_second: Numbers
    equal: Numbers
    different: Numbers


@dataclass(frozen=True, slots=True)
class Difference:
    """How two overlays of one base differ; sizes in bytes."""

    ram: SpaceDifference
    disk: SpaceDifference
    device_state_equal: bool
    first_bytes: int
    second_bytes: int


def compare(first: OverlayReader, second: OverlayReader, base: BasePages) -> Difference:
    """Read both overlays and compare them.

    :raises MismatchError: one of them is for another base.
    :raises IntegrityError: one of them is truncated or corrupt.
    """
    one, other = _Digests(), _Digests()
    apply(first, base, one)
    apply(second, base, other)
    return Difference(
        _compare(one, other, Space.RAM),
        _compare(one, other, Space.DISK),
        one.device_state == other.device_state,
        first.header.file_bytes,
        second.header.file_bytes,
    )


class _Digests:
    """A sink that keeps the digest of each page."""

    def __init__(self) -> None:
        self.device_state = b""
        self._numbers: dict[Space, list[Numbers]] = {space: [] for space in Space}
        self._digests: dict[Space, list[bytes]] = {space: [] for space in Space}

    def begin(self, pages: PageMap) -> None:
        pass

    def pages(self, batch: PageBatch) -> None:
        self._numbers[batch.space].append(batch.numbers.copy())
        self._digests[batch.space].append(digest_rows(batch.data, range(batch.numbers.size)))

    def finish(self, device_state: bytes) -> None:
        self.device_state = device_state

    def sorted(self, space: Space) -> tuple[Numbers, NDArray[np.uint64]]:
        """Page numbers in order, and the digests as two columns."""
        numbers = np.concatenate([np.empty(0, np.uint32), *self._numbers[space]])
        order = np.argsort(numbers)
        digests = np.frombuffer(b"".join(self._digests[space]), np.uint64).reshape(-1, 2)
        return numbers[order], digests[order]


def _compare(one: _Digests, other: _Digests, space: Space) -> SpaceDifference:
    numbers, digests = one.sorted(space)
    others, other_digests = other.sorted(space)
    both, mine, theirs = np.intersect1d(numbers, others, assume_unique=True, return_indices=True)
    same = (digests[mine] == other_digests[theirs]).all(axis=1)
    return SpaceDifference(
        np.setdiff1d(numbers, others, assume_unique=True),
        np.setdiff1d(others, numbers, assume_unique=True),
        both[same],
        both[~same],
    )
