"""Reads a CVRPLIB instance, strictly: what it does not know it refuses rather than plan around.

It stands between the posted text and the solver. Read are the capacitated problem with one depot at
node 1, EUC_2D distances rounded to the nearest integer as CVRPLIB does, and EXPLICIT ones as
FULL_MATRIX or LOWER_ROW. Not read are limits on distance, time or vehicles. Format: TSPLIB 95
(Reinelt) and CVRPLIB's conventions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MAX_NODES = 1001  # two int64 matrices of this size are 16 MB
MAX_VALUE = 10**9  # coordinates, weights, demands: sums stay far below PyVRP's 2**44

_HEADERS = {
    "NAME",
    "COMMENT",
    "TYPE",
    "DIMENSION",
    "CAPACITY",
    "EDGE_WEIGHT_TYPE",
    "EDGE_WEIGHT_FORMAT",
    "NODE_COORD_TYPE",
    "DISPLAY_DATA_TYPE",
}
_SECTIONS = {"NODE_COORD_SECTION", "EDGE_WEIGHT_SECTION", "DEMAND_SECTION", "DEPOT_SECTION"}


class BadInstanceError(ValueError):
    """The text is not an instance this planner can plan; the message says why."""


@dataclass(frozen=True, slots=True)
class Instance:
    """A capacitated problem. Index 0 is the depot, customers are 1..n-1 as in CVRPLIB solutions."""

    name: str
    capacity: int
    demands: tuple[int, ...]
    distances: NDArray[np.int64]
    points: tuple[tuple[float, float], ...] | None  # only to draw where distances are EXPLICIT


def parse(text: str) -> Instance:
    """The instance that `text` describes. Raises BadInstanceError."""
    headers, sections = _split(text)
    if (kind := headers.get("TYPE", "CVRP")) != "CVRP":
        raise BadInstanceError(f"TYPE is {kind}, this planner knows CVRP")
    size = _whole(headers, "DIMENSION", 2, MAX_NODES)
    capacity = _whole(headers, "CAPACITY", 1, MAX_VALUE)
    demands = _by_node(sections, "DEMAND_SECTION", size, 1, integral=True)
    loads = tuple(int(demand) for (demand,) in demands)
    for node, load in enumerate(loads, start=1):
        if not 0 <= load <= capacity:
            raise BadInstanceError(f"node {node} has demand {load}, outside 0..{capacity} (CAPACITY)")
    if loads[0] != 0:
        raise BadInstanceError(f"the depot, node 1, has demand {loads[0]} instead of 0")
    if _numbers(sections, "DEPOT_SECTION", integral=True) not in ([1, -1], [1]):
        raise BadInstanceError("DEPOT_SECTION must hold one depot, node 1, and then -1")
    points = None
    if "NODE_COORD_SECTION" in sections:
        points = tuple((x, y) for x, y in _by_node(sections, "NODE_COORD_SECTION", size, 2))
    distances = _distances(headers, sections, size, points)
    return Instance(headers.get("NAME", "unnamed"), capacity, loads, distances, points)


def _split(text: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Header values by keyword, and the words of each section."""
    headers: dict[str, str] = {}
    sections: dict[str, list[str]] = {}
    words: list[str] | None = None
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        key, colon, value = (part.strip() for part in line.partition(":"))
        if not line:
            continue
        if line == "EOF":
            break
        if key in headers or key in sections:
            raise BadInstanceError(f"line {number}: {key} is given twice")
        if key in _SECTIONS and not value:
            words = sections[key] = []
        elif key in _HEADERS and colon:
            headers[key] = value
            words = None
        elif words is not None and (line[0].isdigit() or line[0] in "+-."):
            words.extend(line.split())
        else:
            raise BadInstanceError(f"line {number}: {line[:40]!r} is not understood here")
    return headers, sections


def _number(word: str, where: str, *, integral: bool) -> float:
    try:
        value = int(word) if integral else float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and abs(value) <= MAX_VALUE and "_" not in word):
        kind = "an integer" if integral else "a number"
        raise BadInstanceError(f"{where}: {word[:40]!r} is not {kind} within +-{MAX_VALUE}")
    return value


def _whole(headers: dict[str, str], key: str, low: int, high: int) -> int:
    if key not in headers:
        raise BadInstanceError(f"{key} is missing")
    value = int(_number(headers[key], key, integral=True))
    if not low <= value <= high:
        raise BadInstanceError(f"{key} is {value}, outside {low}..{high}")
    return value


def _numbers(sections: dict[str, list[str]], key: str, *, integral: bool = False) -> list[float]:
    if key not in sections:
        raise BadInstanceError(f"{key} is missing")
    return [_number(word, key, integral=integral) for word in sections[key]]


def _by_node(
    sections: dict[str, list[str]], key: str, size: int, width: int, *, integral: bool = False
) -> list[Sequence[float]]:
    """Rows `node value...`, in the order of the nodes, which must be 1..size, each once."""
    numbers = _numbers(sections, key, integral=integral)
    if len(numbers) != size * (width + 1):
        raise BadInstanceError(
            f"{key} holds {len(numbers)} numbers, {size} rows of {width + 1} are needed (DIMENSION)"
        )
    rows = {numbers[i]: numbers[i + 1 : i + 1 + width] for i in range(0, len(numbers), width + 1)}
    if rows.keys() != set(range(1, size + 1)):
        raise BadInstanceError(f"{key} must name each of the nodes 1..{size} once")
    return [rows[node] for node in range(1, size + 1)]


def _distances(
    headers: dict[str, str],
    sections: dict[str, list[str]],
    size: int,
    points: tuple[tuple[float, float], ...] | None,
) -> NDArray[np.int64]:
    kind = headers.get("EDGE_WEIGHT_TYPE")
    if kind == "EUC_2D":
        if points is None:
            raise BadInstanceError("NODE_COORD_SECTION is missing")
        xy = np.array(points, dtype=np.float64)
        dx, dy = (xy[:, None, axis] - xy[None, :, axis] for axis in (0, 1))
        return np.floor(np.sqrt(dx * dx + dy * dy) + 0.5).astype(np.int64)
    if kind != "EXPLICIT":
        raise BadInstanceError(f"EDGE_WEIGHT_TYPE is {kind}, this planner knows EUC_2D and EXPLICIT")
    weights = np.array(_numbers(sections, "EDGE_WEIGHT_SECTION", integral=True), dtype=np.int64)
    layout = headers.get("EDGE_WEIGHT_FORMAT")
    if layout not in ("FULL_MATRIX", "LOWER_ROW"):
        raise BadInstanceError(f"EDGE_WEIGHT_FORMAT is {layout}, known are FULL_MATRIX and LOWER_ROW")
    needed = size * size if layout == "FULL_MATRIX" else size * (size - 1) // 2
    if len(weights) != needed or (weights < 0).any():
        raise BadInstanceError(f"EDGE_WEIGHT_SECTION must hold {needed} weights of 0 or more")
    if layout == "FULL_MATRIX":
        matrix = weights.reshape(size, size)
        if matrix.diagonal().any():
            raise BadInstanceError("EDGE_WEIGHT_SECTION: the diagonal must be 0")
        return matrix
    matrix = np.zeros((size, size), dtype=np.int64)
    matrix[np.tril_indices(size, -1)] = weights
    return matrix + matrix.T
