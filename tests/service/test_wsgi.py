"""The site as a WSGI application, under gunicorn and uWSGI: several processes, a job board, a conductor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import requests

from tests.redis import redis
from tests.service.conftest import DEADLINE, PASSWORD, Caller, Made
from tests.service.served import settings_file
from tests.service.two_sites import free_port

BIN = Path(sys.executable).parent
APPLICATION = "cloudlet.wsgi:application"


def gunicorn(port: int, workers: int = 2) -> list[str]:
    return [
        str(BIN / "gunicorn"), "--workers", str(workers), "--threads", "16", "--worker-class", "gthread",
        "--graceful-timeout", "2", "--bind", f"127.0.0.1:{port}", APPLICATION,
    ]  # fmt: skip


def uwsgi(port: int) -> list[str]:
    return [
        str(BIN / "uwsgi"), "--master", "--processes", "2", "--threads", "16", "--lazy-apps", "--die-on-term",
        "--need-app", "--http-socket", f"127.0.0.1:{port}", "--add-header", "Connection: close",
        "--worker-reload-mercy", "2", "--home", sys.prefix, "--module", APPLICATION,
    ]  # fmt: skip


@contextmanager
def running(command: list[str], settings: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program with a file of settings, until the context is left."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OS_")}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**environment, "CLOUDLET_CONFIG_FILE": str(settings)}
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(DEADLINE)
        finally:
            process.kill()


def answering(port: int, process: subprocess.Popen[bytes], log: Path) -> Caller:
    """Wait until the site answers there."""
    call = Caller(f"http://127.0.0.1:{port}")
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            if requests.get(f"{call.url}/healthcheck", timeout=5).status_code == 204:
                return call
        except requests.RequestException:
            pass
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@pytest.mark.parametrize(
    "server",
    [pytest.param(gunicorn, id="gunicorn"), pytest.param(uwsgi, id="uwsgi", marks=pytest.mark.slow)],
)
def test_two_workers_and_a_conductor(server: object, tmp_path: Path, made: Made, hashed: str) -> None:
    port, log = free_port(), tmp_path / "server.log"
    with redis(tmp_path) as board:
        settings = settings_file(tmp_path, made, hashed, work={"job_board": board.url})
        conductor = [sys.executable, "-m", "cloudlet.cli.conductor", "--config-file", str(settings)]
        with (
            running(conductor, settings, tmp_path / "conductor.log"),
            running(server(port), settings, log) as process,  # type: ignore[operator]
        ):
            call = answering(port, process, log)
            app = call.publish(made.overlay)
            instances = [call.as_("mia").start(app) for _ in range(3)]
            for instance in instances:
                assert requests.get(instance["endpoints"][0]["url"], timeout=10).text == "hello\n"
                call.wait_event("instance.active", instance["id"])
                call.done(call.delete(f"/v1/instances/{instance['id']}"))
            stream = requests.get(
                f"{call.url}/v1/events?after=0", headers={"Accept": "text/event-stream"},
                auth=("root", PASSWORD), stream=True, timeout=DEADLINE,
            )  # fmt: skip
            assert next(line for line in stream.iter_lines() if line.startswith(b"id:")) == b"id: 1"
            stream.close()
            assert call.as_(None)("GET", "/v1/instances").status_code == 401
            part = call("GET", app_file(call, app), headers={"Range": "bytes=0-99"})
            assert (part.status_code, len(part.content)) == (206, 100)


def app_file(call: Caller, app: dict[str, list[dict[str, str]]]) -> str:
    return f"/v1/overlays/{app['components'][0]['overlay_id']}/file"


def test_what_cannot_be_is_said_when_it_is_loaded(tmp_path: Path, made: Made, hashed: str) -> None:
    def said(**groups: dict[str, object]) -> str:
        settings = settings_file(tmp_path, made, hashed, **groups)
        done = subprocess.run(
            [sys.executable, "-c", "import cloudlet.wsgi"],
            env={**os.environ, "CLOUDLET_CONFIG_FILE": str(settings)},
            capture_output=True, text=True, check=False, timeout=DEADLINE,
        )  # fmt: skip
        assert done.returncode != 0
        return done.stderr

    assert "without authentication" in said(api={"auth_strategy": "noauth"})
    nobody = tmp_path / "nobody"
    nobody.write_text("")
    assert "names no user" in said(api={"users_file": nobody})


def test_a_second_process_needs_a_job_board(tmp_path: Path, made: Made, hashed: str) -> None:
    settings = settings_file(tmp_path, made, hashed)
    log = tmp_path / "server.log"
    with running(gunicorn(free_port()), settings, log) as process:
        assert process.wait(DEADLINE) != 0
    assert "is served already" in log.read_text()


@pytest.mark.slow
def test_one_worker_is_replaced_without_a_job_board(tmp_path: Path, made: Made, hashed: str) -> None:
    settings = settings_file(tmp_path, made, hashed)
    port, log = free_port(), tmp_path / "server.log"
    command = [*gunicorn(port, workers=1)[:-1], "--graceful-timeout", "8", APPLICATION]
    with running(command, settings, log) as process:
        call = answering(port, process, log)
        # It keeps the worker that is replaced, for as long as may be.
        stream = requests.get(
            f"{call.url}/v1/events?after=0", headers={"Accept": "text/event-stream"},
            auth=("root", PASSWORD), stream=True, timeout=DEADLINE,
        )  # fmt: skip
        process.send_signal(signal.SIGHUP)
        with suppress(requests.RequestException):
            for _ in stream.iter_lines():
                pass
        assert answering(port, process, log).get("/v1/instances")["instances"] == []
    assert "is served already" not in log.read_text()
