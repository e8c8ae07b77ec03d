"""Clients that mean harm, or are only slow: refused, with bounded memory, while others are served."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from urllib.parse import urlsplit

import pytest
from requests.auth import _basic_auth_str

from cloudlet.service.options import Options
from tests.service.conftest import PASSWORD, Caller, Made, Running, serving


@pytest.fixture(scope="module")
def running(module_options: Options) -> Iterator[Running]:
    """One site for all of them: what one does must not be felt by the next."""
    with serving(module_options) as running:
        yield running


def connect(call: Caller) -> socket.socket:
    parts = urlsplit(call.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def served(call: Caller) -> None:
    """Others are served, and in time."""
    began = time.monotonic()
    for _ in range(5):
        assert call.get("/v1/instances")["instances"] == []
    assert time.monotonic() - began < 10


def test_slow_half_open_and_never_reading_clients(running: Running, made: Made) -> None:
    call = running.call
    app = call.publish(made.overlay)
    overlay = app["components"][0]["overlay_id"]
    with ExitStack() as stack:
        for number in range(60):
            connection = stack.enter_context(connect(call))
            match number % 4:
                case 0:
                    pass  # half open
                case 1:
                    connection.sendall(b"GET /v1/inst")
                case 2:
                    connection.sendall(
                        b"POST /v1/overlays HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
                    )
                case 3:
                    # Asks and asks, and never reads.
                    connection.settimeout(0.2)
                    request = f"GET /v1/overlays/{overlay}/file HTTP/1.1\r\nHost: x\r\n\r\n".encode()
                    with suppress(OSError):
                        for _ in range(50):
                            connection.sendall(request)
        served(call.as_("root"))


def test_a_body_of_a_gigabyte_is_not_collected(running: Running) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with connect(running.call) as connection:
        head = f"POST /v1/overlays HTTP/1.1\r\nHost: x\r\n{_basic()}Content-Length: {1 << 30}\r\n\r\n"
        connection.sendall(head.encode() + b'{"overlay": "')
        answer = connection.recv(4096)
        assert b" 413 " in answer
        sent = 0
        try:
            while sent < 1 << 30:
                connection.sendall(b"x" * (1 << 20))
                sent += 1 << 20
        except OSError:
            pass
        assert sent < 1 << 30, "the site read all of it"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    served(running.call)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1_000_000,
        b'{"overlay":' * 100_000,
        b'{"overlay": {"name": "' + b"\\u0000" * 10 + b'"}}',
        b"\xff\xfe",
        b'{"overlay": {"name": "x", "name2": 1}}',
        b'{"overlay": {"name": 1e400}}',
        b'{"overlay": {"name": "x", "url": "file:///etc/passwd"}}',
        b'{"overlay": {"name": "x", "url": "http://x/\\n"}}',
        b'{"overlay": {"name": "' + b"x" * 256 + b'"}}',
        b'{"overlay": {"name": "\\u001b[2J"}}',
        b"null",
        b"",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_bodies_that_are_wrong(body: bytes, call: Caller) -> None:
    answer = call("POST", "/v1/overlays", data=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 413), answer.text
    assert answer.json()["errors"][0]["code"] in ("cloudlet.overlay.invalid", "cloudlet.overlay.too_large")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/overlays/../../etc/passwd",
        "/v1/overlays/%2e%2e%2f%2e%2e",
        "/v1/instances/" + "a" * 5000,
        "/v1/instances?sort=password",
        "/v1/instances?limit=0",
        "/v1/instances?limit=1001",
        "/v1/instances?limit=x",
        "/v1/instances?marker=x",
        "/v1/instances?no_such=1",
        "/v1/instances?name=a&name=b&name[]=c&state=x",
        "/v1/events?after=-1",
        "/v1/events?after=9999999999999999999999",
        "/v1/events?wait=61",
        "/v1/events?wait=nan",
        "/v1/cloudlets/other",
    ],
)
def test_paths_and_queries_that_are_wrong(path: str, call: Caller) -> None:
    answer = call("GET", path)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["errors"][0]["code"].startswith("cloudlet.")


@pytest.mark.parametrize(
    ("version", "status"),
    [
        (None, 200), ("cloudlet 1.0", 200), ("cloudlet latest", 200), ("compute 2.90", 200),
        ("compute 2.1, cloudlet 1.0", 200), ("cloudlet 1.99", 406), ("cloudlet 0.9", 406),
        ("cloudlet x", 406), ("cloudlet 99999.0", 406), ("cloudlet", 406),
    ],
)  # fmt: skip
def test_microversions(version: str | None, status: int, call: Caller) -> None:
    headers = {"OpenStack-API-Version": version} if version else {}
    answer = call("GET", "/v1/instances", headers=headers)
    assert answer.status_code == status
    assert "OpenStack-API-Version" in answer.headers["Vary"]
    if status == 200:
        assert answer.headers["OpenStack-API-Version"] == "cloudlet 1.0"
    else:
        assert "between 1.0 and 1.0" in answer.json()["errors"][0]["detail"]


def test_every_answer_has_a_request_id(call: Caller) -> None:
    for answer in (call("GET", "/v1"), call("GET", "/nowhere"), call("TRACE", "/v1"), call("PUT", "/v1")):
        assert answer.headers["X-Openstack-Request-Id"].startswith("req-"), answer.text


def _basic() -> str:
    return f"Authorization: {_basic_auth_str('root', PASSWORD)}\r\n"


def test_a_name_is_shown_and_never_run(call: Caller) -> None:
    name = "'; DROP TABLE overlays; -- <script>$(reboot)"
    overlay = call.post("/v1/overlays", {"overlay": {"name": name}})["overlay"]
    found = call.get("/v1/overlays", params={"name": name})["overlays"]
    assert [row["id"] for row in found] == [overlay["id"]]


def test_many_connections_at_once(running: Running) -> None:
    problems: list[str] = []

    def ask() -> None:
        call = running.call.as_("root")
        for _ in range(5):
            answer = call("GET", "/v1/instances")
            if answer.status_code != 200:
                problems.append(answer.text)

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
