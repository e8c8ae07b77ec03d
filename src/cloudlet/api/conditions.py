"""Requests that are meant for a row as it was: entity tags, and ``If-Match`` (RFC 9110, 13.1.1).

A row's tag changes with all that the row says, also with what changes by itself, such as an instance's state.
"""

from __future__ import annotations

from typing import Any

from blake3 import blake3

from cloudlet.api.faults import ChangedError


def tag_of(row: Any) -> str:
    """The entity tag of a row."""
    return f'"{blake3(repr(row).encode()).hexdigest(16)}"'


def check(wanted: str, row: Any, noun: str) -> None:
    """Whether a row is one of those that ``If-Match`` names; ``*`` names each.

    :raises ChangedError: it is not.
    """
    if wanted.strip() != "*" and tag_of(row) not in (tag.strip() for tag in wanted.split(",")):
        raise ChangedError(f"{noun} {row.id} is not what If-Match says")
