"""The QEMU driver: from a base or a disk to a confined machine with memory, disk, network and a record.

The order in which an instance comes to be matters, so that a kill at any moment leaves only what a
later command finds: first its folder and record, then its ports, then its processes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cloudlet.errors import CapacityError, MismatchError, NotFoundError
from cloudlet.hypervisor.driver import BaseImage, Boot, Instance, Layer, Wanted
from cloudlet.hypervisor.generation import read_generation_id
from cloudlet.hypervisor.qemu import accelerator, launch, page_server, ramblocks
from cloudlet.hypervisor.qemu.early import QemuArriving, told_in_pages
from cloudlet.hypervisor.qemu.hugepages import without_hugepages
from cloudlet.hypervisor.qemu.incoming import (
    QemuIncoming,
    Starting,
    Stream,
    full_disk_is_capacity,
    no_room_for_a_layer,
    wait_network,
)
from cloudlet.hypervisor.qemu.instance import DISK, UEFI_VARS, QemuInstance
from cloudlet.hypervisor.qemu.layer import LayerWriter, OpenLayer, layer_pages
from cloudlet.hypervisor.qemu.layer_sink import LayerFiles
from cloudlet.hypervisor.qemu.machine import (
    LAYOUT,
    MACHINE_TYPE,
    UEFI_CODE,
    Backends,
    command_line,
)
from cloudlet.hypervisor.qemu.memory import ComingRam, coming_ram, writable_ram
from cloudlet.hypervisor.qemu.network import (
    BoundPort,
    NetworkProcess,
    bind_ports,
    duplicates,
    start_network,
)
from cloudlet.hypervisor.qemu.page_server import PageServer, ServedFile
from cloudlet.hypervisor.qemu.qcow2 import GrowingQcow2, Qcow2Writer
from cloudlet.hypervisor.qemu.receiving import QemuReceiving
from cloudlet.hypervisor.qemu.receiving_early import RAM, OwnRam, QemuReceivingEarly
from cloudlet.hypervisor.qemu.sockets import listen
from cloudlet.hypervisor.records import (
    ProcessId,
    Record,
    Workspace,
    folder_lock,
    reap,
    records,
    users_of_processes,
)
from cloudlet.model import Accelerator, Firmware, Machine, PublishedPort
from cloudlet.overlay.known import HeldPages
from cloudlet.overlay.pages import Space
from cloudlet.settings import Settings


@dataclass(frozen=True, slots=True)
class _Plan:
    """What differs between a machine that boots and one that is resumed."""

    machine: Machine
    disk: Path
    disk_format: str
    backing: Path | None
    ram: int
    ram_shared: bool
    kernel: Path | None
    initrd: Path | None
    cmdline: str
    uefi_vars: Path | None
    optical: Path | None = None
    incoming: int | None = None
    base_uefi_vars: Path | None = None
    layer: OpenLayer | None = None
    layer_disk: int | None = None
    early: bool = False
    """Whether its RAM is a page server's file, of which the kernel must not read more than is touched."""
    run: bool = False
    """Whether it runs by itself when it can."""
    generation_id: str = ""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A started machine, its open stream, and what it still waits for."""

    instance: QemuInstance
    stream: Stream
    starting: Starting


class QemuHypervisor:
    """See :class:`cloudlet.hypervisor.driver.Hypervisor`."""

    name = "qemu"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def choice(self) -> accelerator.Choice:
        """The accelerator and CPU model for new bases, and why these."""
        binary, version = launch.find_qemu(self._settings.qemu_binary)
        memory = self._settings.state_dir / "accelerator.json"
        nobody_elses = self._settings.instance_uid_first + self._settings.instance_uid_count
        confine = launch.confinement(
            nobody_elses if launch.runs_as_root() else None,
            kvm=Path("/dev/kvm").exists(),
            dies_with_parent=True,
        )
        return accelerator.choose(self._settings.accelerator, binary, version, memory, self._kernels, confine)

    def accelerator(self) -> Accelerator:
        return self.choice().accelerator

    def machine(
        self,
        *,
        memory_bytes: int,
        disk_bytes: int,
        cpus: int = 1,
        firmware: Firmware = Firmware.BIOS,
    ) -> Machine:
        choice = self.choice()
        return Machine(
            machine_type=MACHINE_TYPE,
            accelerator=choice.accelerator,
            cpu_model=choice.cpu_model,
            cpus=cpus,
            memory_bytes=memory_bytes,
            disk_bytes=disk_bytes,
            firmware=firmware,
            layout=LAYOUT,
        )

    def check(self, machine: Machine) -> None:
        here = self.choice()
        if machine.accelerator is not here.accelerator:
            raise MismatchError(
                f"the capture was made under {machine.accelerator}, "
                f"this site runs {here.accelerator} ({here.reason})",
                hint="capture it again at a site like this one, or set the accelerator",
            )
        if machine.cpu_model != here.cpu_model:
            raise MismatchError(
                f"the capture was made with CPU model {machine.cpu_model}, this site gives {here.cpu_model}",
                hint="capture it again at a site like this one",
            )
        if machine.layout != LAYOUT:
            raise MismatchError(f"the capture has device layout {machine.layout}, this program has {LAYOUT}")

    def boot(self, boot: Boot, ports: Sequence[PublishedPort] = (), *, name: str = "") -> QemuInstance:
        with ExitStack() as on_error:
            workspace, bound = self._begin(ports, on_error)
            ram = writable_ram(boot.machine.memory_bytes, workspace.id)
            until_started = on_error.enter_context(ExitStack())
            until_started.callback(os.close, ram)
            plan = _Plan(
                machine=boot.machine, disk=boot.disk, disk_format="raw", backing=None, ram=ram,
                ram_shared=True, kernel=boot.kernel, initrd=boot.initrd, cmdline=boot.cmdline,
                uefi_vars=boot.uefi_vars, optical=boot.optical,
            )  # fmt: skip
            record = Record(id=workspace.id, name=name, created=time.time())
            instance, network = self._start(plan, workspace, bound, record)
            until_started.pop_all()  # the RAM is the instance's now
            on_error.callback(instance.stop)
            on_error.callback(network.release)
            wait_network(instance, network)
            network.release()
            instance.fresh_blocks = ramblocks.digests(instance.monitor)
            instance.resume()
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
    ) -> QemuIncoming:
        self.check(base.machine)
        with ExitStack() as on_error:
            workspace, bound = self._begin(ports, on_error)
            disk = Qcow2Writer(workspace.path / DISK, base.machine.disk_bytes)
            on_error.callback(disk.close)
            record = _record(workspace, base, name, overlay_id)
            waiting = self._waiting(base, workspace, bound, record, layer, on_error)
            on_error.pop_all()
            return QemuIncoming(waiting.instance, waiting.stream, disk, waiting.starting)

    def receive(
        self,
        base: BaseImage,
        ports: Sequence[PublishedPort] = (),
        *,
        name: str = "",
        overlay_id: str = "",
        layer: Layer | None = None,
        generation_id: str = "",
    ) -> QemuReceiving:
        self.check(base.machine)
        kept = read_generation_id(generation_id)
        with ExitStack() as on_error:
            workspace, bound = self._begin(ports, on_error)
            disk = GrowingQcow2(workspace.path / DISK, base.machine.disk_bytes)
            on_error.callback(disk.close)
            record = _record(workspace, base, name, overlay_id)
            waiting = self._waiting(
                base, workspace, bound, record, layer, on_error, run=False, generation_id=str(kept or "")
            )
            on_error.pop_all()
            return QemuReceiving(waiting.instance, waiting.stream, disk, waiting.starting)

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
    ) -> QemuReceivingEarly:
        self.check(base.machine)
        kept = read_generation_id(generation_id)
        with ExitStack() as on_error, ExitStack() as always:
            workspace, bound = self._begin(ports, on_error)
            own = OwnRam(workspace.path / RAM, base.machine, layer)
            on_error.callback(own.close)
            server = self._server_of_own(base, workspace, own, wanted)
            on_error.callback(server.stop)
            disk = GrowingQcow2(workspace.path / DISK, base.machine.disk_bytes)
            on_error.callback(disk.close)
            ram = os.dup(server.descriptors[0])
            until_started = on_error.enter_context(ExitStack())
            until_started.callback(os.close, ram)
            plan, ours = self._resumed(base, workspace, ram, on_error, always)
            plan = replace(plan, early=True, run=False, generation_id=str(kept or ""))
            if layer:
                held = OpenLayer(layer)
                on_error.callback(held.close)
                plan = replace(plan, layer=held, layer_disk=held.disk)
            record = _record(workspace, base, name, overlay_id, server.process)
            instance, network = self._start(plan, workspace, bound, record)
            until_started.pop_all()
            on_error.callback(instance.stop)
            on_error.callback(network.release)
            on_error.callback(server.stop)
            target = Stream(instance, base, ours, self._firmware(base.machine))
            on_error.pop_all()
            starting = Starting(instance, network)
            return QemuReceivingEarly(instance, target, own, disk, server, starting)

    def layer_pages(
        self, layer: Layer, machine: Machine
    ) -> AbstractContextManager[Mapping[Space, HeldPages]]:
        return layer_pages(layer, machine)

    def layer_sink(self, base: BaseImage, layer: Layer) -> LayerFiles:
        with no_room_for_a_layer():
            return LayerFiles(LayerWriter(layer, base.machine))

    def early_obstacle(self) -> str:
        return page_server.obstacle()

    def resume_early(
        self,
        base: BaseImage,
        layer: Layer,
        wanted: Wanted,
        ports: Sequence[PublishedPort] = (),
        *,
        name: str = "",
        record_touched: bool = False,
    ) -> QemuArriving:
        self.check(base.machine)
        with ExitStack() as on_error, ExitStack() as always:
            workspace, bound = self._begin(ports, on_error)
            with no_room_for_a_layer():
                writer = LayerWriter(layer, base.machine)
            on_error.callback(writer.close)
            touched = workspace.path / "touched" if record_touched else None
            server = self._page_server(base, workspace, writer, told_in_pages(wanted, writer), touched)
            on_error.callback(server.stop)
            self._empty_disk(workspace, base)
            held = OpenLayer(layer)
            on_error.callback(held.close)
            mounted, layer_disk = server.descriptors
            until_started = on_error.enter_context(ExitStack())
            ram = os.dup(mounted)
            until_started.callback(os.close, ram)
            plan, ours = self._resumed(base, workspace, ram, on_error, always)
            plan = replace(plan, layer=held, layer_disk=layer_disk, early=True, run=True)
            record = _record(workspace, base, name, layer.overlay_id, server.process)
            instance, network = self._start(plan, workspace, bound, record)
            until_started.pop_all()
            on_error.callback(instance.stop)
            on_error.callback(network.release)
            on_error.callback(server.stop)
            target = Stream(instance, base, ours, self._firmware(base.machine))
            on_error.pop_all()
            starting = Starting(instance, network)
            return QemuArriving(instance, target, writer, server, starting, touched)

    def instances(self) -> list[Instance]:
        """Adopted from their records; what needs the machine's size, such as a capture, needs its owner."""
        return [
            QemuInstance(path, record, Machine.from_json(dict(record.detail["machine"])))
            for path, record in records(self._settings.instances_dir)
            if record.machine and record.machine.alive()
        ]

    def reap(self) -> list[str]:
        return reap(self._settings.instances_dir)

    def _begin(
        self, ports: Sequence[PublishedPort], on_error: ExitStack
    ) -> tuple[Workspace, list[BoundPort]]:
        launch.find_qemu(self._settings.qemu_binary)
        bound = bind_ports(ports)
        for port in bound:
            on_error.callback(port.close)
        workspace = Workspace.create(self._settings.instances_dir)
        on_error.callback(workspace.remove)
        return workspace, bound

    def _ram(self, base: BaseImage, until_started: ExitStack, layer: Layer | None = None) -> ComingRam:
        """The RAM that instances of a base, or of a base and a layer, share."""
        siblings = [
            (record.owner, record.ram_descriptor)
            for _, record in records(self._settings.instances_dir)
            if record.base_id == base.base_id and record.owner and record.ram_descriptor
        ]
        ram = coming_ram(base.base_id, base.ram, siblings, layer)
        until_started.callback(ram.close)
        return ram

    def _waiting(
        self,
        base: BaseImage,
        workspace: Workspace,
        bound: list[BoundPort],
        record: Record,
        layer: Layer | None,
        on_error: ExitStack,
        *,
        run: bool = True,
        generation_id: str = "",
    ) -> _Waiting:
        """A started machine that waits for what differs from its base and layer."""
        with ExitStack() as always:
            until_started = on_error.enter_context(ExitStack())
            ram = self._ram(base, until_started, layer)
            plan, ours = self._resumed(base, workspace, ram.descriptor, on_error, always)
            plan = replace(plan, run=run, generation_id=generation_id)
            if layer:
                held = OpenLayer(layer)
                on_error.callback(held.close)
                plan = replace(plan, layer=held, layer_disk=held.disk)
            instance, network = self._start(plan, workspace, bound, record)
            until_started.pop_all()  # the RAM is the instance's now
            on_error.callback(instance.stop)
            on_error.callback(network.release)
            on_error.callback(ram.join)
            target = Stream(instance, base, ours, self._firmware(base.machine))
            return _Waiting(instance, target, Starting(instance, network, ram))

    def _resumed(
        self, base: BaseImage, workspace: Workspace, ram: int, on_error: ExitStack, always: ExitStack
    ) -> tuple[_Plan, int]:
        """The plan of a machine that waits for a stream, and our end of its pipe."""
        uefi_vars = None
        if base.uefi_vars:
            uefi_vars = workspace.path / UEFI_VARS
            shutil.copyfile(base.uefi_vars, uefi_vars)
        theirs, ours = os.pipe()
        always.callback(os.close, theirs)
        on_error.callback(os.close, ours)
        plan = _Plan(
            machine=base.machine, disk=workspace.path / DISK, disk_format="qcow2",
            backing=base.disk, ram=ram, ram_shared=False, kernel=base.kernel,
            initrd=base.initrd, cmdline=base.cmdline, uefi_vars=uefi_vars, incoming=theirs,
            base_uefi_vars=base.uefi_vars,
        )  # fmt: skip
        return plan, ours

    def _empty_disk(self, workspace: Workspace, base: BaseImage) -> None:
        """The machine's own disk, on which nothing has been written."""
        with full_disk_is_capacity():
            disk = Qcow2Writer(workspace.path / DISK, base.machine.disk_bytes)
            try:
                disk.announce(np.empty(0, np.uint32))
            finally:
                disk.close()

    def _page_server(
        self,
        base: BaseImage,
        workspace: Workspace,
        writer: LayerWriter,
        wanted: page_server.Wanted,
        touched: Path | None,
    ) -> PageServer:
        with ExitStack() as always:
            ram = _open(always, base.ram, os.O_RDONLY)
            log = _open(always, workspace.path / "pages.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            recorded = None
            if touched:
                recorded = _open(always, touched, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            of_ram, of_disk = writer.states()
            files = (
                ServedFile(base.machine.memory_bytes, writer.ram, ram, of_ram),
                ServedFile(writer.disk_bytes, writer.disk, None, of_disk),
            )
            return PageServer.start(
                workspace, files, wanted,
                log_fd=log, uid=self._page_server_uid() if launch.runs_as_root() else None,
                # Neighbours that are read along are not touched.
                push_pages=0 if touched else page_server.PUSH_PAGES, touched=recorded,
            )  # fmt: skip

    def _server_of_own(
        self, base: BaseImage, workspace: Workspace, own: OwnRam, wanted: Wanted
    ) -> PageServer:
        """The server of a machine whose pages come from another site."""

        def tell(_: int, place: int, count: int) -> None:
            # The server has read what a guest and its QEMU wrote: what cannot be is not believed.
            after = min(place + count, base.machine.ram_pages)
            if place < after:
                wanted(Space.RAM, np.arange(place, after, dtype=np.uint32))

        with ExitStack() as always:
            ram = _open(always, base.ram, os.O_RDONLY)
            log = _open(always, workspace.path / "pages.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            file = ServedFile(base.machine.memory_bytes, own.descriptor, ram, own.states())
            return PageServer.start(
                workspace, [file], tell,
                log_fd=log, uid=self._page_server_uid() if launch.runs_as_root() else None, changes=True,
            )  # fmt: skip

    def _page_server_uid(self) -> int:
        # No machine's, so that none can do anything to it; they need not be kept from each other.
        return self._settings.instance_uid_first + self._settings.instance_uid_count + 1

    def _start(
        self, plan: _Plan, workspace: Workspace, bound: list[BoundPort], record: Record
    ) -> tuple[QemuInstance, NetworkProcess]:
        """Start a machine and its network; neither is waited for."""
        with folder_lock(self._settings.instances_dir):
            record = replace(
                record,
                uid=self._free_uid() if launch.runs_as_root() else None,
                endpoints=tuple(port.endpoint for port in bound),
                owner=ProcessId.of(os.getpid()),
                ram_descriptor=plan.ram,
                detail={
                    "machine": plan.machine.to_json(),
                    "backing": str(plan.backing) if plan.backing else "",
                    "uefi_vars": str(plan.base_uefi_vars) if plan.base_uefi_vars else "",
                    "layer": plan.layer is not None,
                },
            )
            workspace.write(record)
        with ExitStack() as always, ExitStack() as on_error:
            listeners = duplicates(bound, on_error)
            log = _open(always, workspace.path / "network.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            environment = workspace.environment()
            own = {} if record.uid is None else {"uid": record.uid, "gid": record.uid}
            # What is made into something, a base or an overlay, is nobody's to reach.
            bridge = self._settings.bridge if record.overlay_id else ""
            network = start_network(
                bound, str(workspace.path), log, environment=environment, bridge=bridge, **own
            )
            on_error.callback(network.release)
            always.callback(network.close_qemu_fd)
            record = replace(record, network=ProcessId(network.pid, network.start_time))
            backends = self._backends(plan, workspace, always, network_end=network.qemu_fd)
            binary, _ = launch.find_qemu(self._settings.qemu_binary)
            argv = command_line(
                binary, plan.machine, backends, workspace.id, run=plan.run, generation_id=plan.generation_id
            )
            confine = launch.confinement(record.uid, kvm=plan.machine.accelerator is Accelerator.KVM)

            def start() -> subprocess.Popen[bytes]:
                return launch.start(argv, workspace, backends.descriptors(), confine)

            process = without_hugepages(start) if plan.early else start()
            record = replace(record, machine=ProcessId.of(process.pid))
            workspace.write(record)
            on_error.pop_all()
        instance = QemuInstance(
            workspace.path, record, plan.machine, workspace, process, plan.ram, plan.layer, listeners
        )
        return instance, network

    def _backends(
        self, plan: _Plan, workspace: Workspace, always: ExitStack, *, network_end: int
    ) -> Backends:
        def read(path: Path | None) -> int | None:
            return None if path is None else _open(always, path, os.O_RDONLY)

        def channel(name: str) -> int:
            return always.enter_context(listen(workspace.path / f"{name}.sock")).fileno()

        uefi = plan.machine.firmware is Firmware.UEFI
        return Backends(
            ram=plan.ram,
            ram_shared=plan.ram_shared,
            disk=_open(always, plan.disk, os.O_RDWR),
            disk_format=plan.disk_format,
            backing=read(plan.backing),
            network=network_end,
            monitor=channel("monitor"),
            agent=channel("agent"),
            console=channel("console"),
            console_log=_open(always, workspace.path / "console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            kernel=read(plan.kernel),
            initrd=read(plan.initrd),
            cmdline=plan.cmdline,
            uefi_code=read(uefi_code()) if uefi else None,
            uefi_vars=_open(always, plan.uefi_vars, os.O_RDWR) if uefi and plan.uefi_vars else None,
            optical=read(plan.optical),
            incoming=plan.incoming,
            layer=plan.layer_disk,
        )

    def _firmware(self, machine: Machine) -> bytes:
        """What has to be in the BIOS's memory; the UEFI firmware is a flash chip, which QEMU reads anyway."""
        if machine.firmware is Firmware.UEFI:
            return b""
        binary, _ = launch.find_qemu(self._settings.qemu_binary)
        return launch.find_bios(binary).read_bytes()

    def _free_uid(self) -> int:
        # Of this state folder, and of whatever else runs here: two machines must never share a user.
        used = {record.uid for _, record in records(self._settings.instances_dir)} | users_of_processes()
        first = self._settings.instance_uid_first
        for uid in range(first, first + self._settings.instance_uid_count):
            if uid not in used:
                return uid
        raise CapacityError("no user id is free for another machine", hint="raise instance_uid_count")

    def _kernels(self) -> list[Path]:
        ours = sorted(self._settings.bases_dir.glob("*/kernel"))
        return sorted(Path("/boot").glob("vmlinuz-*")) + ours


def _record(
    workspace: Workspace, base: BaseImage, name: str, overlay_id: str, pages: ProcessId | None = None
) -> Record:
    return Record(
        id=workspace.id,
        name=name,
        created=time.time(),
        base_id=base.base_id,
        overlay_id=overlay_id,
        pages=pages,
    )


def uefi_code() -> Path:
    """The UEFI firmware of the distribution.

    :raises NotFoundError: it is not installed.
    """
    for name in UEFI_CODE:
        if Path(name).exists():
            return Path(name)
    raise NotFoundError("the UEFI firmware is not installed", hint="apt-get install ovmf")


def _open(always: ExitStack, path: Path, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is missing", hint="import or build the base again") from error
    always.callback(os.close, descriptor)
    return descriptor
