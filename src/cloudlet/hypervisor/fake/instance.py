"""One fake machine that runs: the same view of folder, record and process as the QEMU driver's."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cloudlet.errors import FailedError
from cloudlet.hypervisor.connections import cut_connections
from cloudlet.hypervisor.driver import BaseCapture, Capture, Listener, RunState
from cloudlet.hypervisor.fake.devices import read_state
from cloudlet.hypervisor.fake.rounds import FakeRounds, Files, differing, digest_files
from cloudlet.hypervisor.qemu.agent import QemuGuestAgent
from cloudlet.hypervisor.qemu.sockets import connect
from cloudlet.hypervisor.records import ProcessId, Record, Workspace, cpu_seconds_of
from cloudlet.model import PAGE_BYTES, Endpoint
from cloudlet.overlay.pages import PageSource, Space
from cloudlet.sparse import copy_data

RAM, DISK = "ram", "disk.raw"
_ANSWER_SECONDS = 20.0


class FakeInstance:
    """A machine of this driver. ``workspace`` is None where another process owns it."""

    def __init__(
        self,
        directory: Path,
        record: Record,
        workspace: Workspace | None = None,
        process: subprocess.Popen[bytes] | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self.directory = directory
        self.record = record
        self._workspace = workspace
        self._process = process
        self._listeners = list(listeners)

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return self.record.endpoints

    @property
    def listeners(self) -> tuple[Listener, ...]:
        return tuple(self._listeners)

    @property
    def layer(self) -> None:
        """Fake machines have none."""

    @property
    def console_log(self) -> Path:
        return self.directory / "console.log"

    @property
    def agent(self) -> QemuGuestAgent:
        return QemuGuestAgent(self.directory / "agent.sock")

    def state(self) -> RunState:
        if not self.record.machine or not self.record.machine.alive():
            return RunState.GONE
        return RunState(self.tell("status"))

    def pause(self) -> None:
        self.tell("pause")

    def resume(self) -> None:
        self.tell("run")

    def begin_resume(self) -> Callable[[], None]:
        """It says so at once."""
        self.resume()
        return lambda: None

    def prepare_pause(self) -> None:
        """It is always ready."""

    def open_console(self) -> socket.socket:
        return connect(self.directory / "console.sock", timeout=10.0)

    def accepts(self, endpoint: Endpoint, timeout: float) -> bool:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((endpoint.host, endpoint.host_port), timeout),
        ):
            return True
        return False

    def take_listeners(self) -> list[Listener]:
        """Hand the listening sockets over: they are the caller's and survive :meth:`stop`."""
        taken, self._listeners = self._listeners, []
        return taken

    def hold_connections(self, hold: bool) -> None:
        """Have the machine leave its ports alone, or serve them again."""
        self.tell("hold", hold=hold)

    def cut_connections(self) -> None:
        if self.record.machine:
            cut_connections(self.record.machine.pid, {port.host_port for port in self.endpoints})

    def generation_id(self) -> str:
        return str(self.tell("generation"))

    def announce(self) -> None:
        """Its card is on no network with switches: there is nobody to tell."""

    def cpu_seconds(self) -> float:
        return cpu_seconds_of(self._machine_process().pid)

    def insert_optical(self, image: Path) -> None:
        self.tell("insert", image=str(image.absolute()))

    def eject_optical(self) -> None:
        self.tell("eject")

    def shut_down(self, timeout: float) -> bool:
        self.tell("power")
        return self.wait(timeout)

    def capture_base(self, ram: Path) -> BaseCapture:
        began = time.perf_counter()
        self.pause()
        state = self._device_state()
        pause_seconds = time.perf_counter() - began
        with ram.open("wb") as target, (self.directory / RAM).open("rb") as source:
            target.truncate(os.fstat(source.fileno()).st_size)
            copy_data(source.fileno(), target.fileno())
        return BaseCapture(ram, state, read_state(state)[0], pause_seconds)

    def capture(self) -> Capture:
        files = self._files()
        began = time.perf_counter()
        self.pause()
        state = self._device_state()
        saved = time.perf_counter()
        ram, disk = (
            self._spooled(*files[space], self.directory / name)
            for space, name in ((Space.RAM, "ram.pages"), (Space.DISK, "disk.blocks"))
        )
        ended = time.perf_counter()
        return Capture(
            ram=ram,
            disk=disk,
            device_state=state,
            sections=read_state(state)[0],
            pause_seconds=ended - began,
            seconds={"device state": saved - began, "memory and disk": ended - saved},
        )

    def rounds(self, *, with_layer: bool) -> FakeRounds:
        self._machine_process()
        return FakeRounds(self._files(), self._stand_still)

    def digest(self) -> bytes:
        self._machine_process()
        return digest_files(self._files())

    def wait(self, timeout: float | None = None) -> bool:
        return self.record.machine is None or self.record.machine.wait(timeout)

    def stop(self) -> None:
        if self.record.machine:
            self.record.machine.kill()
        if self._process:
            self._process.wait(10.0)
        for _, listener in self.take_listeners():
            listener.close()
        if self._workspace:
            self._workspace.remove()

    def tell(self, command: str, **arguments: Any) -> Any:
        """Run a command of the machine's monitor.

        :raises FailedError: it refuses, does not answer, or is gone.
        """
        request = json.dumps({"do": command, **arguments}).encode() + b"\n"
        try:
            with connect(self.directory / "monitor.sock", _ANSWER_SECONDS) as monitor:
                monitor.sendall(request)
                with monitor.makefile("rb") as answers:
                    line = answers.readline()
        except OSError as error:
            raise FailedError(f"the fake machine is gone ({command}: {error})") from error
        if not line:
            raise FailedError(f"the fake machine ended: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise FailedError(f"the fake machine refuses {command}: {answer['error']}")
        return answer["return"]

    def _machine_process(self) -> ProcessId:
        if not self.record.machine or not self.record.machine.alive():
            raise FailedError(f"instance {self.id} is gone: {self._last_words()}")
        return self.record.machine

    def _last_words(self) -> str:
        try:
            lines = (self.directory / "machine.log").read_text(errors="replace").strip().splitlines()
        except FileNotFoundError:
            return "it left nothing"
        return lines[-1] if lines else "it said nothing"

    def _stand_still(self) -> bytes:
        """Pause the machine; its device state."""
        self.pause()
        return self._device_state()

    def _device_state(self) -> bytes:
        return json.dumps(self.tell("save"), separators=(",", ":")).encode()

    def _files(self) -> Files:
        """The files of RAM and disk, each with its base's."""
        bases = self.record.detail.get("base_files")
        if not bases:
            raise FailedError(f"instance {self.id} was booted: capture it as a base")
        ram, disk = map(Path, bases)
        return {Space.RAM: (self.directory / RAM, ram), Space.DISK: (self.directory / DISK, disk)}

    def _spooled(self, mine: Path, base: Path, spool: Path) -> PageSource:
        """The pages of a file that differ from the base's, copied to another."""
        numbers: list[int] = []
        with mine.open("rb") as one, base.open("rb") as other, spool.open("wb") as out:
            for some, rows in differing(one.fileno(), other.fileno()):
                out.write(rows.tobytes())
                numbers += some.tolist()
        if not numbers:
            return PageSource.empty()
        return PageSource(
            np.array(numbers, np.uint32), np.memmap(spool, np.uint8, "r").reshape(-1, PAGE_BYTES)
        )
