"""Serving: after an early switch the source brings its target the pages that this lacks.

One thread sends, another asks the target which pages its guest waits for. These go first, then what lies
around them, then what had changed in the last moments at the source, then the rest (:meth:`Left.in_turn`).
Little is on its way at a time, so that what is waited for is not behind much else. Once the machine is given
away, what fails is tried again until somebody decides otherwise: the instance is lost without these pages.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Self

import numpy as np

from cloudlet.control.courier import WAITING_BYTES, Courier, Peer, PeerState, answered
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.pages import Numbers
from cloudlet.overlay.rounds import Left

_PAGES, _PAGES_IN_A_HURRY = 8, 4
"""Pages of a record."""
_WINDOW = 16
"""Pages around one that is waited for: those that the page server reads along."""
_ON_ITS_WAY_SECONDS = 0.05
"""So much of what the link carries is on its way at a time, but two records at least and in a hurry."""
_MOST_COMPRESSED = 4.0
_ASK_SECONDS, _ASK_SECONDS_IN_A_HURRY = 10, 2
"""So long the target may wait until it has something to say."""
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 5.0
"""Between two questions of which the first was not answered, and between two attempts to send."""


class Serving:
    """The pages of one machine that are brought; a context that ends with nothing on its way."""

    def __init__(
        self,
        peer: Peer,
        courier: Courier,
        left: Left,
        bring: Callable[[Numbers], None],
        end: Callable[[], None],
    ) -> None:
        """Pages of which nothing is sent yet.

        :param bring: puts the record of pages, in order and 8 at most.
        :param end: puts the last record.
        """
        self.hurries = True
        """Whether the target waits for what it asks for with its machine standing still."""
        self.asked = 0
        """Pages that were sent because the guest waited for them."""
        self._peer = peer
        self._courier = courier
        self._bring = bring
        self._end = end
        self._missing: dict[int, None] = dict.fromkeys(left.in_turn().tolist())
        """In the order in which they are sent, if nobody asks."""
        self._put, self._sent_before = 0, courier.sent
        """Bytes of pages that were put since, and bytes that were sent before."""
        self._wanted: dict[int, None] = {}
        self._near: dict[int, None] = {}
        self._changed = threading.Condition()
        self._heard: PeerState | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._threads = [
            threading.Thread(target=run, name=f"serving-{name}", daemon=True)
            for name, run in (("send", self._send), ("ask", self._ask))
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._threads[0].join()  # the other one may wait for an answer, which nobody needs

    @property
    def missing(self) -> int:
        """Pages that have not been sent."""
        with self._changed:
            return len(self._missing)

    @property
    def error(self) -> BaseException | None:
        """Why nothing can be sent any more, or just now."""
        return self._error

    @property
    def trouble(self) -> BaseException | None:
        """Why nothing gets on just now: at this end, or because the target does not take it."""
        return self._error or self._courier.trouble

    def hear(self, timeout: float) -> PeerState | None:
        """What the target has said since this was asked last, as soon as it says something."""
        with self._changed:
            self._changed.wait_for(lambda: self._heard or self._closed, timeout)
            heard, self._heard = self._heard, None
            return heard

    def _send(self) -> None:
        pause = _PAUSE_SECONDS
        while not self._closed:
            try:
                self._send_all()
                return
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                    if not self._courier.persists:
                        return
                    self._changed.wait_for(lambda: self._closed, pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _send_all(self) -> None:
        courier = self._courier
        while self.missing:
            courier.most_waiting = self._on_its_way()
            courier.wait_for_room()
            if self._closed:
                return
            self._bring_some(self._next())
            self._error = None
        self._end()
        courier.flush()
        self._error = None

    def _bring_some(self, pages: Numbers) -> None:
        try:
            self._bring(pages)
        except BaseException:
            with self._changed:
                again: dict[int, None] = dict.fromkeys(pages.tolist())
                self._missing.update(again)
                self._near = again | self._near
            raise

    def _on_its_way(self) -> int:
        """How many bytes of pages, before they are compressed, may be on their way."""
        compressed = self._put / max(self._courier.sent - self._sent_before, 1)
        carried = (self._courier.rate() or 0.0) * _ON_ITS_WAY_SECONDS
        carried *= min(max(compressed, 1.0), _MOST_COMPRESSED)
        least = self._pages * PAGE_BYTES + 1
        return least if self.hurries else int(min(max(carried, least), WAITING_BYTES))

    @property
    def _pages(self) -> int:
        return _PAGES_IN_A_HURRY if self.hurries else _PAGES

    def _next(self) -> Numbers:
        """The pages to send now, in order."""
        with self._changed:
            wanted = self._taken(self._wanted)
            self.asked += len(wanted)
            for page in wanted:
                first = page // _WINDOW * _WINDOW
                around = range(first, first + _WINDOW)
                self._near.update(dict.fromkeys(near for near in around if near in self._missing))
            some = wanted or self._taken(self._near) or self._taken(self._missing)
            self._put += len(some) * PAGE_BYTES
            return np.array(sorted(some), np.uint32)

    def _taken(self, pages: dict[int, None]) -> list[int]:
        """The first of these pages that are missing; they are not any more."""
        taken: list[int] = []
        while pages and len(taken) < self._pages:
            page = next(iter(pages))
            del pages[page]
            if pages is self._missing or self._missing.pop(page, page) is None:
                taken.append(page)
        return taken

    def _ask(self) -> None:
        after = 0
        while not self._closed:
            answer = self._answer(after)
            pages, number = _wish_in(answer)
            with self._changed:
                if answer:
                    self._heard = answer
                    self._wanted.update(dict.fromkeys(page for page in pages if page in self._missing))
                    self._changed.notify_all()
                if number is None:
                    self._changed.wait_for(lambda: self._closed, _PAUSE_SECONDS)
            after = after if number is None else number

    def _answer(self, after: int) -> PeerState | None:
        wait = _ASK_SECONDS_IN_A_HURRY if self.hurries else _ASK_SECONDS
        try:
            return answered(partial(self._peer.wanted, after, wait))
        except (OSError, MemoryError):  # of this end, which has room again later
            return None


def _wish_in(answer: PeerState | None) -> tuple[list[int], int | None]:
    """Which pages a target asks for, and the number to ask with next; what cannot be is passed over."""
    told = (answer.told or {}) if answer else {}
    pages, number = told.get("wanted"), told.get("wanted_after")
    asked = [page for page in pages if isinstance(page, int)] if isinstance(pages, list) else []
    return asked, number if isinstance(number, int) and number >= 0 else None
