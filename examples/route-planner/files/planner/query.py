"""What a request may ask for: the limits of /plan's parameters; all else is refused."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from .solver import Budget

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_SECONDS = 600.0
MAX_ITERATIONS = 1_000_000
DEFAULT_SECONDS = 2.0


class RefusalError(Exception):
    """A request that gets an error answer."""

    def __init__(self, status: HTTPStatus, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def read_query(text: str) -> dict[str, str]:
    """The parameters of a query string, each at most once."""
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text), max_num_fields=8)
    except ValueError as error:
        raise RefusalError(HTTPStatus.BAD_REQUEST, "bad-query", f"the query: {error}") from error
    if len(dict(pairs)) != len(pairs):
        raise RefusalError(HTTPStatus.BAD_REQUEST, "bad-query", "a parameter is given twice")
    return dict(pairs)


def read_budget(query: Mapping[str, str]) -> tuple[Budget, int]:
    """The budget and the seed that the parameters of /plan ask for."""
    if unknown := query.keys() - {"seconds", "iterations", "seed"}:
        raise RefusalError(HTTPStatus.BAD_REQUEST, "bad-query", f"not known: {', '.join(sorted(unknown))}")
    if "seconds" in query and "iterations" in query:
        raise RefusalError(HTTPStatus.BAD_REQUEST, "bad-query", "give seconds or iterations, not both")
    seed = int(_value(query, "seed", "0", int, 0, 2**32 - 1))
    if "iterations" in query:
        iterations = int(_value(query, "iterations", "", int, 1, MAX_ITERATIONS))
        return Budget(MAX_SECONDS, iterations), seed
    return Budget(_value(query, "seconds", str(DEFAULT_SECONDS), float, 0.1, MAX_SECONDS)), seed


def _value(
    query: Mapping[str, str],
    name: str,
    default: str,
    kind: Callable[[str], float],
    low: float,
    high: float,
) -> float:
    try:
        value = kind(query.get(name, default))
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        noun = "an integer" if kind is int else "a number"
        message = f"{name} must be {noun} in {low:g}..{high:.0f}"
        raise RefusalError(HTTPStatus.BAD_REQUEST, "bad-query", message)
    return value
