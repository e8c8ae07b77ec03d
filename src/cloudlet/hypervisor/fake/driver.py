"""The fake driver: from a base or a disk to a process with RAM, disk, sockets, ports and a record.

An instance comes to be in the order of the QEMU driver's: folder, ports, record, process. So a kill at
any moment leaves what a later command finds and removes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from cloudlet.errors import MismatchError, NotFoundError, RefusedError
from cloudlet.hypervisor.driver import (
    Arriving,
    BaseImage,
    Boot,
    Instance,
    Layer,
    LayerSink,
    ReceivingEarly,
    Wanted,
)
from cloudlet.hypervisor.fake.incoming import FakeIncoming, FakeReceiving, full_disk_is_capacity
from cloudlet.hypervisor.fake.instance import DISK, RAM, FakeInstance
from cloudlet.hypervisor.generation import read_generation_id
from cloudlet.hypervisor.qemu.network import BoundPort, bind_ports, duplicates
from cloudlet.hypervisor.qemu.sockets import listen
from cloudlet.hypervisor.records import ProcessId, Record, Workspace, reap, records
from cloudlet.model import Accelerator, Firmware, Machine, PublishedPort
from cloudlet.overlay.known import HeldPages
from cloudlet.overlay.pages import Space
from cloudlet.settings import Settings
from cloudlet.sparse import copy_data

MACHINE_TYPE = "fake-1"
CPU_MODEL = "fake"
_PROGRAM = Path(__file__).with_name("__main__.py")


class FakeHypervisor:
    """See :class:`cloudlet.hypervisor.driver.Hypervisor`."""

    name = "fake"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def accelerator(self) -> Accelerator:
        return Accelerator.TCG

    def machine(
        self,
        *,
        memory_bytes: int,
        disk_bytes: int,
        cpus: int = 1,
        firmware: Firmware = Firmware.BIOS,
    ) -> Machine:
        return Machine(
            machine_type=MACHINE_TYPE,
            accelerator=self.accelerator(),
            cpu_model=CPU_MODEL,
            cpus=cpus,
            memory_bytes=memory_bytes,
            disk_bytes=disk_bytes,
            firmware=firmware,
        )

    def check(self, machine: Machine) -> None:
        here = self.machine(
            memory_bytes=machine.memory_bytes,
            disk_bytes=machine.disk_bytes,
            cpus=machine.cpus,
            firmware=machine.firmware,
        )
        if differences := machine.differences(here):
            raise MismatchError(
                f"the capture was made on another machine ({'; '.join(differences)})",
                hint="fake machines run captures of fake machines only",
            )

    def boot(self, boot: Boot, ports: Sequence[PublishedPort] = (), *, name: str = "") -> FakeInstance:
        with ExitStack() as on_error:
            workspace, bound = self._begin(ports, on_error)
            with full_disk_is_capacity("memory"), (workspace.path / RAM).open("wb") as ram:
                ram.truncate(boot.machine.memory_bytes)
            if not boot.disk.exists():
                raise NotFoundError(f"{boot.disk} is missing", hint="import or build the base again")
            record = Record(id=workspace.id, name=name, created=time.time())
            config = {
                "disk": str(boot.disk.absolute()),
                "incoming": False,
                "optical": str(boot.optical.absolute()) if boot.optical else "",
                "generation": "",
            }
            instance = self._start(workspace, bound, record, boot.machine, config)
            on_error.pop_all()
            return instance

    def resume(
        self,
        base: BaseImage,
        ports: Sequence[PublishedPort] = (),
        *,
        name: str = "",
        overlay_id: str = "",
        layer: Layer | None = None,
    ) -> FakeIncoming:
        if layer:
            raise RefusedError(self.early_obstacle())
        return FakeIncoming(self._waiting(base, ports, name, overlay_id), base)

    def receive(
        self,
        base: BaseImage,
        ports: Sequence[PublishedPort] = (),
        *,
        name: str = "",
        overlay_id: str = "",
        layer: Layer | None = None,
        generation_id: str = "",
    ) -> FakeReceiving:
        if layer:
            raise RefusedError(self.early_obstacle())
        kept = read_generation_id(generation_id)
        instance = self._waiting(base, ports, name, overlay_id, generation=kept.hex if kept else "")
        return FakeReceiving(instance, base)

    def layer_pages(
        self, layer: Layer, machine: Machine
    ) -> AbstractContextManager[Mapping[Space, HeldPages]]:
        raise RefusedError(self.early_obstacle())

    def layer_sink(self, base: BaseImage, layer: Layer) -> LayerSink:
        raise RefusedError(self.early_obstacle())

    def early_obstacle(self) -> str:
        return "fake machines start when all of their overlay is here"

    def resume_early(
        self,
        base: BaseImage,
        layer: Layer,
        wanted: Wanted,
        ports: Sequence[PublishedPort] = (),
        *,
        name: str = "",
        record_touched: bool = False,
    ) -> Arriving:
        raise RefusedError(self.early_obstacle())

    def receive_early(
        self,
        base: BaseImage,
        wanted: Wanted,
        ports: Sequence[PublishedPort] = (),
        *,
        name: str = "",
        overlay_id: str = "",
        layer: Layer | None = None,
        generation_id: str = "",
    ) -> ReceivingEarly:
        raise RefusedError(self.early_obstacle())

    def instances(self) -> list[Instance]:
        return [
            FakeInstance(path, record)
            for path, record in records(self._settings.instances_dir)
            if record.machine and record.machine.alive()
        ]

    def reap(self) -> list[str]:
        return reap(self._settings.instances_dir)

    def _begin(
        self, ports: Sequence[PublishedPort], on_error: ExitStack
    ) -> tuple[Workspace, list[BoundPort]]:
        bound = bind_ports(ports)
        for port in bound:
            on_error.callback(port.close)
        workspace = Workspace.create(self._settings.instances_dir)
        on_error.callback(workspace.remove)
        return workspace, bound

    def _waiting(
        self,
        base: BaseImage,
        ports: Sequence[PublishedPort],
        name: str,
        overlay_id: str,
        *,
        generation: str = "",
    ) -> FakeInstance:
        """A started machine that waits for what differs from its base."""
        self.check(base.machine)
        with ExitStack() as on_error:
            workspace, bound = self._begin(ports, on_error)
            _private_copy(base.ram, workspace.path / RAM)
            _private_copy(base.disk, workspace.path / DISK)
            record = Record(
                id=workspace.id,
                name=name,
                created=time.time(),
                base_id=base.base_id,
                overlay_id=overlay_id,
                detail={"base_files": [str(base.ram.absolute()), str(base.disk.absolute())]},
            )
            disk = str(workspace.path / DISK)
            config = {"disk": disk, "incoming": True, "optical": "", "generation": generation}
            instance = self._start(workspace, bound, record, base.machine, config)
            on_error.pop_all()
            return instance

    def _start(
        self,
        workspace: Workspace,
        bound: list[BoundPort],
        record: Record,
        machine: Machine,
        config: dict[str, Any],
    ) -> FakeInstance:
        record = replace(
            record,
            endpoints=tuple(port.endpoint for port in bound),
            detail={**record.detail, "machine": machine.to_json()},
        )
        workspace.write(record)
        path = workspace.path
        with ExitStack() as always, ExitStack() as on_error:
            for port in bound:
                always.callback(port.close)
            listeners = duplicates(bound, on_error)
            channels = {
                name: always.enter_context(listen(path / f"{name}.sock")).fileno()
                for name in ("monitor", "agent", "console")
            }
            served = [port.listener.fileno() for port in bound]
            (path / "console.log").touch()
            everything = {
                **config,
                **channels,
                "listeners": served,
                "ram": str(path / RAM),
                "console_log": str(path / "console.log"),
            }
            log = always.enter_context((path / "machine.log").open("ab"))
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_PROGRAM), json.dumps(everything)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[*channels.values(), *served],
                env=workspace.environment(),
                cwd="/",
                start_new_session=True,
            )
            record = replace(record, machine=ProcessId.of(process.pid))
            workspace.write(record)
            on_error.pop_all()
        return FakeInstance(path, record, workspace, process, listeners)


def _private_copy(source: Path, target: Path) -> None:
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFoundError(f"{source} is missing", hint="import or build the base again") from error
    try:
        with full_disk_is_capacity(target.name), target.open("wb") as copy:
            copy.truncate(os.fstat(descriptor).st_size)
            copy_data(descriptor, copy.fileno())
    finally:
        os.close(descriptor)
