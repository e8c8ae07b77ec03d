"""A site that serves TLS: every way to it, who does not speak it as they should, and a new certificate."""

from __future__ import annotations

import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import urlsplit

import openstack
import pytest
from requests.auth import _basic_auth_str

from cloudlet.client import CloudletService, connect
from cloudlet.client.faults import LostError
from tests.service.certificates import certificate
from tests.service.conftest import PASSWORD, Caller, Made
from tests.service.served import Served, serve_command, served, settings_file
from tests.service.test_cli import run


@pytest.fixture(scope="module")
def site(made: Made, hashed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One site for all of them; what it shows is in ``tls.pem`` beside its log."""
    folder = tmp_path_factory.mktemp("tls")
    shown, key = certificate(folder)
    with served(
        settings_file(folder, made, hashed, api={"tls_certificate": shown, "tls_key": key})
    ) as running:
        running.call.session.verify = str(shown)
        yield running


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OS_CACERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def trusted(site: Served) -> str:
    return str(site.log.with_name("tls.pem"))


def plain(site: Served) -> socket.socket:
    """A connection on which nobody has said anything."""
    parts = urlsplit(site.call.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def is_served(site: Served, trusted: str, within: float = 5.0) -> None:
    """Others are served, on connections of their own, and in time."""
    began = time.monotonic()
    for _ in range(3):
        fresh = Caller(site.call.url)
        fresh.session.verify = trusted
        assert "instances" in fresh.get("/v1/instances")
        fresh.session.close()
    assert time.monotonic() - began < within


def test_a_program_that_knows_only_http(site: Served, trusted: str) -> None:
    context = ssl.create_default_context(cafile=trusted)
    request = urllib.request.Request(
        f"{site.call.url}/v1/instances", headers={"Authorization": _basic_auth_str("mia", PASSWORD)}
    )
    assert site.call.url.startswith("https://127.0.0.1:")
    with urllib.request.urlopen(request, context=context, timeout=10) as answer:
        assert answer.read() == b'{"instances":[],"links":[]}'
    versions = site.call.get("/")["versions"]
    assert versions[0]["links"][0]["href"].startswith("https://"), "links lead to where nobody listens"


def test_a_day_over_tls(site: Served, trusted: str, made: Made) -> None:
    with connect(site.call.url, user="paula", password=PASSWORD, verify=trusted) as paula:
        overlay = paula.upload_overlay(paula.create_overlay("hello", public=True), made.overlay)
        app = paula.create_app("hello", overlay)
        instance = paula.wait_for_instance(paula.create_instance(app_id=app.id))
        assert instance.state == "active"
        saved = paula.wait_for_operation(paula.save_instance(instance, "saved"))
        target = site.log.with_name("got")
        paula.download_overlay(saved.resources["overlay"], target)
        assert target.stat().st_size == paula.get_overlay(saved.resources["overlay"]).size
        paula.wait_for_operation(paula.delete_instance(instance))
    auth = {"endpoint": site.call.url, "username": "mia", "password": PASSWORD}
    with closing(openstack.connect(auth_type="http_basic", auth=auth, cacert=trusted)) as connection:
        connection.add_service(CloudletService())
        assert list(connection.cloudlet.instances()) == []
    with pytest.raises(LostError, match="certificate"):
        connect(site.call.url, user="paula", password=PASSWORD)


def test_the_command_line(
    site: Served, trusted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLOUDLET_SITE", site.call.url)
    monkeypatch.setenv("CLOUDLET_USER", "mia")
    monkeypatch.setenv("CLOUDLET_PASSWORD", PASSWORD)
    assert run("--os-cacert", trusted, "instance", "list", "-f", "json").out == "[]\n"
    unknown = run("instance", "list")
    assert (unknown.status, unknown.out) == (1, "")
    assert "certificate" in unknown.err
    assert "--os-cacert" in unknown.err
    missing = run("--os-cacert", tmp_path / "nothing", "instance", "list")
    assert missing.status == 3
    monkeypatch.setenv("OS_CACERT", trusted)
    assert run("instance", "list", "-f", "json").out == "[]\n"
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))
    (tmp_path / "clouds.yaml").write_text(
        f"clouds: {{edge: {{auth_type: http_basic, cloudlet_api_version: '1', "
        f"auth: {{endpoint: '{site.call.url}', username: mia, password: '{PASSWORD}'}}}}}}"
    )
    monkeypatch.delenv("CLOUDLET_SITE")
    at_a_cloud = run("--os-cloud", "edge", "instance", "list", "-f", "json")
    assert (at_a_cloud.out, at_a_cloud.err) == ("[]\n", "")


def test_who_does_not_speak_tls_is_told(site: Served, trusted: str) -> None:
    for request in (b"GET /v1 HTTP/1.1\r\nHost: x\r\n\r\n", b"POST /v1 HTTP/1.1\r\n" + b"x" * 300_000):
        with plain(site) as connection:
            connection.sendall(request)
            said = b""
            while piece := connection.recv(4096):
                said += piece
        assert said.startswith(b"HTTP/1.1 400 ")
        assert b"https://" in said
    with plain(site) as connection:
        connection.sendall(b"\x00" * 100)
        assert b"HTTP" not in connection.recv(4096)
    is_served(site, trusted)


def test_who_says_nothing_keeps_nobody(site: Served, trusted: str) -> None:
    hello = ssl.MemoryBIO()
    beginning = ssl.create_default_context(cafile=trusted).wrap_bio(
        ssl.MemoryBIO(), hello, server_hostname="127.0.0.1"
    )
    with pytest.raises(ssl.SSLWantReadError):
        beginning.do_handshake()
    half = hello.read()[:100]
    with ExitStack() as stack:
        silent = [stack.enter_context(plain(site)) for _ in range(100)]
        for connection in silent[:30]:
            connection.sendall(half)
        is_served(site, trusted)
        # They are not kept for ever either, whichever they are.
        for connection in (silent[0], silent[-1]):
            connection.settimeout(30)
            assert connection.recv(4096) == b""
    is_served(site, trusted)


def test_old_versions_are_refused(site: Served, trusted: str) -> None:
    context = ssl.create_default_context(cafile=trusted)
    with plain(site) as connection, context.wrap_socket(connection, server_hostname="127.0.0.1") as spoken:
        assert spoken.version() == "TLSv1.3"
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(trusted)
    old.set_ciphers("DEFAULT@SECLEVEL=0")  # else we would not ask for it ourselves
    with pytest.warns(DeprecationWarning):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        plain(site) as connection,
        pytest.raises(ssl.SSLError, match=r"(?i)alert protocol version"),
    ):
        old.wrap_socket(connection, server_hostname="127.0.0.1")


def test_two_requests_in_one_piece(site: Served, trusted: str) -> None:
    context = ssl.create_default_context(cafile=trusted)
    filling = b"X-Filling: " + b"x" * 5000 + b"\r\n"
    request = b"GET /healthcheck HTTP/1.1\r\nHost: x\r\n" + filling + b"\r\n"
    with plain(site) as connection, context.wrap_socket(connection, server_hostname="127.0.0.1") as spoken:
        spoken.sendall(request * 3)
        said = b""
        while said.count(b"HTTP/1.1 204") < 3:
            piece = spoken.recv(4096)
            assert piece, said
            said += piece


def test_a_renewed_certificate_is_shown_after_sighup(site: Served, trusted: str) -> None:
    folder = site.log.parent
    kept = plain(site)
    context = ssl.create_default_context(cafile=trusted)
    with context.wrap_socket(kept, server_hostname="127.0.0.1") as before:
        certificate(folder)
        site.process.send_signal(signal.SIGHUP)
        site.wait_log("certificate were read again")
        # The same file, which has the new one now.
        is_served(site, trusted)
        before.sendall(b"GET /healthcheck HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 204 " in before.recv(4096)
    (folder / "tls.key").write_text("nonsense")
    site.process.send_signal(signal.SIGHUP)
    site.wait_log("the settings stay as they were: tls_certificate")
    is_served(site, trusted)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("no key", "tls_key: "),
        ("another key", "are not a certificate and its key"),
        ("no pem", "are not a certificate and its key"),
        ("a passphrase", "the key without a passphrase"),
        ("no certificate", "tls_certificate: "),
        ("half", "tls_certificate and tls_key belong together"),
    ],
)
def test_wrong_files_are_one_line(damage: str, said: str, made: Made, hashed: str, tmp_path: Path) -> None:
    shown, key = certificate(tmp_path)
    given = {"tls_certificate": shown, "tls_key": key}
    match damage:
        case "no key":
            key.unlink()
        case "another key":
            certificate(tmp_path / "other")[1].rename(key)
        case "no pem":
            shown.write_text("nonsense")
        case "a passphrase":
            subprocess.run(
                ["openssl", "genpkey", "-algorithm", "ed25519", "-aes256", "-pass", "pass:x", "-out", key],
                check=True,
            )
        case "no certificate":
            shown.unlink()
        case "half":
            del given["tls_key"]
    file = settings_file(tmp_path, made, hashed, api=given)
    done = subprocess.run(
        serve_command(file), capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("cloudlet: ")]
    assert said in line
    assert "Traceback" not in done.stderr
