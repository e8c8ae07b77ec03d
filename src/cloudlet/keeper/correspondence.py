"""The other end of a hand-off, over HTTPS: the messages of ``docs/formats/handoff.md`` as calls.

Each thread has a connection of its own. An answer that says no becomes the error that it means here; one that
only says that it cannot be done now counts as none.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Self

from cloudlet.control.courier import PeerState
from cloudlet.errors import (
    CapacityError,
    CloudletError,
    ConflictError,
    CorruptError,
    FailedError,
    NotFoundError,
    RefusedError,
    UnreachableError,
)
from cloudlet.store.keyring import KeyRing
from cloudlet.store.tokens import PeerTokens
from cloudlet.transfer.peer import PeerConnection, PeerError

_PATH = "/v1/peer/handoffs"
_ASK_SECONDS = 10.0
_LOAD_SECONDS = 90.0
"""Longest time for records to be loaded, those before them included; the last ones load a machine."""
_ERRORS: Mapping[int, type[CloudletError]] = {
    401: RefusedError,
    403: RefusedError,
    404: NotFoundError,
    409: ConflictError,
    422: CorruptError,
}
_HEEDED = (
    "state", "records", "holds", "reason", "endpoints", "api_url", "events_after", "missing", "wanted",
    "wanted_after",
)  # fmt: skip
_MOST_REASON_LETTERS, _MOST_URL_LETTERS, _MOST_ENDPOINTS_LETTERS = 1000, 4096, 65_536
_NO_ROOM = ("no_capacity", "draining")

Whom = Mapping[str, str]
"""``own_id``, and of the peer ``id``, ``url`` and ``public_key`` (base64)."""


class HttpPeer:
    """A peer, as far as one hand-off is concerned. See :class:`cloudlet.control.courier.Peer`."""

    def __init__(self, connect: Callable[[], PeerConnection], handoff: str) -> None:
        """The peer to whom ``connect`` leads.

        :param connect: called for each thread, and again after a connection has failed: the peer may be
            somewhere else by then.
        """
        self._connect = connect
        self._path = f"{_PATH}/{handoff}"
        self._turn = 0
        """How often all connections were ended."""
        self._own = threading.local()
        self._connections: list[PeerConnection] = []
        self._lock = threading.Lock()

    @classmethod
    def of(cls, whom: Whom, handoff: str, keys: KeyRing) -> Self:
        """The peer that a message names."""
        return cls(connector(whom, keys), handoff)

    def be_at(self, connect: Callable[[], PeerConnection]) -> None:
        """The peer is reached otherwise from now on; who waits for an answer is told that none comes."""
        self._connect = connect
        self.close()

    def offer(self, offer: Mapping[str, Any]) -> PeerState:
        """Offer the instance; what becomes of that is in the state.

        :raises CapacityError: it has no room, or admits nothing.
        :raises CloudletError: it is refused.
        """
        try:
            return self._ask("POST", _PATH, json={"handoff": offer}, timeout=_ASK_SECONDS)
        except UnreachableError as error:
            answer = error.__cause__
            if isinstance(answer, PeerError) and answer.reason in _NO_ROOM:
                raise CapacityError(answer.message) from error
            raise

    def state(self, wait: float = 0.0) -> PeerState:
        query = {"wait": int(wait)} if wait else None
        return self._ask("GET", self._path, query=query, timeout=_ASK_SECONDS + wait)

    def records(self, first: int, body: bytes) -> PeerState:
        return self._ask(
            "PUT", f"{self._path}/records", query={"first": first}, body=body,
            headers={"Content-Type": "application/octet-stream"}, timeout=_LOAD_SECONDS,
        )  # fmt: skip

    def commit(self, epoch: int) -> PeerState:
        return self._ask("POST", f"{self._path}/commit", json={"epoch": epoch}, timeout=_ASK_SECONDS)

    def drop(self) -> PeerState:
        return self._ask("DELETE", self._path, timeout=_ASK_SECONDS)

    def wanted(self, after: int, wait: float) -> PeerState:
        query = {"after": after, "wait": int(wait)}
        return self._ask("GET", f"{self._path}/wanted", query=query, timeout=_ASK_SECONDS + wait)

    def close(self) -> None:
        """End all connections, those of other threads too. Who asks again has one made anew."""
        with self._lock:
            self._turn += 1
            for connection in self._connections:
                connection.close()
            self._connections.clear()

    def _ask(self, method: str, path: str, **more: Any) -> PeerState:
        try:
            answer = self._connection().request(method, path, **more)
        except UnreachableError:
            self._forget()
            raise
        except PeerError as error:
            if error.status >= 500 or error.status in (408, 429):
                raise UnreachableError(error.message) from error
            raise _ERRORS.get(error.status, FailedError)(error.message, hint=error.hint) from error
        try:
            said = _cut(answer.json["handoff"])
            return PeerState(
                str(said["state"]), int(said.get("records", 0)), str(said.get("holds") or "base"),
                said, str(said.get("reason") or ""),
            )  # fmt: skip
        except (TypeError, KeyError, ValueError) as error:
            raise FailedError("what the peer answered is not understood") from error

    def _connection(self) -> PeerConnection:
        connection: PeerConnection | None = getattr(self._own, "connection", None)
        if connection is None or self._own.turn != self._turn:
            self._own.turn = self._turn
            connection = self._own.connection = self._connect()
            with self._lock:
                self._connections.append(connection)
        return connection

    def _forget(self) -> None:
        """Make this thread's connection anew when it asks again."""
        connection, self._own.connection = self._own.connection, None
        connection.close()
        with self._lock, suppress(ValueError):
            self._connections.remove(connection)


def connector(whom: Whom, keys: KeyRing) -> Callable[[], PeerConnection]:
    """What connects to the peer that is named, with tokens of this site's key."""
    tokens = PeerTokens(whom["own_id"], keys.signer().private)

    def make(method: str, path: str, ahead: float) -> str:
        return tokens.make(method, path, whom["id"], offset_seconds=ahead)

    public_key = base64.b64decode(whom["public_key"])
    return lambda: PeerConnection(whom["url"], public_key, make)


def _cut(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a peer says that is heeded here, no longer than what is written down of it may be."""
    cut = {name: said[name] for name in _HEEDED if name in said}
    for name, most in (("reason", _MOST_REASON_LETTERS), ("api_url", _MOST_URL_LETTERS)):
        if cut.get(name):
            cut[name] = str(cut[name])[:most]
    if len(json.dumps(cut.get("endpoints"))) > _MOST_ENDPOINTS_LETTERS:
        cut["endpoints"] = []
    return cut
