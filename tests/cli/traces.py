"""What a command may leave behind, which is nothing: where to look for it; and commands that go on."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cloudlet.hypervisor.records import MARKER, ProcessId
from cloudlet.settings import Settings
from tests.conftest import CommandLine

DEADLINE = 60.0


def traces(settings: Settings, *folders: Path) -> list[str]:
    """What is there and should not be: instances, half-made bases and images, temporary files, processes.

    :param folders: where commands wrote their output to.
    """
    places = [settings.instances_dir, settings.bases_dir, settings.images_dir]
    found = [str(path) for place in places for path in _entries(place) if not _is_whole(path)]
    for folder in (settings.cache_dir, settings.state_dir, *folders):
        found += [str(path) for path in folder.rglob("*.new") if str(path) not in found]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found += [line for line in mounts if " fuse cloudlet " in line]
    return found + [f"process {process.pid}" for process in marked(settings)]


def marked(settings: Settings) -> list[ProcessId]:
    """The processes that belong to any workspace of a site, also to one whose folder is gone."""
    places = (settings.instances_dir, settings.bases_dir, settings.images_dir)
    marks = [f"{MARKER}={folder}/".encode() for folder in places]
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


def _entries(folder: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return [path for path in folder.iterdir() if path.name != ".lock"]
    return []


def _is_whole(path: Path) -> bool:
    """Whether it is a base or an image."""
    return (path / "base.json").exists() or (path / "image.json").exists()
