"""What a source reads from: the contract, and what fulfils it on this machine: a pipe and a file."""

from __future__ import annotations

import os
import threading
from io import FileIO
from typing import BinaryIO, Protocol

from cloudlet.errors import FailedError, TruncatedError
from cloudlet.transfer.link import Link

_PIECE = 64 << 10


class Origin(Protocol):
    """What reads a source; all but ``fetch`` is for the thread that reads ahead."""

    offset: int
    ranged: bool

    @property
    def total(self) -> int | None: ...
    def read(self, size: int, /) -> bytes: ...
    def seek(self, offset: int) -> None: ...
    def fetch(self, offset: int, size: int) -> bytes: ...
    def close(self) -> None: ...


class Pipe:
    """What can be read once, in order."""

    ranged = False
    total: int | None = None

    def __init__(self, name: str, raw: BinaryIO | FileIO, link: Link, *, keep: bool = False) -> None:
        """A pipe at its beginning; with ``keep`` it is somebody else's to close."""
        self.offset = 0
        self._name = name
        self._raw = raw
        self._link = link
        self._keep = keep

    def read(self, size: int, /) -> bytes:
        piece = self._raw.read(self._link.turn(size)) or b""
        self._link.came(len(piece))
        self.offset += len(piece)
        return piece

    def seek(self, offset: int) -> None:
        if offset < self.offset:
            raise FailedError(f"{self._name} does not go back", hint="give a file or a URL")
        while self.offset < offset and self.read(min(offset - self.offset, _PIECE)):
            pass

    def fetch(self, offset: int, size: int) -> bytes:
        raise FailedError(f"{self._name} comes in order only", hint="give a file or a URL")

    def close(self) -> None:
        if not self._keep:
            self._raw.close()


class File(Pipe):
    """A regular file."""

    ranged = True

    def __init__(self, name: str, file: FileIO, link: Link) -> None:
        super().__init__(name, file, link)
        self.total = os.fstat(file.fileno()).st_size
        self._file = file
        self._open = threading.Lock()
        """Held while the file is read out of order: its descriptor must not become another's meanwhile."""

    def seek(self, offset: int) -> None:
        self.offset = self._file.seek(offset)

    def fetch(self, offset: int, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            with self._open:
                if self._file.closed:
                    raise FailedError(f"{self._name} was closed while it was read", hint="try again")
                piece = os.pread(self._file.fileno(), self._link.turn(size - len(data)), offset + len(data))
            if not piece:
                raise TruncatedError(f"{self._name} ends before byte {offset + size}")
            self._link.came(len(piece))
            data += piece
        return bytes(data)

    def close(self) -> None:
        with self._open:
            self._file.close()
