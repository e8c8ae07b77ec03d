"""Checks a plan against its CVRPLIB instance, independently of the planner that made it.

Standard library only, and its own reader of the format, so that a fault in the planner's cannot
hide here too. It proves that a plan is valid and what it costs; whether a better one exists it says
only by comparison with a published solution.

As a program: python3 check.py INSTANCE.vrp PLAN.json [--best INSTANCE.sol]
prints cost, vehicles and gap; exit status 1 and the reasons if the plan is not valid, 2 if the
instance or the best solution cannot be read. PLAN.json may be "-" for standard input.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """What the checker needs of an instance; index 0 is the depot."""

    capacity: int
    demands: list[int]
    distances: list[list[int]]


@dataclass(frozen=True, slots=True)
class Report:
    """The verdict on one plan."""

    vehicles: int
    cost: int | None  # None where a stop is not a known customer
    best: int | None
    violations: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the plan is valid."""
        return not self.violations

    @property
    def gap(self) -> float | None:
        """Per cent above the best known cost."""
        return None if self.cost is None or not self.best else 100 * (self.cost - self.best) / self.best


def check(vrp_text: str, routes: Any, best: int | None = None) -> Report:
    """Judge `routes`, lists of customer numbers 1..n-1, whatever it really is.

    Raises ValueError if the instance itself cannot be read.
    """
    problem = read_problem(vrp_text)
    if not isinstance(routes, list) or not all(isinstance(route, list) for route in routes):
        return Report(0, None, best, ("routes is not a list of lists",))
    customers = range(1, len(problem.demands))
    wrong: list[str] = []
    known = True
    for number, route in enumerate(routes, start=1):
        strangers = [stop for stop in route if type(stop) is not int or stop not in customers]
        if strangers:
            known = False
            wrong.append(f"route {number}: unknown customer {', '.join(map(repr, strangers))}")
            continue
        if not route:
            wrong.append(f"route {number} is empty")
        load = sum(problem.demands[stop] for stop in route)
        if load > problem.capacity:
            wrong.append(f"route {number}: load {load} is over the capacity {problem.capacity}")
    visits = Counter(stop for route in routes for stop in route if type(stop) is int)
    wrong += [f"customer {c} is visited {visits[c]} times" for c in customers if visits[c] > 1]
    if missing := [c for c in customers if not visits[c]]:
        wrong.append(f"not visited: customer {', '.join(map(str, missing))}")
    cost = None
    if known:
        legs = (leg for route in routes for leg in pairwise([0, *route, 0]))
        cost = sum(problem.distances[a][b] for a, b in legs)
    return Report(len(routes), cost, best, tuple(wrong))


def check_plan(vrp_text: str, plan_text: str, best: int | None = None) -> Report:
    """Judge a planner's whole answer: its routes, and the cost and vehicles that it claims."""
    try:
        plan = json.loads(plan_text)
    except ValueError as error:
        return Report(0, None, best, (f"the plan is not JSON: {error}",))
    if not isinstance(plan, dict) or "routes" not in plan:
        return Report(0, None, best, ("the plan is not an object with routes",))
    report = check(vrp_text, plan["routes"], best)
    wrong = list(report.violations)
    for claim, truth in (("cost", report.cost), ("vehicles", report.vehicles)):
        if truth is not None and plan.get(claim) != truth:
            wrong.append(f"the plan says {claim} {plan.get(claim)!r}, it is {truth}")
    return Report(report.vehicles, report.cost, best, tuple(wrong))


