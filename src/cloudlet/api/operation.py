"""What an operation of the API is, and what its handler gets and gives.

A handler is a plain function. Its parameters say what it wants: ``call`` (who calls, and the site), the row
that the path names (under the noun's name), ``body`` and ``query`` (pydantic models), ``upload`` (bytes that
stream in). What it returns is a model, one of the answers below, or None for an empty answer.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar, get_type_hints

from pydantic import BaseModel
from sqlalchemy.engine import Connection

from cloudlet.api.faults import BusyError
from cloudlet.api.identity import Identity
from cloudlet.api.microversion import MIN, Version
from cloudlet.api.policy import PEER
from cloudlet.errors import NotFoundError
from cloudlet.service.site import ServedSite
from cloudlet.store import retries
from cloudlet.store.retries import Retry
from cloudlet.store.rows import OPERATIONS, Peer, Row, Rows
from cloudlet.transfer.peer import DESCRIPTION_PATH

R = TypeVar("R", bound=Row)


class Upload(Protocol):
    """The body of an upload."""

    length: int
    """Bytes that the client promises."""
    offset: int
    """Where they belong (``Upload-Offset``)."""

    def read(self, size: int, /) -> bytes: ...


class Desk:
    """So many requests are worked on at a time; who only waits or transfers steps aside.

    Many may step aside, and want to come back at the same moment. They never have more than a part of the
    places, so that who comes anew does not notice.
    """

    def __init__(self, threads: int) -> None:
        lock = threading.Lock()
        self._anew, self._back = threading.Condition(lock), threading.Condition(lock)
        self._free = threads
        self._free_for_those_back = max(1, threads // 4)
        self._here = threading.local()
        """Whether the request of this thread was aside, and is back."""

    @contextmanager
    def work(self) -> Iterator[None]:
        """Be worked on: wait for a place, and have it."""
        with self._anew:
            self._anew.wait_for(lambda: self._free)
            self._free -= 1
        self._here.back = False
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within :meth:`work`: give the place to others for a while."""
        self._leave()
        try:
            yield
        finally:
            with self._back:
                self._back.wait_for(lambda: self._free and self._free_for_those_back)
                self._free -= 1
                self._free_for_those_back -= 1
            self._here.back = True

    def _leave(self) -> None:
        with self._anew:
            self._free += 1
            self._free_for_those_back += self._here.back
            self._anew.notify()
            self._back.notify()


class Slots:
    """So many at a time, and no more: who comes above that is sent away at once."""

    def __init__(self, most: int, what: str, desk: Desk) -> None:
        self._most = most
        self._what = what
        self._desk = desk
        self._now = 0
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """How many there are now."""
        return self._now

    @contextmanager
    def one(self, *, worked_on: bool = True) -> Iterator[None]:
        """Take a place.

        :param worked_on: the request has a place at the desk, which others get meanwhile.
        :raises BusyError: there is none.
        """
        with self._lock:
            if self._now >= self._most:
                raise BusyError(f"{self._most} {self._what} already")
            self._now += 1
        try:
            with self._desk.aside() if worked_on else nullcontext():
                yield
        finally:
            with self._lock:
                self._now -= 1


class Turns:
    """So many at a time that are about the same: one who asks often takes no places of others."""

    def __init__(self, most: int, what: str) -> None:
        self._most = most
        self._what = what
        self._now: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def one(self, about: str) -> Iterator[None]:
        """Take a turn.

        :raises BusyError: too many have one.
        """
        with self._lock:
            if self._now[about] >= self._most:
                raise BusyError(f"{self._most} {self._what} already")
            self._now[about] += 1
        try:
            yield
        finally:
            with self._lock:
                self._now[about] -= 1
                if not self._now[about]:
                    del self._now[about]


