"""How a hand-off goes along: how hard it compresses, when what is left fits the pause, and what it will take.

All of it follows from what was measured since it began, and the first forecast from the last hand-off to the
same peer, if there was one.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

LEVELS = (1, 3, 6, 9)
"""Zstandard's levels, from the fastest. Measured on a guest's pages: level 9 takes 3 % off level 3, for five
times the CPU; beyond, bytes hardly become fewer."""
_LINK_BOUND, _CPU_BOUND = 0.5, 0.1
"""Shares of the time in which the link holds up the guest's pages: above, there is CPU to spare."""
_ADJUST_SECONDS = 0.25
GUESSED_OVERHEAD = 0.06
"""Seconds of a pause that depend on nothing, before it is known: to stop, to save and load the devices, to
decide, and for each of the two to hear of it."""
_MOST_OVERHEAD = 1.0
_LITTLE = 0.2
"""Another round is not worth while if it can save no more than this share of the pause that was asked for."""
_PER_LOOKED_PAGE = 1.4e-6
"""Seconds to look at one page in the pause: about 35 ms for 100 MiB (measured)."""
GUESSED_RATE = 12.5e6
"""Bytes per second of a link of which nothing is known: 100 Mbit/s."""
_LISTED_PAGE_BYTES = 1.0
"""What it takes to say that a page comes later."""
_PROGRESS, _WITHOUT_PROGRESS = 0.85, 2
"""A round that sends more than this share of the one before has brought nothing; two of them are enough."""
GUESSED_PAGE_BYTES = 1500.0
"""What a changed page takes on the wire, before it is known."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a hand-off will take from now on, and how long the instance will stand still."""

    seconds: float
    bytes: int
    pause_seconds: float
    can_be_lost: bool = False
    """Whether the instance runs, or is about to run, where not all of its memory is."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Terms:
    """What was asked of a hand-off."""

    pause_seconds: float = 0.1
    """It switches as soon as what is left fits into this."""
    deadline_seconds: float = 60.0
    """It switches by then, however long the pause becomes; but for the first round, which is made to its end
    unless what is left of it can go over after the switch: the pause would only become longer."""
    patience_seconds: float = 60.0
    """How long a peer may be silent while the instance runs here."""
    bytes_per_second: float = 0.0
    """At most; 0: as many as the link carries."""
    verify_full: bool = False
    """Whether all memory is compared before the switch, and not only what was sent."""
    early: bool = False
    """Whether it may switch before all memory is there, if the pause cannot be short otherwise."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Terms:
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Round:
    """One look at all pages that may have changed."""

    number: int
    looked: int = 0
    """Pages."""
    changed: int = 0
    bytes: int = 0
    """On the wire."""
    seconds: float = 0.0


