"""QEMU without huge pages: what it asks the kernel for is answered with "done", and nothing is done.

QEMU asks for huge pages for guest RAM. The kernel then reads a MiB or more of the RAM's file at each
fault, which is wrong where pages are still to come. A system call filter (seccomp) answers instead of
the kernel. Filters are inherited, so no code of ours runs between fork and exec, and QEMU's own filter
comes on top of it.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable
from typing import TypeVar

from cloudlet.errors import FailedError

T = TypeVar("T")

# uname's machine: (AUDIT_ARCH_..., the number of madvise)
_KNOWN = {"x86_64": (0xC000003E, 28), "aarch64": (0xC00000B7, 233)}
_MADV_HUGEPAGE = 14
_PR_SET_SECCOMP, _MODE_FILTER, _PR_SET_NO_NEW_PRIVS = 22, 2, 38
_ALLOW, _ANSWER_WITH_0 = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER, _ARCHITECTURE, _THIRD_ARGUMENT = 0, 4, 32  # offsets in struct seccomp_data, little-endian


def known_here() -> bool:
    """Whether there is a filter for this processor."""
    return os.uname().machine in _KNOWN


def without_hugepages(start: Callable[[], T]) -> T:
    """Return what ``start`` returns; the processes that it starts cannot have huge pages, nor new rights.

    It runs in a thread of its own, which has the filter; no other thread of this process has. The
    thread ends with ``start``: nothing that should die with its parent may be started here.

    :raises FailedError: there is no filter for this processor, or the kernel takes none.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            _install()
            result.append(start())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="without-hugepages")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def _install() -> None:
    """Put the filter on the calling thread."""
    machine = os.uname().machine
    if machine not in _KNOWN:
        raise FailedError(f"no system call filter is known for {machine}", hint="use --start full")
    architecture, madvise = _KNOWN[machine]
    steps = (
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 0, 5, architecture),
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 0, 3, madvise),
        (_LOAD, 0, 0, _THIRD_ARGUMENT),
        (_EQUAL, 0, 1, _MADV_HUGEPAGE),
        (_RETURN, 0, 0, _ANSWER_WITH_0),
        (_RETURN, 0, 0, _ALLOW),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("<H6xQ", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
        or libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, program, 0, 0) != 0
    ):
        reason = os.strerror(ctypes.get_errno())
        raise FailedError(f"the kernel takes no system call filter: {reason}", hint="use --start full")
