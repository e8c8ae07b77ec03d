"""Bytes from a file, a pipe or a web server: in order and out of it, at once, through any fault."""

from __future__ import annotations

import datetime
import io
import ipaddress
import math
import os
import random
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cloudlet.errors import CloudletError, ExitCode, FailedError, RefusedError, TruncatedError
from cloudlet.transfer.download import SKIP_BYTES
from cloudlet.transfer.link import Link
from cloudlet.transfer.resource import Resource
from cloudlet.transfer.source import Source, open_source
from tests.cli.web import CUT_AFTER, Web, serving

SEED = 20240607
WHOLE = random.Random(SEED).randbytes(2 << 20)
NOTHING = io.BytesIO()
DEADLINE = 20.0


@pytest.fixture
def web() -> Iterator[Web]:
    with serving(WHOLE) as served:
        yield served


@pytest.fixture
def small() -> Iterator[Web]:
    """A server of a few times what it cuts after."""
    with serving(WHOLE[:130_000]) as served:
        yield served


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "whole"
    path.write_bytes(WHOLE)
    return path


def read_on(source: Source, size: int = -1) -> bytes:
    """The next ``size`` bytes, or all that is left."""
    data = bytearray()
    while size < 0 or len(data) < size:
        piece = source.read(size - len(data) if size >= 0 else 1 << 20)
        if not piece:
            break
        data += piece
    return bytes(data)


def aside(run: Callable[[], bytes | int]) -> Future:
    """What comes of a call in another thread."""
    future: Future = Future()

    def report() -> None:
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=report, daemon=True).start()
    return future


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# In order.


@pytest.mark.parametrize("how", ["whole", "cut", "cut-no-ranges", "moved", "mending", "gone"])
def test_a_stream_is_whole(how: str, small: Web) -> None:
    small.back.set()
    with open_source(f"{small.url}/{how}", NOTHING) as source:
        assert read_on(source) == small.content
        assert source.read(1) == b""
        assert source.offset == len(small.content)
        assert source.ranged is (how != "cut-no-ranges")


def test_a_file_and_a_pipe(file: Path) -> None:
    with open_source(str(file), NOTHING) as source:
        assert (source.ranged, source.rate()) == (True, math.inf)
        assert read_on(source) == WHOLE
    with file.open("rb") as standard_input, open_source("-", standard_input) as source:
        assert not source.ranged
        with pytest.raises(FailedError, match="comes in order only"):
            source.fetch(0, 1)
        assert read_on(source, 1000) == WHOLE[:1000]
        source.seek(1_000_000)
        assert read_on(source) == WHOLE[1_000_000:]
        assert source.received == len(WHOLE)
        source.seek(0)
        with pytest.raises(FailedError, match="standard input does not go back"):
            source.read(1)


def test_a_named_pipe_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writing = aside(lambda: path.write_bytes(WHOLE[:1000]))
    with open_source(str(path), NOTHING) as source:
        assert not source.ranged
        assert read_on(source) == WHOLE[:1000]
    writing.result(DEADLINE)


# Elsewhere.


