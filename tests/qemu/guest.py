"""What the tests do with a guest: commands in it, a clone that nobody renews, a second look at its memory.

The truths here (:func:`memory_of`, :func:`saved_memory_of`, :func:`saved_disk_of`) are got on other ways
than the program's own capture, so that the two can be compared.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cloudlet.control.site import Site
from cloudlet.hypervisor.driver import Capture
from cloudlet.hypervisor.qemu.changed import Mapping
from cloudlet.hypervisor.qemu.incoming import QemuIncoming
from cloudlet.hypervisor.qemu.instance import DISK, QemuInstance
from cloudlet.model import PAGE_BYTES, GuestPort, PublishedPort, Readiness
from cloudlet.overlay.apply import apply
from cloudlet.overlay.create import Description, create
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import PageBatch, PageSource, Space, runs_of
from cloudlet.overlay.plan import Hot
from cloudlet.overlay.reader import OverlayReader
from cloudlet.overlay.root import App
from cloudlet.sparse import copy_data, digest_file, write_at
from cloudlet.store.bases import Base

Pages = np.ndarray[Any, Any]
"""A whole memory, shape ``(n, 4096)``."""

SHADOWED = slice(0xA0, 0x100)
"""Pages of RAM that the board covers with its video and firmware areas: a CPU does not see them."""

COUNT = "echo 1 > /run/counter.ask; read count < /run/counter.say; echo $count"
"""Shell commands by which the quick guest's counter counts one more, and tells."""


def shell(instance: QemuInstance, script: str, timeout: float = 30.0) -> str:
    """What a shell script prints in the guest; it must succeed."""
    status, output = instance.agent.run(["/bin/sh", "-ec", script], timeout=timeout)
    text = output.decode(errors="replace")
    assert status == 0, f"{script!r} gave {status}: {text}"
    return text.strip()


@contextmanager
def incoming(
    site: Site, base: Base, ports: Sequence[PublishedPort] = (), *, name: str = "test"
) -> Iterator[QemuIncoming]:
    """An instance that waits for its pages; it is gone when the context is left."""
    waiting = site.hypervisor.resume(base.image(), ports, name=name)
    assert isinstance(waiting, QemuIncoming)
    try:
        yield waiting
    finally:
        waiting.abort()


@contextmanager
def clone_of(
    site: Site, base: Base, overlay: Path, ports: Sequence[PublishedPort] = ()
) -> Iterator[QemuInstance]:
    """A machine just synthesised: nobody has asked it anything yet, and its identity is the captured one."""
    with incoming(site, base, ports) as waiting:
        with overlay.open("rb") as source, base.pages() as pages:
            apply(OverlayReader(source, None, allow_unsigned=True), pages, waiting)
        yield waiting.instance


@contextmanager
def resumed(site: Site, base: Base, ports: Sequence[PublishedPort] = ()) -> Iterator[QemuInstance]:
    """The base itself, running."""
    with incoming(site, base, ports) as waiting:
        begin_with_nothing(waiting)
        waiting.finish(base.image().device_state.read_bytes())
        yield waiting.instance


def begin_with_nothing(waiting: QemuIncoming) -> None:
    nothing = runs_of(PageSource.empty().numbers)
    waiting.begin(PageMap(nothing, nothing))


def pack(base: Base, capture: Capture, output: Path, *, ports: Sequence[int] = (), hot: Hot = ()) -> None:
    """Write an unsigned overlay, of which the pages of ``hot`` come first."""
    app = App("test", ports=tuple(GuestPort(port) for port in ports), ready=Readiness.parse("agent"))
    description = Description(
        app=app,
        created="2026-01-01T00:00:00Z",
        machine=base.machine,
        device_sections=capture.sections,
        device_state=capture.device_state,
    )
    with output.open("wb") as out, tempfile.TemporaryFile() as spool, base.pages() as pages:
        create(out, spool, description, capture.ram, capture.disk, pages, base.index(), hot=hot)


