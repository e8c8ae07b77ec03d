"""What is in a served file: its pages' states, and two files that hold the bytes."""

import os

from cloudlet.pageserver.state import BASE, HERE, MISSING, PAGE_SHIFT


class Content:
    """A served file of ``size`` bytes; ``base`` is -1 where a page of the base is all zeros."""

    def __init__(self, states: memoryview, size: int, delta: int, base: int) -> None:
        self.size = size
        self._states = states
        self._files = {BASE: base, HERE: delta}

    def missing(self, offset: int, size: int) -> tuple[int, int] | None:
        """The first page of a part that has not come, and how many pages from there to the last such."""
        first = offset >> PAGE_SHIFT
        kinds = bytes(self._states[first : ((offset + size - 1) >> PAGE_SHIFT) + 1])
        at = kinds.find(MISSING)
        return None if at < 0 else (first + at, kinds.rfind(MISSING) - at + 1)

    def present(self, first: int, after: int) -> list[tuple[int, int]]:
        """Those pages that have come, as ranges."""
        kinds = bytes(self._states[first:after])
        ranges, at = [], 0
        while at < len(kinds):
            end = kinds.find(MISSING, at)
            end = len(kinds) if end < 0 else end
            if end > at:
                ranges.append((first + at, first + end))
            at = end + 1
        return ranges

    def read(self, offset: int, size: int) -> bytes | memoryview:
        """A part of which nothing is missing; one system call for each run of pages of a kind."""
        first = offset >> PAGE_SHIFT
        kinds = bytes(self._states[first : ((offset + size - 1) >> PAGE_SHIFT) + 1])
        file = self._files[kinds[0]]
        if file >= 0 and kinds.count(kinds[0]) == len(kinds):
            content = os.pread(file, size, offset)
            if len(content) == size:
                return content
        room = memoryview(bytearray(size))
        at = 0
        while at < size:
            page = ((offset + at) >> PAGE_SHIFT) - first
            change = kinds.find(BASE if kinds[page] == HERE else HERE, page)
            end = size if change < 0 else ((first + change) << PAGE_SHIFT) - offset
            if (file := self._files[kinds[page]]) >= 0:
                _fill(file, room[at:end], offset + at)
            at = end
        return room


def _fill(file: int, room: memoryview, offset: int) -> None:
    """Read what the file has; what is behind its end stays zeros."""
    while room:
        count = os.preadv(file, [room], offset)
        if count == 0:
            return
        room, offset = room[count:], offset + count