@pytest.mark.parametrize("how", ["file", "whole", "cut", "no-ranges", "claimed-ranges"])
def test_going_on_anywhere(how: str, small: Web, tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(small.content)
    chance = random.Random(SEED)
    with open_source(str(path) if how == "file" else f"{small.url}/{how}", NOTHING) as source:
        for _ in range(20):
            at = chance.randrange(len(small.content) + 1)
            size = chance.choice((1, 5000))
            source.seek(at)
            assert source.offset == at
            assert read_on(source, size) == small.content[at : at + size]
        assert read_on(source) == small.content[source.offset :] or source.offset == len(small.content)
        source.seek(0)
        assert read_on(source) == small.content, "it goes back after its end, too"


def test_what_is_ahead_is_not_asked_for_again(web: Web) -> None:
    with open_source(f"{web.url}/whole", NOTHING) as source:
        wait_for(lambda: source.received == len(WHOLE))
        for at in (10, 100_000, 1_500_000):
            source.seek(at)
            assert read_on(source, 100) == WHOLE[at : at + 100]
    assert web.ranges() == [None]


def test_what_is_a_little_ahead_is_read(web: Web) -> None:
    web.rate = 100_000
    with open_source(f"{web.url}/whole", NOTHING) as source:
        source.read(1)
        source.seek(source.received + SKIP_BYTES // 2)
        at = source.offset
        assert read_on(source, 100) == WHOLE[at : at + 100]
    assert web.ranges() == [None]


def test_what_is_held_is_not_sent(web: Web) -> None:
    web.rate = 500_000
    held = len(WHOLE) - 100_000
    with open_source(f"{web.url}/whole", NOTHING) as source:
        read_on(source, 1000)
        source.seek(held)
        assert read_on(source) == WHOLE[held:]
    assert web.ranges() == [None, f"bytes={held}-"]
    assert web.sent < len(WHOLE) * 3 / 4
    assert web.sent_twice() <= SKIP_BYTES


def test_without_ranges_it_is_read_up_to_there(web: Web) -> None:
    with open_source(f"{web.url}/no-ranges", NOTHING) as source:
        source.read(1)
        source.seek(len(WHOLE) - 1000)
        assert read_on(source) == WHOLE[-1000:]
    assert web.ranges() == [None]


# Out of order.


def test_ranges_beside_the_stream(web: Web) -> None:
    chance = random.Random(SEED)
    with open_source(f"{web.url}/moved", NOTHING, rate=4e6) as source:
        assert source.read(1) == WHOLE[:1]
        stream = aside(lambda: read_on(source))
        for _ in range(200):
            at = chance.randrange(len(WHOLE) - 8000)
            size = chance.randrange(1, 8000)
            assert source.fetch(at, size) == WHOLE[at : at + size]
        assert stream.result(DEADLINE) == WHOLE[1:]
    assert {path for path, wanted in web.asked if wanted} == {"/whole"}, "it is known where it moved to"
    assert web.connections == 3, "the redirect, the stream, and one for all ranges"


def test_an_address_that_expires_is_asked_for_again(web: Web) -> None:
    with open_source(f"{web.url}/signed", NOTHING, rate=4e6) as source:
        assert source.read(1) == WHOLE[:1]
        for ticket in (1, 2, 3):
            web.ticket = ticket
            for at in (100_000, 200_000):
                assert source.fetch(at, 1000) == WHOLE[at : at + 1000]
        assert read_on(source) == WHOLE[1:]
    assert [path for path, _ in web.asked].count("/signed") == 3


def test_an_address_that_is_refused_anew_is_refused(web: Web) -> None:
    with open_source(f"{web.url}/signed", NOTHING, rate=4e6) as source:
        source.read(1)
        web.ticket = 2
        web.never = True
        with pytest.raises(RefusedError):
            source.fetch(0, 1000)


def test_ranges_of_a_file(file: Path) -> None:
    with open_source(str(file), NOTHING) as source:
        assert source.fetch(1_000_000, 100_000) == WHOLE[1_000_000:1_100_000]
        with pytest.raises(TruncatedError, match="ends before byte"):
            source.fetch(len(WHOLE) - 1, 2)
        assert read_on(source) == WHOLE


def test_ranges_through_cuts(small: Web) -> None:
    chance = random.Random(SEED)
    with open_source(f"{small.url}/cut", NOTHING) as source:
        assert read_on(source, 1000) == small.content[:1000]
        stream = aside(lambda: read_on(source))
        for size in (CUT_AFTER, CUT_AFTER + 1, 125_000, *(chance.randrange(1, 9000) for _ in range(50))):
            at = chance.randrange(len(small.content) - size)
            assert source.fetch(at, size) == small.content[at : at + size]
        assert stream.result(DEADLINE) == small.content[1000:]


def test_a_connection_that_the_server_ends_between_ranges(small: Web) -> None:
    with open_source(f"{small.url}/closing-ranges", NOTHING) as source:
        source.read(1)
        for at in range(5):
            assert source.fetch(at, 100) == small.content[at : at + 100]
    assert small.connections == 6


def test_a_range_does_not_wait_for_the_stream_nor_the_stream_for_it(web: Web) -> None:
    size, rate = 64 << 10, 1.25e6
    began = time.monotonic()
    with open_source(f"{web.url}/whole", NOTHING, rate=rate) as source:
        source.read(1)
        before = source.received
        source.fetch(1_000_000, size)
        beside = source.received - before - size
        assert size / 4 < beside < size * 4
        assert source.received <= rate * (time.monotonic() - began + 0.1)


def test_the_rate(web: Web) -> None:
    with open_source(f"{web.url}/whole", NOTHING, rate=2e6) as source:
        source.read(1)
        read_on(source, 400_000)
        rate = source.rate()
        assert rate is not None
        assert 0 < rate < 2.5e6
    link = Link()
    link.came(1 << 20)
    assert link.rate() is None, "one piece says nothing"


# Faults.


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ("no-ranges", FailedError, "comes as a whole only"),
        ("claimed-ranges", FailedError, "comes as a whole only"),
        ("wrong-range", FailedError, "answers bytes 1001-1100 when asked for bytes 1000-1099"),
        ("short-range", FailedError, "answers 50 bytes for the 100 of its range"),
        ("changed-ranges", TruncatedError, "changed while it was read"),
        ("slow-ranges", FailedError, "does not come: timed out"),
    ],
)
def test_a_range_that_is_not_what_it_should_be(
    how: str, kind: type[CloudletError], says: str, web: Web
) -> None:
    with open_source(f"{web.url}/{how}", NOTHING, patience=0.6) as source:
        source.read(1)
        with pytest.raises(kind, match=says):
            source.fetch(1000, 100)
        assert read_on(source) == WHOLE[1:], "the stream is none the worse for it"
        source.seek(1000)
        if how in ("no-ranges", "claimed-ranges"):
            assert read_on(source, 100) == WHOLE[1000:1100]
        else:
            with pytest.raises(kind):
                source.read(1)


