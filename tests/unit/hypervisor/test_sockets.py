"""Unix sockets in folders with any path."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from cloudlet.hypervisor.qemu.sockets import connect, listen


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_one_can_connect_however_long_the_path(tmp_path: Path, depth: int) -> None:
    folder = tmp_path.joinpath(*["a" * 60] * depth)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "monitor.sock"
    with listen(path) as listening:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with connect(path, 1.0) as ours:
            theirs, _ = listening.accept()
            with theirs:
                ours.sendall(b"hello")
                assert theirs.recv(5, socket.MSG_WAITALL) == b"hello"
    with pytest.raises(ConnectionRefusedError):
        connect(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        connect(path)
