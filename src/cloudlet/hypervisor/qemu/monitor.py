"""QMP: the monitor of one QEMU, by the QEMU project's own library on one private loop thread.

The library is asyncio; nothing else here is. Every call has a deadline, since a QEMU that waits for a
page or a disk does not answer. Not for deadlines or progress: those must not depend on the monitor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import QMPClient, QMPError
from qemu.qmp.qmp_client import ExecuteError

from cloudlet.errors import FailedError
from cloudlet.hypervisor.qemu.sockets import reachable

_T = TypeVar("_T")
_DEADLINE = 20.0


class Monitor:
    """A connection to the monitor socket of a running QEMU."""

    def __init__(self, path: Path, *, timeout: float = _DEADLINE) -> None:
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        self._client = QMPClient("cloudlet")
        try:
            with reachable(path) as short:
                self._wait(self._client.connect(short), timeout, "connect")
        except BaseException:
            self._stop_loop()
            raise

    def execute(self, command: str, *, timeout: float = _DEADLINE, **arguments: object) -> Any:
        """Run a command; underscores in the names of arguments stand for dashes.

        :raises FailedError: QEMU refuses, does not answer in time, or is gone.
        """
        wire = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._wait(self._client.execute(command, wire), timeout, command)

    def human(self, command: str) -> str:
        """Run a command of the human monitor, where QMP has none; its printed answer."""
        return str(self.execute("human-monitor-command", command_line=command))

    def send_descriptor(self, descriptor: int, name: str) -> None:
        """Hand an open descriptor over under a name, for commands that take ``fd:NAME``."""

        def send() -> None:
            self._client.send_fd_scm(descriptor)

        self._call(send)
        self.execute("getfd", fdname=name)

    def add_descriptor(self, descriptor: int) -> tuple[str, int]:
        """Hand an open descriptor over as a descriptor set: its path in QEMU, and its number."""

        def send() -> None:
            self._client.send_fd_scm(descriptor)

        self._call(send)
        number = int(self.execute("add-fd")["fdset-id"])
        return f"/dev/fdset/{number}", number

    def close(self) -> None:
        """Close the connection; the machine goes on. Can be called again."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(FailedError):
            self._wait(self._client.disconnect(), 5.0, "disconnect")
        self._stop_loop()

    def _wait(self, coroutine: Coroutine[Any, Any, _T], timeout: float, what: str) -> _T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout)
        except ExecuteError as error:
            raise FailedError(f"QEMU refuses {what}: {error}") from error
        except TimeoutError as error:
            future.cancel()
            raise FailedError(f"QEMU did not answer {what} within {timeout:.0f} s") from error
        except (QMPError, OSError, EOFError) as error:
            raise FailedError(f"QEMU is gone ({what}: {error})") from error

    def _call(self, action: Callable[[], None]) -> None:
        async def on_loop() -> None:
            action()

        self._wait(on_loop(), _DEADLINE, "send a descriptor")

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        self._loop.close()
