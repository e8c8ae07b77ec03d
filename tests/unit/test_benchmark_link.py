"""The emulated link of the benchmarks: it serves the right bytes, at the rate and delay that it was told.

These tests are about time because time is what the link makes. Nothing may come faster than the link
allows; on a busy machine it may come later.
"""

import http.client
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import urlsplit

import pytest
from benchmarks.link import link

BYTES = 1_500_000
DEADLINE = 20.0
UNLIMITED_MBIT = 10_000


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("link") / "served.bin"
    path.write_bytes(random.Random(1).randbytes(BYTES))
    return path


@pytest.fixture(scope="module")
def content(path):
    return path.read_bytes()


@pytest.fixture(scope="module")
def fast(path):
    with link(path, UNLIMITED_MBIT, 0) as url:
        yield url


def connect(url):
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=DEADLINE)
    connection.connect()
    return closing(connection)


def ask(connection, url, method="GET", path=None, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path or urlsplit(url).path, headers=names)
    response = connection.getresponse()
    return response, response.read()


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=1447-1448", 1447, 1448),
        ("bytes=100000-299999", 100_000, 299_999),
        ("bytes=1400000-", 1_400_000, BYTES - 1),
        ("bytes=1400000-9999999", 1_400_000, BYTES - 1),
        ("bytes=-10", BYTES - 10, BYTES - 1),
    ],
)
def test_a_range_is_those_bytes(fast, content, wanted, first, last):
    with connect(fast) as connection:
        response, body = ask(connection, fast, Range=wanted)
    assert response.status == 206
    assert response.headers["Content-Range"] == f"bytes {first}-{last}/{BYTES}"
    assert body == content[first : last + 1]


def test_requests_on_one_connection(fast, content):
    with connect(fast) as connection:
        own_socket = connection.sock
        whole, body = ask(connection, fast)
        assert (whole.status, whole.headers["Accept-Ranges"]) == (200, "bytes")
        assert body == content
        tag = whole.headers["ETag"]
        same, body = ask(connection, fast, Range="bytes=5-9", If_Range=tag)
        assert (same.status, body) == (206, content[5:10])
        changed, body = ask(connection, fast, Range="bytes=5-9", If_Range='"another"')
        assert (changed.status, body) == (200, content)
        beyond, body = ask(connection, fast, Range=f"bytes={BYTES}-")
        assert (beyond.status, beyond.headers["Content-Range"], body) == (416, f"bytes */{BYTES}", b"")
        head, body = ask(connection, fast, method="HEAD")
        assert (head.status, head.headers["Content-Length"], body) == (200, str(BYTES), b"")
        assert ask(connection, fast, path="/other")[0].status == 404
        assert ask(connection, fast, method="DELETE")[0].status == 405
        assert connection.sock is own_socket
        last, body = ask(connection, fast, Connection="close")
        assert (last.will_close, body) == (True, content)


def test_a_round_trip(path, content):
    rtt = 0.05
    with link(path, 10, rtt * 1000) as url:
        began = time.monotonic()
        with connect(url) as connection:
            ask(connection, url, Range="bytes=0-99")
            first = time.monotonic() - began
            later = []
            for place in range(0, 500, 100):
                began = time.monotonic()
                assert ask(connection, url, Range=f"bytes={place}-{place + 99}")[1] == content[place:][:100]
                later.append(time.monotonic() - began)
    assert first >= 2 * rtt  # the handshake's, and its own
    assert min(later) >= rtt
    assert sorted(later)[len(later) // 2] <= rtt + 0.025


def test_a_connection_starts_slowly(path):
    """100,000 bytes are 10, 20 and 40 packets of three round trips; then the window is open."""
    rtt = 0.05
    with link(path, UNLIMITED_MBIT, rtt * 1000) as url, connect(url) as connection:
        ask(connection, url, Range="bytes=0-0")
        seconds = []
        for _ in range(4):
            began = time.monotonic()
            ask(connection, url, Range="bytes=0-99999")
            seconds.append(time.monotonic() - began)
    assert seconds[0] >= 3 * rtt
    assert min(seconds[1:]) < 2 * rtt


def bytes_in_a_second(url, together):
    """Bytes per second of a download, counted for a second once all downloads have begun."""
    with connect(url) as connection:
        connection.request("GET", urlsplit(url).path)
        response = connection.getresponse()
        response.read(100_000)  # the slow start is over
        together.wait(DEADLINE)
        began = now = time.monotonic()
        count = 0
        while now < began + 1:
            count += len(response.read1(65_536))
            now = time.monotonic()
        return count / (now - began)


@pytest.mark.parametrize("number", [1, 2])
def test_all_connections_share_the_rate(path, number):
    mbit = 8
    with link(path, mbit, 40) as url, ThreadPoolExecutor(number) as pool:
        together = threading.Barrier(number)
        rates = list(pool.map(lambda _: bytes_in_a_second(url, together), range(number)))
    assert sum(rates) == pytest.approx(mbit * 1e6 / 8, rel=0.05)
    assert max(rates) <= 1.25 * min(rates)


def test_what_a_gone_client_asked_for_is_not_sent(path):
    mbit, size = 8, 200_000
    with link(path, mbit, 10) as url, connect(url) as connection:
        ask(connection, url, Range=f"bytes=0-{size - 1}")
        with connect(url) as gone:
            gone.request("GET", urlsplit(url).path)
            gone.getresponse().read(1000)
        began = time.monotonic()
        ask(connection, url, Range=f"bytes=0-{size - 1}")
        seconds = time.monotonic() - began
    wire = size * 8e-6 / mbit
    assert wire <= seconds < 1.7 * wire  # shared with another, it would be twice as long
