"""The memory of another process, read from outside: many stretches of it with one system call.

``process_vm_readv(2)`` takes a list of addresses, which halves the time of a call per stretch; Python does
not offer it. Where a filter keeps it from us (systemd's ``@system-service`` does), ``/proc/PID/mem`` is read
instead, which wants the same rights.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cloudlet.errors import FailedError

Stretches = NDArray[np.uint64]
"""Address and length of each, in bytes, shape ``(n, 2)``: two columns as ``struct iovec`` has them."""

_MOST_VECTORS = 1024
"""Linux' IOV_MAX."""
_KEPT_FROM_US = (errno.ENOSYS, errno.EPERM)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
)  # fmt: skip


class ProcessMemory:
    """The memory of the process that has ``pid`` now; of no later one with this number."""

    def __init__(self, pid: int) -> None:
        """:raises OSError: there is no such process, or this one may not look."""
        self._pid = pid
        self._at_once = True
        with ExitStack() as files:
            self._process = os.pidfd_open(pid)
            files.callback(os.close, self._process)
            self._file = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            files.callback(os.close, self._file)
            self._end = select.poll()
            self._end.register(self._process, select.POLLIN)
            self._files = files.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, stretches: Stretches, room: NDArray[Any]) -> None:
        """Fill ``room`` (contiguous, as long as all stretches together) with one stretch after the other.

        :raises FailedError: there is no memory at such an address, or the process is gone.
        """
        to = 0
        raw = room.reshape(-1).view(np.uint8)
        for at in range(0, len(stretches), _MOST_VECTORS):
            some = np.ascontiguousarray(stretches[at : at + _MOST_VECTORS], np.uint64)
            length = int(some[:, 1].sum())
            self._fill(some, raw[to : to + length])
            to += length

    def close(self) -> None:
        """Let go of the process. Can be called again."""
        self._files.close()

    def _fill(self, stretches: Stretches, room: NDArray[np.uint8]) -> None:
        if self._at_once:
            mine = np.array([room.ctypes.data, room.size], np.uint64)
            count = _libc.process_vm_readv(
                self._pid, mine.ctypes.data, 1, stretches.ctypes.data, len(stretches), 0
            )
            number = ctypes.get_errno()
            # The number may be another process's when this one has ended: then what was read is nothing.
            if count == room.size and not self._end.poll(0):
                return
            if count >= 0 or number not in _KEPT_FROM_US:
                raise self._unreadable(int(stretches[0, 0]))
            self._at_once = False
        to = 0
        for address, length in stretches.tolist():
            if not self._read_stretch(address, room[to : to + length]):
                raise self._unreadable(address)
            to += length

    def _read_stretch(self, address: int, room: NDArray[np.uint8]) -> bool:
        try:
            return os.preadv(self._file, [room.data], address) == room.size
        except OSError:
            return False

    def _unreadable(self, address: int) -> FailedError:
        return FailedError(f"cannot read the memory of process {self._pid} at {address:#x}")
