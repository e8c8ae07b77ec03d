"""Unix sockets in an instance's folder, however long the folder's path is.

The kernel takes 107 bytes for a socket's path. A longer one is reached by way of the open folder.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LONGEST = 107


@contextmanager
def reachable(path: Path) -> Iterator[str]:
    """A path of the socket ``path`` that the kernel takes, valid in this process within the context."""
    if len(os.fsencode(path)) <= _LONGEST:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def listen(path: Path) -> socket.socket:
    """A listening socket, only for its owner: QEMU inherits it, one can connect before QEMU runs."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with reachable(path) as short:
        listening.bind(short)
    path.chmod(0o600)
    listening.listen(4)
    return listening


def connect(path: Path, timeout: float | None = None) -> socket.socket:
    """A connection to a socket.

    :raises OSError: nobody listens there.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        with reachable(path) as short:
            connection.connect(short)
    except BaseException:
        connection.close()
        raise
    return connection
