"""The relay of the network process between plain sockets."""

import os
import resource
import select
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cloudlet.forwarder.loop import READ, Loop
from cloudlet.forwarder.relay import Relay

SECONDS = 10.0
RESET = struct.pack("ii", 1, 0)


class Relayed:
    """A relay in a thread, the address in front of it and the listener behind it."""

    def __init__(self) -> None:
        self.front = socket.create_server(("127.0.0.1", 0))
        self.behind = socket.create_server(("127.0.0.1", 0))
        self.behind.settimeout(SECONDS)
        self._stop_read, self._stop_write = os.pipe()
        loop = Loop()
        Relay(loop, 2).listen(self.front, self.behind.getsockname())
        loop.add(self._stop_read, READ, lambda _events: loop.stop())
        self._thread = threading.Thread(target=loop.run)
        self._thread.start()

    def pair(self) -> tuple[socket.socket, socket.socket]:
        client = socket.create_connection(self.front.getsockname(), SECONDS)
        server, _ = self.behind.accept()
        server.settimeout(SECONDS)
        return client, server

    def close(self) -> None:
        os.close(self._stop_write)
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        os.close(self._stop_read)
        self.front.close()
        self.behind.close()


@pytest.fixture
def relayed() -> Iterator[Relayed]:
    relayed = Relayed()
    yield relayed
    relayed.close()


@pytest.mark.parametrize("client_first", [True, False])
def test_each_end_is_handed_on_by_itself(relayed: Relayed, client_first: bool) -> None:
    first, second = relayed.pair() if client_first else relayed.pair()[::-1]
    with first, second:
        first.sendall(b"question")
        first.shutdown(socket.SHUT_WR)
        assert second.recv(8, socket.MSG_WAITALL) == b"question"
        assert second.recv(1) == b""
        second.sendall(b"answer")
        second.close()
        assert first.recv(6, socket.MSG_WAITALL) == b"answer"
        assert first.recv(1) == b""


@pytest.mark.parametrize("client_first", [True, False])
def test_a_reset_is_handed_on_as_a_reset(relayed: Relayed, client_first: bool) -> None:
    first, second = relayed.pair() if client_first else relayed.pair()[::-1]
    with first, second:
        first.sendall(b"half an ans")
        assert second.recv(11, socket.MSG_WAITALL) == b"half an ans"
        first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        first.close()
        with pytest.raises(ConnectionResetError):
            second.recv(1)


def test_a_reset_after_a_half_close_is_noticed(relayed: Relayed) -> None:
    client, server = relayed.pair()
    with client, server:
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.close()
        poll = select.poll()
        poll.register(server, 0)
        assert poll.poll(SECONDS * 1000), "the server is not told that nobody listens any more"


def test_a_slow_reader_gets_everything_after_the_sender_has_ended(relayed: Relayed) -> None:
    data = os.urandom(16 << 20)
    client, server = relayed.pair()
    with client, server, ThreadPoolExecutor(1) as executor:
        client.settimeout(None)

        def send() -> None:
            client.sendall(data)
            client.close()

        sending = executor.submit(send)
        while select.select([], [client], [], 0.5)[1] and not sending.done():
            pass  # until no more finds room: the sender is held back
        received = bytearray()
        while block := server.recv(1 << 20):
            received += block
        sending.result(SECONDS)
    assert received == data


def test_a_refused_connection_behind_is_a_reset_in_front(relayed: Relayed) -> None:
    relayed.behind.close()
    with (
        pytest.raises(ConnectionResetError),  # which may come before connecting is over
        socket.create_connection(relayed.front.getsockname(), SECONDS) as client,
    ):
        client.recv(1)


def test_each_connection_that_ends_makes_room(relayed: Relayed) -> None:
    for _ in range(20):
        client, server = relayed.pair()
        with client, server:
            client.close()
            assert server.recv(1) == b""
            server.close()


def test_out_of_descriptors_it_waits_and_then_goes_on(relayed: Relayed) -> None:
    first = relayed.pair()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    waiting = socket.socket()
    waiting.settimeout(SECONDS)
    highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(highest)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        waiting.connect(relayed.front.getsockname())
        waiting.sendall(b"patience")
        first[0].sendall(b"x")
        assert first[1].recv(1) == b"x"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in spare:
            os.close(descriptor)
    server, _ = relayed.behind.accept()
    with waiting, server, first[0], first[1]:
        server.settimeout(SECONDS)
        assert server.recv(8, socket.MSG_WAITALL) == b"patience"
