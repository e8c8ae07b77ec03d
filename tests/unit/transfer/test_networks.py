"""Where users may lead a site: which addresses are public, names that change, redirects, proxies."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cloudlet.errors import FailedError, UsageError
from cloudlet.transfer import networks
from cloudlet.transfer.networks import EVERYWHERE, Networks
from cloudlet.transfer.resource import ask, request_for
from cloudlet.transfer.source import open_source
from tests.service.certificates import certificate

PUBLIC = Networks(())
INSIDE = [
    "127.0.0.1",
    "127.8.8.8",
    "2130706433",
    "0x7f.1",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "169.254.169.254",
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "[::]",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:a9fe:a9fe]",
    "[::7f00:1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b::a00:1]",
    "[2002:7f00:1::]",
    "[2001:db8::1]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[fe80::1]",
    "[fec0::1]",
    "[ff02::1]",
    "localhost",
]
OUTSIDE = ["8.8.8.8", "193.0.0.1", "[2001:4860:4860::8888]", "[64:ff9b::808:808]", "[::ffff:8.8.8.8]"]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@contextmanager
def listening(address: str = "127.0.0.1", **headers: str) -> Iterator[tuple[str, list[str]]]:
    """A web server: its URL, and what it is asked for. With headers it sends who asks elsewhere."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(302 if headers else 200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"here")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((address, 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://{address}:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("host", INSIDE)
def test_what_is_not_public_is_refused(host: str) -> None:
    with pytest.raises(UsageError, match=r"^x\.url: .* which is not a public address \(the site's operator"):
        PUBLIC.check(f"https://user:secret@{host}:8443/path", "x.url")
    with pytest.raises(UsageError):
        PUBLIC.connect(host.strip("[]"), 80, 1)
    EVERYWHERE.check(f"http://{host}/", "x.url")


@pytest.mark.parametrize("host", OUTSIDE)
def test_what_is_public_is_not(host: str) -> None:
    PUBLIC.check(f"http://{host}/", "x.url")


@pytest.mark.parametrize("url", ["http://[::1/", "http://x:y/", "http://x:99999/"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"^x\.url: "):
        PUBLIC.check(url, "x.url")


def test_a_name_that_nobody_knows_leads_nowhere() -> None:
    PUBLIC.check("http://nobody.invalid/", "x.url")
    PUBLIC.check(f"http://{'x' * 70}.invalid/", "x.url")
    with pytest.raises(OSError, match=r".") as raised:
        PUBLIC.connect("nobody.invalid", 80, 1)
    assert isinstance(raised.value, socket.gaierror)


def test_what_the_operator_allows_is_allowed() -> None:
    some = Networks(["127.0.0.1", "10.1.0.0/16", "fd00::/8"])
    for host in ("127.0.0.1", "10.1.2.3", "[fd00::1]", "[::ffff:10.1.2.3]", "[64:ff9b::a01:203]"):
        some.check(f"http://{host}/", "x.url")
    for host in ("127.0.0.2", "10.2.0.1", "[fc00::1]"):
        with pytest.raises(UsageError):
            some.check(f"http://{host}/", "x.url")
    for wrong in ("10.1.0.1/16", "everywhere", "10.1.0.0/33"):
        with pytest.raises(UsageError, match="no network"):
            Networks([wrong])


def test_a_name_that_changes_is_looked_at_when_it_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo
    leads = ["8.8.8.8", "127.0.0.1"]

    def resolve(host: str, port: Any, *args: Any, **more: Any) -> Any:
        return real(leads.pop(0) if host == "rebound.example" else host, port, *args, **more)

    monkeypatch.setattr(networks.socket, "getaddrinfo", resolve)
    with listening() as (url, asked):
        port = url.rpartition(":")[2]
        PUBLIC.check(f"http://rebound.example:{port}/", "x.url")
        with pytest.raises(UsageError, match=r"rebound\.example leads to 127\.0\.0\.1"):
            ask(request_for(f"http://rebound.example:{port}/"), 5, PUBLIC)
        assert (asked, leads) == ([], [])


def test_of_several_addresses_those_are_tried_that_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 1)) for address in ("10.0.0.1", "127.0.0.9")
    ]
    with listening("127.0.0.2") as (url, _):
        port = int(url.rpartition(":")[2])
        found.append((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.2", port)))
        monkeypatch.setattr(networks.socket, "getaddrinfo", lambda *_, **__: found)
        with Networks(["127.0.0.0/8"]).connect("several.example", port, 5) as connection:
            assert connection.getpeername() == ("127.0.0.2", port)
            assert connection.gettimeout() == 5


def test_redirects_are_looked_at() -> None:
    here = Networks(["127.0.0.1"])
    with listening("127.0.0.2") as (elsewhere, asked), listening(Location=f"{elsewhere}/x") as (url, _):
        with pytest.raises(UsageError, match=r"127\.0\.0\.2"):
            ask(request_for(url), 5, here)
        assert asked == []
        with ask(request_for(url), 5, Networks(["127.0.0.0/8"])) as answer:
            assert (answer.read(), asked) == (b"here", ["/x"])
    for target in ("ftp://127.0.0.1/x", "file:///etc/passwd"):
        with listening(Location=target) as (url, _), pytest.raises((OSError, FailedError)):
            ask(request_for(url), 5, here)


def test_a_download_is_refused_at_once() -> None:
    with (
        listening() as (url, asked),
        open_source(url, io.BytesIO(), networks=PUBLIC) as source,
        pytest.raises(UsageError, match="not a public address"),
    ):
        source.read(1)
    assert asked == []


def test_a_proxy_decides_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as (url, asked):
        monkeypatch.setenv("http_proxy", url)
        with ask(request_for("http://10.0.0.1/x"), 5, PUBLIC) as answer:
            assert answer.read() == b"here"
        assert asked == ["http://10.0.0.1/x"]


def test_a_certificate_is_for_the_name_not_the_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown, key = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(shown))
    context = networks.ssl.SSLContext(networks.ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown, key)
    here = Networks(["127.0.0.0/8"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        names: list[str | None] = []
        context.sni_callback = lambda _, name, __: names.append(name)

        def serve() -> None:
            for _ in range(2):
                client, _ = listener.accept()
                try:
                    with context.wrap_socket(client, server_side=True) as spoken:
                        spoken.recv(1)
                except OSError:
                    client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        good = here.connection("https", f"127.0.0.1:{port}", 5)
        good.connect()
        good.close()
        bad = here.connection("https", f"other.localhost:{port}", 5)
        monkeypatch.setattr(
            networks.socket, "getaddrinfo",
            lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))],
        )  # fmt: skip
        with pytest.raises(networks.ssl.SSLCertVerificationError, match="Hostname mismatch"):
            bad.connect()
        thread.join(10)
        assert names == [None, "other.localhost"]


def test_the_machine_itself_is_not_public() -> None:
    program = (
        "from cloudlet.transfer.networks import Networks\n"
        "Networks(()).check('http://8.8.4.4/', 'other')\n"
        "Networks(['8.8.8.0/24']).check('http://8.8.8.8/', 'allowed')\n"
        "Networks(()).check('http://8.8.8.8/', 'ours')\n"
    )
    inside = f"ip link set lo up && ip addr add 8.8.8.8/32 dev lo && exec '{sys.executable}' -c \"{program}\""
    done = subprocess.run(
        ["unshare", "--map-root-user", "--net", "sh", "-c", inside],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "ours: 8.8.8.8 leads to 8.8.8.8, which is not a public address" in done.stderr
