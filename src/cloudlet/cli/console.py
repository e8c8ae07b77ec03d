"""A guest's serial console on this terminal."""

from __future__ import annotations

import os
import selectors
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from cloudlet.errors import FailedError
from cloudlet.hypervisor.driver import Instance

_LEAVE = b"\x1d"
"""Ctrl-]"""


def attach(instance: Instance, keyboard: TextIO, notes: TextIO) -> None:
    """Connect this terminal, or a pipe, with the guest's console until Ctrl-] or the end of input.

    :raises FailedError: the machine ended.
    """
    print(
        "The guest's console; Ctrl-] (or the end of input) when the app runs as it should.",
        file=notes,
        flush=True,
    )
    with instance.open_console() as console, _raw(keyboard), selectors.DefaultSelector() as selector:
        selector.register(console, selectors.EVENT_READ, "console")
        selector.register(keyboard, selectors.EVENT_READ, "keyboard")
        while True:
            for key, _ in selector.select():
                data = os.read(key.fd, 4096)
                if key.data == "console":
                    if not data:
                        raise FailedError("the machine ended")
                    sys.stdout.buffer.write(data)
                    sys.stdout.buffer.flush()
                    continue
                before, leave, _ = data.partition(_LEAVE)
                console.sendall(before)
                if leave or not data:
                    return


@contextmanager
def _raw(keyboard: TextIO) -> Iterator[None]:
    if not keyboard.isatty():
        yield
        return
    before = termios.tcgetattr(keyboard)
    tty.setraw(keyboard, termios.TCSADRAIN)  # keeps what was typed ahead
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