def read_problem(text: str) -> Problem:
    """Read a CVRP instance: EUC_2D, or EXPLICIT as FULL_MATRIX or LOWER_ROW. Raises ValueError."""
    fields = dict(re.findall(r"^([A-Z_0-9]+)[ \t]*:[ \t]*(.*?)\s*$", text, re.MULTILINE))
    parts = re.split(r"^([A-Z]\w*_SECTION)[ \t:]*$|^(EOF)[ \t]*$", text, flags=re.MULTILINE)
    names = [section or end for section, end in zip(parts[1::3], parts[2::3], strict=True)]
    sections = {name: body.split() for name, body in zip(names, parts[3::3], strict=True)}
    try:
        size, capacity = int(fields["DIMENSION"]), int(fields["CAPACITY"])
        if fields.get("TYPE", "CVRP") != "CVRP" or sections["DEPOT_SECTION"][0] != "1":
            raise ValueError("it is not a CVRP with its depot at node 1")
        pairs = iter(map(int, sections["DEMAND_SECTION"]))
        demand = dict(zip(pairs, pairs, strict=True))
        demands = [demand[node] for node in range(1, size + 1)]
        if fields["EDGE_WEIGHT_TYPE"] == "EUC_2D":
            triples = iter(map(float, sections["NODE_COORD_SECTION"]))
            place = {int(node): (x, y) for node, x, y in zip(triples, triples, triples, strict=True)}
            points = [place[node] for node in range(1, size + 1)]
            distances = [[_rounded(a, b) for b in points] for a in points]
        else:
            distances = _explicit(fields["EDGE_WEIGHT_FORMAT"], sections["EDGE_WEIGHT_SECTION"], size)
    except (KeyError, IndexError) as error:
        raise ValueError(f"the instance lacks {error}") from error
    return Problem(capacity, demands, distances)


def _rounded(a: tuple[float, float], b: tuple[float, float]) -> int:
    """CVRPLIB's distance: Euclidean, to the nearest integer (nint of TSPLIB 95)."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    return int(math.sqrt(dx * dx + dy * dy) + 0.5)


def _explicit(layout: str, words: list[str], size: int) -> list[list[int]]:
    weights = iter(map(int, words))
    table = [[0] * size for _ in range(size)]
    if layout not in ("FULL_MATRIX", "LOWER_ROW"):
        raise ValueError(f"EDGE_WEIGHT_FORMAT {layout} is not known")
    for i in range(size):
        for j in range(size if layout == "FULL_MATRIX" else i):
            table[i][j] = next(weights, -1)
            if table[i][j] < 0:
                raise ValueError("EDGE_WEIGHT_SECTION is too short or has a negative weight")
            if layout == "LOWER_ROW":
                table[j][i] = table[i][j]
    return table


def read_solution(text: str) -> tuple[list[list[int]], int]:
    """Routes and cost of a CVRPLIB .sol file. Raises ValueError."""
    routes = [
        [int(word) for word in line.split()]
        for line in re.findall(r"^Route #\d+:(.*)$", text, re.MULTILINE | re.IGNORECASE)
    ]
    cost = re.search(r"^Cost\s+(\d+)\s*$", text, re.MULTILINE | re.IGNORECASE)
    if not routes or not cost:
        raise ValueError("the solution has no 'Route #' lines or no whole-number 'Cost'")
    return routes, int(cost[1])


def main() -> int:
    """The program; returns the exit status."""
    arguments = argparse.ArgumentParser(description="Check a plan against its CVRPLIB instance.")
    arguments.add_argument("instance", type=pathlib.Path)
    arguments.add_argument("plan", help="the planner's JSON answer; - reads standard input")
    arguments.add_argument("--best", type=pathlib.Path, help="a .sol file to compare with")
    options = arguments.parse_args()
    try:
        plan = sys.stdin.read() if options.plan == "-" else pathlib.Path(options.plan).read_text("utf-8")
        best = read_solution(options.best.read_text("utf-8"))[1] if options.best else None
        report = check_plan(options.instance.read_text("utf-8"), plan, best)
    except (OSError, ValueError) as error:
        print(f"check.py: {error}", file=sys.stderr)
        return 2
    for violation in report.violations:
        print(f"not valid: {violation}", file=sys.stderr)
    gap = "" if report.gap is None else f"  best known {report.best}  gap {report.gap:.2f} %"
    verdict = "valid" if report.ok else "NOT VALID"
    print(f"cost {report.cost}  vehicles {report.vehicles}{gap}  {verdict}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
