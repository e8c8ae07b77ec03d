"""The route planner as its user meets it: a process of its own, over a real socket, with PyVRP."""

import http.client
import importlib.util
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "route-planner"
DATA = EXAMPLE / "data"
FIRST20 = (DATA / "X-n200-first20.vrp").read_bytes()
DEADLINE = 60  # seconds, for each wait

_spec = importlib.util.spec_from_file_location("route_planner_check", EXAMPLE / "check.py")
checker = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = checker
_spec.loader.exec_module(checker)


@contextmanager
def running():
    """A started and warm service: its process and port. Ends with SIGTERM, which must work."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS")}
    command = [
        sys.executable,
        "-m",
        "planner",
        "--port",
        "0",
        "--warm-up",
        DATA / "X-n200-first20.vrp",
    ]
    with subprocess.Popen(
        command,
        env=environment | {"PYTHONPATH": str(EXAMPLE / "files"), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
    ) as process:
        try:
            readable, _, _ = select.select([process.stdout], [], [], DEADLINE)
            line = process.stdout.readline().decode() if readable else "nothing in time"
            assert line.startswith("ready on http://127.0.0.1:"), line
            yield process, int(line.rpartition(":")[2])
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def port():
    with running() as (_, port):
        yield port


def ask(port, method, path, body=None, **headers):
    """Status, headers and body (decoded if JSON) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.headers["Content-Type"] == "application/json":
            content = json.loads(content)
        return answer.status, answer.headers, content
    finally:
        connection.close()


