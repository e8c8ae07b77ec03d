"""The route planner's independent checker: what it must accept and everything it must refuse."""

import importlib.util
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

EXAMPLE = Path(__file__).parents[2] / "examples" / "route-planner"
DATA = EXAMPLE / "data"

_spec = importlib.util.spec_from_file_location("route_planner_check", EXAMPLE / "check.py")
checker = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = checker  # dataclasses look their module up there
_spec.loader.exec_module(checker)

TRIANGLE = """NAME : triangle
TYPE : CVRP
DIMENSION : 4
EDGE_WEIGHT_TYPE : EUC_2D
CAPACITY : 10
NODE_COORD_SECTION
1 0 0
2 3 4
3 3 0
4 0 1
DEMAND_SECTION
1 0
2 6
3 4
4 5
DEPOT_SECTION
1
-1
EOF
"""


def run(*arguments, stdin=""):
    return subprocess.run(
        [sys.executable, EXAMPLE / "check.py", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", ["X-n200-k36", "X-n303-k21"])
def test_best_known_solution_is_valid_at_its_published_cost(name):
    routes, cost = checker.read_solution((DATA / f"{name}.sol").read_text())
    report = checker.check((DATA / f"{name}.vrp").read_text(), routes, cost)
    assert report.violations == ()
    assert report.cost == cost
    assert report.gap == 0
    assert report.vehicles == int(name.rpartition("k")[2])


def test_cost_by_hand():
    report = checker.check(TRIANGLE, [[1, 2], [3]])
    assert (report.ok, report.cost, report.vehicles) == (True, 5 + 4 + 3 + 1 + 1, 2)
    assert report.gap is None


@pytest.mark.parametrize(
    ("routes", "reason"),
    [
        ([[1, 3], [2]], "route 1: load 11 is over the capacity 10"),
        ([[1, 2]], "not visited: customer 3"),
        ([[1, 2], [3, 3]], "customer 3 is visited 2 times"),
        ([[1, 2], [3, 4]], "route 2: unknown customer 4"),
        ([[1, 2], [0, 3]], "route 2: unknown customer 0"),
        ([[1, 2], [True, 3]], "route 2: unknown customer True"),
        ([[1, 2], ["3"]], "route 2: unknown customer '3'"),
        ([[1, 2], [3.0]], "route 2: unknown customer 3.0"),
        ([[1, 2], [[3]]], "route 2: unknown customer [3]"),
        ([[1, 2], [3], []], "route 3 is empty"),
        ({"1": [1, 2]}, "routes is not a list of lists"),
        ([1, 2, 3], "routes is not a list of lists"),
        ([], "not visited: customer 1, 2, 3"),
    ],
)
def test_violation_is_named(routes, reason):
    report = checker.check(TRIANGLE, routes)
    assert not report.ok
    assert reason in report.violations


@pytest.mark.parametrize(
    ("layout", "weights"),
    [("LOWER_ROW", "5 3 4 1 4 3"), ("FULL_MATRIX", "0 5 3 1\n5 0 4 4\n3 4 0 3\n1 4 3 0")],
)
def test_explicit_weights(layout, weights):
    head, tail = TRIANGLE.split("NODE_COORD_SECTION")
    explicit = head.replace("EUC_2D", f"EXPLICIT\nEDGE_WEIGHT_FORMAT : {layout}")
    text = f"{explicit}EDGE_WEIGHT_SECTION\n{weights}\nDEMAND_SECTION{tail.split('DEMAND_SECTION')[1]}"
    assert checker.check(text, [[1, 2], [3]]).cost == 14


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("CAPACITY : 10", ""),
        ("TYPE : CVRP", "TYPE : VRPTW"),
        ("4 5\n", ""),
        ("4 0 1\n", "4 0\n"),
        ("DEPOT_SECTION\n1", "DEPOT_SECTION\n2"),
        ("EUC_2D", "GEO"),
    ],
)
def test_unreadable_instance_is_an_error_not_a_verdict(old, new):
    assert old in TRIANGLE
    with pytest.raises(ValueError):
        checker.check(TRIANGLE.replace(old, new, 1), [[1, 2], [3]])


