"""Who may run an instance that is handed off: a record that never goes back, and survives its process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cloudlet.control.ownership import RECORD, Ownership, OwnershipFile, Record, read_record
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
