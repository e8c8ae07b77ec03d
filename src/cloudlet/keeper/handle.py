"""A keeper as its site sees it: started through the nursery, found again, watched, asked for things.

One thread reads what all keepers say. Its site is told of each change of a keeper's status, and once of its
end, however that came: what the keeper said last is in its folder, and a keeper that was killed said nothing.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oslo_log import log

from cloudlet.errors import CloudletError, ConflictError, FailedError
from cloudlet.hypervisor.qemu.sockets import connect
from cloudlet.keeper import folder as folders
from cloudlet.keeper.control import SOCKET, read_status
from cloudlet.keeper.order import KeeperState, Order, Status, raised, settings_to_json
from cloudlet.keeper.wire import LONGEST_LINE, Line
from cloudlet.settings import Settings

LOG = log.getLogger(__name__)
_START_SECONDS = 20.0
"""Longest time until a new keeper can be talked to."""
_END_SECONDS = 30.0
_LOOK_SECONDS = 0.01
_ENVIRONMENT = {
    # One thread, or a fork would not be safe.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    # An arena for each thread would keep what each has freed: 6 MiB more in a hand-off (measured).
    "MALLOC_ARENA_MAX": "2",
}
"""Of the nursery and all keepers."""

Told = Callable[[str, Status | None, folders.Generation | None], None]
"""Told, from the watching thread, of an instance's id, its new status, and which of its keepers says so; once
the last is ``ENDED``. None if it has gone without a trace: somebody else has ended it."""
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class _Watched:
    instance_id: str
    connection: socket.socket
    generation: folders.Generation | None
    """Which of an instance's keepers it is, that follow each other."""
    unread: bytes = b""


