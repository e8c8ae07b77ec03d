"""A plain QEMU: the machine of our captures, used as one would without them.

It is what the figures are compared with: it boots, it restores a full stream, it loads a snapshot. Same
command line, confinement and network process as ours; its memory is anonymous, as QEMU's usually is, and
its disk is whatever the comparison needs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cloudlet.errors import FailedError
from cloudlet.hypervisor.qemu import launch
from cloudlet.hypervisor.qemu.instance import QemuInstance
from cloudlet.hypervisor.qemu.machine import RAM_BLOCK, Backends, command_line
from cloudlet.hypervisor.qemu.network import NOBODY, bind_ports, start_network
from cloudlet.hypervisor.qemu.sockets import listen
from cloudlet.hypervisor.records import ProcessId, Record, Workspace
from cloudlet.model import Machine, PublishedPort
from cloudlet.settings import Settings

_NETWORK_SECONDS = 20.0
_STREAM_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Plain:
    """What a plain QEMU starts from."""

    machine: Machine
    disk: Path
    """It is written to."""
    kernel: Path | None
    initrd: Path | None
    cmdline: str
    disk_format: str = "qcow2"
    backing: Path | None = None
    """What the disk, a qcow2 file, stands on: a raw image."""
    generation_id: str = ""
    """What the guest is told of which machine it is; where it is empty, a new one."""


@contextmanager
def run(
    settings: Settings,
    plain: Plain,
    port: int | Sequence[PublishedPort] | None,
    *,
    incoming: int | None = None,
    extra: Sequence[str] = (),
) -> Iterator[QemuInstance]:
    """A plain QEMU, started and not waited for; it ends when the context is left.

    :param port: the guest's port that is published, or several, and where.
    :param incoming: descriptor of a migration stream to restore.
    :param extra: more of QEMU's arguments.
    """
    with ExitStack() as stack:
        workspace = stack.enter_context(Workspace.create(settings.instances_dir))
        uid = settings.instance_uid_first + settings.instance_uid_count - 1 if launch.runs_as_root() else None
        with ExitStack() as handed:

            def open_file(path: Path | None, flags: int = os.O_RDONLY) -> int | None:
                if path is None:
                    return None
                descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
                handed.callback(os.close, descriptor)
                return descriptor

            def channel(name: str) -> int:
                return handed.enter_context(listen(workspace.path / f"{name}.sock")).fileno()

            bound = bind_ports(_ports(port))
            endpoints = tuple(item.endpoint for item in bound)
            log = open_file(workspace.path / "network.log", os.O_WRONLY | os.O_CREAT)
            assert log is not None
            own = NOBODY if uid is None else uid
            network = start_network(
                bound, str(workspace.path), log, environment=workspace.environment(), uid=own, gid=own
            )
            handed.callback(network.release)
            disk = open_file(plain.disk, os.O_RDWR)
            console_log = open_file(workspace.path / "console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            unused = open_file(Path(os.devnull))
            assert disk is not None and console_log is not None and unused is not None
            backends = Backends(
                ram=unused, ram_shared=False, disk=disk, disk_format=plain.disk_format,
                backing=open_file(plain.backing),
                network=network.qemu_fd, monitor=channel("monitor"), agent=channel("agent"),
                console=channel("console"), console_log=console_log, kernel=open_file(plain.kernel),
                initrd=open_file(plain.initrd), cmdline=plain.cmdline, incoming=incoming,
            )  # fmt: skip
            binary, _ = launch.find_qemu(settings.qemu_binary)
            argv = [
                _anonymous(word, plain.machine)
                for word in command_line(
                    binary, plain.machine, backends, workspace.id, generation_id=plain.generation_id
                )
            ]
            confine = launch.confinement(uid)
            process = launch.start([*argv, *extra], workspace, backends.descriptors(), confine)
            record = Record(
                id=workspace.id,
                name="plain",
                created=time.time(),
                uid=uid,
                endpoints=endpoints,
                machine=ProcessId.of(process.pid),
                network=ProcessId(network.pid, network.start_time),
            )
            workspace.write(record)
            network.wait_ready(time.monotonic() + _NETWORK_SECONDS)
        instance = QemuInstance(workspace.path, record, plain.machine, workspace, process)
        stack.callback(instance.stop)
        yield instance


def run_on(instance: QemuInstance) -> None:
    """Let a machine run as soon as its stream is loaded: it was saved paused, and so it comes."""
    deadline = time.monotonic() + _STREAM_SECONDS
    monitor = instance.monitor
    while (status := monitor.execute("query-status")["status"]) == "inmigrate":
        if time.monotonic() > deadline:
            raise FailedError("QEMU does not load the stream")
        time.sleep(0.005)
    if status != "running":
        monitor.execute("cont")


def save_stream(instance: QemuInstance, path: Path) -> float:
    """Save a paused machine as QEMU does, devices and all memory, to a file; the seconds it took."""
    monitor = instance.monitor
    monitor.execute("migrate-set-parameters", max_bandwidth=1 << 40)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        monitor.send_descriptor(descriptor, "stream")
    finally:
        os.close(descriptor)
    began = time.monotonic()
    monitor.execute("migrate", uri="fd:stream")
    while (status := monitor.execute("query-migrate")["status"]) != "completed":
        if status == "failed" or time.monotonic() - began > _STREAM_SECONDS:
            raise FailedError(f"QEMU did not save the machine: {status}")
        time.sleep(0.005)
    return time.monotonic() - began


def save_snapshot(instance: QemuInstance, name: str) -> float:
    """Save a paused machine into its own disk (``savevm``); the seconds it took."""
    began = time.monotonic()
    if said := instance.monitor.human(f"savevm {name}").strip():
        raise FailedError(f"QEMU did not save the machine: {said}")
    return time.monotonic() - began


def _ports(port: int | Sequence[PublishedPort] | None) -> Sequence[PublishedPort]:
    if port is None:
        return []
    return [PublishedPort(port)] if isinstance(port, int) else port


def _anonymous(word: str, machine: Machine) -> str:
    if not word.startswith(f"memory-backend-file,id={RAM_BLOCK},"):
        return word
    return f"memory-backend-ram,id={RAM_BLOCK},size={machine.memory_bytes}"
