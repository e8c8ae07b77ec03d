"""The state file of an instance: what is in each page, and how far the start is. 4096 bytes, then pages.

| offset | type | written by | what |
|---|---|---|---|
| 0 | 8 bytes, u32, u32 | owner, once | ``cl-pages``, version, number of files |
| 16 | u64, u64 | owner, once | pages of file 0, of file 1 |
| 32 | u64 | owner | pages that come with the app |
| 40 | u64 | owner | of them not here yet |
| 48 | u64, u64 | owner | bytes of the overlay in all, received |
| 64 | u64 | owner | 1 when all is here |
| 128 | u64, u64 | server | reads answered; stalls, that is reads that had to wait |
| 144 | f64, f64 | server | the longest stall, and all of them together, in seconds |
| 160 | f64 | server | since when the longest-waiting read waits, on CLOCK_MONOTONIC; 0.0: none waits |
| 168 | u64 | server | reads that wait now |
| 4096 | bytes | owner | one for each page of file 0, then of file 1 |

Numbers are little-endian. The owner reads and writes it by system calls and only the server maps it:
whoever shortens a file ends those who have it mapped.
"""

import mmap
import struct
import sys

PAGE_BYTES = 4096
PAGE_SHIFT = 12
NAME = "pages.state"
MAGIC, VERSION = b"cl-pages", 1
HEADER_BYTES = 4096

BASE, MISSING, HERE = 0, 1, 2
"""A page is the base's, has not come yet, or is in the app's own file."""

SHAPE = struct.Struct("<8sIIQQ")
OWNERS, OWNERS_AT = struct.Struct("<5Q"), 32
SERVERS, SERVERS_AT = struct.Struct("<QQdddQ"), 128
_COMPLETE_AT = 64

# Indexes into the server's numbers, which are eight bytes each.
_READS, _STALLS, _LONGEST, _WAITED, _SINCE, _WAITING = range(6)


class StateFile:
    """The state file as the server has it mapped."""

    def __init__(self, descriptor: int) -> None:
        whole = memoryview(mmap.mmap(descriptor, 0))
        magic, version, files, *pages = SHAPE.unpack_from(whole)
        if (magic, version) != (MAGIC, VERSION) or sys.byteorder != "little":
            raise ValueError("this is no state file for this server")
        self.states: list[memoryview] = []
        """One byte for each page, of each file."""
        start = HEADER_BYTES
        for count in pages[:files]:
            self.states.append(whole[start : start + count])
            start += count
        self._complete = whole[_COMPLETE_AT : _COMPLETE_AT + 8].cast("Q")
        # Casts, because these write eight bytes at once, and others read meanwhile.
        numbers = whole[SERVERS_AT : SERVERS_AT + SERVERS.size]
        self._counts, self._times = numbers.cast("Q"), numbers.cast("d")

    @property
    def complete(self) -> bool:
        """Whether all has come, as the owner says."""
        return self._complete[0] != 0

    def count_read(self) -> None:
        """A read was answered."""
        self._counts[_READS] += 1

    def count_stall(self, seconds: float) -> None:
        """A read that had to wait was answered."""
        self._counts[_STALLS] += 1
        self._times[_WAITED] += seconds
        self._times[_LONGEST] = max(self._times[_LONGEST], seconds)

    def show_waiting(self, count: int, since: float) -> None:
        """So many reads wait, the first of them since then."""
        self._counts[_WAITING] = count
        self._times[_SINCE] = since
