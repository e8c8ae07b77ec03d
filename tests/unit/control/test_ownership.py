"""Who may run an instance that is handed off: a record that never goes back, and survives its process."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cloudlet.control import ownership
from cloudlet.control.ownership import FOLLOWING, RECORD, Ownership, OwnershipFile, Record, read_record
from cloudlet.errors import ConflictError, CorruptError


def record(state: Ownership = Ownership.COPYING) -> Record:
    return Record("handoff", "instance", 3, state, paused=True)


def test_what_was_decided_is_read_again(tmp_path: Path) -> None:
    file = OwnershipFile(tmp_path, record())
    file.become(Ownership.SWITCHING)
    file.become(Ownership.COMMITTED)
    file.become(Ownership.COMPLETED, told={"endpoints": [{"guest_port": 80}]})
    read = read_record(tmp_path)
    assert read == file.record and read and read.state is Ownership.COMPLETED and read.paused


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Ownership.COPYING, Ownership.COMMITTED),
        (Ownership.COPYING, Ownership.COMPLETED),
        (Ownership.COMMITTED, Ownership.SWITCHING),
        (Ownership.REVERTED, Ownership.COMMITTED),
        (Ownership.COMPLETED, Ownership.REVERTED),
        (Ownership.RECEIVING, Ownership.RUNNING),
        (Ownership.RUNNING, Ownership.DROPPED),
        (Ownership.DROPPED, Ownership.RUNNING),
        (Ownership.LOADED, Ownership.COMMITTED),
        (Ownership.SWITCHING, Ownership.SERVING),
        (Ownership.COMMITTED, Ownership.LOST),
        (Ownership.LOADED, Ownership.LOST),
        (Ownership.FILLING, Ownership.DROPPED),
        (Ownership.LOST, Ownership.REVERTED),
        (Ownership.LOST, Ownership.RUNNING),
    ],
)
def test_what_cannot_follow_is_refused(tmp_path: Path, before: Ownership, after: Ownership) -> None:
    file = OwnershipFile(tmp_path, record(before))
    with pytest.raises(ConflictError, match="cannot be"):
        file.become(after)
    assert read_record(tmp_path) == record(before)


def test_to_become_what_it_is_changes_nothing(tmp_path: Path) -> None:
    file = OwnershipFile(tmp_path, record(Ownership.REVERTED))
    file.become(Ownership.REVERTED, reason="another")
    assert file.record.reason == ""


def test_many_may_note_the_same_at_once(tmp_path: Path) -> None:
    OwnershipFile(tmp_path, record(Ownership.FILLING))
    begin = threading.Barrier(8, timeout=20)

    def note() -> Ownership:
        file = OwnershipFile(tmp_path, record(Ownership.FILLING))
        begin.wait()
        file.become(Ownership.LOST, reason="its machine ended")
        return file.state

    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            (tmp_path / RECORD).unlink()
            assert {one.result() for one in [threads.submit(note) for _ in range(8)]} == {Ownership.LOST}
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]


def test_a_next_hand_off_begins_anew(tmp_path: Path) -> None:
    OwnershipFile(tmp_path, record(Ownership.REVERTED))
    OwnershipFile(tmp_path, Record("next", "instance", 3, Ownership.COPYING))
    read = read_record(tmp_path)
    assert read and (read.handoff, read.state) == ("next", Ownership.COPYING)


def test_no_record_is_no_hand_off(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"handoff": "x"}', '{"state": "nowhere"}'])
def test_a_damaged_record_is_told_and_not_guessed(tmp_path: Path, content: str) -> None:
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(CorruptError, match="cannot be read"):
        read_record(tmp_path)


@pytest.fixture
def power_cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Has files be empty that were not synced, as XFS leaves them after a power cut."""
    synced: set[tuple[int, int]] = set()
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        about = os.fstat(descriptor)
        synced.add((about.st_ino, about.st_mtime_ns))
        sync(descriptor)

    def cut(folder: Path) -> None:
        for path in folder.iterdir():
            about = path.stat()
            if (about.st_ino, about.st_mtime_ns) not in synced:
                path.write_bytes(b"")

    monkeypatch.setattr(ownership.os, "fsync", fsync)
    return cut