class FileSink:
    """A sink that is two plain files, the RAM's and the disk's, which begin as the base's."""

    def __init__(self, base: Base, ram: Path, disk: Path) -> None:
        self.device_state = b""
        self._files = {
            Space.RAM: _sparse_copy(base.image().ram, ram),
            Space.DISK: _sparse_copy(base.image().disk, disk),
        }

    def begin(self, page_map: PageMap) -> None:
        self.announced = {space: page_map.runs(space) for space in Space}

    def pages(self, batch: PageBatch) -> None:
        write_pages(self._files[batch.space], batch.numbers, batch.data)

    def finish(self, device_state: bytes) -> None:
        self.device_state = device_state
        for descriptor in self._files.values():
            os.close(descriptor)


def write_pages(descriptor: int, numbers: Pages, data: Pages) -> None:
    for number, row in zip(numbers.tolist(), data, strict=True):
        write_at(descriptor, row.tobytes(), number * PAGE_BYTES)


def memory_of(instance: QemuInstance) -> Pages:
    """The guest's RAM as the machine's process has it mapped."""
    mapping = mapping_of(instance)
    size = mapping.pages * PAGE_BYTES
    with Path(f"/proc/{mapping.pid}/mem").open("rb", buffering=0) as memory:
        content = os.pread(memory.fileno(), size, mapping.address)
    assert len(content) == size
    return np.frombuffer(content, np.uint8).reshape(-1, PAGE_BYTES)


def mapping_of(instance: QemuInstance) -> Mapping:
    """Where the machine's process has mapped its RAM: a memory file, or a page server's only file."""
    process = instance.record.machine
    assert process
    size = instance.machine.memory_bytes
    for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
        span, _, offset, _, _, *name = line.split(None, 5)
        start, end = (int(edge, 16) for edge in span.split("-"))
        of_ram = name and (name[0] == "/" or name[0].startswith("/memfd:cloudlet-"))
        if of_ram and not int(offset, 16) and end - start == size:
            return Mapping(process.pid, start, size // PAGE_BYTES)
    raise AssertionError(f"process {process.pid} has no mapping of {size} bytes")


def saved_memory_of(instance: QemuInstance) -> Pages:
    """The guest's memory as its CPUs see it, written by QEMU itself (``pmemsave``)."""
    size = instance.machine.memory_bytes
    # QEMU may open no path. A memory file's mode lets anyone write who was given its descriptor.
    target = os.memfd_create("truth", os.MFD_CLOEXEC)
    try:
        _, number = instance.monitor.add_descriptor(target)
        (inside,) = [
            entry["fds"][0]["fd"]
            for entry in instance.monitor.execute("query-fdsets")
            if entry["fdset-id"] == number
        ]
        instance.monitor.execute("pmemsave", val=0, size=size, filename=f"/proc/self/fd/{inside}")
        instance.monitor.execute("remove-fd", fdset_id=number)
        content = os.pread(target, size, 0)
    finally:
        os.close(target)
    assert len(content) == size
    return np.frombuffer(content, np.uint8).reshape(-1, PAGE_BYTES)


def saved_disk_of(instance: QemuInstance, base: Base, target: Path, layer: Path | None = None) -> None:
    """The instance's whole disk as a raw image, read by ``qemu-img``; it may stand on an app's layer."""
    save_disk([instance.directory / DISK, *([layer] if layer else [])], base, target)


def save_disk(images: Sequence[Path], base: Base, target: Path) -> None:
    """A chain of qcow2 files over a base's disk as a raw image."""
    options = ["driver=raw", f"file.filename={base.image().disk}"]
    for image in reversed(images):
        under = [f"backing.{option}" for option in options]
        options = ["driver=qcow2", f"file.filename={image}", *under]
    command = ["qemu-img", "convert", "--force-share", "--image-opts", ",".join(options)]
    subprocess.run([*command, "-O", "raw", "-S", "4k", str(target)], check=True, timeout=120)


def base_memory(base: Base) -> Pages:
    return np.fromfile(base.image().ram, np.uint8).reshape(-1, PAGE_BYTES)


def differing(one: Pages, other: Pages) -> list[int]:
    """Numbers of the pages that are not equal."""
    return np.flatnonzero((one.view(np.uint64) != other.view(np.uint64)).any(axis=1)).tolist()


def digest(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return digest_file(descriptor)
    finally:
        os.close(descriptor)


def _sparse_copy(source: Path, target: Path) -> int:
    """A descriptor of the copy, for reading and writing."""
    copy = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    original = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.ftruncate(copy, os.fstat(original).st_size)
        copy_data(original, copy)
    finally:
        os.close(original)
    return copy
