"""Uploads: bytes that come from a client, perhaps in several tries, until there is a whole file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cloudlet.errors import ConflictError, TruncatedError
from cloudlet.service.alone import Alone

_PIECE = 256 << 10


class Body(Protocol):
    """Bytes that a client sends; none at their end, and fewer than it promised when it was cut off."""

    def read(self, size: int, /) -> bytes: ...


class Uploads:
    """Uploads of one kind; ``place`` says where the file of a row is collected."""

    def __init__(self, place: Callable[[str], Path], alone: Alone) -> None:
        self._place = place
        self._alone = alone

    def received(self, key: str) -> int:
        """How many bytes are here: where the next try has to go on."""
        try:
            return self._place(key).stat().st_size
        except FileNotFoundError:
            return 0

    def check(self, key: str, offset: int) -> None:
        """Whether a try may go on there.

        :raises ConflictError: it may not.
        """
        if offset != (here := self.received(key)):
            raise ConflictError(f"{here} bytes are here, not {offset}", hint="ask with HEAD where to go on")

    def take(self, key: str, body: Body, offset: int, length: int) -> Path:
        """Take the bytes from ``offset`` to the end; the file, which is whole.

        :raises ConflictError: the last try did not end there.
        :raises TruncatedError: the client was cut off; what came is kept.
        """
        self.check(key, offset)
        file = self._place(key)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            left = length
            while left:
                piece = memoryview(body.read(min(_PIECE, left)))
                if not piece:
                    raise TruncatedError(
                        f"{left} of {length} bytes did not come", hint="ask with HEAD where to go on"
                    )
                left -= len(piece)
                while piece:
                    piece = piece[os.write(descriptor, piece) :]
        finally:
            os.close(descriptor)
        return file

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Be the only one who uploads this.

        :raises ConflictError: somebody does.
        """
        with self._alone.at_once(f"upload {key}") as first:
            if not first:
                raise ConflictError("it is being uploaded", hint="wait, or create another")
            yield
