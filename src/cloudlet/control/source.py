"""Where an overlay's bytes come from: a file, standard input, or a web server, at a limited rate or not.

A cut download goes on by range where it stopped, as often as it makes progress. A thread reads ahead
into a bounded queue, so that receiving overlaps with what is done with the bytes. Nothing here fills a
buffer before it hands out what has come: a slow pipe's first bytes are of use at once.
"""

from __future__ import annotations

import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse, InvalidURL
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Protocol

from cloudlet.errors import FailedError, NotFoundError, RefusedError, TruncatedError, UsageError

_PIECE = 64 << 10
_AHEAD_PIECES = 64
"""Pieces between the link and its user: 4 MiB."""
_TIMEOUT = 30.0
_TRIES, _FIRST_PAUSE = 6, 0.2


class Bytes(Protocol):
    """A stream of bytes that ends with an empty read."""

    def read(self, size: int, /) -> bytes: ...


@contextmanager
def open_source(where: str, standard_input: BinaryIO, rate: float | None = None) -> Iterator[Bytes]:
    """The bytes at ``where``: a path, an http(s) URL, or ``-`` for standard input.

    :param rate: bytes per second at most.
    """
    close: Callable[[], None] = _nothing
    if where.partition("://")[0].lower() in ("http", "https"):
        download = _Download(where)
        raw: Bytes = download
        close = download.close
    elif where == "-":
        # Not the buffer: a thread that waits in it when the program ends would hold its lock.
        raw = getattr(standard_input, "raw", standard_input)
    else:
        file = _open_file(Path(where))
        raw, close = file, file.close
    ahead = _Ahead(_Limited(raw, rate) if rate else raw, close)
    try:
        yield ahead
    finally:
        ahead.close()


def _nothing() -> None:
    pass


def _open_file(path: Path) -> FileIO:
    try:
        return FileIO(path)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is not there") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path} is a folder") from error
    except PermissionError as error:
        raise RefusedError(f"{path} may not be read") from error


class _Download:
    """A resource on a web server; a cut is mended by asking for the rest."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._offset = 0
        self._total: int | None = None
        self._tag: str | None = None
        self._response: HTTPResponse | None = None

    def read(self, size: int, /) -> bytes:
        pause = _FIRST_PAUSE
        for attempt in range(_TRIES):
            try:
                if self._response is None:
                    self._response = self._request()
                piece = self._response.read1(size)
                if piece or self._total is None or self._offset >= self._total:
                    self._offset += len(piece)
                    return piece
                problem: Exception = TruncatedError(f"{self._url} was cut at byte {self._offset}")
            except (OSError, HTTPException) as error:
                problem = error
            self.close()
            if attempt + 1 < _TRIES:
                time.sleep(pause)
                pause *= 2
        raise FailedError(
            f"{self._url} does not come: {problem}", hint=f"{self._offset} bytes had come; try again later"
        ) from problem

    def close(self) -> None:
        if self._response:
            with suppress(OSError):
                self._response.close()
            self._response = None

    def _request(self) -> HTTPResponse:
        headers = {"Accept-Encoding": "identity"}
        if self._offset:
            headers["Range"] = f"bytes={self._offset}-"
            if self._tag:
                headers["If-Range"] = self._tag
        try:
            request = urllib.request.Request(self._url, headers=headers)
            response: HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(self._url, error.code) from error
        except (ValueError, InvalidURL) as error:
            raise UsageError(f"{self._url} is not a URL: {error}", hint="write http://HOST/PATH") from error
        if self._offset and response.status != 206:
            self._skip(response)
        elif not self._offset:
            length = response.headers.get("Content-Length")
            self._total = int(length) if length and length.isdecimal() else None
            tag = response.headers.get("ETag")
            self._tag = tag if tag and not tag.startswith("W/") else None
        return response

    def _skip(self, response: HTTPResponse) -> None:
        """The server gives no ranges, or the file changed: pass over what came, if it is the same file."""
        if self._tag and response.headers.get("ETag") != self._tag:
            raise TruncatedError(f"{self._url} changed while it was read", hint="try again")
        left = self._offset
        while left:
            piece = response.read1(min(left, _PIECE))
            if not piece:
                raise ConnectionError("cut again")
            left -= len(piece)


def _refusal(url: str, status: int) -> Exception:
    if status in (404, 410):
        return NotFoundError(f"{url} is not there (status {status})")
    if status in (401, 402, 403):
        return RefusedError(f"{url} is refused (status {status})")
    if 300 <= status < 400:
        return FailedError(f"{url} leads on and on (status {status})", hint="give the overlay's own URL")
    if 400 <= status < 500:
        return FailedError(f"{url} answers with status {status}")
    return ConnectionError(f"status {status}")


class _Limited:
    """A stream that gives no more than so many bytes per second, counted from its first byte."""

    def __init__(self, raw: Bytes, rate: float) -> None:
        self._raw = raw
        self._rate = rate
        self._began: float | None = None
        self._given = 0

    def read(self, size: int, /) -> bytes:
        if self._began is None:
            self._began = time.monotonic()
        # What a real link of this rate would deliver in about 10 ms comes at once.
        piece = self._raw.read(min(size, max(1500, int(self._rate / 100))))
        self._given += len(piece)
        time.sleep(max(0.0, self._began + self._given / self._rate - time.monotonic()))
        return piece


class _Ahead:
    """A thread that reads ahead; its errors are raised where the bytes would have come.

    The thread closes what it reads: it may be waiting for a server, and nobody waits for that at an end.
    """

    def __init__(self, raw: Bytes, close: Callable[[], None]) -> None:
        self._raw = raw
        self._close_raw = close
        self._queue: queue.Queue[bytes | Exception] = queue.Queue(_AHEAD_PIECES)
        self._stopped = threading.Event()
        self._rest = memoryview(b"")
        self._end: Exception | None = None
        self._ended = False
        threading.Thread(target=self._run, name="read-ahead", daemon=True).start()

    def read(self, size: int, /) -> bytes:
        if not self._rest and not self._ended:
            item = self._queue.get()
            if isinstance(item, Exception):
                self._ended, self._end = True, item
            elif not item:
                self._ended = True
            else:
                self._rest = memoryview(item)
        if self._end:
            raise self._end
        piece = self._rest[:size]
        self._rest = self._rest[len(piece) :]
        return bytes(piece)

    def close(self) -> None:
        self._stopped.set()
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                try:
                    item: bytes | Exception = self._raw.read(_PIECE)
                except Exception as error:  # handed over, and raised by read()
                    item = error
                self._put(item)
                if not item or isinstance(item, Exception):
                    return
        finally:
            self._close_raw()

    def _put(self, item: bytes | Exception) -> None:
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=0.2)
                return