class Keepers:
    """The keepers of a site."""

    def __init__(self, settings: Settings, told: Told) -> None:
        self._settings = settings
        self._folder = settings.keepers_dir
        self._told = told
        self._nursery: tuple[subprocess.Popen[bytes], Line] | None = None
        self._forking = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._watched: dict[str, _Watched] = {}
        self._dropped: list[_Watched] = []
        """Those that are watched no more, for the watching thread to close."""
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="keepers", daemon=True)
        self._thread.start()

    def warm(self) -> None:
        """Have the nursery ready before the first keeper is wanted."""
        with self._forking:
            self._nursery_line()

    def start(self, instance_id: str, order: Order) -> None:
        """Have a keeper for an instance; nothing happens if there is one that lives or that has ended.

        :raises FailedError: it does not begin.
        """
        folder = self._folder / instance_id
        folders.make(folder, order)
        if not folders.is_kept(folder) and read_status(folder) is None:
            self._fork(folder)
        self._adopt(instance_id, folder)

    def adopt(self, besides: Collection[str] = ()) -> set[str]:
        """Watch all keepers that live, whoever started them, and tell of those that have ended; their ids."""
        if not self._folder.exists():
            return set()
        found = {path.name for path in self._folder.iterdir() if path.is_dir()}
        for instance_id in found.difference(besides):
            with suppress(CloudletError, OSError):  # it ends just now: its last word is told like any other
                self.watch(instance_id)
        return found

    def watch(self, instance_id: str) -> bool:
        """Watch the keeper of an instance, whoever started it, and tell if it has ended; whether it lives.

        :raises FailedError: it does not answer.
        """
        folder = self._folder / instance_id
        if not folders.is_kept(folder):
            generation, status = folders.generation(folder), read_status(folder)
            if not folders.is_kept(folder):  # it has not begun just now
                if status:
                    self._told(instance_id, _ended(status), generation)
                return False
        if instance_id not in self._watched:
            self._adopt(instance_id, folder)
        return True

    def generation(self, instance_id: str) -> folders.Generation | None:
        """Which of an instance's keepers there is, or was last; None if there is no trace of any."""
        return folders.generation(self._folder / instance_id)

    def lives(self, instance_id: str) -> bool:
        """Whether an instance has a living keeper."""
        return folders.is_kept(self._folder / instance_id)

    def status(self, instance_id: str) -> Status | None:
        """What the keeper of an instance said last."""
        return read_status(self._folder / instance_id)

    def ask(
        self,
        instance_id: str,
        what: str,
        *,
        timeout: float = 60.0,
        progress: Progress | None = None,
        body: bytes = b"",
        **more: Any,
    ) -> dict[str, Any]:
        """Have a keeper do something, and wait for it.

        :param timeout: seconds in which it must say something.
        :raises CloudletError: it could not be done, or the keeper has gone.
        """
        try:
            line = Line(connect(self._folder / instance_id / SOCKET, timeout=timeout))
        except (FailedError, OSError) as error:
            raise ConflictError(f"instance {instance_id} does not run") from error
        try:
            line.send({"do": what, **more}, body)
            for message in line.messages():
                if "error" in message:
                    raise raised(message["error"])
                if "done" in message:
                    return dict(message["done"])
                if progress:
                    progress(*message["progress"])
        except TimeoutError as error:
            raise FailedError(f"the keeper of instance {instance_id} does not answer") from error
        except OSError as error:
            raise FailedError(f"the keeper of instance {instance_id} has gone") from error
        finally:
            line.close()
        raise FailedError(f"the keeper of instance {instance_id} ended meanwhile")

    def end(self, instance_id: str) -> None:
        """End an instance, and forget its keeper. Can be called again.

        :raises FailedError: the keeper does not end.
        """
        folder = self._folder / instance_id
        with suppress(ConflictError, FailedError):
            self.ask(instance_id, "end", timeout=5.0)
        deadline = time.monotonic() + _END_SECONDS
        while folders.is_kept(folder):
            if time.monotonic() > deadline:
                raise FailedError(
                    f"the keeper of instance {instance_id} does not end", hint="see its keeper.log"
                )
            time.sleep(_LOOK_SECONDS)
        self.forget(instance_id)

    def forget(self, instance_id: str) -> None:
        """Remove what a keeper that has ended left."""
        with self._lock:
            self._drop(instance_id)
        self._wake()
        folders.remove(self._folder / instance_id)

    def close(self) -> None:
        """Stop watching; the keepers go on."""
        self._closed = True
        self._wake_now()
        self._thread.join()
        if self._nursery:
            process, line = self._nursery
            line.close()
            process.wait()
        for watched in (*self._watched.values(), *self._dropped):
            watched.connection.close()
        self._selector.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _fork(self, folder: Path) -> None:
        with self._forking:
            for attempt in (1, 2):
                try:
                    line = self._nursery_line()
                    line.send({"folder": str(folder)})
                    if line.receive() is not None:
                        return
                except OSError:
                    pass
                self._nursery = None  # it was killed: another takes its place
                if attempt == 2:
                    raise FailedError("no keeper can be started", hint="see the server's log")

    def _nursery_line(self) -> Line:
        if self._nursery is None:
            ours, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", "cloudlet.keeper.nursery", str(theirs.fileno()),
                     json.dumps(settings_to_json(self._settings))],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **_ENVIRONMENT},
                )  # fmt: skip
            self._nursery = process, Line(ours)
        return self._nursery[1]

    def _adopt(self, instance_id: str, folder: Path) -> None:
        """Watch a keeper that has begun, or is about to."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                connection = connect(folder / SOCKET, timeout=_START_SECONDS)
                break
            except (FailedError, OSError) as error:
                if (status := read_status(folder)) and status.state is KeeperState.ENDED:
                    self._told(instance_id, status, folders.generation(folder))
                    return
                if time.monotonic() > deadline:
                    raise FailedError(f"the keeper of instance {instance_id} does not begin") from error
                time.sleep(_LOOK_SECONDS)
        Line(connection).send({"do": "watch"})
        connection.setblocking(False)
        with self._lock:
            # In the place of one before it, whose end was not heard yet.
            self._drop(instance_id)
            self._watched[instance_id] = _Watched(instance_id, connection, folders.generation(folder))
        self._wake()

    def _wake(self) -> None:
        if not self._closed:
            self._wake_now()

    def _wake_now(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._wake_writer, b"\0")

    def _watch(self) -> None:
        while not self._closed:
            self._register()
            for key, _ in self._selector.select():
                if key.data is None:
                    with suppress(BlockingIOError):
                        os.read(self._wake_reader, 4096)
                    continue
                try:
                    self._hear(key.data)
                except Exception:
                    LOG.exception("what the keeper of %s says is not understood", key.data.instance_id)

    def _drop(self, instance_id: str) -> None:
        if watched := self._watched.pop(instance_id, None):
            self._dropped.append(watched)

    def _register(self) -> None:
        """Listen to those who came, and no more to those who were forgotten."""
        with self._lock:
            wanted = {id(watched): watched for watched in self._watched.values()}
            dropped, self._dropped = self._dropped, []
        for key in list(self._selector.get_map().values()):
            if key.data and wanted.pop(id(key.data), None) is None:
                self._selector.unregister(key.fileobj)
                key.data.connection.close()
        for watched in dropped:  # also those that came and went since the last time
            watched.connection.close()
        for watched in wanted.values():
            self._selector.register(watched.connection, selectors.EVENT_READ, watched)

    def _hear(self, watched: _Watched) -> None:
        try:
            piece = watched.connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        *lines, watched.unread = (watched.unread + piece).split(b"\n")
        if lines:  # those before the last are old already; the end is told when it is one
            status = Status.from_json(json.loads(lines[-1]))
            if status.state is not KeeperState.ENDED:
                self._told(watched.instance_id, status, watched.generation)
        if piece and len(watched.unread) < LONGEST_LINE:
            return
        self._selector.unregister(watched.connection)
        watched.connection.close()
        with self._lock:
            # Another keeper of the same instance may be there already.
            forgotten = self._watched.get(watched.instance_id) is not watched
            if not forgotten:
                del self._watched[watched.instance_id]
        folder = self._folder / watched.instance_id
        if piece:
            LOG.error("the keeper of %s says more at once than it may", watched.instance_id)
            return  # whoever looks for keepers listens to it again
        if forgotten or folders.generation(folder) not in (None, watched.generation):
            return
        deadline = time.monotonic() + _END_SECONDS
        while folders.is_kept(folder):
            if time.monotonic() > deadline:
                return  # it lives, and says nothing: who looks for keepers finds it again
            time.sleep(_LOOK_SECONDS)
        last = read_status(folder)
        self._told(watched.instance_id, _ended(last) if last else None, watched.generation)


def _ended(status: Status) -> Status:
    """The last status of a keeper that has gone."""
    if status.state is KeeperState.ENDED:
        return status
    killed = {"kind": "FailedError", "message": "its keeper was killed", "hint": ""}
    return status.with_(state=KeeperState.ENDED, endpoints=(), error=killed)
