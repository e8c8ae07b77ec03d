"""Records and workspaces: only what the dead left is removed, and a reused pid is never touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cloudlet.errors import RefusedError
from cloudlet.hypervisor.records import (
    MARKER,
    ProcessId,
    Record,
    Workspace,
    abandon,
    processes_of,
    read_record,
    reap,
    records,
    start_time_of,
)
from cloudlet.model import Endpoint

_OWNER = """
import subprocess, sys, time
from pathlib import Path
from cloudlet.hypervisor.records import ProcessId, Record, Workspace
workspace = Workspace.create(Path(sys.argv[1]))
# The shell's child has a session of its own: only its environment says whose it is.
child = subprocess.Popen(["/bin/sh", "-c", "setsid sleep 100 & wait"], env=workspace.environment())
workspace.write(Record(workspace.id, "owned", time.time(), machine=ProcessId.of(child.pid)))
(workspace.path / "folder").mkdir()
(workspace.path / "folder" / "file").write_text("content")
(workspace.path / "link").symlink_to(sys.argv[2])
print(workspace.id, flush=True)
time.sleep(100)
"""


@contextmanager
def sleeping(**environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "100"], env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def another_owner(parent: Path, link: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    command = [sys.executable, "-c", _OWNER, str(parent), str(link)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout
            yield owner, parent / owner.stdout.readline().strip()
        finally:
            owner.kill()


def wait_for_processes(path: Path, number: int) -> list[ProcessId]:
    deadline = time.monotonic() + 5.0
    while len(found := processes_of(path)) != number:
        assert time.monotonic() < deadline, found
    return found


def test_a_process_that_was_just_started_is_found(tmp_path: Path) -> None:
    """Whoever starts a program goes on before the kernel has given it its environment.

    Here the two share a processor, and, where we may have it so, the program gets it only while we sleep.
    """
    with first_on_one_processor():
        for _ in range(20):
            with sleeping(**{MARKER: str(tmp_path)}) as process:
                assert [found.pid for found in processes_of(tmp_path)] == [process.pid]


@contextmanager
def first_on_one_processor() -> Iterator[None]:
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    try:
        yield
    finally:
        with suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, processors)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    with Workspace.create(tmp_path) as workspace:
        assert records(tmp_path) == []
        record = Record(
            id=workspace.id,
            name="app",
            created=1.5,
            base_id="ab",
            uid=400000,
            endpoints=(Endpoint(80, "127.0.0.1", 8000, "web"),),
            machine=ProcessId(1, 2),
            ram_descriptor=7,
            detail={"machine": {"cpus": 1}},
        )
        workspace.write(record)
        assert read_record(workspace.path) == record
        assert records(tmp_path) == [(workspace.path, record)]
    assert records(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"id": 1}', '{"endpoints": 3}'])
def test_a_damaged_record_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "record.json").write_text(content)
    assert read_record(tmp_path) is None


def test_a_record_of_a_later_version_is_none(tmp_path: Path) -> None:
    with Workspace.create(tmp_path) as workspace:
        workspace.write(Record("x", "", 0.0))
        later = json.loads((workspace.path / "record.json").read_text()) | {"colour": "blue"}
        (workspace.path / "record.json").write_text(json.dumps(later))
        assert read_record(workspace.path) is None
        assert records(tmp_path) == []


def test_what_a_living_owner_has_is_not_reaped(tmp_path: Path) -> None:
    with another_owner(tmp_path / "all", tmp_path) as (_, path):
        processes = wait_for_processes(path, 2)
        assert reap(tmp_path / "all") == []
        assert all(process.alive() for process in processes)
        assert [record.name for _, record in records(tmp_path / "all")] == ["owned"]
        owner_gone = path
    assert records(tmp_path / "all") == []
    assert reap(tmp_path / "all") == [owner_gone.name]


def test_only_what_a_dead_owner_left_is_reaped(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("mine")
    parent = tmp_path / "all"
    with Workspace.create(parent) as living, sleeping(**living.environment()) as mine:
        with another_owner(parent, kept) as (owner, path):
            left = wait_for_processes(path, 2)
            owner.kill()
            owner.wait()
            # Killed before the machine's record was whole: the environment is enough.
            (path / "record.json").write_text("{")
            assert reap(parent) == [path.name]
        assert not any(process.alive() for process in left)
        assert not path.exists()
        assert (kept / "file").read_text() == "mine"
        assert mine.poll() is None
        assert living.path.exists()
        assert reap(parent) == []


def test_a_workspace_that_is_removed_ends_its_processes(tmp_path: Path) -> None:
    workspace = Workspace.create(tmp_path, prefix=".new-")
    assert workspace.id.startswith(".new-")
    with sleeping(**workspace.environment()) as mine, sleeping(**{MARKER: f"{workspace.path}0"}) as other:
        workspace.remove()
        assert mine.wait(5.0) == -signal.SIGKILL
        assert other.poll() is None
    assert not workspace.path.exists()
    workspace.remove()


def test_an_interrupted_process_abandons_what_it_holds(tmp_path: Path) -> None:
    mine = Workspace.create(tmp_path / "all")
    with another_owner(tmp_path / "all", tmp_path) as (_, theirs):
        abandon(tmp_path / "all")
        assert not mine.path.exists()
        assert theirs.exists()
    mine.remove()
    assert reap(tmp_path / "all") == [theirs.name]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RefusedError, match="cannot write"):
        Workspace.create(tmp_path / "file" / "below")


def test_nothing_to_reap_where_there_is_nothing(tmp_path: Path) -> None:
    assert reap(tmp_path / "none") == []
    assert records(tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_a_signal_is_for_this_process_only() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        real = ProcessId.of(process.pid)
        ProcessId(real.pid, real.start_time - 1).send_signal(signal.SIGKILL)
        assert process.poll() is None
        real.send_signal(signal.SIGSTOP)
        assert os.waitid(os.P_PID, process.pid, os.WSTOPPED).si_status == signal.SIGSTOP
        real.kill()
        assert process.wait() == -signal.SIGKILL
    real.send_signal(signal.SIGCONT)  # it is gone


def test_a_reused_pid_is_never_touched() -> None:
    with sleeping() as process:
        earlier = ProcessId(process.pid, start_time_of(process.pid) - 1)
        assert not earlier.alive()
        assert earlier.wait(0.0)
        earlier.kill()
        assert process.poll() is None
        real = ProcessId.of(process.pid)
        assert real.alive()
        assert not real.wait(0.05)
        real.kill()
        # Killed and waited for; that its status was not fetched yet does not make it alive.
        assert not real.alive()
        assert real.wait(0.0)
        assert process.wait(5.0) == -signal.SIGKILL
    real.kill()
    assert real.wait(None)
    with pytest.raises(ProcessLookupError):
        ProcessId.of(process.pid)


def test_a_process_with_a_strange_name_has_a_start_time(tmp_path: Path) -> None:
    program = tmp_path / "a) S (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "100"]) as process:
        try:
            deadline = time.monotonic() + 5.0
            while Path(f"/proc/{process.pid}/comm").read_text() != "a) S (b\n":
                assert time.monotonic() < deadline
            own = start_time_of(os.getpid())
            assert own <= start_time_of(process.pid) < own + 3600 * os.sysconf("SC_CLK_TCK")
        finally:
            process.kill()


def test_a_recorded_process_without_the_mark_is_ended_too(tmp_path: Path) -> None:
    """As one that was taken over would hide: it can overwrite its environment, not its pid."""
    with subprocess.Popen(["sleep", "60"], env={}) as process:
        workspace = Workspace.create(tmp_path)
        workspace.write(Record("x", "x", 0.0, machine=ProcessId.of(process.pid)))
        workspace.remove()
        assert process.wait(5.0) == -signal.SIGKILL
    assert not workspace.path.exists()
