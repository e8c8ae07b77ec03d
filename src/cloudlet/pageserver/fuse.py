"""A FUSE connection whose root is a regular file, as the kernel speaks it on ``/dev/fuse``.

Source: ``include/uapi/linux/fuse.h``, protocol 7.31. All that is not about content is answered here.
What a file that is only read does not need is refused with ENOSYS, after which the kernel asks no more.
"""

import errno
import os
import struct

READ, RELEASE, INTERRUPT = 15, 18, 36
DIRECT_IO, KEEP_CACHE = 1 << 0, 1 << 1
"""How a file is opened: every read comes here, or pages stay in the kernel's cache."""

_IN, _OUT = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_ATTRIBUTES = struct.Struct("<QIIQQQQQQIIIIIIIIII")
_OPEN_OUT, _READ_IN = struct.Struct("<QII"), struct.Struct("<QQI")
_STATFS_OUT = struct.Struct("<QQQQQIIII24x")
_UNIQUE = struct.Struct("<Q")
_ASYNC_READ, _MAX_PAGES = 1 << 0, 1 << 22
_MOST_WRITTEN = 4096  # the least that the kernel takes: nothing is written
_BUFFER_BYTES = 8192  # the least that the kernel takes
_MOST_WAITING = 65535  # reads in the background, which the kernel would otherwise stop at 12
_MOST_PAGES = 256
_FOREVER = 1 << 30  # seconds
_NO_ANSWER = (2, INTERRUPT, 42)  # FORGET, BATCH_FORGET
# Closing the file asks nothing here. The server has an opening of it itself, and must not wait for its
# own answer, least of all while it ends.
_NO_FLUSH = 1 << 5

Request = tuple[int, int, int, bytes]
"""Operation, number by which it is answered, thread that waits for it, and what belongs to it."""


class EndedError(Exception):
    """Nobody has the file any more."""


class Connection:
    """One served file of ``size`` bytes, as seen from ``/dev/fuse``."""

    def __init__(self, device: int, size: int, how: int) -> None:
        self.device = device
        self.opened = 0
        """Openings of the file that somebody still has, or has mapped."""
        self._how = how
        self._attributes = _ATTRIBUTES.pack(
            *(_FOREVER, 0, 0),  # how long they are true
            *(1, size, size // 512, *(0,) * 6, 0o100444, 1, 0, 0, 0, 4096, 0),
        )

    def next(self) -> Request | None:
        """The next request; None if there is none now.

        :raises EndedError: there will be none.
        """
        try:
            data = os.read(self.device, _BUFFER_BYTES)
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                raise EndedError from error
            if error.errno in (errno.EAGAIN, errno.ENOENT):  # the latter: taken back meanwhile
                return None
            raise
        _, operation, unique, _, _, _, thread, _ = _IN.unpack_from(data)
        return operation, unique, thread, data[_IN.size :]

    def answer(self, unique: int, content: bytes | memoryview = b"") -> None:
        """Answer a request."""
        self._write(unique, 0, content)

    def refuse(self, unique: int, number: int) -> None:
        """Answer a request with an error."""
        self._write(unique, number, b"")

    def settle(self, request: Request) -> None:
        """Answer a request that is not about content."""
        operation, unique, _, body = request
        match operation:
            case 26:  # INIT
                _, _, _, offered = struct.unpack_from("<4I", body)
                flags = offered & (_ASYNC_READ | _MAX_PAGES)
                limits = (_MOST_WAITING, _MOST_WAITING, _MOST_WRITTEN, 1, _MOST_PAGES, 0, 0)
                self.answer(unique, _INIT_OUT.pack(7, 31, 0, flags, *limits))
            case 3:  # GETATTR
                self.answer(unique, self._attributes)
            case 14:  # OPEN
                self.opened += 1
                self.answer(unique, _OPEN_OUT.pack(0, self._how | _NO_FLUSH, 0))
            case 18:  # RELEASE
                self.opened -= 1
                self.answer(unique)
            case 17:  # STATFS
                self.answer(unique, _STATFS_OUT.pack(0, 0, 0, 0, 0, 4096, 255, 4096, 0))
            case _ if operation not in _NO_ANSWER:
                self.refuse(unique, errno.ENOSYS)

    def _write(self, unique: int, number: int, content: bytes | memoryview) -> None:
        header = _OUT.pack(_OUT.size + len(content), -number, unique)
        try:
            os.writev(self.device, (header, content))
        except OSError as error:
            # Who asked does not wait any more, or nobody does.
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):
                raise


def part_of(body: bytes) -> tuple[int, int]:
    """Offset and size, in bytes, that a READ asks for."""
    _, offset, size = _READ_IN.unpack_from(body)
    return offset, size


def interrupted(body: bytes) -> int:
    """The number of the request that an INTERRUPT is about."""
    return int(_UNIQUE.unpack_from(body)[0])
