"""Connections that are relayed to where an instance has gone."""

from __future__ import annotations

import socket

import pytest

from cloudlet.forwarder.moved import Forwarding, is_within


def test_connections_are_relayed_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as there, socket.create_server(("127.0.0.1", 0)) as here:
        forwarding = Forwarding([(here.dup(), there.getsockname()[:2])], 4, within=True)
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


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "169.254.1.1", "::1", "::ffff:127.0.0.1"])
def test_no_other_site_leads_users_into_this_machine(host: str) -> None:
    assert is_within(host)
    with socket.create_server(("127.0.0.1", 0)) as here, pytest.raises(OSError, match="own address"):
        Forwarding([(here, (host, 22))], 4)


@pytest.mark.parametrize("host", ["192.0.2.7", "10.1.2.3", "2001:db8::1", "edge-2.example"])
def test_addresses_elsewhere_are_not_within(host: str) -> None:
    assert not is_within(host)
