"""The wire between the benchmarks' sites: the right bytes, never faster than it was told; cut and mended.

Nothing may come faster than the wire allows; on a busy machine it may come later.
"""

import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import pytest
from benchmarks.wire import wire

DEADLINE = 20.0
BURST_SECONDS = 0.01
"""What may come at once, in seconds of the rate: the wire's burst, and a piece."""


@pytest.fixture
def echo():
    """A place that sends back what it is sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(8) as threads:

        def answer(connection):
            with closing(connection), suppress(OSError):
                while piece := connection.recv(1 << 16):
                    connection.sendall(piece)

        def accept():
            with suppress(OSError):
                while True:
                    threads.submit(answer, listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def connect(port):
    return closing(socket.create_connection(("127.0.0.1", port), timeout=DEADLINE))


def there_and_back(connection, content):
    """What comes back of what is sent."""
    came = bytearray()
    sending = threading.Thread(target=connection.sendall, args=(content,))
    sending.start()
    while len(came) < len(content) and (piece := connection.recv(1 << 16)):
        came += piece
    sending.join()
    return bytes(came)


@pytest.mark.parametrize("mbit", [0, 40])
def test_what_is_sent_comes(echo, mbit):
    content = random.Random(1).randbytes(500_000)
    with wire([echo], [echo], mbit) as between:
        for port in (*between.there, *between.back):
            with connect(port) as connection:
                assert there_and_back(connection, content) == content
        assert between.carried() == 2 * 2 * len(content)


def test_connections_share_the_rate_of_a_direction(echo):
    content = random.Random(2).randbytes(250_000)
    with wire([echo], mbit=8) as between, ThreadPoolExecutor(2) as threads:

        def use():
            with connect(between.there[0]) as connection:
                return there_and_back(connection, content)

        began = time.monotonic()
        assert list(threads.map(lambda _: use(), range(2))) == [content] * 2
        assert time.monotonic() - began >= 2 * len(content) / 1e6 - BURST_SECONDS


def test_a_new_rate_counts_at_once(echo):
    content = random.Random(3).randbytes(100_000)
    with wire([echo], mbit=0) as between, connect(between.there[0]) as connection:
        assert there_and_back(connection, content) == content
        between.rate(2)
        began = time.monotonic()
        assert there_and_back(connection, content) == content
        assert time.monotonic() - began >= len(content) / 250_000 - BURST_SECONDS


def test_a_cut_ends_connections_until_it_is_mended(echo):
    with wire([echo]) as between:
        with connect(between.there[0]) as connection:
            assert there_and_back(connection, b"before") == b"before"
            between.cut()
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        with pytest.raises(ConnectionResetError), connect(between.there[0]) as connection:
            connection.recv(1)
        between.mend()
        with connect(between.there[0]) as connection:
            assert there_and_back(connection, b"after") == b"after"


def test_one_who_has_said_all_is_still_answered(echo):
    with wire([echo], mbit=8) as between, connect(between.there[0]) as connection:
        connection.sendall(b"all")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(10) == b"all"
        assert connection.recv(10) == b""


def test_nothing_where_a_place_leads_is_an_end():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        place = gone.getsockname()
    # The end may come before connecting is over.
    with wire([place]) as between, suppress(ConnectionResetError), connect(between.there[0]) as connection:
        assert connection.recv(1) == b""
