"""The program ``cloudlet``: how it begins, and what signals do.

To be told to end, by Ctrl-C, SIGTERM or SIGHUP, is the same: what runs is ended, what was begun is
removed, the exit code is 130. The commands are loaded last, since that takes a third of a second in
which a signal has to be heard too.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

from cloudlet.errors import ExitCode

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CLEANING_SECONDS = 3.0
"""So long after a signal another one does not disturb the cleaning that the first began."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status, as ``errors.py`` lists them."""
    heard = [number for number in _SIGNALS if not _silenced(number)]
    for number in heard:
        signal.signal(number, _leave)
    from cloudlet.cli.command import CloudletApp

    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        interrupts = _Interrupts()
        for number in heard:
            signal.signal(number, interrupts)
        return int(CloudletApp().run(argv or ["help"]))
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    finally:
        # What is left is the interpreter's end, and that is near: only an ignored signal does not disturb it.
        for number in heard:
            signal.signal(number, signal.SIG_IGN)


def _silenced(number: signal.Signals) -> bool:
    """Whether who started us wants us to outlive the terminal: ``nohup``."""
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


class _Interrupts:
    """Raises KeyboardInterrupt, and not again while that is being dealt with."""

    def __init__(self) -> None:
        self._last = -_CLEANING_SECONDS

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        if (now := time.monotonic()) - self._last >= _CLEANING_SECONDS:
            self._last = now
            raise KeyboardInterrupt


def _leave(_number: int, _frame: FrameType | None) -> None:
    """End at once: nothing was begun."""
    os._exit(ExitCode.INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