@pytest.mark.parametrize(
    "states",
    [[Ownership.COPYING, Ownership.SWITCHING, Ownership.COMMITTED], [Ownership.RECEIVING, Ownership.LOADED]],
)
def test_a_power_cut_may_forget_the_last_state_and_not_the_one_before(
    tmp_path: Path, states: list[Ownership], power_cut: Callable[[Path], None]
) -> None:
    file = OwnershipFile(tmp_path, record(states[0]))
    for state in states[1:]:
        file.become(state)
    assert read_record(tmp_path) == record(states[-1])
    power_cut(tmp_path)
    assert read_record(tmp_path) == record(states[-2])


def test_what_follows_is_synced_again(tmp_path: Path, power_cut: Callable[[Path], None]) -> None:
    file = OwnershipFile(tmp_path, record(Ownership.RECEIVING))
    file.become(Ownership.LOADED)
    file.become(Ownership.RUNNING)
    power_cut(tmp_path)
    assert read_record(tmp_path) == record(Ownership.RUNNING)


@pytest.mark.parametrize(
    ("before", "state"), [(Ownership.SWITCHING, Ownership.COMMITTED), (Ownership.RECEIVING, Ownership.LOADED)]
)
def test_the_pause_waits_for_no_disk(
    tmp_path: Path, before: Ownership, state: Ownership, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = OwnershipFile(tmp_path, record(before))

    def fsync(descriptor: int) -> None:
        raise AssertionError

    monkeypatch.setattr(ownership.os, "fsync", fsync)
    file.become(state)
    assert read_record(tmp_path) == record(state)


@pytest.mark.parametrize("content", ["", "\0" * 300, "{", "[]", '{"state": "committed"}'])
def test_what_cannot_be_read_beside_the_record_does_not_count(tmp_path: Path, content: str) -> None:
    OwnershipFile(tmp_path, record(Ownership.SWITCHING)).become(Ownership.COMMITTED)
    (tmp_path / FOLLOWING).write_text(content)
    assert read_record(tmp_path) == record(Ownership.SWITCHING)


@pytest.mark.parametrize(
    "now",
    [
        Record("next", "instance", 3, Ownership.SWITCHING),
        Record("handoff", "instance", 4, Ownership.SWITCHING),
        record(Ownership.REVERTED),
        record(Ownership.RECEIVING),
        record(Ownership.SWITCHING),
    ],
)
def test_what_was_beside_another_record_does_not_count(tmp_path: Path, now: Record) -> None:
    OwnershipFile(tmp_path, record(Ownership.SWITCHING)).become(Ownership.COMMITTED)
    OwnershipFile(tmp_path, now)
    assert read_record(tmp_path) == now


def test_a_damaged_record_is_told_whatever_is_beside_it(tmp_path: Path) -> None:
    OwnershipFile(tmp_path, record(Ownership.SWITCHING)).become(Ownership.COMMITTED)
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(CorruptError, match="cannot be read"):
        read_record(tmp_path)


def test_without_a_descriptor_for_the_folder_it_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = OwnershipFile(tmp_path, record())
    opens = os.open

    def open_(path: object, flags: int, *more: object, **named: object) -> int:
        if flags & os.O_DIRECTORY:
            raise OSError(errno.EMFILE, "Too many open files")
        return opens(path, flags, *more, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(ownership.os, "open", open_)
        with pytest.raises(OSError, match="Too many"):
            file.become(Ownership.SWITCHING)
    assert (file.record, read_record(tmp_path)) == (record(), record())
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]


def test_a_folder_that_cannot_be_synced_leaves_what_its_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = OwnershipFile(tmp_path, record())
    sync, synced = os.fsync, []

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr(ownership.os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        file.become(Ownership.SWITCHING)
    assert file.record == read_record(tmp_path) == record(Ownership.SWITCHING)
