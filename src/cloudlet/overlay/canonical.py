"""JSON in the one form that the root has: read strictly, written back, compared byte by byte.

Two programs that agree on a value agree on its bytes, so that a digest of the root is a digest of
what it says. :class:`Fields` takes an object apart with the type and range of each member checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any, NoReturn

from cloudlet.errors import CorruptError
from cloudlet.overlay.limits import NUMBER

_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


def encode(value: Any) -> bytes:
    """The canonical bytes: keys sorted, no white space, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def decode(data: bytes, where: str) -> Any:
    """Read canonical bytes.

    :raises CorruptError: not JSON, or not in canonical form.
    """
    try:
        value = json.loads(data.decode(), parse_float=_no_float, parse_constant=_no_float)
        again = encode(value)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where} is not JSON of this format: {error}") from error
    if again != data:
        raise CorruptError(f"{where} is not in canonical form")
    return value


def _no_float(text: str) -> NoReturn:
    raise ValueError(f"{text} is not an integer")


class Fields:
    """A strict view of a JSON object: exactly these keys, each read with its type.

    Every method raises :class:`CorruptError` that names the member when it is not as it should be.
    """

    def __init__(self, value: Any, where: str, keys: Iterable[str]) -> None:
        self.where = where
        if not isinstance(value, dict):
            raise CorruptError(f"{where} is not an object")
        wanted = set(keys)
        if value.keys() != wanted:
            raise CorruptError(f"{where} has the keys {sorted(value)}, not {sorted(wanted)}")
        self._value = value

    def integer(self, key: str, low: int = 0, high: int = NUMBER - 1) -> int:
        return integer(self._value[key], f"{self.where}.{key}", low, high)

    def text(self, key: str, most: int = 1024) -> str:
        """A line of printable characters: it will be shown on terminals."""
        return line(self._value[key], f"{self.where}.{key}", most)

    def digest(self, key: str) -> bytes:
        return digest(self._value[key], f"{self.where}.{key}")

    def time(self, key: str) -> str:
        return time(self._value[key], f"{self.where}.{key}")

    def truth(self, key: str) -> bool:
        value = self._value[key]
        if not isinstance(value, bool):
            raise CorruptError(f"{self.where}.{key} is neither true nor false")
        return value

    def list(self, key: str) -> list[Any]:
        value = self._value[key]
        if not isinstance(value, list):
            raise CorruptError(f"{self.where}.{key} is not a list")
        return value

    def fields(self, key: str, keys: Iterable[str]) -> Fields:
        return Fields(self._value[key], f"{self.where}.{key}", keys)


def integer(value: Any, where: str, low: int = 0, high: int = NUMBER - 1) -> int:
    if type(value) is not int or not low <= value <= high:
        raise CorruptError(f"{where} is not an integer from {low} to {high}")
    return value


def line(value: Any, where: str, most: int = 1024) -> str:
    if not isinstance(value, str) or len(value) > most or not value.isprintable():
        raise CorruptError(f"{where} is not a line of at most {most} printable characters")
    return value


def time(value: Any, where: str) -> str:
    """A time in UTC, to the second, in the one form that sorts as it passes: 2026-11-24T23:00:00Z."""
    try:
        if not isinstance(value, str) or not _TIME.fullmatch(value):
            raise ValueError("not of the form 2026-11-24T23:00:00Z")
        datetime.fromisoformat(value)
    except ValueError as error:
        raise CorruptError(f"{where} is not a time in UTC: {error}") from error
    return value


def digest(value: Any, where: str) -> bytes:
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise CorruptError(f"{where} is not a digest of 64 hexadecimal digits")
    return bytes.fromhex(value)


def row(value: Any, where: str, length: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != length:
        raise CorruptError(f"{where} is not a list of {length}")
    return value
