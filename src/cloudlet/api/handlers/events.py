"""Events: what became true, from a number on; a page, a wait, or a stream without end."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from cloudlet.api.operation import Call, Stream
from cloudlet.api.schemas.events import EventsBody, EventsQuery, EventView
from cloudlet.store import journal
from cloudlet.store.journal import Event

EVENT_STREAM = "text/event-stream"
_HEARTBEAT_SECONDS = 15.0
"""Between two lines of a stream: a client that has gone is found out by the next."""


def list(call: Call, query: EventsQuery) -> EventsBody | Stream:  # noqa: A001 (it is what it is called on the wire)
    """List events after a number, at once or as soon as there is one; or stream them.

    With ``wait`` the answer comes with the first event, or empty after so many seconds. With
    ``Accept: text/event-stream`` the answer is a stream of Server-Sent Events that goes on where
    ``Last-Event-ID`` says.
    """
    after = query.after if query.after is not None else call.site.news.last
    wanted = _wanted(call, query)
    if EVENT_STREAM in call.headers.get("HTTP_ACCEPT", ""):
        last = call.headers.get("HTTP_LAST_EVENT_ID", "")
        return _stream(call, int(last) if re.fullmatch("[0-9]{1,18}", last) else after, wanted)
    found, last_number = _next(call, after, wanted, query.limit, 0)
    if query.wait and not found:
        with call.waiters.one():
            found, last_number = _next(call, last_number, wanted, query.limit, query.wait)
    return EventsBody(events=[EventView.of(event) for event in found], last=last_number)


Wanted = Callable[[Event], bool]


def _wanted(call: Call, query: EventsQuery) -> Wanted:
    kinds = tuple(kind for kind in (query.kind or "").split(",") if kind)
    everything, who, project_wide = call.everything, call.who, call.project_wide

    def wanted(event: Event) -> bool:
        mine = event.project_id == who.project_id and (project_wide or event.user_id == who.user_id)
        return (
            (everything or mine)
            and (not kinds or event.kind.startswith(kinds))
            and (query.resource_id is None or event.resource_id == query.resource_id)
        )

    return wanted


def _next(call: Call, after: int, wanted: Wanted, limit: int, wait: float) -> tuple[Sequence[Event], int]:
    """Events after a number, and the number up to which there are no others."""
    if (found := call.site.news.events(after, wanted, limit, wait)) is not None:
        return found
    # Memory does not reach so far back.
    read = call.site.database.read(lambda connection: journal.read(connection, after, limit))
    return [event for event in read if wanted(event)], read[-1].number if read else call.site.news.last


def _stream(call: Call, after: int, wanted: Wanted) -> Stream:
    @contextmanager
    def pieces() -> Iterator[Iterator[bytes]]:
        with call.waiters.one(worked_on=False):
            yield _lines(call, after, wanted)

    return Stream(pieces(), EVENT_STREAM, headers={"Cache-Control": "no-store"})


def _lines(call: Call, after: int, wanted: Wanted) -> Iterator[bytes]:
    yield b": cloudlet\n\n"
    while not call.site.news.closed:
        began = time.monotonic()
        found, after = _next(call, after, wanted, 100, _HEARTBEAT_SECONDS)
        for event in found:
            view = EventView.of(event).model_dump(mode="json")
            yield f"id: {event.number}\nevent: {event.kind}\ndata: {json.dumps(view)}\n\n".encode()
        if not found and time.monotonic() - began >= _HEARTBEAT_SECONDS:
            yield b":\n\n"
