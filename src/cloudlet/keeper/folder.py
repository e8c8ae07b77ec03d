"""The folder of a keeper: its order, its lock, its status; and who lives in which."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from pathlib import Path

from cloudlet.keeper.order import Order

ORDER, _LOCK = "order.json", "lock"
_LOOK_SECONDS = 1.0

Generation = tuple[int, int]
"""What tells the keepers apart that follow each other in folders of one name."""


def make(folder: Path, order: Order) -> None:
    """Make the folder of a keeper to be; nothing happens if there is one."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (folder / ORDER).exists():
        new = folder / f"{ORDER}.new"
        new.write_text(json.dumps(order.to_json()))
        new.replace(folder / ORDER)


def take(folder: Path) -> int:
    """Become the keeper of a folder: its lock, as a descriptor that must stay open.

    :raises BlockingIOError: there is one.
    :raises FileNotFoundError: the folder has gone.
    """
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOOK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Perhaps somebody only looks (is_kept), for a moment.
            if time.monotonic() > deadline:
                os.close(lock)
                raise
            time.sleep(0.01)
        else:
            return lock


def is_kept(folder: Path) -> bool:
    """Whether a living keeper has this folder."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(lock)


def generation(folder: Path) -> Generation | None:
    """Which of the keepers it is that have had a folder by this name; None if there is none."""
    try:
        lock = (folder / _LOCK).stat()
    except FileNotFoundError:
        return None
    return lock.st_ino, lock.st_ctime_ns


def remove(folder: Path) -> None:
    """Remove the folder of a keeper that has ended."""
    shutil.rmtree(folder, ignore_errors=True)
