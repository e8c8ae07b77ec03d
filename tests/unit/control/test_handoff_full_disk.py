"""A decision that cannot be written down is none: nothing follows from it, until there is room again."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cloudlet.control.courier import PeerState
from cloudlet.control.handoff import Departure
from cloudlet.control.ownership import Ownership, OwnershipFile, Record, read_record
from cloudlet.control.pace import Terms
from cloudlet.errors import FailedError, UnreachableError


@dataclass
class Disk:
    """A file system of a MiB."""

    place: Path

    def fill(self) -> None:
        with suppress(OSError), (self.place / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass

    def make_room(self) -> None:
        (self.place / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("only root can make a small file system")
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "cloudlet-test", tmp_path]
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount")
    try:
        yield Disk(tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@dataclass
class Target:
    """The other end, which says one and the same."""

    says: str
    asked: threading.Event = field(default_factory=threading.Event)
    dropped: bool = False

    def state(self, wait: float = 0.0) -> PeerState:
        self.asked.set()
        return PeerState(self.says)

    def commit(self, epoch: int) -> PeerState:
        self.asked.set()
        return PeerState(self.says, told={"endpoints": [epoch]})

    def records(self, first: int, body: bytes) -> PeerState:
        raise UnreachableError("it takes no records")

    def drop(self) -> PeerState:
        self.dropped = True
        return PeerState("dropped")


def file_in(disk: Disk, *states: Ownership) -> OwnershipFile:
    file = OwnershipFile(disk.place, Record("handoff", "instance", 3, Ownership.COPYING))
    for state in states:
        file.become(state)
    return file


def stored(disk: Disk) -> Ownership | None:
    record = read_record(disk.place)
    return record and record.state


def test_it_is_as_before(disk: Disk) -> None:
    file = file_in(disk)
    disk.fill()
    with pytest.raises(OSError, match="No space"):
        file.become(Ownership.SWITCHING)
    assert (file.state, stored(disk)) == (Ownership.COPYING, Ownership.COPYING)
    disk.make_room()
    file.become(Ownership.SWITCHING)
    assert stored(disk) is Ownership.SWITCHING


@pytest.mark.parametrize(
    ("before", "says", "after"),
    [
        ([Ownership.SWITCHING, Ownership.COMMITTED], "running", Ownership.COMPLETED),
        ([Ownership.SWITCHING, Ownership.COMMITTED], "dropped", Ownership.REVERTED),
        ([Ownership.SWITCHING], "receiving", Ownership.REVERTED),
        ([], "receiving", Ownership.REVERTED),
    ],
)
def test_the_end_is_said_when_it_is_written(
    disk: Disk, before: list[Ownership], says: str, after: Ownership
) -> None:
    target = Target(says)
    departure = Departure(file_in(disk, *before), target, Terms())
    was = departure.state
    disk.fill()
    ended = threading.Event()

    def conclude() -> None:
        with suppress(FailedError):
            departure.conclude()
        ended.set()

    thread = threading.Thread(target=conclude)
    thread.start()
    if before:
        assert target.asked.wait(10)
    time.sleep(0.2)
    assert not ended.is_set()
    assert (departure.state, stored(disk), target.dropped) == (was, was, False)
    disk.make_room()
    thread.join(20)
    assert ended.is_set()
    assert (departure.state, stored(disk)) == (after, after)
    if after is Ownership.COMPLETED:
        assert departure.told == {"endpoints": [3]}
