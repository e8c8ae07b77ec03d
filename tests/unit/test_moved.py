"""Connections that are relayed to where an instance has gone."""

from __future__ import annotations

import socket

import pytest

from cloudlet.forwarder.moved import Forwarding


def test_connections_are_relayed_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as there, socket.create_server(("127.0.0.1", 0)) as here:
        asked: list[str] = []
        forwarding = Forwarding(
            [(here.dup(), ("localhost", there.getsockname()[1]))], 4, lambda host: not asked.append(host)
        )
        try:
            with socket.create_connection(here.getsockname()) as user:
                user.sendall(b"hello")
                connection, _ = there.accept()
                with connection:
                    assert connection.recv(5) == b"hello"
                    connection.sendall(b"there")
                    assert user.recv(5) == b"there"
        finally:
            forwarding.close()
    assert asked == ["127.0.0.1"]  # what a name leads to is looked at, and gone to


def test_no_way_leads_where_none_may() -> None:
    with socket.create_server(("127.0.0.1", 0)) as here, pytest.raises(OSError, match="no way may lead"):
        Forwarding([(here, ("127.0.0.1", 22))], 4, lambda host: False)
