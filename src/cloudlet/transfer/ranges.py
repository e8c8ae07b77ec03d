"""Single ranges of a resource on a web server, out of order, beside the stream that reads all of it."""

from __future__ import annotations

import threading
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.request import Request, getproxies, proxy_bypass

from cloudlet.errors import CloudletError, TruncatedError
from cloudlet.transfer.link import Link, Patience
from cloudlet.transfer.networks import Networks
from cloudlet.transfer.resource import Resource, WholeOnlyError, ask, refusal, request_for

_EXPIRED = (401, 403, 404, 410)
"""What an address answers to which a server led only for a while, such as a signed one of an object store."""


class Ranges:
    """Ranges of one resource, asked for one after the other on a connection that is kept."""

    def __init__(
        self, first_url: str, resource: Resource, link: Link, patience: float, networks: Networks
    ) -> None:
        """Nothing is asked for yet.

        :param first_url: what led to the resource.
        """
        self._first_url = first_url
        self._url = resource.url
        self._resource = resource
        self._link = link
        self._patience = patience
        self._networks = networks
        self._turn = threading.Lock()
        self._connection: HTTPConnection | None = None

    def fetch(self, offset: int, size: int) -> bytes:
        """Exactly these bytes; what is cut goes on by range.

        :raises FailedError: they do not come, or others do.
        :raises TruncatedError: the resource ends before, or changed.
        """
        url, total = self._resource.url, self._resource.total
        if total is not None and offset + size > total:
            raise TruncatedError(f"{url} ends at byte {total}, before byte {offset + size}")
        hint = f"asked for bytes {offset}-{offset + size - 1}; try again later"
        with self._turn:
            try:
                return self._fetched(offset, size, hint)
            except CloudletError:
                self._drop()
                raise
            finally:
                if self._link.closed.is_set():
                    self._drop()

    def close(self) -> None:
        """End the connection, after the range that is on its way."""
        with self._turn:
            self._drop()

    def _fetched(self, offset: int, size: int, hint: str) -> bytes:
        data = bytearray()
        patience = Patience(self._patience, self._link)
        while len(data) < size:
            kept = self._connection is not None
            try:
                self._receive(offset, size, data, patience)
            except (OSError, HTTPException) as error:
                self._drop()
                # A server may end a kept connection at any time: that is no reason to wait.
                if not kept or self._link.closed.is_set():
                    patience.wait(self._resource.url, error, hint)
        return bytes(data)

    def _receive(self, offset: int, size: int, data: bytearray, patience: Patience) -> None:
        """Ask for what is missing of a range, and add what comes of it to ``data``."""
        with self._ask(offset + len(data), size - len(data), patience.timeout()) as answer:
            while len(data) < size:
                piece = answer.read1(self._link.turn(size - len(data)))
                if not piece or self._link.closed.is_set():
                    raise ConnectionError(f"cut at byte {offset + len(data)}")
                self._link.came(len(piece))
                data += piece
                patience.renew()
            reusable = answer.length == 0 and not answer.will_close
        if not reusable:
            self._drop()

    def _ask(self, offset: int, size: int, timeout: float) -> HTTPResponse:
        url = self._url
        request = request_for(url, offset, size, self._resource.tag)
        if _proxied(request):
            answer = ask(request, timeout, self._networks)
        else:
            connection = self._connected(request, timeout)
            connection.request("GET", request.selector, headers=dict(request.header_items()))
            answer = connection.getresponse()
        if answer.status in _EXPIRED and url != self._first_url:
            answer.close()
            self._drop()
            request = request_for(self._first_url, offset, size, self._resource.tag)
            answer = ask(request, timeout, self._networks)
            url = self._url = answer.url
        try:
            if answer.status >= 300:
                raise refusal(url, answer.status)
            if answer.status != 206:
                self._resource.check_whole(answer)
                raise WholeOnlyError(url)
            self._resource.check_range(answer, offset, size)
        except BaseException:
            answer.close()
            raise
        return answer

    def _connected(self, request: Request, timeout: float) -> HTTPConnection:
        if self._connection is None:
            connection = self._networks.connection(request.type, request.host, timeout)
            connection.connect()
            self._connection = connection
        else:
            self._connection.sock.settimeout(timeout)
        return self._connection

    def _drop(self) -> None:
        if self._connection:
            with suppress(OSError):
                self._connection.close()
            self._connection = None


def _proxied(request: Request) -> bool:
    return request.type in getproxies() and not proxy_bypass(request.host)