@dataclass(slots=True)
class Call:
    """A request, as far as handlers are concerned."""

    site: ServedSite
    who: Identity
    request_id: str
    version: Version
    root: str
    """The URL of the service, without a slash at its end."""
    waiters: Slots
    transfers: Slots
    turns: Turns
    """Of what a peer asks of a hand-off."""
    document: Callable[[], str]
    """The API as OpenAPI."""
    figures: Callable[[], str]
    """The site's figures, for Prometheus."""
    allows: Callable[[str, Any], bool]
    """Whether the caller may do what a rule is for, with a row."""
    headers: Mapping[str, str] = field(default_factory=dict)
    retry: Retry | None = None
    peer: Peer | None = None
    """Who calls, where that is another cloudlet."""

    def again(self, rows: Rows[R]) -> R | None:
        """What an earlier request with the same ``Idempotency-Key`` made; None if that is not there.

        :raises ConflictError: that was another request.
        """
        if not self.retry or (key := retries.known(self.site.database, self.retry)) is None:
            return None
        try:
            return self.site.database.read(lambda connection: rows.get(connection, key))
        except NotFoundError:
            retries.drop(self.site.database, self.retry)
            return None

    def remember(self, connection: Connection, resource_id: str) -> None:
        """Have a repetition of this request find what it made, if the caller wants that."""
        if self.retry:
            retries.remember(connection, self.retry, resource_id)

    @property
    def everything(self) -> bool:
        """Whether the caller sees the rows of everybody."""
        return self.allows("admin", None)

    @property
    def project_wide(self) -> bool:
        """Whether the caller, who may only look, sees the rows of the whole project."""
        return "reader" in self.who.roles and "member" not in self.who.roles


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with more than a body."""

    body: BaseModel | None = None
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Text:
    """An answer that is text."""

    text: str
    content_type: str = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer in pieces, which come when they come; ``pieces`` is entered when the answer begins."""

    pieces: AbstractContextManager[Iterator[bytes]]
    content_type: str
    length: int | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[..., BaseModel | Answer | Text | Stream | None]

_PARAMETER = re.compile(r"{(\w+)}")


@dataclass(frozen=True)
class Operation:
    """A row of the table."""

    method: str
    path: str
    handler: Handler
    check: str
    """Who may, in the language of oslo.policy."""
    rows: Rows[Any] | None = None
    """Of what noun the path's id names a row."""
    status: int = 200
    """Of an answer that says nothing else."""
    statuses: tuple[int, ...] = ()
    """What else it may answer when all is well."""
    since: Version = MIN
    until: Version | None = None
    public: bool = False
    """Whether it is answered without showing who calls."""
    media: str = "application/json"
    """What a good answer is."""

    @cached_property
    def noun(self) -> str:
        """The noun in its codes: the row's, else what the path begins with."""
        if self.rows:
            return self.rows.noun
        return self.handler.__module__.rpartition(".")[2].removesuffix("s")

    @cached_property
    def name(self) -> str:
        """Its name, ``NOUN.WHAT``."""
        return f"{self.noun}.{self.handler.__name__}"

    @property
    def rule(self) -> str:
        """The name of its policy rule."""
        return f"cloudlet:{self.handler.__module__.rpartition('.')[2]}:{self.handler.__name__}"

    @cached_property
    def summary(self) -> str:
        """What it does, in a line."""
        return (inspect.getdoc(self.handler) or "").partition("\n\n")[0].replace("\n", " ")

    @cached_property
    def description(self) -> str:
        """What else there is to say."""
        return (inspect.getdoc(self.handler) or "").partition("\n\n")[2]

    @property
    def tagged(self) -> bool:
        """Whether it is about one row as it is: GET tells the row's entity tag, the others heed ``If-Match``.

        Not so for operations, which one waits for.
        """
        return self.rows not in (None, OPERATIONS) and self.path.endswith("}")

    @property
    def for_peers(self) -> bool:
        """Whether other cloudlets call it, and nobody else."""
        return self.check == PEER

    @property
    def at_peers_door(self) -> bool:
        """Whether it is also there where only other cloudlets are served."""
        return f"{self.path}/".startswith(f"{DESCRIPTION_PATH}/")

    @cached_property
    def wants(self) -> Mapping[str, Any]:
        """The handler's parameters and their types."""
        hints = get_type_hints(self.handler)
        hints.pop("return", None)
        return hints

    @cached_property
    def gives(self) -> Any:
        """The type of what the handler returns."""
        return get_type_hints(self.handler).get("return")

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names in its path."""
        return tuple(_PARAMETER.findall(self.path))

    def arguments(self, call: Call, row: Any, body: Any, query: Any, upload: Any) -> dict[str, Any]:
        """What the handler is called with."""
        given = {"call": call, "body": body, "query": query, "upload": upload, self.noun: row}
        return {name: given[name] for name in self.wants}
