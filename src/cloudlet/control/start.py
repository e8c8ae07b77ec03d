"""When a machine resumes: at once, with the hot pages, or when all of its overlay is here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cloudlet.model import PAGE_BYTES, format_bytes
from cloudlet.overlay.root import Root

FULL_SECONDS = 0.1
"""Where the rest of an overlay comes and is built in less time than this, it is waited for: it is as fast."""

_BUILT_PER_SECOND = 600 << 20
"""Bytes of pages that a core builds; measured."""


class Start(StrEnum):
    """What a machine waits for before it resumes."""

    HOT = "hot"
    """Nothing but its devices: the pages that it touches first come first, and it waits for each."""
    READY = "ready"
    """The hot prefix: all that the publisher's trial touched."""
    FULL = "full"
    """Everything: pages are loaded as they come, and shared with the base as far as they are the base's."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A start, and why."""

    start: Start
    why: str
    hint: str = ""
    """What would make it faster, where something would."""


def choose(asked: Start | None, root: Root, rest: int, rate: float | None, obstacle: str) -> Choice:
    """Decide on the start of one machine.

    :param asked: what the user wants, if anything.
    :param rest: bytes of the overlay that have not come.
    :param rate: bytes per second of the link, as far as is known.
    :param obstacle: why this site cannot start early, if it cannot.
    """
    if asked is Start.FULL:
        return Choice(Start.FULL, "it was asked for")
    if obstacle:
        return Choice(Start.FULL, "this site cannot start early", obstacle)
    if asked:
        return Choice(asked, "it was asked for")
    if not root.hot_frames:
        return Choice(
            Start.FULL,
            "the overlay does not say what is needed first",
            "its publisher can make it start early: cloudlet overlay reorder",
        )
    if rate is not None:
        seconds = rest / rate + root.totals.pages * PAGE_BYTES / _BUILT_PER_SECOND
        if seconds < FULL_SECONDS:
            return Choice(Start.FULL, f"all of it takes {seconds:.2f} s")
    return Choice(Start.HOT, f"{format_bytes(rest)} are still to come")
