"""What is asked of a web server for a resource, and what its answers have to say.

A range that is not the one that was asked for, or of another file than the one being read, is an
error here already; that the bytes are the right ones is for their user's digests to say.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import partial
from http.client import HTTPResponse, InvalidURL
from urllib.request import OpenerDirector, Request

from cloudlet.errors import FailedError, NotFoundError, RefusedError, TruncatedError, UsageError
from cloudlet.transfer.networks import EVERYWHERE, Networks

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)
_COUNT = re.compile(r"\d{1,18}", re.ASCII)
WHERE_ELSE = "take it from another server, or as a file"


class WholeOnlyError(FailedError):
    """A server gives no ranges."""

    def __init__(self, url: str) -> None:
        super().__init__(f"{url} comes as a whole only, not by ranges", hint=WHERE_ELSE)


@dataclass(frozen=True, slots=True)
class Resource:
    """What a server's first answer said of what it serves."""

    url: str
    """After redirects."""
    total: int | None
    """Its size in bytes, where that was said."""
    tag: str | None
    """Its strong entity tag."""
    ranged: bool
    """Whether the server said that it gives ranges."""

    @classmethod
    def of(cls, url: str, answer: HTTPResponse) -> Resource:
        """What an answer says, whole or a range."""
        length = answer.headers.get("Content-Length", "")
        if answer.status == 206:
            said = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            length = said[3] if said else ""
        units = answer.headers.get("Accept-Ranges", "").lower()
        return cls(
            url=url,
            total=int(length) if _COUNT.fullmatch(length) else None,
            tag=_strong(answer.headers.get("ETag")),
            ranged=answer.status == 206 or units == "bytes",
        )

    def check_range(self, answer: HTTPResponse, offset: int, size: int | None = None) -> None:
        """That an answer of status 206 brings ``size`` bytes of this from ``offset``, or any number.

        :raises FailedError: it brings others.
        :raises TruncatedError: it is of another file.
        """
        said = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if not said:
            raise FailedError(f"{self.url} answers with a range, but not with which one", hint=WHERE_ELSE)
        first, last = int(said[1]), int(said[2])
        if first != offset or (size is not None and last != offset + size - 1):
            wanted = f"{offset}-" if size is None else f"{offset}-{offset + size - 1}"
            raise FailedError(
                f"{self.url} answers bytes {first}-{last} when asked for bytes {wanted}", hint=WHERE_ELSE
            )
        length = answer.headers.get("Content-Length", "")
        if _COUNT.fullmatch(length) and int(length) != last - first + 1:
            raise FailedError(
                f"{self.url} answers {length} bytes for the {last - first + 1} of its range",
                hint=WHERE_ELSE,
            )
        tag = _strong(answer.headers.get("ETag"))
        self._check_same(tag or self.tag, None if said[3] == "*" else int(said[3]))

    def check_whole(self, answer: HTTPResponse) -> None:
        """That an answer which brings the whole, instead of a range, is of the same file.

        :raises TruncatedError: it is of another.
        """
        seen = Resource.of(self.url, answer)
        self._check_same(seen.tag, seen.total)

    def _check_same(self, tag: str | None, total: int | None) -> None:
        other_size = total is not None and self.total is not None and total != self.total
        if other_size or (self.tag and tag != self.tag):
            raise TruncatedError(f"{self.url} changed while it was read", hint="try again")


def _strong(tag: str | None) -> str | None:
    return tag if tag and not tag.startswith("W/") else None


def request_for(url: str, offset: int = 0, size: int | None = None, tag: str | None = None) -> Request:
    """A request for a resource from ``offset`` on, or for ``size`` bytes there.

    :raises UsageError: what is given is no URL.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": "cloudlet"}
    if offset or size is not None:
        headers["Range"] = f"bytes={offset}-{'' if size is None else offset + size - 1}"
        if tag:
            headers["If-Range"] = tag
    try:
        return Request(url, headers=headers)
    except ValueError as error:
        raise no_url(url, error) from error


def ask(request: Request, timeout: float, networks: Networks = EVERYWHERE) -> HTTPResponse:
    """The answer to a request on a connection of its own; redirects and proxies are followed.

    :param networks: where it may lead, and each redirect.
    :raises OSError: it may be worth another try, as may ``HTTPException``.
    """
    try:
        answer: HTTPResponse = _opener(networks).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            raise refusal(request.full_url, error.code) from error
    except (ValueError, InvalidURL) as error:
        raise no_url(request.full_url, error) from error
    return answer


class _Http(urllib.request.HTTPHandler):
    """Connects to where it may, unless a proxy does that."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self._networks = networks

    def http_open(self, request: Request) -> HTTPResponse:
        return self._open("http", request)

    def https_open(self, request: Request) -> HTTPResponse:
        return self._open("https", request)

    https_request = urllib.request.HTTPHandler.http_request

    def _open(self, scheme: str, request: Request) -> HTTPResponse:
        proxied = request.has_proxy() or getattr(request, "_tunnel_host", None)
        networks = EVERYWHERE if proxied else self._networks
        return self.do_open(partial(networks.connection, scheme), request)


def _opener(networks: Networks) -> OpenerDirector:
    """What follows redirects and proxies of HTTP, and knows no other kinds of URLs."""
    opener = OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        _Http(networks),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def no_url(url: str, error: Exception) -> UsageError:
    """The error for a URL that is none."""
    return UsageError(f"{url} is not a URL: {error}", hint="write http://HOST/PATH")


def refusal(url: str, status: int) -> Exception:
    """The error for a status from 300 on; for a server's own it is one that is worth another try."""
    if status in (404, 410):
        return NotFoundError(f"{url} is not there (status {status})")
    if status in (401, 402, 403):
        return RefusedError(f"{url} is refused (status {status})")
    if status == 416:
        return TruncatedError(f"{url} ends before what is asked of it (status {status})")
    if 300 <= status < 400:
        return FailedError(f"{url} leads on and on (status {status})", hint="give the overlay's own URL")
    if 400 <= status < 500:
        return FailedError(f"{url} answers with status {status}")
    return ConnectionError(f"status {status}")
