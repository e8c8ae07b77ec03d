"""The HTTP server where descriptors or threads are few."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from cheroot.server import HTTPConnection

from cloudlet.api.server import _Threads
from tests.service.conftest import Made
from tests.service.served import served, settings_file


def seconds_of(pid: int) -> float:
    """The processor time that a process has used."""
    used = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return sum(map(int, used)) / os.sysconf("SC_CLK_TCK")


def test_without_descriptors_it_waits_and_goes_on(tmp_path: Path, made: Made, hashed: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        try:
            site = stack.enter_context(served(settings_file(tmp_path, made, hashed)))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        pid = site.process.pid
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (hard, hard)
        assert site.call.get("/v1/instances")["instances"] == []
        open_now = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_now + 20, open_now + 20))
        place = urlsplit(site.call.url)
        with ExitStack() as idle:
            for _ in range(60):
                idle.enter_context(socket.create_connection((place.hostname, place.port), timeout=10))
            site.wait_log("nobody can connect")
            began = seconds_of(pid)
            time.sleep(1.5)
            assert seconds_of(pid) - began < 0.5
            assert site.log.read_text().count("nobody can connect") == 1
        began = time.monotonic()
        site.call.session.close()
        assert site.call.get("/v1/instances")["instances"] == []
        assert time.monotonic() - began < 8, "it waited until they expired"


class _Busy(HTTPConnection):
    """A connection whose request is worked on until all are."""

    def __init__(self, together: threading.Barrier) -> None:
        self.together = together

    def communicate(self) -> bool:
        self.together.wait(5)
        return False

    def close(self) -> None:
        pass


def test_nobody_waits_for_a_thread_that_could_be_made() -> None:
    errors: list[Any] = []
    server: Any = SimpleNamespace(
        stats={"Worker Threads": {}, "Enabled": False}, error_log=lambda text, **_: errors.append(text)
    )
    pool = server.requests = _Threads(server, 2, 40)
    pool.start()
    try:
        for many in (1, 2, 3, 12, 40, *[4, 2] * 500):
            together = threading.Barrier(many + 1)
            for _ in range(many):
                pool.put(_Busy(together))
            together.wait(5)
    finally:
        pool.stop(5)
    assert errors == []