def raw(port, request):
    """All that the service answers to these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_healthy_once_it_says_so(port):
    status, _, health = ask(port, "GET", "/healthz")
    assert (status, health["status"]) == (200, "ok")
    assert health["solver"] == "pyvrp 0.14.1"


def test_plans_the_bundled_instance(port):
    status, _, plan = ask(port, "POST", "/plan?iterations=1", FIRST20)
    assert status == 200
    assert plan["solver"] == "pyvrp 0.14.1"
    assert plan["iterations"] == 1
    assert plan["seconds"] > 0
    assert checker.check_plan(FIRST20.decode(), json.dumps(plan)).violations == ()


def test_equal_requests_get_equal_plans(port):
    first, second = (ask(port, "POST", "/plan?iterations=50&seed=7", FIRST20)[2] for _ in range(2))
    assert first["routes"] == second["routes"]


def test_plans_a_benchmark_within_a_time_near_the_best_known(port):
    text = (DATA / "X-n200-k36.vrp").read_text()
    status, _, plan = ask(port, "POST", "/plan?seconds=4", text.encode())
    assert status == 200
    assert 4 <= plan["seconds"] < 30
    best = checker.read_solution((DATA / "X-n200-k36.sol").read_text())[1]
    report = checker.check_plan(text, json.dumps(plan), best)
    assert report.violations == ()
    assert 0 <= report.gap < 8


@pytest.mark.parametrize(
    ("layout", "weights"),
    [("LOWER_ROW", "5 3 4"), ("FULL_MATRIX", "0 5 3  5 0 4  3 4 0")],
)
def test_plans_explicit_weights(port, layout, weights):
    text = (
        f"NAME : tiny\nTYPE : CVRP\nDIMENSION : 3\nCAPACITY : 2\nEDGE_WEIGHT_TYPE : EXPLICIT\n"
        f"EDGE_WEIGHT_FORMAT : {layout}\nEDGE_WEIGHT_SECTION\n{weights}\n"
        "DEMAND_SECTION\n1 0\n2 1\n3 1\nDEPOT_SECTION\n1\n-1\nEOF\n"
    )
    status, _, plan = ask(port, "POST", "/plan?iterations=5", text.encode())
    assert (status, plan["cost"], plan["vehicles"]) == (200, 12, 1)
    assert checker.check_plan(text, json.dumps(plan)).ok
    assert b"no coordinates to draw" in ask(port, "GET", "/")[2]


def test_counter_counts_in_one_process(port):
    first, second = (ask(port, "GET", "/counter")[2] for _ in range(2))
    assert second == {"counter": first["counter"] + 1, "process": first["process"]}


def test_page_shows_the_last_plan_and_escapes_its_name(port):
    ask(
        port,
        "POST",
        "/plan?iterations=1",
        FIRST20.replace(b"X-n200-first20", b"<script>1</script>"),
    )
    status, headers, page = ask(port, "GET", "/")
    assert status == 200
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert b"&lt;script&gt;1&lt;/script&gt;" in page
    assert page.count(b"<polyline") == page.count(b"<tr><th scope=row>") > 0


def test_head_answers_like_get_without_a_body(port):
    status, headers, content = ask(port, "HEAD", "/")
    assert (status, content) == (200, b"")
    assert int(headers["Content-Length"]) > 1000


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"TYPE : CVRP", b"TYPE : CVRPTW", "TYPE is CVRPTW"),
        (b"EUC_2D", b"GEO", "EDGE_WEIGHT_TYPE is GEO"),
        (b"CAPACITY : 402", b"CAPACITY : 99", "node 21 has demand 100, outside 0..99"),
        (b"CAPACITY : 402", b"CAPACITY : many", "CAPACITY: 'many' is not an integer"),
        (b"CAPACITY : 402\n", b"", "CAPACITY is missing"),
        (b"CAPACITY : 402", b"CAPACITY : 402\nDISTANCE : 9", "'DISTANCE : 9' is not understood"),
        (b"CAPACITY : 402", b"CAPACITY : 402\nCAPACITY : 1", "line 7: CAPACITY is given twice"),
        (b"DIMENSION : 21", b"DIMENSION : 22", "NODE_COORD_SECTION holds|DEMAND_SECTION holds"),
        (b"DIMENSION : 21", b"DIMENSION : 100000", "DIMENSION is 100000, outside 2..1001"),
        (b"\n2 149 141", b"\n3 149 141", "NODE_COORD_SECTION must name each"),
        (b"\n2 149 141", b"\n2 inf 141", "is not understood|is not a number"),
        (b"\n2 149 141", b"\n2 1e300 141", "'1e300' is not a number"),
        (b"DEPOT_SECTION\n1", b"DEPOT_SECTION\n2", "DEPOT_SECTION must hold"),
        (FIRST20, b"hello", "line 1: 'hello' is not understood"),
        (FIRST20, b"", "DIMENSION is missing"),
    ],
)
def test_bad_instance_is_refused_with_the_reason(port, old, new, reason):
    assert old in FIRST20
    status, _, error = ask(port, "POST", "/plan?iterations=1", FIRST20.replace(old, new, 1))
    assert (status, error["error"]) == (422, "bad-instance")
    assert re.search(reason, error["message"])


@pytest.mark.parametrize(
    "query",
    [
        "seconds=0",
        "seconds=nan",
        "seconds=601",
        "seconds=soon",
        "iterations=0",
        "iterations=1.5",
        "iterations=1&seconds=1",
        "iterations=1&iterations=2",
        "seed=-1",
        "color=red",
        "iterations",
    ],
)
def test_bad_query_is_refused(port, query):
    status, _, error = ask(port, "POST", f"/plan?{query}", FIRST20)
    assert (status, error["error"]) == (400, "bad-query"), error


def test_body_that_is_not_text_is_refused(port):
    status, _, error = ask(port, "POST", "/plan", b"\xff\xfe\x00")
    assert (status, error["error"]) == (400, "bad-body")


def test_oversize_body_is_refused_and_the_sender_sees_why(port):
    status, _, error = ask(port, "POST", "/plan", b"1" * (2 << 20))
    assert (status, error["error"]) == (413, "too-large")
    assert ask(port, "GET", "/healthz")[0] == 200


def test_oversize_body_is_refused_before_it_is_sent(port):
    head = b"POST /plan HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n"
    answer = raw(port, head + b"Expect: 100-continue\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"100 Continue" not in answer


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /plan HTTP/1.1\r\nHost: x\r\n\r\n", b"411"),
        (b"POST /plan HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"411"),
        (b"POST /plan HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", b"400"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", b"501"),
    ],
)
def test_broken_requests_get_an_error_in_json(port, request_bytes, status):
    answer = raw(port, request_bytes)
    body = answer.rpartition(b"\r\n\r\n")[2]
    assert json.loads(body)["error"]
    if answer.startswith(b"HTTP/"):  # not to a request line that names no version
        assert answer.split()[1] == status


def test_truncated_body_is_refused(port):
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
        connection.sendall(b"POST /plan HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nNAME")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_wrong_method_and_unknown_path(port):
    status, headers, _ = ask(port, "GET", "/plan")
    assert (status, headers["Allow"]) == (405, "POST")
    status, headers, _ = ask(port, "DELETE", "/counter", b"x")
    assert (status, headers["Allow"]) == (405, "GET")
    assert ask(port, "GET", "/nowhere")[0] == 404


def test_second_plan_is_told_to_come_back_and_health_still_answers(port):
    with ThreadPoolExecutor(2) as clients:
        plans = {clients.submit(ask, port, "POST", "/plan?seconds=4", FIRST20) for _ in range(2)}
        done, waiting = wait(plans, DEADLINE, FIRST_COMPLETED)
        assert ask(port, "GET", "/healthz")[0] == 200
        status, headers, error = done.pop().result()
        assert (status, headers["Retry-After"], error["error"]) == (503, "2", "busy")
        assert waiting.pop().result(DEADLINE)[0] == 200
    assert ask(port, "POST", "/plan?iterations=1", FIRST20)[0] == 200


def test_connections_beyond_the_bound_are_turned_away_and_come_back(port):
    idle = [socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) for _ in range(16)]
    try:
        answer = raw(port, b"")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After" in answer
        for connection in idle:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    finally:
        for connection in idle:
            connection.close()


def test_a_new_process_counts_from_one():
    with running() as (_, port):
        first = ask(port, "GET", "/counter")[2]
    with running() as (_, port):
        second = ask(port, "GET", "/counter")[2]
    assert first["counter"] == second["counter"] == 1
    assert first["process"] != second["process"]


def test_warm_up_that_fails_ends_the_process(tmp_path):
    bad = tmp_path / "bad.vrp"
    bad.write_text("NAME : bad\n")
    done = subprocess.run(
        [sys.executable, "-m", "planner", "--port", "0", "--warm-up", bad],
        env=os.environ | {"PYTHONPATH": str(EXAMPLE / "files"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 1
    assert "DIMENSION is missing" in done.stderr
