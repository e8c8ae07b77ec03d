"""Pages whose frame has come while literals that they refer to have not: numbers and references, no content.

Memory: 12 bytes for each page that waits, and one pass over them for each frame that comes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.pages import Numbers, Positions
from cloudlet.overlay.payload import Operation, PagePayload, oldest_reference

Starts = NDArray[np.int64]
"""Where pages begin, in bytes of the sequence of all literals: an earlier literal is a span like others."""

Here = NDArray[np.bool_]
"""Which literals have come."""


class Waiting:
    """The pages of one space that wait."""

    def __init__(self) -> None:
        self._numbers: Numbers = np.empty(0, np.uint32)
        self._starts: Starts = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._numbers.size

    def hold_back(self, payload: PagePayload, here: Here) -> PagePayload:
        """Keep those pages of a frame that must wait; the result is the frame without them.

        The frame's own literals are here.
        """
        # In file order nothing is missing, and this is all that it costs.
        if here[oldest_reference(payload.first_literal, len(payload.literals)) : payload.first_literal].all():
            return payload
        positions, starts = _references(payload)
        waits = ~_all_here(here, starts)
        if not waits.any():
            return payload
        self._numbers = np.concatenate((self._numbers, payload.numbers[positions[waits]]))
        self._starts = np.concatenate((self._starts, starts[waits]))
        return payload.without(positions[waits])

    def release(self, here: Here) -> tuple[Numbers, Starts]:
        """Take out the pages whose literals are all here: their numbers, and where they begin."""
        if not self._numbers.size:
            return self._numbers, self._starts
        ready = _all_here(here, self._starts)
        numbers, starts = self._numbers[ready], self._starts[ready]
        if numbers.size:
            self._numbers, self._starts = self._numbers[~ready], self._starts[~ready]
        return numbers, starts

    def literals_of(self, page: int) -> set[int]:
        """The one or two literals that a page is made of; none when it does not wait."""
        first, last = _first_and_last(self._starts[np.flatnonzero(self._numbers == page)])
        return {*first.tolist(), *last.tolist()}


def _first_and_last(starts: Starts) -> tuple[Starts, Starts]:
    """The literals that hold the first and the last byte of each page."""
    return starts // PAGE_BYTES, (starts + (PAGE_BYTES - 1)) // PAGE_BYTES


def _all_here(here: Here, starts: Starts) -> NDArray[np.bool_]:
    first, last = _first_and_last(starts)
    return np.asarray(here[first] & here[last])


def _references(payload: PagePayload) -> tuple[Positions, Starts]:
    """The pages that are made of literals, of whichever frame, and where each begins."""
    positions, starts = [np.empty(0, np.intp)], [np.empty(0, np.int64)]
    for operation, (mine, references) in payload.by_operation().items():
        if operation is Operation.EARLIER:
            positions.append(mine)
            starts.append(references.astype(np.int64) * PAGE_BYTES)
        elif operation is Operation.SPAN:
            positions.append(mine)
            starts.append(payload.span_starts(references))
    return np.concatenate(positions), np.concatenate(starts)
