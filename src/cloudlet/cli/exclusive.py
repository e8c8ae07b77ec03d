"""A state folder has one server, and what must not happen beside one waits for none."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloudlet.errors import ConflictError


@contextmanager
def only_server(folder: Path) -> Iterator[None]:
    """Be the only server of a state folder.

    :raises ConflictError: there is one.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(folder / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConflictError(
            f"{folder} is served already", hint="stop that server, or name another folder with --state-dir"
        ) from error
