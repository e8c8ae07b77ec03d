"""A part of a file that a client asks for: one range, as RFC 9110 has it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from cloudlet.api.faults import RangeError


@dataclass(frozen=True, slots=True)
class Part:
    """What of a file is sent."""

    start: int
    length: int
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)


def ranged(headers: Mapping[str, str], size: int, tag: str) -> Part:
    """What of a file of this size and entity tag a request wants; several ranges at once get the whole.

    :raises RangeError: there is no such part.
    """
    always = {"Accept-Ranges": "bytes", "ETag": tag}
    whole = Part(0, size, 200, always)
    if headers.get("HTTP_IF_RANGE", tag) != tag:
        return whole
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", headers.get("HTTP_RANGE", "").replace(" ", ""))
    if not match or match.groups() == ("", ""):
        return whole
    first, last = match.groups()
    if first:
        start, end = int(first), min(int(last) + 1, size) if last else size
    else:
        start, end = max(0, size - int(last)), size
    if not start < end:
        raise RangeError(f"bytes {first}-{last} are not in a file of {size}", size)
    return Part(start, end - start, 206, {**always, "Content-Range": f"bytes {start}-{end - 1}/{size}"})
