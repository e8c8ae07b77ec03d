"""Turns an instance and a budget into a plan, with PyVRP's iterated local search.

The one module that knows PyVRP. The budget covers the whole call, the first local search included:
on an emulated processor that search is a large part of it. PyVRP looks at the budget between two
searches only, so a large instance may overrun a small one.
"""

from __future__ import annotations

import importlib.metadata
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyvrp import Client, Depot, Location, ProblemData, VehicleType, solve

if TYPE_CHECKING:
    from .instance import Instance

SOLVER = f"pyvrp {importlib.metadata.version('pyvrp')}"


class NoPlanError(RuntimeError):
    """The budget ended before any plan within the trucks' capacity was found."""


@dataclass(frozen=True, slots=True)
class Budget:
    """When to stop: after `iterations` if given, after `seconds` of wall time in any case."""

    seconds: float
    iterations: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Routes of customer numbers (CVRPLIB's, the depot left out), their cost, and what it took."""

    routes: tuple[tuple[int, ...], ...]
    cost: int
    seconds: float
    iterations: int


class _Stop:
    """PyVRP's stopping criterion: called with the best cost before each iteration."""

    def __init__(self, budget: Budget) -> None:
        self._deadline = time.monotonic() + budget.seconds
        self._left = budget.iterations

    def __call__(self, best_cost: int) -> bool:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                return True
        return time.monotonic() >= self._deadline


def plan(instance: Instance, budget: Budget, seed: int = 0) -> Plan:
    """The best plan found within `budget`. Equal inputs and iterations give equal plans.

    Raises NoPlanError.
    """
    start = time.monotonic()
    stop = _Stop(budget)
    size = len(instance.demands)
    points = instance.points or ((0.0, 0.0),) * size  # PyVRP plans by the matrix, not by these
    matrix: Any = instance.distances  # PyVRP's stub says ndarray[int], a type that no array has
    data = ProblemData(
        locations=[Location(x, y) for x, y in points],
        clients=[Client(location=i, delivery=[instance.demands[i]]) for i in range(1, size)],
        depots=[Depot(location=0)],
        vehicle_types=[VehicleType(num_available=size - 1, capacity=[instance.capacity])],
        distance_matrices=[matrix],
        duration_matrices=[matrix],
    )
    result = solve(data, stop, seed=seed, collect_stats=False, display=False)
    if not result.is_feasible():
        raise NoPlanError("no plan within the capacity was found in time: give it more seconds")
    routes = tuple(
        tuple(visit.idx + 1 for visit in route if visit.is_client()) for route in result.best.routes()
    )
    return Plan(routes, int(result.cost()), time.monotonic() - start, result.num_iterations)