def test_program_accepts_and_prints_the_gap(tmp_path):
    routes, cost = checker.read_solution((DATA / "X-n200-k36.sol").read_text())
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"routes": routes, "cost": cost, "vehicles": len(routes)}))
    done = run(DATA / "X-n200-k36.vrp", plan, "--best", DATA / "X-n200-k36.sol")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "cost 58578  vehicles 36  best known 58578  gap 0.00 %  valid\n"


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ('{"routes": [[1, 2], [3]', "the plan is not JSON"),
        ("[[1, 2], [3]]", "not an object with routes"),
        ('{"error": "busy"}', "not an object with routes"),
        ('{"routes": [[1, 2], [3]], "cost": 13, "vehicles": 2}', "the plan says cost 13, it is 14"),
        (
            '{"routes": [[1, 2], [3]], "cost": 14, "vehicles": 1}',
            "the plan says vehicles 1, it is 2",
        ),
        ('{"routes": [[1, 3], [2]], "cost": 16, "vehicles": 2}', "over the capacity"),
    ],
)
def test_program_refuses_with_the_reason(tmp_path, plan, reason):
    instance = tmp_path / "triangle.vrp"
    instance.write_text(TRIANGLE)
    done = run(instance, "-", stdin=plan)
    assert done.returncode == 1
    assert reason in done.stderr
    assert "NOT VALID" in done.stdout


def test_program_tells_a_missing_file_from_a_bad_plan(tmp_path):
    done = run(tmp_path / "none.vrp", "-", stdin="{}")
    assert done.returncode == 2
    assert "none.vrp" in done.stderr


@st.composite
def planned(draw):
    """An instance with integer points, and a random plan that keeps its capacity."""
    customers = draw(st.integers(2, 12))
    coordinate = st.integers(-1000, 1000)
    points = draw(st.lists(st.tuples(coordinate, coordinate), min_size=customers + 1, max_size=customers + 1))
    demands = [0, *draw(st.lists(st.integers(1, 50), min_size=customers, max_size=customers))]
    routes, capacity = [[]], 60
    for customer in draw(st.permutations(range(1, customers + 1))):
        if sum(demands[c] for c in routes[-1]) + demands[customer] > capacity:
            routes.append([])
        routes[-1].append(customer)
    rows = "\n".join(f"{n} {x} {y}" for n, (x, y) in enumerate(points, start=1))
    loads = "\n".join(f"{n} {load}" for n, load in enumerate(demands, start=1))
    text = (
        f"DIMENSION : {customers + 1}\nCAPACITY: {capacity}\nEDGE_WEIGHT_TYPE: EUC_2D\n"
        f"NODE_COORD_SECTION\n{rows}\nDEMAND_SECTION\n{loads}\nDEPOT_SECTION\n1\n-1\nEOF\n"
    )
    return text, points, demands, capacity, routes


def nearest_integer_distance(a, b):
    """The distance in exact integers: the k with (2k-1)^2 <= 4 d^2 < (2k+1)^2."""
    squared = (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2
    return (math.isqrt(4 * squared) + 1) // 2


@given(planned())
def test_any_plan_within_capacity_is_valid_and_costed_exactly(case):
    text, points, _, _, routes = case
    legs = [leg for route in routes for leg in pairwise([0, *route, 0])]
    report = checker.check(text, routes)
    assert report.violations == ()
    assert report.cost == sum(nearest_integer_distance(points[a], points[b]) for a, b in legs)


@given(planned(), st.data())
def test_any_single_fault_is_found(case, data):
    text, _, demands, capacity, routes = case
    victim = data.draw(st.sampled_from([c for route in routes for c in route]))
    fault = data.draw(st.sampled_from(["drop", "repeat", "stranger", "overload"]))
    broken = [list(route) for route in routes]
    if fault == "drop":
        broken = [[c for c in route if c != victim] for route in broken]
    elif fault == "repeat":
        broken.append([victim])
    elif fault == "stranger":
        broken.append([len(demands)])
    else:
        broken = [[c for route in routes for c in route]]
        if sum(demands) <= capacity:
            assert checker.check(text, broken).ok
            return
    assert not checker.check(text, broken).ok
