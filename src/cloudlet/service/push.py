"""One push: an event is sent to a webhook's URL, signed, and its status is all that is read of the answer.

The signature is that of Standard Webhooks (https://www.standardwebhooks.com): HMAC-SHA256 with the secret of
the webhook over ``id.timestamp.body``; the headers are ``webhook-id``, ``webhook-timestamp`` and
``webhook-signature``.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
import socket
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from hashlib import sha256
from http.client import HTTPConnection, HTTPException
from urllib.parse import SplitResult, quote, unquote, urlsplit

from cloudlet.errors import UsageError
from cloudlet.store.deliveries import Delivery
from cloudlet.store.rows import Webhook
from cloudlet.transfer.networks import Networks

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 10.0
"""For the answer's first line to come, after the request was sent."""
_LOOK_SECONDS = 0.25
_LONGEST_LINE = 8 << 10
_STATUS = re.compile(rb"HTTP/1\.[01] ([2-5][0-9]{2})\b")
_AS_IT_IS = "%/:=&?~#+!$,;'@()*[]"


class UnansweredError(Exception):
    """Nobody answered in time, or not as a web server does."""


def signature(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The value of ``webhook-signature``."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(secret.encode(), signed, sha256).digest()).decode()


def push(webhook: Webhook, delivery: Delivery, networks: Networks, ended: Callable[[], bool]) -> int:
    """Send an event; the status of the answer, which may lead elsewhere, where nobody follows.

    :param networks: where the webhook may lead.
    :param ended: asked now and then whether to give up.
    :raises UnansweredError: there was no answer. It says no more than what kind of problem it was: more would
        be of use to who looks around where the site is.
    """
    try:
        url = urlsplit(webhook.url)
        host = url.netloc.rpartition("@")[2]
        with closing(networks.connection(url.scheme, host, _CONNECT_SECONDS)) as connection:
            return _asked(connection, url, webhook, delivery, ended)
    except UsageError as error:
        raise UnansweredError(error.message) from error
    except (OSError, HTTPException, ValueError) as error:
        raise UnansweredError(type(error).__name__) from error


def _asked(
    connection: HTTPConnection,
    url: SplitResult,
    webhook: Webhook,
    delivery: Delivery,
    ended: Callable[[], bool],
) -> int:
    body = json.dumps(delivery.event).encode()
    message_id = f"{webhook.id}.{delivery.number}"
    timestamp = int(datetime.now(UTC).timestamp())
    headers = {
        "Connection": "close",
        "Content-Type": "application/json",
        "User-Agent": "cloudlet",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(webhook.secret, message_id, timestamp, body),
    }
    if url.username is not None:
        known = f"{unquote(url.username)}:{unquote(url.password or '')}".encode()
        headers["Authorization"] = "Basic " + base64.b64encode(known).decode()
    path = quote(url.path or "/", safe=_AS_IT_IS) + (
        f"?{quote(url.query, safe=_AS_IT_IS)}" if url.query else ""
    )
    connection.request("POST", path, body, headers)
    return _status(connection.sock, ended)


def _status(connection: socket.socket, ended: Callable[[], bool]) -> int:
    """The status in the first line of an answer; who sends it byte by byte has no more time than others."""
    line, ends = b"", time.monotonic() + _ANSWER_SECONDS
    connection.settimeout(_LOOK_SECONDS)
    while b"\n" not in line and len(line) < _LONGEST_LINE:
        if time.monotonic() > ends or ended():
            raise TimeoutError
        try:
            piece = connection.recv(_LONGEST_LINE)
        except TimeoutError:
            continue
        if not piece:
            break
        line += piece
    if not (found := _STATUS.match(line)):
        raise HTTPException("not an answer of HTTP")
    return int(found[1])
