"""The page server of an instance, as its owner sees it: started, told what has come, asked how far it is.

The owner makes the mounts, writes what comes to the served files' own files and then says so here:
the pages' bytes in the state file are set, and whoever waits for one of them goes on. What the server
does, the documentation of ``cloudlet.pageserver`` says, and ``pageserver/state.py`` what is in the file.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloudlet.errors import RefusedError
from cloudlet.hypervisor.driver import Paging
from cloudlet.hypervisor.qemu import hugepages
from cloudlet.hypervisor.records import ProcessId, Workspace
from cloudlet.pageserver import mount
from cloudlet.pageserver.state import (
    HEADER_BYTES,
    HERE,
    MAGIC,
    MISSING,
    NAME,
    OWNERS,
    OWNERS_AT,
    SERVERS,
    SERVERS_AT,
    SHAPE,
    VERSION,
)
from cloudlet.sparse import write_at

PUSH_PAGES = 16
"""Pages of the aligned window whose present neighbours are read along: 64 KiB, as the kernel maps around."""

_SERVER = Path(__file__).parents[2] / "pageserver" / "__main__.py"
_PACKET_BYTES = 64
_FORGET_ALL = struct.pack("<IiQQqq", 40, 2, 0, 1, 0, 0)
"""FUSE_NOTIFY_INVAL_INODE of the root, from its first byte to its last (``include/uapi/linux/fuse.h``)."""
_WANTED = struct.Struct("<BQI")

Wanted = Callable[[int, int, int], None]
"""File number, first page, count: a read waits for some of these. Called from a thread of its own."""


@dataclass(frozen=True, slots=True)
class ServedFile:
    """A file to serve, of ``size`` bytes."""

    size: int
    delta: int
    """Descriptor of a file of the same size for the pages that come."""
    base: int | None
    """Descriptor of what the other pages are; None: zeros."""
    states: NDArray[np.uint8]
    """What is in each page: ``BASE``, ``MISSING`` or ``HERE`` of ``cloudlet.pageserver.state``."""


@cache
def obstacle() -> str:
    """What is in the way of an early start on this machine, and what to do; empty if nothing is."""
    if not hugepages.known_here():
        return f"an early start is not known on a {os.uname().machine} processor"
    try:
        # A mount that nobody serves and nobody opens: it is gone with its descriptors.
        device = mount.open_device()
        try:
            os.close(mount.mount(device))
        finally:
            os.close(device)
    except OSError as error:
        match error.errno:
            case errno.ENOENT | errno.ENODEV | errno.ENXIO:
                return f"{mount.DEVICE} is missing: modprobe fuse (in a container: --device {mount.DEVICE})"
            case errno.EPERM | errno.EACCES:
                return "this user may not mount: run as root (in a container: --cap-add SYS_ADMIN)"
            case errno.ENOSYS:
                return "this kernel cannot mount without a folder: use Linux 5.2 or newer"
        return f"{mount.DEVICE} cannot be used: {error.strerror}"
    return ""


@dataclass(slots=True, eq=False)
class PageServer:
    """A running page server; made by :meth:`start`."""

    process: ProcessId
    descriptors: tuple[int, ...]
    """The mounts, one for each file: QEMU gets them and opens ``/proc/self/fd/N``."""
    _child: subprocess.Popen[bytes]
    _control: socket.socket
    _state: int
    _states: list[NDArray[np.uint8]]
    _progress: Paging
    _device: int = -1
    """Of file 0, while what has been read of it may change."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _flushed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _listener: threading.Thread | None = None

    @classmethod
    def start(
        cls,
        workspace: Workspace,
        files: Sequence[ServedFile],
        wanted: Wanted,
        *,
        log_fd: int,
        uid: int | None = None,
        push_pages: int = PUSH_PAGES,
        touched: int | None = None,
        changes: bool = False,
    ) -> PageServer:
        """Start the server of one or two files; the caller goes on to own all descriptors it gives.

        :param uid: the user and group it becomes, without any right and network. It starts as who the
            caller is, because Python may be installed where only its owner can read.
        :param push_pages: 0 reads nothing along.
        :param touched: descriptor of a file to which the order is appended in which pages are first read.
        :param changes: whether pages of file 0 that can be read already may come again, until :meth:`settle`.
            Reads may hang until then, if the server dies.
        :raises RefusedError: it cannot be started here; :func:`obstacle` says so before.
        """
        if reason := obstacle():
            raise RefusedError(f"an early start is not possible: {reason}")
        with ExitStack() as inherited, ExitStack() as on_error:

            def given(descriptor: int) -> int:
                inherited.callback(os.close, descriptor)
                return descriptor

            states = [served.states.astype(np.uint8) for served in files]
            pages = sum(int(np.count_nonzero(kinds)) for kinds in states)
            missing = sum(int(np.count_nonzero(kinds == MISSING)) for kinds in states)
            progress = Paging(pages, missing, bytes=0, received=0, complete=False)
            state = _create(workspace.path / NAME, states, progress)
            on_error.callback(os.close, state)
            control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            on_error.callback(control.close)
            inherited.callback(theirs.close)
            mounts, arguments, handed = [], [], [theirs.fileno(), state]
            kept = -1
            for served in files:
                device = given(mount.open_device())
                mounts.append(mount.mount(device))
                on_error.callback(os.close, mounts[-1])
                if changes and kept < 0:
                    kept = os.dup(device)
                    on_error.callback(os.close, kept)
                delta = given(_read_only(served.delta))
                base = -1 if served.base is None else given(_read_only(served.base))
                arguments.append(f"{device}:{served.size}:{delta}:{base}")
                handed += [device, delta, *([base] if base >= 0 else [])]
            if touched is not None:
                handed.append(touched)
            numbers = (-1 if uid is None else uid, push_pages, -1 if touched is None else touched)
            command = [sys.executable, "-I", "-S", str(_SERVER)]
            child = subprocess.Popen(
                [*command, *map(str, [*numbers, theirs.fileno(), state]), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log_fd,
                stderr=log_fd,
                env=workspace.environment(),
                cwd="/",
                pass_fds=handed,
                start_new_session=True,
            )
            on_error.pop_all()
        process = ProcessId.of(child.pid)
        server = cls(process, tuple(mounts), child, control, state, states, progress, kept)
        server._listen(wanted, push_pages)
        return server

    def arrived(self, file: int, numbers: NDArray[np.uint32]) -> None:
        """Pages of a file have come, and are already written to its ``delta``."""
        if not len(numbers):
            return
        states = self._states[file]
        with self._lock:
            if self._state < 0:
                return
            came = np.unique(numbers)
            fresh = int(np.count_nonzero(states[came] == MISSING))
            states[came] = HERE
            first, after = int(came[0]), int(came[-1]) + 1
            start = HEADER_BYTES + sum(len(before) for before in self._states[:file])
            write_at(self._state, states[first:after].tobytes(), start + first)
            self._note(replace(self._progress, missing=self._progress.missing - fresh))
        self._tell(b"A")

    def expect(self, file: int, numbers: NDArray[np.uint32]) -> None:
        """Pages of a file are still to come, or to come again: who reads one waits for it."""
        states = self._states[file]
        with self._lock:
            if self._state < 0:
                return
            more = int(np.count_nonzero(states[numbers] != MISSING))
            states[numbers] = MISSING
            start = HEADER_BYTES + sum(len(before) for before in self._states[:file])
            write_at(self._state, states.tobytes(), start)
            pages = sum(int(np.count_nonzero(kinds)) for kinds in self._states)
            self._note(replace(self._progress, pages=pages, missing=self._progress.missing + more))

    def settle(self) -> None:
        """Have the kernel forget what was read of file 0, which may have changed and does not from now on.

        This process asks for it and not the server, which must be there for what is being read just now.
        """
        if self._device >= 0:
            # Without the lock: it waits for pages that are being read, which may have to come first.
            os.write(self._device, _FORGET_ALL)
        self._close_device()

    def received(self, done: int, total: int) -> None:
        """So many bytes of the overlay are here, of so many."""
        with self._lock:
            self._note(replace(self._progress, received=done, bytes=total))

    def complete(self) -> None:
        """All has come: from now on the server goes on without its owner."""
        with self._lock:
            self._note(replace(self._progress, complete=True))

    def flush_touched(self, timeout: float = 10.0) -> bool:
        """Have what was touched until now written down; whether that was done in time."""
        self._tell(b"T")
        return self._flushed.acquire(timeout=timeout)

    def progress(self) -> Paging:
        """How far the instance is; the last known when this was closed."""
        with self._lock:
            return self._look()

    def release(self) -> None:
        """Close what is held here; the process goes on, if all has come. Can be called again."""
        self._close()
        if self._child.poll() is None:
            # Somebody has to fetch its status.
            name = f"pages-{self.process.pid}"
            threading.Thread(target=self._child.wait, name=name, daemon=True).start()

    def stop(self) -> None:
        """End the process: reads that wait fail, and so does every later one. Can be called again."""
        if self._child.poll() is None:
            self._child.kill()
            self._child.wait()
        self._close()

    def _close_device(self) -> None:
        with self._lock:
            if self._device >= 0:
                os.close(self._device)
                self._device = -1

    def _close(self) -> None:
        self._close_device()
        # Wakes the listener, also where it is the one that calls.
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        if self._listener and self._listener is not threading.current_thread():
            self._listener.join()
        self._control.close()
        with self._lock:
            if self._state >= 0:
                self._progress = self._look()
                os.close(self._state)
                self._state = -1
                for descriptor in self.descriptors:
                    os.close(descriptor)

    def _look(self) -> Paging:
        return _read(self._state) or self._progress if self._state >= 0 else self._progress

    def _note(self, progress: Paging) -> None:
        self._progress = progress
        if self._state >= 0:
            write_at(self._state, _owners(progress), OWNERS_AT)

    def _tell(self, packet: bytes) -> None:
        # A full socket has enough of these already; and one that is gone is seen by who watches the process.
        with suppress(OSError):
            self._control.send(packet, socket.MSG_DONTWAIT)

    def _listen(self, wanted: Wanted, push_pages: int) -> None:
        def listen() -> None:
            if push_pages:
                self._hand_over_opening()
            while packet := self._receive():
                if len(packet) == _WANTED.size:
                    wanted(*_WANTED.unpack(packet))
                else:
                    self._flushed.release()

        name = f"wanted-{self.process.pid}"
        self._listener = threading.Thread(target=listen, name=name, daemon=True)
        self._listener.start()

    def _receive(self) -> bytes:
        try:
            return self._control.recv(_PACKET_BYTES)
        except OSError:
            return b""

    def _hand_over_opening(self) -> None:
        """Give the server an opening of its file 0, for which it would have to wait for itself."""
        with suppress(OSError):  # the server is gone
            descriptor = os.open(f"/proc/self/fd/{self.descriptors[0]}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                rights = array.array("i", [descriptor])
                self._control.sendmsg([b"F"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            finally:
                os.close(descriptor)


def read_progress(folder: Path) -> Paging | None:
    """How far the instance in ``folder`` is; None if it did not start early, or the file is not sound."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _read(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _create(path: Path, states: Sequence[NDArray[np.uint8]], progress: Paging) -> int:
    """A new state file, open for reading and writing."""
    counts = [*(len(kinds) for kinds in states), 0][:2]
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        start = HEADER_BYTES
        for kinds in states:
            write_at(descriptor, kinds.tobytes(), start)
            start += len(kinds)
        write_at(descriptor, _owners(progress), OWNERS_AT)
        # Last, because this makes it a state file for others.
        write_at(descriptor, SHAPE.pack(MAGIC, VERSION, len(states), *counts), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _owners(progress: Paging) -> bytes:
    return OWNERS.pack(
        progress.pages, progress.missing, progress.bytes, progress.received, int(progress.complete)
    )


def _read(descriptor: int) -> Paging | None:
    header = os.pread(descriptor, HEADER_BYTES, 0)
    if len(header) < HEADER_BYTES:
        return None
    magic, version, files, *counts = SHAPE.unpack_from(header)
    if (magic, version) != (MAGIC, VERSION) or files > len(counts):
        return None
    if os.fstat(descriptor).st_size != HEADER_BYTES + sum(counts):
        return None
    pages, missing, size, received, complete = OWNERS.unpack_from(header, OWNERS_AT)
    reads, stalls, longest, waited, since, _ = SERVERS.unpack_from(header, SERVERS_AT)
    return Paging(
        pages, missing, size, received, complete != 0,
        reads, stalls, longest, waited, since or None,
    )  # fmt: skip


def _read_only(descriptor: int) -> int:
    """Another opening of the same file, through which nobody can change it."""
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
