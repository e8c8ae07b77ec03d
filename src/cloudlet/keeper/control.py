"""The socket of a keeper: who watches is told of every change, who asks for something gets an answer.

Each connection has a thread; there is one for the site, and one for each thing that is asked for. What is
asked for is done one at a time, but for what may be done beside anything. The status is a file too: it is
what a site reads that comes later.
"""

from __future__ import annotations

import errno
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from cloudlet.errors import CloudletError, FailedError, UsageError, of_the_system
from cloudlet.hypervisor.qemu.sockets import listen
from cloudlet.keeper.order import Status, describe
from cloudlet.keeper.wire import Line

SOCKET, STATUS = "control.sock", "status.json"

_LATER, _LATER_SECONDS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNABORTED), 0.1
"""What passes, when somebody wants to connect."""
_LOOK_SECONDS = 10.0
"""How often to look whether those are still there who have nothing to say, but want to know all."""

Progress = Callable[[int, int], None]
Command = Callable[[Mapping[str, Any], Progress], dict[str, Any]]
"""Does what is asked, with the arguments of the message, and gives its answer; bytes are its ``body``."""


class Control:
    """A keeper's socket and status, in its folder."""

    def __init__(
        self, folder: Path, commands: Mapping[str, Command], beside: Mapping[str, Command] = {}
    ) -> None:
        """Serve in ``folder``.

        :param commands: what is done one at a time.
        :param beside: what nobody has to wait for until something else is done.
        """
        self.status = Status()
        self._folder = folder
        self._commands = {**commands, **beside}
        self._beside = beside.keys()
        self._changed = threading.Condition()
        self._number = 0
        self._busy = threading.Lock()
        self._unwritten = False
        self._write()
        with suppress(FileNotFoundError):  # of a keeper that was killed here
            (folder / SOCKET).unlink()
        self._listener = listen(folder / SOCKET)
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def tell(self, *, keep: bool = True, **changes: Any) -> None:
        """Change the status; with ``keep`` also that in the file.

        What cannot be written is written with the next change: who watches knows it anyway.
        """
        with self._changed:
            self.status = self.status.with_(**changes)
            self._number += 1
            if keep or self._unwritten:
                self._try_to_write()
            self._changed.notify_all()

    def _try_to_write(self) -> None:
        try:
            self._write()
            self._unwritten = False
        except OSError as error:
            if not self._unwritten:
                _log(f"the status cannot be written: {error}")
            self._unwritten = True

    def _write(self) -> None:
        new = self._folder / f"{STATUS}.new"
        new.write_text(json.dumps(self.status.to_json()))
        new.replace(self._folder / STATUS)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if error.errno not in _LATER:
                    return
                time.sleep(_LATER_SECONDS)
                continue
            threading.Thread(target=self._serve, args=(connection,), name="served", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        line = Line(connection)
        try:
            for message in line.messages():
                if message.get("do") == "watch":
                    self._watched(line)
                else:
                    self._do(line, {**message, "body": line.body(message)})
        except (OSError, EOFError):
            pass  # who asked has gone
        finally:
            line.close()

    def _watched(self, line: Line) -> None:
        seen = -1
        while not line.closed:
            with self._changed:
                if self._number == seen:
                    # Nobody says that a site has ended that waited for news.
                    self._changed.wait(_LOOK_SECONDS)
                news, seen, status = self._number != seen, self._number, self.status
            if news:
                line.send(status.to_json())

    def _do(self, line: Line, message: Mapping[str, Any]) -> None:
        def progress(done: int, total: int) -> None:
            line.send({"progress": [done, total]})

        try:
            command = self._commands.get(str(message.get("do")))
            if command is None:
                raise UsageError(f"a keeper cannot {message.get('do')!r}")
            beside = message.get("do") in self._beside
            with nullcontext() if beside else self._busy:
                if not beside and line.closed:
                    return  # who gave up waiting does not want it any more
                answer = command(message, progress)
            line.send({"done": answer})
        except Exception as error:
            line.send({"error": describe_any(error)})


def describe_any(error: Exception) -> dict[str, str]:
    """An error as text, for another process; a defect is logged as well."""
    if isinstance(error, CloudletError):
        return describe(error)
    if isinstance(error, OSError | MemoryError):
        return describe(of_the_system(error))
    _log("".join(traceback.format_exception(error)))
    said = f"a defect: {type(error).__name__}: {error}"
    return describe(FailedError(said, hint="see keeper.log of the instance"))


def _log(text: str) -> None:
    with suppress(OSError):  # the log may be on the disk that is full
        print(text, file=sys.stderr, flush=True)


def read_status(folder: Path) -> Status | None:
    """What the keeper of a folder said last; None if it has not said anything yet."""
    try:
        return Status.from_json(json.loads((folder / STATUS).read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return None
