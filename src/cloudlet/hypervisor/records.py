"""What runs, on disk: a folder for each instance, with a typed record, so that nothing is ever lost.

A :class:`Workspace` is a folder that belongs to a living process through a file lock, which the kernel
drops when that process dies in whatever way. Every process started for it carries the folder's name in
its environment. So a later command finds what a dead owner left (folder, processes, sockets), removes
that, and only that. Records name processes by pid *and* start time: a reused pid is never touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import select
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from cloudlet.errors import FailedError, RefusedError
from cloudlet.model import Endpoint

MARKER = "CLOUDLET_INSTANCE"
"""Environment variable that names the workspace in every process started for it."""

_LOCK = "lock"
_ENVIRONMENT_END = 48  # env_end of proc_pid_stat(5), counted from the state: an address
_RECORD = "record.json"


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process, named so that it cannot be mistaken for a later one with the same pid."""

    pid: int
    start_time: int
    """Clock ticks after boot, field 22 of ``/proc/PID/stat``."""

    @classmethod
    def of(cls, pid: int) -> Self:
        return cls(pid, start_time_of(pid))

    def alive(self) -> bool:
        try:
            return start_time_of(self.pid) == self.start_time and not _is_zombie(self.pid)
        except ProcessLookupError:
            return False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the process is gone, at most ``timeout`` seconds; whether it is."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            return not self.alive() or _wait_pidfd(descriptor, timeout)
        finally:
            os.close(descriptor)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process is gone."""
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self.pid)
            try:
                if self.alive():
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)

    def kill(self, timeout: float = 5.0) -> None:
        """End the process with SIGKILL and wait until it is gone; nothing happens if it already is."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.alive():
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                _wait_pidfd(descriptor, timeout)
        except ProcessLookupError:
            pass
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of an instance; written whenever it changes."""

    id: str
    name: str
    created: float
    """Seconds since 1970."""
    base_id: str = ""
    overlay_id: str = ""
    uid: int | None = None
    """The user QEMU runs as, where it is not the owner's."""
    endpoints: tuple[Endpoint, ...] = ()
    owner: ProcessId | None = None
    machine: ProcessId | None = None
    network: ProcessId | None = None
    pages: ProcessId | None = None
    """The page server, of an instance that has one. It ends first: see :meth:`processes`."""
    ram_descriptor: int | None = None
    """Under this number the owner holds the machine's RAM file, the base's for instances that come later.

    It is the owner's, not the machine's: a machine that was taken over can put another file there.
    """
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def processes(self) -> tuple[ProcessId, ...]:
        """The instance's processes in the order in which to end them.

        A machine that waits for a page cannot be ended before its page server is: only then the wait fails.
        """
        return tuple(process for process in (self.pages, self.machine, self.network) if process)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        known = dict(data)
        known["endpoints"] = tuple(Endpoint(**endpoint) for endpoint in known["endpoints"])
        for name in ("owner", "machine", "network", "pages"):
            known[name] = ProcessId(**known[name]) if known[name] else None
        return cls(**known)


class Workspace:
    """A locked folder of a living process; see the module's text."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, parent: Path, prefix: str = "") -> Self:
        """Make and lock a new folder below ``parent``."""
        with folder_lock(parent):
            path = parent / f"{prefix}{secrets.token_hex(4)}"
            path.mkdir(mode=0o700)
            return cls(path, _lock_file(path / _LOCK))

    @property
    def id(self) -> str:
        return self.path.name

    def environment(self) -> dict[str, str]:
        """The whole environment for a process of this workspace."""
        return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", MARKER: str(self.path)}

    def write(self, record: Record) -> None:
        """Replace the record; a reader sees the old one or the new one, whole."""
        temporary = self.path / f"{_RECORD}.new"
        temporary.write_text(json.dumps(asdict(record), indent=1))
        temporary.replace(self.path / _RECORD)

    def remove(self) -> None:
        """End every process of the workspace and remove its folder. Can be called again."""
        if self._lock < 0:
            return
        _empty(self.path)
        os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def read_record(path: Path) -> Record | None:
    """The record in an instance's folder; None if there is none yet, or none that can be read."""
    try:
        return Record.from_json(json.loads((path / _RECORD).read_text()))
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def records(parent: Path) -> list[tuple[Path, Record]]:
    """All records below ``parent`` whose owner is alive."""
    found = []
    for path in _workspaces(parent):
        if (record := read_record(path)) and not _owner_is_dead(path):
            found.append((path, record))
    return found


