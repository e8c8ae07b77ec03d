"""HTTP over a Unix socket, as a transport of requests."""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool
from urllib3.connection import HTTPConnection


class UnixAdapter(HTTPAdapter):
    """Whatever the host in a URL is called, it is behind one Unix socket."""

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": partial(_Pool, path=self._path)}


class _Connection(HTTPConnection):
    def __init__(self, *args: Any, path: Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self.timeout)
            sock.connect(str(self._path))
        except OSError:
            sock.close()
            raise
        self.sock = sock


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection
    """It is made with what the pool does not know itself: the path."""
