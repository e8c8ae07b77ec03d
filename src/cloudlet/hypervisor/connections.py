"""Connections of another process, ended from outside: whoever has one is told at once, and not when it ends.

A process that stands still keeps its connections open for as long as it is there. Its sockets are taken over
for a moment (``pidfd_getfd(2)``, Linux 5.6, which Python does not offer) and shut down, as it would itself.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Collection
from contextlib import closing, suppress
from pathlib import Path

_PIDFD_GETFD = 438  # the same on every architecture

_libc = ctypes.CDLL(None, use_errno=True)


def cut_connections(pid: int, ports: Collection[int]) -> None:
    """Shut down what a process has accepted at these ports, as far as this process may touch its sockets."""
    with suppress(OSError):  # it has ended
        process = os.pidfd_open(pid)
        try:
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                if str(entry.readlink()).startswith("socket:"):
                    _cut(process, int(entry.name), ports)
        finally:
            os.close(process)


def _cut(process: int, number: int, ports: Collection[int]) -> None:
    descriptor = int(_libc.syscall(_PIDFD_GETFD, process, number, 0))
    if descriptor < 0:
        return  # it is closed meanwhile, or this process may not
    # Not connected, or no socket of the internet: then it has no port, or no peer.
    with closing(socket.socket(fileno=descriptor)) as taken, suppress(OSError, IndexError):
        if taken.family in (socket.AF_INET, socket.AF_INET6) and taken.getsockname()[1] in ports:
            taken.getpeername()
            taken.shutdown(socket.SHUT_RDWR)