def test_a_range_that_lies_is_for_digests_to_find(web: Web) -> None:
    with open_source(f"{web.url}/lying-range", NOTHING) as source:
        source.read(1)
        assert source.fetch(1000, 3) == bytes(255 - byte for byte in WHOLE[1000:1003])


def test_a_range_beyond_the_end(web: Web) -> None:
    with open_source(f"{web.url}/whole", NOTHING) as source:
        source.read(1)
        with pytest.raises(TruncatedError, match="ends at byte"):
            source.fetch(len(WHOLE) - 10, 11)
        assert source.fetch(len(WHOLE) - 10, 10) == WHOLE[-10:]


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("missing", ExitCode.NOT_FOUND, "is not there"),
        ("loop", ExitCode.FAILED, "leads on and on"),
        ("changed", ExitCode.INTEGRITY, "changed while it was read"),
    ],
)
def test_what_does_not_get_better_is_an_error_at_once(how: str, code: ExitCode, says: str, web: Web) -> None:
    with open_source(f"{web.url}/{how}", NOTHING, patience=600.0) as source:
        with pytest.raises(CloudletError, match=says) as caught:
            read_on(source)
        assert caught.value.exit_code == code


def test_a_server_with_errors_is_asked_until_patience_is_over(web: Web) -> None:
    # Within it a busy machine, too, answers several times.
    with open_source(f"{web.url}/broken", NOTHING, patience=2.0) as source:
        with pytest.raises(FailedError, match="does not come: status 500"):
            source.read(1)
        tries = len(web.asked)
        assert tries > 2
        source.seek(0)
        with pytest.raises(FailedError, match="status 500"):
            source.read(1)
        assert len(web.asked) > tries, "who seeks tries again"


