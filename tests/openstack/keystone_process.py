"""Keystone in one process: makes its database at the first start, serves, and says at which port.

Run by the Python that Keystone is installed for, with ``-I``: beside this file is another ``keystone``.
usage: keystone_process.py FOLDER PORT (0: any)
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from cheroot.wsgi import Server


class Listening(Server):
    """A server at a socket that is bound already."""

    def __init__(self, listener: socket.socket, application: object) -> None:
        super().__init__(listener.getsockname(), application, numthreads=4, server_name="keystone")
        self._listener = listener

    def bind(self, *_: object) -> socket.socket:
        self.socket = self._listener
        return self.socket


def manage(*arguments: str) -> None:
    """Do what keystone-manage does; in a child, since each command reads the configuration anew."""
    if child := os.fork():
        if status := os.waitpid(child, 0)[1]:
            sys.exit(f"keystone-manage {arguments[0]}: {status}")
        return
    from keystone.cmd import cli

    cli.main(["keystone-manage", *arguments], os.environ["OS_KEYSTONE_CONFIG_FILES"])
    os._exit(0)


def make(url: str, password: str) -> None:
    """Make the database, the first administrator and the catalogue with Keystone itself."""
    import keystone.cmd.cli  # noqa: F401 (once, for both children)

    manage("db_sync")
    endpoints = [f"--bootstrap-{face}-url={url}" for face in ("public", "internal", "admin")]
    manage("bootstrap", f"--bootstrap-password={password}", "--bootstrap-region-id=RegionOne", *endpoints)


def main() -> None:
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # its log is all that Keystone writes
    listener = socket.create_server(("127.0.0.1", port))
    os.environ["OS_KEYSTONE_CONFIG_FILES"] = str(folder / "keystone.conf")
    port = listener.getsockname()[1]
    if not (folder / "made").exists():
        make(f"http://127.0.0.1:{port}/v3", (folder / "password").read_text())
        (folder / "made").touch()
    del sys.argv[1:]  # Keystone would read it too
    from keystone.wsgi.api import application

    server = Listening(listener, application)
    server.prepare()
    print(port, file=answer, flush=True)
    server.serve()


if __name__ == "__main__":
    main()
