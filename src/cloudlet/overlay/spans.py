"""Finding content that came before at another place within a page.

An app that has read a file holds it twice: in the guest's page cache and on the disk at page borders,
and in its own buffers some bytes further on, behind an allocator's header. Comparing whole pages finds
the first, not the second. Here each literal leaves an *anchor*: the one of its 512 words whose mixed
value is the largest, and where it is. A page that holds the same stretch of content shifted by a
multiple of eight bytes has, nearly always, the same largest word; the bytes around it are then compared.
Once a page is found, the next one is tried right behind it, without an anchor.

The literals of the window are kept in memory for that: 64 MiB at most, touched as they come.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.limits import WINDOW_LITERALS
from cloudlet.overlay.pages import Rows

_WORD = 8
_MIXER = np.uint64(0x9E3779B97F4A7C15)
"""An odd number without structure: it makes the largest product any word's, whatever the content."""


class SpanFinder:
    """The literals so far, as one sequence of bytes of which the last ``window`` pages are kept."""

    def __init__(self, window: int = WINDOW_LITERALS) -> None:
        self._window = window
        self._ring: Rows = np.empty((window, PAGE_BYTES), np.uint8)
        self._bytes = self._ring.reshape(-1)
        self._end = 0
        self._anchors: dict[int, int] = {}
        self._order: deque[int | None] = deque()
        self._expected = -1

    def anchors(self, rows: Rows) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
        """The anchor of each page: its mixed value, and where in the page it is, in bytes."""
        mixed = rows.view(np.uint64) * _MIXER
        at = mixed.argmax(axis=1)
        return mixed[np.arange(len(rows)), at], at * _WORD

    def find(self, row: Rows, anchor: int, offset: int, oldest: int) -> int | None:
        """Where the content of a page begins in the sequence, not before byte ``oldest``; None if nowhere."""
        content = row.tobytes()
        for start in (self._expected, self._anchors.get(anchor, -1) - offset):
            if oldest <= start <= self._end - PAGE_BYTES and self._at(start) == content:
                self._expected = start + PAGE_BYTES
                return start
        self._expected = -1
        return None

    def add(self, row: Rows, anchor: int | None = None, offset: int = 0) -> None:
        """The next literal; one without an anchor is not looked for."""
        if len(self._order) == self._window:
            first = self._end - self._window * PAGE_BYTES
            forgotten = self._order.popleft()
            if forgotten is not None and first <= self._anchors.get(forgotten, -1) < first + PAGE_BYTES:
                del self._anchors[forgotten]
        self._order.append(anchor)
        if anchor is not None:
            self._anchors[anchor] = self._end + offset
        self._ring[self._end // PAGE_BYTES % self._window] = row
        self._end += PAGE_BYTES

    def _at(self, start: int) -> bytes:
        """A page's worth of the sequence from byte ``start``."""
        at = start % self._bytes.size
        content = self._bytes[at : at + PAGE_BYTES].tobytes()
        return content + self._bytes[: PAGE_BYTES - len(content)].tobytes()


class NoSpans:
    """Finds nothing and keeps nothing: for who would rather send a page than look for it."""

    def anchors(self, rows: Rows) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
        """No page has an anchor."""
        return np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.intp)

    def find(self, row: Rows, anchor: int, offset: int, oldest: int) -> int | None:
        """Nowhere."""
        return None

    def add(self, row: Rows, anchor: int | None = None, offset: int = 0) -> None:
        """Nothing is kept."""
