"""The order in which pages are first read, as a file of (u8 file, u32 page), little-endian."""

import os
import struct

from cloudlet.pageserver.state import PAGE_SHIFT

_ENTRY = struct.Struct("<BI")
_BUFFER_BYTES = 1 << 16


class FirstTouches:
    """Appends each page of each file once to ``target``, a regular file."""

    def __init__(self, target: int, pages: list[int]) -> None:
        self._target = target
        self._seen = [bytearray(count) for count in pages]
        self._buffer = bytearray()

    def note(self, number: int, offset: int, size: int) -> None:
        """A read of a file has come."""
        seen = self._seen[number]
        for page in range(offset >> PAGE_SHIFT, ((offset + size - 1) >> PAGE_SHIFT) + 1):
            if not seen[page]:
                seen[page] = 1
                self._buffer += _ENTRY.pack(number, page)
        if len(self._buffer) >= _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is in the buffer."""
        while self._buffer:
            del self._buffer[: os.write(self._target, self._buffer)]
