"""What a signal does: to be told to end, by Ctrl-C, SIGTERM or SIGHUP, is the same at all times.

Before a command begins, the program leaves at once. While it works, it is interrupted: what runs is
ended, what was begun is removed. At its very end a signal is ignored. The exit code is always 130.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from cloudlet.errors import ExitCode

_CLEANING_SECONDS = 3.0
"""So long after a signal another one does not disturb the cleaning that the first began."""

_Handler = Callable[[int, FrameType | None], None] | signal.Handlers


def leave() -> None:
    """From now on a signal ends the program at once: nothing has been begun."""
    _hear(_leave)


def interrupt() -> None:
    """From now on a signal raises KeyboardInterrupt, once: a second Ctrl-C must not stop the cleaning."""
    last = -_CLEANING_SECONDS

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _CLEANING_SECONDS:
            last = now
            raise KeyboardInterrupt

    _hear(handle)


def ignore() -> None:
    """From now on signals are ignored: the end is near."""
    _hear(signal.SIG_IGN)


def _hear(handler: _Handler) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Under nohup we are wanted to outlive the terminal.
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _leave(_number: int, _frame: FrameType | None) -> None:
    os._exit(ExitCode.INTERRUPTED)