@pytest.mark.parametrize("how", ["stream", "range"])
def test_a_server_that_is_gone_for_a_while(how: str, web: Web) -> None:
    with open_source(f"{web.url}/gone", NOTHING, patience=DEADLINE) as source:
        assert read_on(source, 10) == WHOLE[:10]
        assert web.left.wait(DEADLINE)
        coming = aside(lambda: source.fetch(500_000, 10) if how == "range" else read_on(source))
        with pytest.raises(TimeoutError):
            coming.result(0.3)
        web.back.set()
        assert coming.result(DEADLINE) == (WHOLE[500_000:500_010] if how == "range" else WHOLE[10:])


@pytest.mark.parametrize("how", ["gone", "stall"])
def test_a_server_that_gives_no_more(how: str, web: Web) -> None:
    began = time.monotonic()
    with open_source(f"{web.url}/{how}", NOTHING, patience=0.6) as source:
        with pytest.raises(FailedError, match=r"does not come: .*\(\d+ bytes had come; try again later\)"):
            read_on(source)
        assert source.offset == (len(WHOLE) // 2 if how == "stall" else CUT_AFTER)
    assert time.monotonic() - began < DEADLINE


# The end.


@pytest.mark.parametrize("how", ["stream", "range"])
def test_the_end_frees_who_waits(how: str, web: Web) -> None:
    path = "stall" if how == "stream" else "slow-ranges"
    with open_source(f"{web.url}/{path}", NOTHING, patience=600.0) as source:
        source.read(1)
        waiting = aside(lambda: read_on(source) if how == "stream" else source.fetch(0, 1))
        wait_for(lambda: len(web.asked) == 2 if how == "range" else source.offset >= len(WHOLE) // 2)
        source.close()
        with pytest.raises(FailedError, match="was closed while it was read"):
            waiting.result(5.0)
    with pytest.raises(FailedError, match="was closed"):
        source.fetch(0, 1)


# Other ways.


@pytest.fixture
def opener() -> Iterator[None]:
    """urllib keeps what it once found in the environment."""
    urllib.request.install_opener(None)
    yield
    urllib.request.install_opener(None)


@pytest.mark.usefixtures("opener")
def test_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = _certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with serving(WHOLE, tls) as web:
        with (
            open_source(f"{web.url}/whole", NOTHING) as source,
            pytest.raises(FailedError, match="CERTIFICATE"),
        ):
            source.read(1)
        urllib.request.install_opener(None)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with open_source(f"{web.url}/whole", NOTHING) as source:
            assert source.read(1) == WHOLE[:1]
            before = web.connections
            for at in (1000, 5, 1_000_000):
                assert source.fetch(at, 100_000) == WHOLE[at : at + 100_000]
            assert web.connections == before + 1
            assert read_on(source) == WHOLE[1:]


@pytest.mark.usefixtures("opener")
def test_by_a_proxy(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", web.url)
    monkeypatch.delenv("no_proxy", raising=False)
    with open_source("http://apps.invalid/whole", NOTHING) as source:
        assert source.read(1) == WHOLE[:1]
        assert source.fetch(1000, 100) == WHOLE[1000:1100]
    assert web.asked == [
        ("http://apps.invalid/whole", None),
        ("http://apps.invalid/whole", "bytes=1000-1099"),
    ]


def _certificate(folder: Path) -> Path:
    """A certificate of 127.0.0.1, signed by itself, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Length": "9" * 5000},
        {"Content-Length": "\u0663"},
        {"Content-Range": f"bytes 0-{'9' * 5000}/*"},
        {"Content-Range": f"bytes 0-1/{'9' * 5000}"},
    ],
    ids=["length", "digits of another script", "range", "total"],
)
def test_numbers_that_are_none_say_nothing(headers: dict[str, str]) -> None:
    told = Message()
    for name, value in headers.items():
        told[name] = value
    answer = SimpleNamespace(status=206 if "Content-Range" in headers else 200, headers=told)
    assert Resource.of("http://where", answer).total is None
    if answer.status == 206:
        with pytest.raises(FailedError, match="not with which one"):
            Resource.of("http://where", answer).check_range(answer, 0)
