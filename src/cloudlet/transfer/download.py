"""A resource on a web server: read in order from wherever one likes, and single ranges beside it.

A cut, an answer that does not come and a server's own errors are mended by asking for the rest, for as
long as patience lasts. A server that gives no ranges sends all again, and what came before is passed over.
"""

from __future__ import annotations

from contextlib import suppress
from http.client import HTTPException, HTTPResponse

from cloudlet.errors import TruncatedError
from cloudlet.transfer.link import Link, Patience
from cloudlet.transfer.networks import Networks
from cloudlet.transfer.ranges import Ranges
from cloudlet.transfer.resource import Resource, WholeOnlyError, ask, request_for

FIRST_ANSWER_SECONDS = 10.0
"""Longest time until a server answers for the first time."""

SKIP_BYTES = 64 << 10
"""What is rather read and thrown away than asked past: about what a link sends in the time of a request."""
_PIECE = 64 << 10


class Download:
    """One resource; all but :meth:`fetch` is for one thread."""

    def __init__(self, url: str, link: Link, patience: float, networks: Networks) -> None:
        """Nothing is asked for yet.

        :param patience: seconds without a byte after which it is an error.
        :param networks: where the URL may lead.
        """
        self.offset = 0
        self.ranged = False
        """Whether the server gives ranges, as far as is known."""
        self._url = url
        self._link = link
        self._patience = patience
        self._networks = networks
        self._resource: Resource | None = None
        self._ranges: Ranges | None = None
        self._response: HTTPResponse | None = None

    @property
    def total(self) -> int | None:
        """Its size in bytes, where the server has said it."""
        return self._resource.total if self._resource else None

    def read(self, size: int, /) -> bytes:
        """The next bytes.

        :raises FailedError: they do not come.
        :raises TruncatedError: it changed since its first bytes came.
        """
        # A server that never answered at all is more likely a wrong name than a cut link.
        seconds = self._patience if self._resource else min(self._patience, FIRST_ANSWER_SECONDS)
        patience = Patience(seconds, self._link)
        while not self._at_end():
            try:
                if self._response is None:
                    self._open(patience.timeout())
                piece = self._take(size)
                if piece or not self._resource or self._resource.total is None:
                    self.offset += len(piece)
                    return piece
                problem: Exception = TruncatedError(f"{self._url} was cut at byte {self.offset}")
            except (OSError, HTTPException) as error:
                problem = error
            self._cut()
            patience.wait(self._url, problem, f"{self.offset} bytes had come; try again later")
        return b""

    def seek(self, offset: int) -> None:
        """Go on at ``offset``: by reading where that is not far, else by asking from there."""
        ahead = offset - self.offset
        if self._response and ahead >= 0 and (ahead <= SKIP_BYTES or not self.ranged):
            while self.offset < offset and self.read(min(offset - self.offset, _PIECE)):
                pass
        else:
            self._cut()
            self.offset = offset

    def fetch(self, offset: int, size: int) -> bytes:
        """Exactly these bytes, on a connection of their own; for any thread.

        :raises FailedError: the server gives no ranges, or wrong ones, or they do not come.
        :raises TruncatedError: the resource ends before, or changed.
        """
        if not self._ranges or not self.ranged:
            raise WholeOnlyError(self._url)
        return self._ranges.fetch(offset, size)

    def close(self) -> None:
        """End both connections."""
        self._cut()
        if self._ranges:
            self._ranges.close()

    def _at_end(self) -> bool:
        return self.total is not None and self.offset >= self.total

    def _take(self, size: int) -> bytes:
        assert self._response
        piece = self._response.read1(self._link.turn(size))
        self._link.came(len(piece))
        return piece

    def _open(self, timeout: float) -> None:
        known = self._resource
        request = request_for(self._url, self.offset, tag=known.tag if known else None)
        answer = ask(request, timeout, self._networks)
        self._response = answer
        if known is None:
            known = self._resource = Resource.of(answer.url, answer)
            self._ranges = Ranges(self._url, known, self._link, self._patience, self._networks)
            self.ranged = known.ranged
        if answer.status == 206:
            known.check_range(answer, self.offset)
            self.ranged = True
        elif self.offset:
            # The server gives no ranges, or the file changed: pass over what came, if it is the same file.
            self.ranged = False
            known.check_whole(answer)
            left = self.offset
            while left:
                piece = self._take(min(left, _PIECE))
                if not piece:
                    raise ConnectionError("cut again")
                left -= len(piece)

    def _cut(self) -> None:
        if self._response:
            with suppress(OSError):
                self._response.close()
            self._response = None
