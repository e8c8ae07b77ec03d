"""The RAM of a base, or of a base and a layer, as one sealed memory file that its instances map privately.

QEMU 7.2 insists on opening its memory file for writing, even for a private mapping, and a QEMU that
was taken over could then change the base under every other instance. A memory file sealed against
writing cannot be changed by anyone, and gives the pages back when its last user is gone. Each
owner of an instance keeps it open: whoever starts another one takes it from there, or fills a new one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from cloudlet.errors import CapacityError, NotFoundError
from cloudlet.hypervisor.driver import Layer
from cloudlet.hypervisor.records import ProcessId
from cloudlet.model import PAGE_BYTES
from cloudlet.overlay.pages import Space
from cloudlet.sparse import copy_data, copy_range

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def writable_ram(size: int, name: str) -> int:
    """A new memory file of ``size`` bytes for a machine whose RAM is to be captured."""
    descriptor = os.memfd_create(f"cloudlet-{name}", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return descriptor


class ComingRam:
    """A base's RAM as a memory file that may be mapped at once, while a thread still fills and seals it."""

    def __init__(self, descriptor: int, fill: Callable[[int], None] | None = None) -> None:
        self.descriptor = descriptor
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if fill:
            self._thread = threading.Thread(target=self._run, args=(fill,), name="base-ram", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait until all is there and nobody can change it any more.

        :raises CapacityError: there is not enough memory.
        """
        self.join()
        if self._error:
            raise self._error

    def join(self) -> None:
        """Wait until nothing is done to the file any more. Can be called again."""
        if self._thread:
            self._thread.join()

    def close(self) -> None:
        """Close the descriptor; who has mapped the file keeps it. Can be called again."""
        self.join()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _run(self, fill: Callable[[int], None]) -> None:
        try:
            fill(self.descriptor)
        except BaseException as error:  # raised by wait()
            self._error = error


def coming_ram(
    base_id: str, ram: Path, siblings: Iterable[tuple[ProcessId, int]], layer: Layer | None = None
) -> ComingRam:
    """RAM as a sealed memory file, from a sibling or filled while the caller goes on.

    :param ram: the base's; the pages of ``layer`` replace some of it.
    :param siblings: running processes that may hold it, each with its number there.
    """
    name = f"cloudlet-app-{layer.overlay_id[:32]}" if layer else f"cloudlet-base-{base_id[:32]}"
    for process, number in siblings:
        if (descriptor := _take(name, process, number)) is not None:
            return ComingRam(descriptor)
    return _filling(name, ram, layer)


def is_sealed(descriptor: int) -> bool:
    """Whether nobody can change the file any more."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False


def _take(name: str, process: ProcessId, number: int) -> int | None:
    try:
        # Of its owner, who keeps it: QEMU itself could have put anything under that number.
        path = Path(f"/proc/{process.pid}/fd/{number}")
        if not _is_called(path, name):
            return None
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    ours = Path(f"/proc/self/fd/{descriptor}")
    if process.alive() and _is_called(ours, name) and is_sealed(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _is_called(descriptor: Path, name: str) -> bool:
    return str(descriptor.readlink()).startswith(f"/memfd:{name} ")


def _filling(name: str, ram: Path, layer: Layer | None) -> ComingRam:
    with ExitStack() as on_error:
        sources = []
        for path in (ram, *((layer.ram,) if layer else ())):
            try:
                sources.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except FileNotFoundError as error:
                raise NotFoundError(
                    f"a machine's RAM is missing: {path}", hint="import or build the base again"
                ) from error
            on_error.callback(os.close, sources[-1])
        runs = layer.pages.runs(Space.RAM).tolist() if layer else []

        def fill(target: int) -> None:
            try:
                copy_data(sources[0], target)
                for start, length in runs:
                    copy_range(sources[1], target, start * PAGE_BYTES, length * PAGE_BYTES)
                fcntl.fcntl(target, fcntl.F_ADD_SEALS, _SEALS)
            except OSError as error:
                if error.errno in (errno.ENOMEM, errno.ENOSPC):
                    raise CapacityError(
                        "not enough memory for a machine's RAM", hint="stop an instance, or add memory"
                    ) from error
                raise
            finally:
                for source in sources:
                    os.close(source)

        target = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        on_error.callback(os.close, target)
        os.ftruncate(target, os.fstat(sources[0]).st_size)
        coming = ComingRam(target, fill)
        on_error.pop_all()
        return coming