def reap(parent: Path) -> list[str]:
    """Remove the workspaces below ``parent`` whose owners are dead, and their processes. Their names.

    Where this user may not write, they are somebody else's to remove.
    """
    if not parent.exists():
        return []
    removed = []
    with contextlib.suppress(RefusedError), folder_lock(parent):
        for path in _workspaces(parent):
            if _owner_is_dead(path):
                _empty(path)
                removed.append(path.name)
        # Killed before it had its lock, or after the lock was removed.
        for path in parent.iterdir():
            with contextlib.suppress(OSError):
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
    return removed


def abandon(parent: Path) -> None:
    """Remove the workspaces below ``parent`` that this very process still holds; it is about to end."""
    real = parent.resolve()
    held = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            file = entry.readlink()
            if file.name == _LOCK and file.parent.parent == real:
                held.add(file.parent.name)
    for name in held:
        _empty(parent / name)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock that orders making and reaping of workspaces below ``folder``."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        raise RefusedError(
            f"cannot write to {folder}: {error.strerror}",
            hint="make it writable, or name another with --state-dir or --cache-dir",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def start_time_of(pid: int) -> int:
    """Start of a process in clock ticks after boot.

    :raises ProcessLookupError: there is no such process.
    """
    return int(_stat_fields(pid)[19])


def cpu_seconds_of(pid: int) -> float:
    """CPU time a process has used, in user and system mode.

    :raises ProcessLookupError: there is no such process.
    """
    fields = _stat_fields(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def processes_of(path: Path) -> list[ProcessId]:
    """The processes that carry the workspace ``path`` in their environment."""
    marker = f"{MARKER}={path}".encode() + b"\0"
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if marker in _environment_of(entry) + b"\0":
                found.append(ProcessId.of(int(entry.name)))
    return found


def _environment_of(entry: Path) -> bytes:
    """The environment of a process, ``entry`` being its folder below ``/proc``; empty where it has none.

    A program that was just started has none until the kernel has laid out its stack, and on a busy machine
    that can be after whoever started it goes on: this waits for it.
    """
    deadline = time.monotonic() + 1.0
    while not (found := (entry / "environ").read_bytes()) and time.monotonic() < deadline:
        (entry / "exe").readlink()  # neither a zombie nor a thread of the kernel has one
        if int(_stat_fields(int(entry.name))[_ENVIRONMENT_END]):
            break  # it was started without any
        time.sleep(0.001)
    return found


def _workspaces(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if (path / _LOCK).exists())
    except FileNotFoundError:
        return []


def _owner_is_dead(path: Path) -> bool:
    try:
        descriptor = os.open(path / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two who look at the same time do not take each other for the owner.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def _lock_file(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    # Nobody else holds it for longer than a look.
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def users_of_processes() -> set[int]:
    """The users that any process runs as."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(FileNotFoundError):
                found.add(entry.stat().st_uid)
    return found


def _left(path: Path, record: Record | None) -> list[ProcessId]:
    """What still runs for a workspace: by its mark, and by its record.

    A machine that was taken over can remove its mark, not its pid; and it can start no other process.
    Its user is no sign: that may be another machine's by now.
    """
    found = set(processes_of(path))
    first: tuple[ProcessId, ...] = ()
    if record:
        found |= {process for process in record.processes if process.alive()}
        first = record.processes[:1]
    return sorted(found, key=lambda process: (process not in first, process.pid))


def _empty(path: Path) -> None:
    deadline = time.monotonic() + 10.0
    record = read_record(path)
    # A process may have been forking while we looked: look until none is left.
    while left := _left(path, record):
        if time.monotonic() > deadline:
            pids = ", ".join(str(process.pid) for process in left)
            raise FailedError(f"processes {pids} of {path} do not end", hint="kill them and try again")
        for process in left:
            process.kill()
    # The lock goes last: while it is there, a later command can find and finish what we began.
    for entry in path.iterdir() if path.exists() else ():
        if entry.name != _LOCK:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(
                missing_ok=True
            )
    shutil.rmtree(path, ignore_errors=True)


def _wait_pidfd(descriptor: int, timeout: float | None) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(None if timeout is None else timeout * 1000))


def _is_zombie(pid: int) -> bool:
    return _stat_fields(pid)[0] == "Z"


def _stat_fields(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise _no_process(pid) from error
    # The command's name, in parentheses, may hold spaces and parentheses.
    return text.rpartition(")")[2].split()


def _no_process(pid: int) -> ProcessLookupError:
    return ProcessLookupError(errno.ESRCH, f"process {pid} is gone")
