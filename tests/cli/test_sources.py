"""Where an overlay comes from: a pipe or a web server with any fault a server can have."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from cloudlet.settings import Settings
from tests.cli.conftest import Hello
from tests.cli.test_corruption import refused
from tests.cli.traces import first_line, running, traces
from tests.cli.web import CUT_AFTER, Web, serving
from tests.conftest import CommandLine

pytestmark = pytest.mark.qemu


@pytest.fixture
def web(hello: Hello) -> Iterator[Web]:
    with serving(hello.path.read_bytes()) as served:
        yield served


@pytest.mark.parametrize("how", ["whole", "moved", "slow", "mending"])
def test_from_a_web_server(how: str, web: Web, cloudlet: CommandLine) -> None:
    with running(cloudlet, f"{web.url}/{how}") as machine:
        assert machine.url
    assert set(web.ranges()) == {None}


def test_a_cut_download_goes_on_where_it_stopped(web: Web, cloudlet: CommandLine) -> None:
    with running(cloudlet, f"{web.url}/cut"):
        pass
    requests = -(-len(web.content) // CUT_AFTER)
    assert requests > 3
    assert web.ranges() == [None, *(f"bytes={CUT_AFTER * number}-" for number in range(1, requests))]


def test_without_ranges_what_came_is_passed_over(web: Web, cloudlet: CommandLine) -> None:
    with running(cloudlet, f"{web.url}/cut-no-ranges"):
        pass
    assert f"bytes={CUT_AFTER}-" in web.ranges()


@pytest.mark.parametrize(
    ("how", "status", "says"),
    [
        ("missing", 3, "is not there"),
        ("changed", 7, "changed while it was read"),
        ("loop", 1, "leads on and on"),
    ],
)
def test_what_a_server_can_do_wrong(
    how: str, status: int, says: str, web: Web, cloudlet: CommandLine, settings: Settings
) -> None:
    assert says in refused(cloudlet("run", f"{web.url}/{how}"), status)
    if how == "missing":
        assert len(web.asked) == 1


@pytest.mark.parametrize(("url", "status"), [("http://[::1/x", 2), ("http://127.0.0.1:x/", 2)])
def test_what_is_no_url(url: str, status: int, cloudlet: CommandLine) -> None:
    refused(cloudlet("run", url), status)


def test_a_server_that_stalls_does_not_hold_back_the_end(web: Web, cloudlet: CommandLine) -> None:
    process = cloudlet.start("run", f"{web.url}/stall")
    _wait_for_machine(cloudlet)
    began = time.monotonic()
    done = cloudlet.end(process)
    assert (done.status, done.err) == (130, "")
    assert time.monotonic() - began < 5.0


def test_from_standard_input(hello: Hello, cloudlet: CommandLine) -> None:
    with hello.path.open("rb") as file:
        process = _with_input(cloudlet, file.fileno())
        try:
            assert first_line(process).startswith("http://127.0.0.1:")
        finally:
            assert cloudlet.end(process).status == 130


def test_a_pipe_that_is_cut(hello: Hello, cloudlet: CommandLine) -> None:
    whole = hello.path.read_bytes()
    refused(cloudlet("run", "-", stdin=whole[: len(whole) // 2]), 7)


def test_a_pipe_that_stalls_does_not_hold_back_the_end(hello: Hello, cloudlet: CommandLine) -> None:
    ours, theirs = os.pipe()
    whole = hello.path.read_bytes()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, len(whole))
    os.write(theirs, whole[: len(whole) // 2])
    process = _with_input(cloudlet, ours)
    os.close(ours)
    try:
        _wait_for_machine(cloudlet)
        done = cloudlet.end(process, signal.SIGTERM)
    finally:
        os.close(theirs)
    assert (done.status, done.err) == (130, "")
    assert traces(cloudlet.settings) == []


def _with_input(cloudlet: CommandLine, descriptor: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        cloudlet.argv("run", "-"),
        stdin=descriptor,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cloudlet.environment,
    )


def _wait_for_machine(cloudlet: CommandLine) -> None:
    """Until a machine has been started for an overlay that is still on its way."""
    deadline = time.monotonic() + 30.0
    while not list(cloudlet.settings.instances_dir.glob("*/monitor.sock")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
