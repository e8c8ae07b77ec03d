"""Making a base: a disk is booted once, waits until it is ready and quiet, and is captured.

``build`` makes the disk from a guest recipe (``cloudlet/guests``); ``import_image`` takes any image.
From there on both are the same story. A base belongs to the machine it was captured on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cloudlet.control.identity import CLONE_AGENT
from cloudlet.control.image import check_header, check_info
from cloudlet.control.media import write_iso
from cloudlet.control.publishing import QUIET, make_quiet
from cloudlet.control.readiness import guest_port, wait_ready
from cloudlet.control.site import Site
from cloudlet.errors import CapacityError, CorruptError, FailedError, NotFoundError, UsageError
from cloudlet.hypervisor.driver import Boot, Instance
from cloudlet.hypervisor.records import Workspace
from cloudlet.model import (
    LARGEST_DISK_BYTES,
    MEBIBYTE,
    Firmware,
    Machine,
    PublishedPort,
    Readiness,
    ReadinessKind,
    format_bytes,
)
from cloudlet.overlay import canonical
from cloudlet.sparse import Progress
from cloudlet.store import bases as store
from cloudlet.store.bases import Base, Guest

BOOT_SECONDS = 600.0
_QUIET_SECONDS, _QUIET_SHARE = 90.0, 0.15
"""A guest is quiet when for two seconds it used less than this share of a CPU."""
_CLOUD_INIT_ENDED = """
cloud-init status --wait >/dev/null 2>&1
for second in $(seq 120); do test -e /etc/cloud/cloud-init.disabled && exit 0; sleep 1; done
exit 1
"""
"""A module that fails makes ``status --wait`` return while others, and our last word, are still to come."""
_GUESTS = Path(__file__).parents[1] / "guests"
_READABLE = 0o444
"""What QEMU reads by name it reads as another user, whatever this one's umask says."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BaseRequest:
    """What kind of base is asked for."""

    name: str
    memory_bytes: int
    disk_bytes: int = 0
    """0: as large as the image."""
    cpus: int = 1
    firmware: Firmware = Firmware.BIOS
    ready: Readiness = field(default_factory=lambda: Readiness(ReadinessKind.AGENT))


def build(site: Site, request: BaseRequest, recipe: str, say: Say, progress: Progress | None = None) -> Base:
    """Make a base from a guest recipe: the name of one of ours, or a folder with a ``build`` program."""
    _check(request)
    if not request.disk_bytes:
        raise UsageError("the disk needs a size", hint="give --disk 4G, say")
    folder = _guest_recipe(recipe)
    machine = site.hypervisor.machine(
        memory_bytes=request.memory_bytes, disk_bytes=request.disk_bytes, cpus=request.cpus
    )
    with site.bases.workspace() as workspace:
        say(f"building the disk by {folder / 'build'}")
        _run_recipe(folder, workspace, machine, say)
        path = workspace.path
        for made, wanted in (("vmlinuz", store.KERNEL), ("initrd.img", store.INITRD)):
            if (path / made).exists():
                (path / made).rename(path / wanted)
                (path / wanted).chmod(_READABLE)
        cmdline = (path / "cmdline").read_text().strip() if (path / "cmdline").exists() else ""
        _check_line(cmdline, f"the cmdline of {folder.name}", 2048)
        boot = Boot(
            machine=machine,
            disk=path / store.DISK,
            kernel=_if_there(path / store.KERNEL),
            initrd=_if_there(path / store.INITRD),
            cmdline=cmdline,
        )
        return _boot_and_capture(site, workspace, boot, request, say, progress)