class Pace:
    """The pace of one hand-off."""

    def __init__(self, terms: Terms, rate: float | None = None, overhead: float | None = None) -> None:
        """A hand-off that begins now.

        :param rate: bytes per second of the last one to the same peer.
        :param overhead: seconds of its pause, without what was looked at and sent.
        """
        self.rounds: list[Round] = []
        self.terms = terms
        self._began = time.monotonic()
        self._rate = min(rate or GUESSED_RATE, terms.bytes_per_second or math.inf)
        self._at_first = 0, 0
        """Pages that might have changed when it began, and that had."""
        self._overhead = GUESSED_OVERHEAD if overhead is None else min(overhead, _MOST_OVERHEAD)
        self._level = 0
        self._looked_at = self._began, 0.0

    @property
    def level(self) -> int:
        """How hard to compress now."""
        return LEVELS[self._level]

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    def adjust(self, held: float, rate: float | None) -> None:
        """Take note of how the link does.

        :param held: seconds, in all, in which it held up the pages.
        :param rate: bytes per second that it carries, if known.
        """
        self._rate = rate or self._rate
        now, (last, before) = time.monotonic(), self._looked_at
        if now - last < _ADJUST_SECONDS:
            return
        share = (held - before) / (now - last)
        step = (share > _LINK_BOUND) - (share < _CPU_BOUND)
        self._level = min(max(self._level + step, 0), len(LEVELS) - 1)
        self._looked_at = now, held

    def ended(self, done: Round) -> None:
        """A round has been sent and loaded."""
        self.rounds.append(done)

    def page_bytes(self) -> float:
        """What a changed page took on the wire, lately."""
        for done in reversed(self.rounds):
            if done.changed:
                return done.bytes / done.changed
        return GUESSED_PAGE_BYTES

    def forecast(self, looked: int, changed: int) -> Forecast:
        """What is left, if the machine stood still now.

        :param looked: pages that may have changed.
        :param changed: pages that have.
        """
        left = int(changed * self.page_bytes())
        pause = self._overhead + self._besides_overhead(looked, left)
        return Forecast(round(pause, 3), left, round(pause, 3))

    def overhead(self, pause: float, looked: int, sent: int) -> float:
        """Seconds of a pause that did not depend on what was looked at (pages) and sent (bytes) in it."""
        return max(0.0, pause - self._besides_overhead(looked, sent))

    def _besides_overhead(self, looked: int, sent: float) -> float:
        return looked * _PER_LOOKED_PAGE + sent / self._rate

    def begun(self, looked: int, changed: int) -> Forecast:
        """The first forecast, of the whole of it; as :meth:`forecast`, before anything was sent.

        Of a guest that goes on nobody knows how much it will have changed at the end: a hundredth is assumed.
        """
        self._at_first = looked, changed
        whole, at_last = self.forecast(looked, changed), self.forecast(looked, changed // 100)
        return replace(at_last, seconds=round(whole.seconds + at_last.seconds, 3), bytes=whole.bytes)

    def within(self, changed: int, sent: int) -> Forecast:
        """What is left in the middle of the first round.

        :param changed: pages that had changed and have gone over.
        :param sent: bytes that this took.
        """
        page_bytes = sent / changed if changed else self.page_bytes()
        looked, whole = self._at_first
        left = int(max(0, whole - changed) * page_bytes)
        pause = self._overhead + self._besides_overhead(looked, whole / 100 * page_bytes)
        return Forecast(round(left / self._rate + pause, 3), left, round(pause, 3))

    @property
    def is_late(self) -> bool:
        """Whether a switch that leaves memory for later has to be now: the deadline is here."""
        return self.terms.early and self.elapsed > self.terms.deadline_seconds

    def early(self, looked: int, changed: int) -> Forecast:
        """What is left, if the machine switched early now; as :meth:`forecast`."""
        whole, listed = self.forecast(looked, changed), int(changed * _LISTED_PAGE_BYTES)
        pause = self._overhead + self._besides_overhead(looked, listed)
        return replace(whole, pause_seconds=round(pause, 3), can_be_lost=True)

    def leaves(self, at_last: Forecast) -> bool:
        """Whether a switch now would be an early one: what is left alone does not fit into the pause."""
        return self.terms.early and at_last.bytes / self._rate > self.terms.pause_seconds

    def switches(self, at_last: Forecast) -> bool:
        """Whether to switch now: what is left fits, or another round is too long or would bring nothing."""
        asked, to_send = self.terms.pause_seconds, at_last.bytes / self._rate
        if at_last.pause_seconds <= asked or to_send <= _LITTLE * asked:
            return True
        # What is to be sent may be as good as it gets, and the rest of the pause alone is too long.
        rest = at_last.pause_seconds - to_send
        if (self.terms.early or to_send <= rest > asked) and self._stands():
            return True
        # Another round takes about as long as this pause would, and leaves as much again.
        return self.elapsed + 2 * at_last.pause_seconds > self.terms.deadline_seconds

    def _stands(self) -> bool:
        """Whether the last rounds have brought nothing: the guest changes as much as the link carries."""
        last = [done.bytes for done in self.rounds[-_WITHOUT_PROGRESS - 1 :]]
        return len(last) > _WITHOUT_PROGRESS and all(
            after > _PROGRESS * before for before, after in pairwise(last)
        )
