"""QMP: the monitor of one QEMU, by the QEMU project's own library on one private loop thread.

The library is asyncio; nothing else here is. Every call has a deadline, since a QEMU that waits for a
page or a disk does not answer. Not for deadlines or progress: those must not depend on the monitor.
QEMU serves one connection at a time: one that is not used for a while is given back, so that a process
that adopted the machine gets its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import QMPClient, QMPError, Runstate
from qemu.qmp.qmp_client import ExecuteError

from cloudlet.errors import FailedError
from cloudlet.hypervisor.qemu.sockets import reachable

_T = TypeVar("_T")
_DEADLINE = 20.0
_IDLE_SECONDS = 1.0
"""How long a connection is kept for the next call: what QEMU ties to it, such as descriptors that were
handed over, is there for the calls that follow at once."""


class Monitor:
    """A connection to the monitor socket of a running QEMU."""

    def __init__(self, path: Path, *, timeout: float = _DEADLINE) -> None:
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        self._path = path
        self._client = QMPClient("cloudlet")
        self._calls = 0
        self._turn = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        try:
            self._wait(self._connected(), timeout, "connect")
        except BaseException:
            self._stop_loop()
            raise

    def execute(self, command: str, *, timeout: float = _DEADLINE, **arguments: object) -> Any:
        """Run a command; underscores in the names of arguments stand for dashes.

        :raises FailedError: QEMU refuses, does not answer in time, or is gone.
        """
        wire = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._wait(self._executed(command, wire), timeout, command)

    def begin(self, command: str) -> Callable[[], Any]:
        """Have a command run, and do not wait for it: that does what is returned, as :meth:`execute`."""
        future = self._submit(self._executed(command, {}))
        return lambda: self._result(future, _DEADLINE, command)

    def prepare(self) -> None:
        """Have the connection ready for a call that soon comes; nobody waits for that."""

        async def prepared() -> None:
            with contextlib.suppress(QMPError, OSError, EOFError):
                await self._connected()

        self._submit(prepared())

    def human(self, command: str) -> str:
        """Run a command of the human monitor, where QMP has none; its printed answer."""
        return str(self.execute("human-monitor-command", command_line=command))

    def send_descriptor(self, descriptor: int, name: str) -> None:
        """Hand an open descriptor over under a name, for commands that take ``fd:NAME``."""
        self._wait(self._executed("getfd", {"fdname": name}, descriptor), _DEADLINE, "getfd")

    def add_descriptor(self, descriptor: int) -> tuple[str, int]:
        """Hand an open descriptor over as a descriptor set: its path in QEMU, and its number."""
        added = self._wait(self._executed("add-fd", {}, descriptor), _DEADLINE, "add-fd")
        number = int(added["fdset-id"])
        return f"/dev/fdset/{number}", number

    def close(self) -> None:
        """Close the connection; the machine goes on. Can be called again."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(FailedError):
            self._wait(self._disconnected(), 5.0, "disconnect")
        self._stop_loop()

    def _wait(self, coroutine: Coroutine[Any, Any, _T], timeout: float, what: str) -> _T:
        return self._result(self._submit(coroutine), timeout, what)

    def _submit(self, coroutine: Coroutine[Any, Any, _T]) -> Future[_T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _result(self, future: Future[_T], timeout: float, what: str) -> _T:
        try:
            return future.result(timeout)
        except ExecuteError as error:
            raise FailedError(f"QEMU refuses {what}: {error}") from error
        except TimeoutError as error:
            future.cancel()
            raise FailedError(f"QEMU did not answer {what} within {timeout:.0f} s") from error
        except (QMPError, OSError, EOFError) as error:
            raise FailedError(f"QEMU is gone ({what}: {error})") from error
        except BaseException:
            # Interrupted: nobody waits for this call any more, and the loop is about to be stopped.
            future.cancel()
            raise

    async def _executed(self, command: str, arguments: dict[str, object], descriptor: int = -1) -> Any:
        async with self._connection():
            if descriptor >= 0:
                self._client.send_fd_scm(descriptor)
            return await self._client.execute(command, arguments)

    async def _connected(self) -> None:
        async with self._connection():
            pass

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[None]:
        self._calls += 1
        try:
            async with self._turn:
                if self._client.runstate is not Runstate.RUNNING:
                    await self._disconnected()
                    with reachable(self._path) as short:
                        await self._client.connect(short)
            yield
        finally:
            self._calls -= 1
            if self._idle:
                self._idle.cancel()
            self._idle = self._loop.call_later(_IDLE_SECONDS, self._give_back)

    def _give_back(self) -> None:
        async def release() -> None:
            async with self._turn:
                if not self._calls:
                    await self._disconnected()

        self._releasing = self._loop.create_task(release())

    async def _disconnected(self) -> None:
        # What a connection that broke has to say was said to the call that it broke. The library asserts
        # that no call is pending, though one that it has just interrupted may not have run since.
        with contextlib.suppress(QMPError, OSError, EOFError, AssertionError):
            await self._client.disconnect()

    def _stop_loop(self) -> None:
        async def end() -> None:
            # A call that was given up closes its socket in its own time, and nobody runs this loop later.
            if others := asyncio.all_tasks() - {asyncio.current_task()}:
                _, pending = await asyncio.wait(others, timeout=2.0)
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)

        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(5.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        self._loop.close()