def import_image(
    site: Site,
    request: BaseRequest,
    image: Path,
    say: Say,
    progress: Progress | None = None,
    *,
    kernel: Path | None = None,
    initrd: Path | None = None,
    cmdline: str = "",
    seed: Path | None = None,
    cloud_init: bool = False,
) -> Base:
    """Make a base from a disk image that is one file (:mod:`cloudlet.control.image`).

    :param kernel: boot this kernel instead of the image's own boot loader.
    :param seed: an ISO image for the optical drive at the first boot.
    :param cloud_init: make such a seed, for an image with cloud-init.
    """
    _check(request)
    _check_line(cmdline, "--cmdline", 2048)
    if initrd and not kernel:
        raise UsageError("an initrd without a kernel", hint="give --kernel too")
    if seed and cloud_init:
        raise UsageError("a seed of yours and one of ours", hint="give one of --seed and --cloud-init")
    with site.bases.workspace() as workspace:
        path = workspace.path
        say(f"converting {image}")
        disk_bytes = _convert(image, path / store.DISK, request.disk_bytes, workspace)
        machine = site.hypervisor.machine(
            memory_bytes=request.memory_bytes,
            disk_bytes=disk_bytes,
            cpus=request.cpus,
            firmware=request.firmware,
        )
        if cloud_init:
            seed = path / "seed.iso"
            _write_seed(seed, workspace)
        boot = Boot(
            machine=machine,
            disk=path / store.DISK,
            kernel=_copy(kernel, path / store.KERNEL),
            initrd=_copy(initrd, path / store.INITRD),
            cmdline=cmdline or ("root=/dev/vda rw console=ttyS0" if kernel else ""),
            uefi_vars=_uefi_vars(path) if request.firmware is Firmware.UEFI else None,
            optical=seed,
        )
        return _boot_and_capture(
            site, workspace, boot, request, say, progress, disables_cloud_init=cloud_init
        )


def _check(request: BaseRequest) -> None:
    """Find what would be refused at the end of the work before it begins."""
    store.check_name(request.name)
    _check_line(str(request.ready), "the readiness rule", 1024)
    if request.disk_bytes % MEBIBYTE:
        raise UsageError("the disk's size must be a multiple of 1 MiB", hint="give --disk 4G, say")
    if request.disk_bytes > LARGEST_DISK_BYTES:
        raise UsageError(f"a disk of {format_bytes(request.disk_bytes)} is too large", hint="up to 4T")


def _check_line(text: str, what: str, most: int) -> None:
    try:
        canonical.line(text, what, most)
    except CorruptError as error:
        raise UsageError(error.message) from error
    if len(text.encode()) > most:
        raise UsageError(f"{what} is longer than {most} bytes")


def _boot_and_capture(
    site: Site,
    workspace: Workspace,
    boot: Boot,
    request: BaseRequest,
    say: Say,
    progress: Progress | None,
    *,
    disables_cloud_init: bool = False,
) -> Base:
    port = guest_port(request.ready)
    ports = [PublishedPort(port)] if port else []
    with ExitStack() as stack:
        say(f"booting it ({boot.machine.accelerator}, {boot.machine.cpu_model})")
        instance = site.hypervisor.boot(boot, ports, name=request.name)
        stack.callback(instance.stop)
        seconds = wait_ready(instance, request.ready, BOOT_SECONDS)
        say(f"ready ({request.ready}) after {seconds:.1f} s")
        guest = _examine(instance, asked=request.ready.kind is ReadinessKind.AGENT)
        if disables_cloud_init:
            _finish_cloud_init(instance, guest)
        if boot.optical:
            instance.eject_optical()
        say("waiting until it is quiet")
        wait_until_quiet(instance)
        make_quiet(instance.agent if guest.agent else None, guest.quiet)
        wait_until_quiet(instance)
        say("capturing")
        capture = instance.capture_base(workspace.path / store.RAM)
    (workspace.path / store.DEVICE_STATE).write_bytes(capture.device_state)
    say("naming it by its content")
    description = site.bases.describe(
        workspace.path,
        machine=boot.machine,
        sections=capture.sections,
        cmdline=boot.cmdline,
        ready=request.ready,
        guest=guest,
        progress=progress,
    )
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    base = site.bases.adopt(workspace.path, description, request.name, created)
    say("indexing its pages")
    base.index(progress)
    return base


def wait_until_quiet(instance: Instance) -> None:
    """Wait until the guest has little to do, or until it is clear that it always has."""
    deadline = time.monotonic() + _QUIET_SECONDS
    quiet = 0
    used = instance.cpu_seconds()
    while quiet < 2 and time.monotonic() < deadline:
        if instance.wait(1.0):
            raise FailedError("the machine ended while it should become quiet")
        before, used = used, instance.cpu_seconds()
        quiet = quiet + 1 if used - before < _QUIET_SHARE else 0


def _examine(instance: Instance, *, asked: bool) -> Guest:
    agent = instance.agent
    if agent is None or not agent.ping(10.0 if asked else 3.0):
        return Guest(agent=False, clone_agent=False, quiet=False)

    def has(program: str) -> bool:
        return agent.run(["/bin/sh", "-c", f"test -x {program}"], timeout=60.0)[0] == 0

    return Guest(agent=True, clone_agent=has(CLONE_AGENT), quiet=has(QUIET))


