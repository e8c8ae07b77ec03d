"""``cloudlet serve`` as a process of its own, with a file of settings: as an operator starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloudlet.api.identity import User, write_users
from tests.service.conftest import USERS, Caller, Made

DEADLINE = 60.0
_SERVING = re.compile(r"serving at (\S+);")


@dataclass
class Served:
    """A site that is served by another process."""

    process: subprocess.Popen[bytes]
    log: Path
    call: Caller

    def wait_log(self, text: str) -> None:
        """Wait until the server has said something."""
        _wait_log(self.process, self.log, re.compile(re.escape(text)))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE)


def settings_file(folder: Path, made: Made, hashed: str, **groups: Mapping[str, Any]) -> Path:
    """Write the settings of a site in ``folder`` with the users of tests, and options as they are given."""
    users = folder / "users"
    write_users(users, [User(name, hashed, "shop", roles) for name, roles in USERS.items()])
    usual: dict[str, dict[str, Any]] = {
        "DEFAULT": {
            "cache_dir": made.cache,
            "state_dir": folder / "state",
            "keys_dir": made.keys,
            "hypervisor": "fake",
        },
        "api": {"listen": "127.0.0.1:0", "users_file": users},
    }
    lines = []
    for group in usual.keys() | groups.keys():
        given = {**usual.get(group, {}), **groups.get(group, {})}
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in given.items())]
    file = folder / "cloudlet.conf"
    file.write_text("\n".join(lines) + "\n")
    return file


def serve_command(file: Path) -> list[str]:
    """The command that serves a site."""
    return [sys.executable, "-W", "ignore", "-m", "cloudlet.cli.app", "--config-file", str(file), "serve"]


@contextmanager
def served(file: Path) -> Iterator[Served]:
    """A server with a file of settings, until the context is left or it ends."""
    log = file.with_suffix(".log")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OS_")}
    with log.open("wb") as out:
        process = subprocess.Popen(serve_command(file), stdout=out, stderr=out, env=environment)
    try:
        (url,) = _wait_log(process, log, _SERVING).groups()
        yield Served(process, log, Caller(url))
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(DEADLINE)


def _wait_log(process: subprocess.Popen[bytes], log: Path, wanted: re.Pattern[str]) -> re.Match[str]:
    deadline = time.monotonic() + DEADLINE
    while not (found := wanted.search(text := log.read_text(errors="replace"))):
        assert process.poll() is None and time.monotonic() < deadline, text
        time.sleep(0.02)
    return found
