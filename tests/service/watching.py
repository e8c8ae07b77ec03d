"""Who watches fake guests from outside: an observer who counts those that run, and a user who uses them.

Both know processes and guests only: they find guests in ``/proc``, ask their monitors whether they run, and
use their ports. What a site says of them is not asked for.
"""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Generic, Protocol, TypeVar
from urllib.error import HTTPError

from cloudlet.hypervisor.fake.files import PAGE, page_of
from cloudlet.hypervisor.qemu.sockets import connect

_PROGRAM = b"hypervisor/fake/__main__.py"
_MARK = b"CLOUDLET_INSTANCE="
_LISTENS = "0A"
_LOOK_SECONDS = 0.004
_SCAN_SECONDS = 0.03
_ANSWER_SECONDS = 0.4
_FILES = {"ram": "ram", "disk": "disk.raw"}
_PAGES = range(512, 712)
"""Those that the user writes, again and again."""


@dataclass(frozen=True)
class Guest:
    """A fake machine, as the kernel shows it."""

    pid: int
    folder: Path

    def runs(self) -> bool:
        """What its monitor says."""
        with suppress(OSError, ValueError, KeyError), connect(self.folder / "monitor.sock", 2.0) as monitor:
            monitor.sendall(b'{"do": "status"}\n')
            with monitor.makefile("rb") as answers:
                return bool(json.loads(answers.readline())["return"] == "running")
        return False

    def ports(self) -> list[int]:
        """Where it listens."""
        mine = set()
        with suppress(OSError):
            for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
                with suppress(OSError):
                    mine.add(str(descriptor.readlink()))
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return [
            int(line[1].rpartition(":")[2], 16)
            for line in lines
            if line[3] == _LISTENS and f"socket:[{line[9]}]" in mine
        ]

    def page(self, space: str, number: int) -> bytes:
        """A page of its memory or disk."""
        with (self.folder / _FILES[space]).open("rb") as file:
            return os.pread(file.fileno(), PAGE, number * PAGE)


Found = TypeVar("Found", bound=Guest)


def guests_below(folder: Path) -> list[Guest]:
    """The fake machines whose folders are somewhere below a folder."""
    return processes_below(folder, _PROGRAM, Guest)


def processes_below(folder: Path, program: bytes, kind: Callable[[int, Path], Found]) -> list[Found]:
    """The machines that are processes of a program, and whose folders are somewhere below a folder."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        with suppress(OSError):
            if program not in (process / "cmdline").read_bytes():
                continue
            variables = (process / "environ").read_bytes().split(b"\0")
            # One that ends just now has none.
            for mark in (one.removeprefix(_MARK) for one in variables if one.startswith(_MARK)):
                place = Path(os.fsdecode(mark))
                if place.is_relative_to(folder):
                    found.append(kind(int(process.name), place))
    return found


class Observer(Generic[Found]):
    """Looks at the guests below a folder, all the time; two may never run at the same moment."""

    def __init__(self, folder: Path, find: Callable[[Path], list[Found]]) -> None:
        self.ran_twice = False
        self.looks = 0
        self._folder, self._find = folder, find

    def look(self, guests: list[Found]) -> None:
        """Have a look, and another at those that ran: who ran before and after another, ran beside it."""
        running = [guest for guest in guests if guest.runs()]
        if len(running) > 1 and sum(guest.runs() for guest in running) > 1:
            self.ran_twice = True
        self.looks += 1

    def run(self, ended: threading.Event) -> None:
        scanned, guests = 0.0, list[Found]()
        while not ended.wait(_LOOK_SECONDS):
            if time.monotonic() - scanned > _SCAN_SECONDS:
                guests, scanned = self._find(self._folder), time.monotonic()
            self.look(guests)


class AnyUser(Protocol):
    """Who uses the guest, wherever it is."""

    problems: list[str]

    def begin(self) -> None:
        """Begin with a new guest."""

    def counts_on(self, guest: Guest) -> bool:
        """Whether the guest counts on from where it was."""

    def verify(self, guest: Guest) -> list[str]:
        """What of all that it has to have the guest does not have."""


class User:
    """Somebody who uses the guest, wherever it is: each count is a new one, and what is written stays.

    What was asked for without an answer may be done later, or never: of such a page nothing is known.
    """

    def __init__(self, folder: Path) -> None:
        self.counted = 0
        self.problems: list[str] = []
        self.written: dict[tuple[str, int], int] = {}
        self._folder = folder
        self._using = threading.Lock()
        self._next = 0
        self._unknown: set[tuple[str, int]] = set()

    def begin(self) -> None:
        """Begin with a new guest: write all pages once, so that its files need no more room from then on."""
        with self._using:
            self.counted = self._next = 0
            self.written.clear()
            self._unknown.clear()
            self.problems.clear()
            ((port,),) = [guest.ports() for guest in guests_below(self._folder)]
            for _ in _PAGES:
                self._write(port)

    def run(self, ended: threading.Event) -> None:
        while not ended.wait(0.03):
            for guest in guests_below(self._folder):
                for port in guest.ports():
                    with self._using:
                        self._count(port)
                        self._write(port)

    def verify(self, guest: Guest) -> list[str]:
        """What of all that was written the guest does not have."""
        with self._using:
            return [
                f"page {number} of the {space} is not as it was written"
                for (space, number), seed in self.written.items()
                if guest.page(space, number) != page_of(seed)
            ]

    def counts_on(self, guest: Guest) -> bool:
        """Whether the guest counts on from where it was."""
        with self._using:
            before = self.counted
            deadline = time.monotonic() + 20.0
            while self.counted == before and time.monotonic() < deadline:
                for port in guest.ports():
                    self._count(port)
            return self.counted > before

    def _count(self, port: int) -> None:
        if (said := _get(port, "/counter")) is None:
            return
        if int(said) <= self.counted:
            self.problems.append(f"the guest counted {int(said)} after {self.counted}")
        self.counted = max(self.counted, int(said))

    def _write(self, port: int) -> None:
        """Write another page; every fifth is on the disk."""
        self._next += 1
        space = "disk" if self._next % 5 == 0 else "ram"
        page, seed = _PAGES[self._next % len(_PAGES)], self._next
        if (space, page) in self._unknown:
            return
        if _get(port, f"/write?space={space}&page={page}&seed={seed}") is None:
            self._unknown.add((space, page))
            self.written.pop((space, page), None)
        else:
            self.written[space, page] = seed


def _get(port: int, target: str) -> bytes | None:
    """What the guest answers; None if it does not."""
    with suppress(OSError, HTTPException):
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{port}{target}", timeout=_ANSWER_SECONDS
            ) as answer:
                return bytes(answer.read())
        except HTTPError as error:
            error.close()
    return None


@contextmanager
def watching(*who: Callable[[threading.Event], None]) -> Iterator[None]:
    """Have each do what it does in a thread of its own, until the context is left."""
    ended = threading.Event()
    threads = [threading.Thread(target=run, args=(ended,)) for run in who]
    for thread in threads:
        thread.start()
    try:
        yield
        assert all(thread.is_alive() for thread in threads), "who watches has gone"
    finally:
        ended.set()
        for thread in threads:
            thread.join()
