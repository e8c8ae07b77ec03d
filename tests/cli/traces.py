"""What a command may leave behind, which is nothing: where to look, and commands that are cut short."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cloudlet.hypervisor.records import MARKER, ProcessId
from cloudlet.settings import Settings
from tests.conftest import CommandLine

DEADLINE = 60.0


def traces(settings: Settings, *folders: Path) -> list[str]:
    """Instances, half-made bases, temporary files and processes that are there; empty is as it should be.

    :param folders: where commands wrote their output to.
    """
    places = [settings.instances_dir, settings.bases_dir]
    found = [str(path) for place in places for path in _entries(place) if not _is_base(path)]
    for folder in (settings.cache_dir, settings.state_dir, *folders):
        found += [str(path) for path in folder.rglob("*.new") if str(path) not in found]
    return found + [f"process {process.pid}" for process in marked(settings)]


def marked(settings: Settings) -> list[ProcessId]:
    """The processes that belong to any workspace of a site, also to one whose folder is gone."""
    marks = [f"{MARKER}={folder}/".encode() for folder in (settings.instances_dir, settings.bases_dir)]
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with suppress(OSError):
                environment = (entry / "environ").read_bytes().split(b"\0")
                if any(value.startswith(mark) for value in environment for mark in marks):
                    found.append(ProcessId.of(int(entry.name)))
    return found


@dataclass
class Running:
    """A ``cloudlet run`` that answers."""

    process: subprocess.Popen[str]
    url: str
    folder: Path
    """Its instance's folder."""

    @property
    def id(self) -> str:
        return self.folder.name


@contextmanager
def running(cloudlet: CommandLine, *arguments: str | Path) -> Iterator[Running]:
    """``cloudlet run`` until its first URL; it is ended when the context is left, if it still runs."""
    before = set(_entries(cloudlet.settings.instances_dir))
    process = cloudlet.start("run", *arguments)
    try:
        url = first_line(process)
        (folder,) = set(_entries(cloudlet.settings.instances_dir)) - before
        yield Running(process, url, folder)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE)


def first_line(process: subprocess.Popen[str]) -> str:
    """The first line on a command's standard output; an assertion if it ends or takes too long."""
    assert process.stdout
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        assert selector.select(DEADLINE), "nothing came on standard output"
    line = process.stdout.readline().strip()
    if not line:
        _, err = process.communicate(timeout=DEADLINE)
        raise AssertionError(f"the command ended with {process.returncode}: {err}")
    return line


@dataclass
class Cut:
    """A command that a signal ended."""

    status: int
    err: str
    seconds: float
    """From the signal to the end."""
    delay: float
    traces: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return self.status == 130 and not self.traces and "Traceback" not in self.err and self.seconds < 10.0

    def __str__(self) -> str:
        return f"after {self.delay:.3f} s: status {self.status}, left {self.traces}, said {self.err!r}"


def cut(
    cloudlet: CommandLine,
    arguments: list[str | Path],
    number: signal.Signals,
    delay: float,
    *folders: Path,
    again_after: float | None = None,
) -> Cut:
    """Send a signal to a command, as a terminal does to its whole process group, and see what is left.

    :param delay: seconds after the command hears signals (for SIGKILL: after its start).
    :param again_after: so much later a second time.
    """
    process = subprocess.Popen(
        cloudlet.argv(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cloudlet.environment,
        process_group=0,
    )
    try:
        if number is not signal.SIGKILL:
            _wait_until_it_hears(process, number)
        time.sleep(delay)  # The moment is what is being tried.
        began = time.monotonic()
        _signal_group(process, number)
        if again_after is not None:
            time.sleep(again_after)
            _signal_group(process, number)
        _, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.wait()
    seconds = time.monotonic() - began
    return Cut(process.returncode, err, seconds, delay, traces(cloudlet.settings, *folders))


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _wait_until_it_hears(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Until then the signal would meet the interpreter's start, which is not ours to test."""
    # SIGTERM tells: the interpreter itself handles SIGINT from its start.
    deadline = time.monotonic() + DEADLINE
    while process.poll() is None and time.monotonic() < deadline:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)
    raise AssertionError(f"the command does not hear {number.name}")


def _entries(folder: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return [path for path in folder.iterdir() if path.name != ".lock"]
    return []


def _is_base(path: Path) -> bool:
    return (path / "base.json").exists()
