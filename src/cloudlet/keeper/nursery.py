"""The nursery: a process that has loaded everything and from which keepers are forked.

A keeper that began as a program of its own would spend half a second on loading what all keepers share, and
would have a copy of it. Here it is there at once and shares it. The nursery has one thread and no work of its
own; it ends with the site's process, and the keepers go on.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
from pathlib import Path

from cloudlet.keeper import process
from cloudlet.keeper.order import settings_from_json
from cloudlet.keeper.wire import Line
from cloudlet.settings import Settings


def main() -> int:
    """``python -m cloudlet.keeper.nursery DESCRIPTOR SETTINGS``: fork a keeper for each folder that comes."""
    line = Line(socket.socket(fileno=int(sys.argv[1])))
    settings = settings_from_json(json.loads(sys.argv[2]))
    # What is sent to the whole terminal is not meant for keepers, nor for us.
    os.setsid()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel takes note of their ends for us
    gc.collect()
    gc.freeze()
    for message in line.messages():
        pid = os.fork()
        if pid == 0:
            _become_keeper(line, settings, Path(message["folder"]))
        line.send({"pid": pid})
    return 0


def _become_keeper(line: Line, settings: Settings, folder: Path) -> None:
    status = 1
    try:
        os.setsid()
        os.close(line.socket.fileno())
        # A keeper has children whose ends it wants to know.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        status = process.main(settings, folder)
    finally:
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
