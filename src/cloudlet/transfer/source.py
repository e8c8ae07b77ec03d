"""Where an overlay's bytes come from: a file, standard input, or a web server, at a limited rate or not.

They come in order, as a stream; and where the source can do that, single ranges come beside it, out of
order. A thread reads the stream ahead into a bounded queue, so that receiving overlaps with what is done
with the bytes. Nothing here fills a buffer before it hands out what has come: a slow pipe's first bytes
are of use at once.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Protocol

from cloudlet.errors import FailedError, NotFoundError, RefusedError, UsageError
from cloudlet.transfer.download import Download
from cloudlet.transfer.link import Link
from cloudlet.transfer.networks import EVERYWHERE, Networks
from cloudlet.transfer.origin import File, Origin, Pipe

PATIENCE_SECONDS = 60.0
_PIECE = 64 << 10
_AHEAD = 4 << 20
"""Bytes between the link and its user."""


class Bytes(Protocol):
    """A stream of bytes that ends with an empty read."""

    def read(self, size: int, /) -> bytes: ...


@contextmanager
def open_source(
    where: str,
    standard_input: BinaryIO,
    rate: float | None = None,
    *,
    patience: float = PATIENCE_SECONDS,
    networks: Networks = EVERYWHERE,
) -> Iterator[Source]:
    """The bytes at ``where``: a path, an http(s) URL, or ``-`` for standard input.

    :param rate: bytes per second at most, of the stream and of ranges together.
    :param patience: seconds without a single byte from a web server after which it is an error. Until then
        what failed is tried again. A pipe is waited for however long it takes: who writes it has its reasons.
    :param networks: where a URL may lead.
    """
    if where.partition("://")[0].lower() in ("http", "https"):
        link = Link(rate)
        origin: Origin = Download(where, link, patience, networks)
    elif where == "-":
        link = Link(rate)
        # Not the buffer: a thread that waits in it when the program ends would hold its lock.
        origin = Pipe("standard input", getattr(standard_input, "raw", standard_input), link, keep=True)
    else:
        file = _open_file(Path(where))
        regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        link = Link(rate, local=regular)
        origin = File(where, file, link) if regular else Pipe(where, file, link)
    source = Source(origin, link)
    try:
        yield source
    finally:
        source.close()


def _open_file(path: Path) -> FileIO:
    try:
        return FileIO(path)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is not there") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path} is a folder") from error
    except PermissionError as error:
        raise RefusedError(f"{path} may not be read") from error


class Source:
    """A stream that is read ahead, which can go on elsewhere, and single ranges beside it.

    Only :meth:`fetch`, :meth:`rate`, ``received`` and :meth:`close` are for other threads than the one
    that reads. The threads that wait for a server close what they read: nobody waits for them at an end.
    """

    def __init__(self, origin: Origin, link: Link) -> None:
        self.offset = 0
        """Of the byte that :meth:`read` gives next."""
        self._origin = origin
        self._link = link
        self._changed = threading.Condition()
        self._pieces: deque[memoryview] = deque()
        self._ahead = 0
        self._sought = False
        self._ended = False
        self._problem: Exception | None = None
        threading.Thread(target=self._run, name="read-ahead", daemon=True).start()

    def read(self, size: int, /) -> bytes:
        """The next bytes, as many as have come and at most ``size``; none at the end.

        :raises CloudletError: they do not come, or the source was closed.
        """
        with self._changed:
            while not (self._pieces or self._ended or self._link.closed.is_set()):
                self._changed.wait()
            if self._link.closed.is_set():
                raise self._was_closed()
            if self._pieces:
                return bytes(self._next(size))
            if self._problem:
                raise self._problem
            return b""

    def seek(self, offset: int) -> None:
        """Let the stream go on at ``offset``.

        What has come already is dropped up to there. A little that is still to come before it is read and
        thrown away (``download.SKIP_BYTES``); for more, and to go back, a ranged source is asked for it anew.
        After an error, also for where the stream stands, it is tried again. Where it cannot be done,
        :meth:`read` says so.
        """
        with self._changed:
            while self._pieces and self.offset < offset:
                self._next(offset - self.offset)
            if offset == self.offset and (self._pieces or not self._problem):
                return
            self._pieces.clear()
            self._ahead = 0
            self.offset = offset
            self._sought, self._ended, self._problem = True, False, None
            self._changed.notify_all()

    @property
    def ranged(self) -> bool:
        """Whether :meth:`fetch` can work: a file, or a server that said so when it first answered."""
        return self._origin.ranged

    @property
    def total(self) -> int | None:
        """Its size in bytes, where that is known; of what a server has, when the first bytes have come."""
        return self._origin.total

    def fetch(self, offset: int, size: int) -> bytes:
        """Exactly these bytes, while the stream goes on; one fetch at a time.

        :raises FailedError: the source gives no ranges, or wrong ones, or they do not come, or it was closed.
        :raises TruncatedError: the source ends before, or changed.
        """
        if self._link.closed.is_set():
            raise self._was_closed()
        found: list[bytes | Exception] = []

        def run() -> None:
            try:
                result: bytes | Exception = self._origin.fetch(offset, size)
            except Exception as error:  # handed over, and raised below
                result = error
            with self._changed:
                found.append(result)
                self._changed.notify_all()

        # In a thread of its own, which is left behind when the source is closed.
        threading.Thread(target=run, name="fetch", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: found or self._link.closed.is_set())
            if not found:
                raise self._was_closed()
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    @property
    def received(self) -> int:
        """Bytes that came in all, thrown away or not."""
        return self._link.received

    def rate(self) -> float | None:
        """Bytes per second so far, stream and ranges together, from the first byte that came to the last.

        None while too little came to say. Infinite for a local file, unless it is limited.
        """
        return self._link.rate()

    def close(self) -> None:
        """End reading; whoever waits for bytes gets an error."""
        with self._changed:
            self._link.closed.set()
            self._pieces.clear()
            self._changed.notify_all()

    def _was_closed(self) -> FailedError:
        return FailedError("the source was closed while it was read", hint="try again")

    def _next(self, size: int) -> memoryview:
        first = self._pieces.popleft()
        if size < len(first):
            self._pieces.appendleft(first[size:])
        taken = first[:size]
        self.offset += len(taken)
        self._ahead -= len(taken)
        self._changed.notify_all()
        return taken

    def _run(self) -> None:
        try:
            while self._wanted():
                piece, problem, start = b"", None, self._origin.offset
                try:
                    with self._changed:
                        target = self.offset if self._sought else None
                        self._sought = False
                    if target is not None:
                        self._origin.seek(target)
                    start = self._origin.offset
                    piece = self._origin.read(_PIECE)
                except Exception as error:  # handed over, and raised by read()
                    problem = error
                self._put(start, memoryview(piece), problem)
        finally:
            self._origin.close()

    def _wanted(self) -> bool:
        """Wait until something is to be read; False when nothing is any more."""
        with self._changed:
            while not (self._link.closed.is_set() or self._sought):
                if not self._ended and self._ahead < _AHEAD:
                    break
                self._changed.wait()
            return not self._link.closed.is_set()

    def _put(self, start: int, piece: memoryview, problem: Exception | None) -> None:
        with self._changed:
            if self._sought:
                # Meanwhile the stream is to go on elsewhere; perhaps within what came.
                if problem or not start <= self.offset < start + len(piece):
                    return
                piece = piece[self.offset - start :]
                self._sought = False
            if piece:
                self._pieces.append(piece)
                self._ahead += len(piece)
            else:
                self._ended, self._problem = True, problem
            self._changed.notify_all()