def _guest_recipe(recipe: str) -> Path:
    folder = Path(recipe) if "/" in recipe else _GUESTS / recipe
    if not (folder / "build").is_file():
        ours = ", ".join(sorted(path.parent.name for path in _GUESTS.glob("*/build")))
        raise NotFoundError(f"{folder / 'build'} is not there", hint=f"ours are: {ours}")
    return folder


def _run_recipe(folder: Path, workspace: Workspace, machine: Machine, say: Say) -> None:
    environment = {
        **os.environ,
        **workspace.environment(),
        "CLOUDLET_OUT": str(workspace.path),
        "CLOUDLET_DISK_BYTES": str(machine.disk_bytes),
        "CLOUDLET_ACCELERATOR": machine.accelerator.value,
    }
    log = workspace.path / "build.log"
    last = ""
    with (
        log.open("wb") as record,
        subprocess.Popen(
            [str((folder / "build").absolute())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        assert process.stdout
        for line in process.stdout:
            record.write(line)
            if text := line.decode(errors="replace").strip():
                last = text
                if text.startswith("guest: "):
                    last = text.removeprefix("guest: ")
                    say(last)
    if process.returncode:
        raise FailedError(f"the recipe {folder.name} failed: {last}")


def _convert(image: Path, disk: Path, wanted: int, workspace: Workspace) -> int:
    """Convert an image to a sparse raw disk; its size in bytes, a multiple of 1 MiB."""
    program = shutil.which("qemu-img")
    if not program:
        raise NotFoundError("qemu-img is not installed", hint="apt-get install qemu-utils")
    if not image.is_file():
        raise NotFoundError(f"{image} is not there")
    check_header(image)
    # By its whole path, for qemu-img takes nbd:x or json:x for more than a file's name.
    source = str(image.absolute())
    info = json.loads(_tool([program, "info", "--output=json", source], workspace))
    check_info(image, info)
    virtual_size = int(info["virtual-size"])
    size = max(wanted, -(-virtual_size // MEBIBYTE) * MEBIBYTE)
    if wanted and wanted < virtual_size:
        raise UsageError(f"the image is larger ({info['virtual-size']} bytes) than the disk asked for")
    if not 0 < size <= LARGEST_DISK_BYTES:
        raise UsageError(f"{image} is a disk of {virtual_size} bytes", hint="a disk has up to 4 TiB")
    forms = ["-f", info["format"], "-O", "raw", "-S", "4k"]
    _tool([program, "convert", *forms, source, str(disk)], workspace)
    with disk.open("r+b") as file:
        file.truncate(size)
    return size


def _tool(command: list[str], workspace: Workspace) -> str:
    """What a program prints; it carries the workspace's mark, so that it ends with it."""
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **workspace.environment()},
        start_new_session=True,
    )
    if result.returncode:
        said = (result.stderr or result.stdout).strip().splitlines()
        last = said[-1] if said else f"status {result.returncode}"
        if "No space left" in last:
            raise CapacityError(last, hint="free space in the cache folder, or set --cache-dir")
        raise FailedError(last)
    return result.stdout


def _uefi_vars(folder: Path) -> Path:
    from cloudlet.hypervisor.qemu.machine import UEFI_VARS

    for name in UEFI_VARS:
        if Path(name).exists():
            target = folder / store.UEFI_VARS
            shutil.copyfile(name, target)
            return target
    raise NotFoundError("the UEFI firmware is not installed", hint="apt-get install ovmf")


def _write_seed(seed: Path, workspace: Workspace) -> None:
    source = _GUESTS / "cloud-init"
    write_iso(seed, {f"/{path.name}": path for path in source.iterdir()}, "cidata", workspace.environment())


def _finish_cloud_init(instance: Instance, guest: Guest) -> None:
    """Wait for cloud-init's end, so that a clone that reboots does not begin it again."""
    if not guest.agent:
        return
    agent = instance.agent
    assert agent
    status, output = agent.run(
        ["/bin/sh", "-c", _CLOUD_INIT_ENDED],
        timeout=BOOT_SECONDS,
    )
    if status:
        raise FailedError(
            f"cloud-init did not take the seed: {output.decode(errors='replace').strip()[-200:]}"
        )


def _copy(source: Path | None, target: Path) -> Path | None:
    if source is None:
        return None
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError as error:
        raise NotFoundError(f"{source} is not there") from error
    target.chmod(_READABLE)
    return target


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None
