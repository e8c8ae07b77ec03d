"""Being alone with something: locks by name, for all threads and processes of a site.

They are locks of one byte each in one file (``fcntl(2)``, open file description locks): the kernel frees
those of a process that is killed, they leave nothing behind, and threads are kept apart like processes.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path

_FLOCK = struct.Struct("hhqqi4x")
"""``struct flock`` of 64-bit Linux: type, whence, start, length, process."""


class Alone:
    """The locks of a site, in a file of its state folder."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextmanager
    def with_(self, what: str) -> Iterator[None]:
        """Be alone with something: waits for who is. Not for one who is already."""
        with self._locked(what, fcntl.F_OFD_SETLKW):
            yield

    @contextmanager
    def at_once(self, what: str) -> Iterator[bool]:
        """The same without waiting; whether one is alone."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._locked(what, fcntl.F_OFD_SETLK))
            except (BlockingIOError, PermissionError):
                yield False
            else:
                yield True

    @contextmanager
    def _locked(self, what: str, how: int) -> Iterator[None]:
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            place = int.from_bytes(blake2b(what.encode(), digest_size=8).digest()) >> 2
            fcntl.fcntl(descriptor, how, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0))
            yield
        finally:
            os.close(descriptor)
