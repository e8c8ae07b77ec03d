"""A state folder has one server, or several that share a job board; and what must happen beside none."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloudlet.errors import ConflictError

_LOOK_SECONDS = 0.1


@contextmanager
def only_server(folder: Path, *, shared: bool = False, wait: float = 0.0) -> Iterator[None]:
    """Be the only server of a state folder, or one of those that share it.

    :param wait: seconds in which one that is there may end.
    :raises ConflictError: there is one.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(folder / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(descriptor, folder, shared, time.monotonic() + wait)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, shared: bool, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise ConflictError(
                    f"{folder} is served already",
                    hint="stop that server, or name another folder with --state-dir",
                ) from error
        time.sleep(_LOOK_SECONDS)
