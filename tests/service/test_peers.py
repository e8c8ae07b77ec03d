"""Two sites that trust each other, and all who stand between them or say that they are one of them."""

from __future__ import annotations

import base64
import json
import os
import pty
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from cryptography import x509

from cloudlet.api.server import Server
from cloudlet.api.table import PEERS_TABLE, TABLE
from cloudlet.api.tls import own_context
from cloudlet.client import connect
from cloudlet.errors import ConflictError, IntegrityError, RefusedError, UnconfirmedError, UnreachableError
from cloudlet.service.options import Listening, read_options
from cloudlet.settings import load, read_files
from cloudlet.store.keyring import KeyRing
from cloudlet.store.tokens import PeerTokens
from cloudlet.transfer.description import grouped
from cloudlet.transfer.peer import PeerConnection, PeerError, StrangerError, describe
from tests.service.between import Between, between
from tests.service.certificates import certificate
from tests.service.conftest import PASSWORD, Caller, Made
from tests.service.served import Served, serve_command, served, settings_file
from tests.service.test_cli import Users

pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS")
MISSING = "00000000-0000-4000-8000-000000000000"
CAPABILITIES = "/v1/peer/capabilities"


@dataclass
class Site:
    """A site with a key of its own, which other cloudlets reach."""

    served: Served
    keys: Path
    file: Path

    @property
    def call(self) -> Caller:
        return self.served.call

    @property
    def about(self) -> dict[str, Any]:
        return dict(self.call.get("/v1/cloudlets/self")["cloudlet"])

    @property
    def id(self) -> str:
        return str(self.about["id"])

    @property
    def url(self) -> str:
        return str(self.about["peers_url"])

    @property
    def fingerprint(self) -> str:
        return str(self.about["fingerprint"])

    @property
    def public_key(self) -> bytes:
        return KeyRing(self.keys).signer().public_raw

    def adds(self, other: Site, **more: Any) -> dict[str, Any]:
        """Trust another site."""
        wanted = {"url": other.url, "fingerprint": other.fingerprint, **more}
        return dict(self.call.post("/v1/peers", {"peer": wanted})["peer"])

    def forget_all(self) -> None:
        for peer in self.call.get("/v1/peers")["peers"]:
            self.call.delete(f"/v1/peers/{peer['id']}")

    def token(self, other: Site, method: str = "GET", path: str = CAPABILITIES, **more: Any) -> str:
        """A token of this site's for another."""
        tokens = PeerTokens(self.id, KeyRing(self.keys).signer().private)
        return tokens.make(method, path, other.id, **more)

    def connection(self, other: Site, url: str | None = None) -> PeerConnection:
        """A connection as this site has one to another."""
        tokens, target = PeerTokens(self.id, KeyRing(self.keys).signer().private), other.id

        def make(method: str, path: str, ahead: float) -> str:
            return tokens.make(method, path, target, offset_seconds=ahead)

        return PeerConnection(url or other.url, other.public_key, make)


@contextmanager
def site_in(folder: Path, made: Made, hashed: str, **groups: Any) -> Iterator[Site]:
    folder.mkdir(exist_ok=True)
    keys = folder / "keys"
    ours = {"DEFAULT": {"keys_dir": keys}, "peers": {"listen": "127.0.0.1:0"}, **groups}
    file = settings_file(folder, made, hashed, **ours)
    with served(file) as running:
        yield Site(running, keys, file)


@pytest.fixture(scope="module")
def both(made: Made, hashed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Site]]:
    with ExitStack() as stack:
        east, west = (
            stack.enter_context(site_in(tmp_path_factory.mktemp(name), made, hashed))
            for name in ("east", "west")
        )
        yield east, west


@pytest.fixture
def strangers(both: tuple[Site, Site]) -> Iterator[tuple[Site, Site]]:
    """Two sites that do not know each other yet."""
    yield both
    for site in both:
        site.forget_all()


@pytest.fixture
def peers(strangers: tuple[Site, Site]) -> tuple[Site, Site]:
    """Two sites that trust each other."""
    east, west = strangers
    east.adds(west)
    west.adds(east)
    return east, west


@pytest.fixture
def middle(tmp_path: Path) -> Iterator[Between]:
    """Somebody with a TLS server, who has no site's key."""
    with between(*certificate(tmp_path / "middle")) as found:
        yield found


def ask(site: Site, token: str | None, path: str = CAPABILITIES, method: str = "GET") -> requests.Response:
    """A request where other cloudlets come, with a token as it is given."""
    headers = {"Authorization": f"Cloudlet-Peer {token}"} if token is not None else {}
    return requests.request(method, site.url + path, headers=headers, verify=False, timeout=30)


def code_of(answer: requests.Response) -> str:
    return str(answer.json()["errors"][0]["code"])


def test_two_sites_add_each_other(strangers: tuple[Site, Site], made: Made) -> None:
    east, west = strangers
    unconfirmed = east.call("POST", "/v1/peers", {"peer": {"url": west.url}})
    assert unconfirmed.status_code == 409
    (error,) = unconfirmed.json()["errors"]
    assert error["code"] == "cloudlet.peer.unconfirmed"
    assert error["fingerprint"] == west.fingerprint
    assert grouped(west.fingerprint) in error["detail"]
    wrong = {"url": west.url, "fingerprint": east.fingerprint}
    refused = east.call("POST", "/v1/peers", {"peer": wrong})
    assert (refused.status_code, code_of(refused)) == (422, "cloudlet.peer.signature")
    assert east.call.get("/v1/peers")["peers"] == [], "nothing was trusted"

    first = east.adds(west, fingerprint=grouped(west.fingerprint).upper(), name="west")
    assert (first["id"], first["name"], first["state"]) == (west.id, "west", "trusted")
    assert (first["seen_at"], first["capabilities"]["bases"]) == (None, [])
    assert first["error"]["code"] == "cloudlet.peer.failed"
    assert first["error"]["detail"] == (
        "west refuses: it does not know the one that calls (have its operator add that one as a peer)"
    )
    second = west.adds(east)
    assert second["error"] is None
    assert second["name"] == east.about["name"]
    assert second["capabilities"]["versions"] == [1]
    assert made.base_id in second["capabilities"]["bases"]
    assert second["capabilities"]["hypervisor"] == "fake"
    called = east.call.get(f"/v1/peers/{west.id}")["peer"]
    assert called["seen_at"] and called["error"] is None, "west has called, and so knows east"
    now = east.call.post(f"/v1/peers/{west.id}/refresh")["peer"]
    assert now["error"] is None
    assert now["capabilities"] == second["capabilities"]
    assert [event["kind"] for event in east.call.events(kind="peer.")][-1] == "peer.trusted"
    again = east.call("POST", "/v1/peers", {"peer": {"url": west.url, "fingerprint": west.fingerprint}})
    assert (again.status_code, code_of(again)) == (409, "cloudlet.peer.conflict")
    assert f"it is a peer already: west, {west.id}" in again.text
    for name in ("x/y", "a\x1bb", ""):
        refused = east.call("PATCH", f"/v1/peers/{west.id}", {"peer": {"name": name}})
        assert (refused.status_code, code_of(refused)) == (400, "cloudlet.peer.invalid"), name


def test_a_repeated_request_adds_once(strangers: tuple[Site, Site]) -> None:
    east, west = strangers
    body = {"peer": {"url": west.url, "fingerprint": west.fingerprint}}
    answers = [east.call("POST", "/v1/peers", body, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].json()["peer"]["id"] == answers[1].json()["peer"]["id"]


def test_urls_that_lead_to_no_other_site(strangers: tuple[Site, Site], middle: Between) -> None:
    east, west = strangers
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        closed = f"https://127.0.0.1:{nobody.getsockname()[1]}"
    for url, status, reason in (
        (east.url, 422, "impossible"),
        (closed, 422, "unreachable"),
        (east.call.url.replace("http:", "https:"), 422, "unreachable"),
        ("https://no-such-host.invalid", 422, "unreachable"),
        ("https://127.0.0.1:70000", 422, "impossible"),
        ("https://user@127.0.0.1", 422, "impossible"),
        ("https://127.0.0.1:1/?a=b", 422, "impossible"),
        ("https://[", 422, "impossible"),
        ("http://127.0.0.1:1", 400, "invalid"),
        ("https://" + "x" * 5000, 400, "invalid"),
    ):
        answer = east.call("POST", "/v1/peers", {"peer": {"url": url, "fingerprint": west.fingerprint}})
        assert (answer.status_code, code_of(answer)) == (status, f"cloudlet.peer.{reason}"), answer.text
    assert east.call.get("/v1/peers")["peers"] == []


def _renamed(said: Any) -> Any:
    return {"peer": {**said["peer"], "name": "another"}}


def _not_new(said: Any) -> Any:
    return {"peer": {**said["peer"], "nonce": "0" * 32}}


def _other_key(said: Any) -> Any:
    return {"peer": {**said["peer"], "public_key": base64.b64encode(bytes(32)).decode()}}


def _own_certificate(said: Any) -> Any:
    return {"peer": {**said["peer"], "certificate": "0" * 64}}


@pytest.mark.parametrize(
    "alter",
    [
        _renamed, _not_new, _other_key, _own_certificate, lambda said: said, lambda said: [], lambda said: {},
        lambda said: {"peer": None}, lambda said: {"peer": dict.fromkeys(said["peer"], 7)},
        lambda said: {"peer": {**said["peer"], "signature": "!"}},
    ],
)  # fmt: skip
def test_a_description_that_is_forged_or_only_passed_on(
    alter: Callable[[Any], Any], strangers: tuple[Site, Site], middle: Between
) -> None:
    east, west = strangers
    middle.site, middle.alter = west.url, alter
    for given in ({}, {"fingerprint": west.fingerprint}):
        answer = east.call("POST", "/v1/peers", {"peer": {"url": middle.url, **given}})
        assert answer.status_code == 422, answer.text
    with pytest.raises(IntegrityError):
        describe(middle.url, timeout=10)
    assert east.call.get("/v1/peers")["peers"] == []


@pytest.mark.parametrize("alter", [lambda said: said, _renamed, _not_new, _other_key, lambda said: {}])
def test_who_stands_between_gets_no_token(
    alter: Callable[[Any], Any], peers: tuple[Site, Site], middle: Between
) -> None:
    east, west = peers
    middle.site, middle.alter = west.url, alter
    with east.connection(west, middle.url) as connection, pytest.raises(StrangerError):
        connection.request("PUT", CAPABILITIES, body=b"secret", timeout=10)
    moved = east.call("PATCH", f"/v1/peers/{west.id}", {"peer": {"url": middle.url}})
    assert moved.status_code == 422
    assert set(middle.paths) == {"/v1/peer"}
    for method, _, headers in middle.heard:
        assert (method, headers.get("Authorization")) == ("GET", None)
    assert east.call.get(f"/v1/peers/{west.id}")["peer"]["url"] == west.url


def test_another_site_at_the_address_of_a_peer(peers: tuple[Site, Site]) -> None:
    east, west = peers
    with east.connection(west, east.url) as connection, pytest.raises(StrangerError, match="another key"):
        connection.request("GET", CAPABILITIES, timeout=10)
    moved = east.call("PATCH", f"/v1/peers/{west.id}", {"peer": {"url": east.url}})
    assert (moved.status_code, code_of(moved)) == (422, "cloudlet.peer.signature")
    detail = moved.json()["errors"][0]["detail"]
    assert detail.endswith("has another key (give the URL of that peer, or delete it and add it again)")


@pytest.mark.parametrize("closes", [False, True], ids=["keeps", "closes"])
def test_a_site_behind_another_tls_server(
    closes: bool, both: tuple[Site, Site], made: Made, hashed: str, tmp_path: Path
) -> None:
    east, _ = both
    shown, key = certificate(tmp_path / "front")
    with between(shown, key) as front, ExitStack() as stack:
        front.closes = closes
        settings = {"url": f"{front.url}/", "tls_certificate": shown}
        north = stack.enter_context(site_in(tmp_path / "north", made, hashed, peers=settings))
        stack.callback(east.forget_all)
        front.site = north.call.url
        assert north.url == front.url
        north.adds(east)
        added = east.adds(north)
        assert added["error"] is None
        assert len(added["certificate"]) == 64
        with east.connection(north) as connection:
            for _ in range(3):
                assert connection.request("GET", CAPABILITIES, timeout=10).json["capabilities"]
                assert front.paths[-1] == CAPABILITIES
            # A new certificate, which the file names that the site reads.
            front.show(*certificate(tmp_path / "front"))
            connection.close()
            assert connection.request("GET", CAPABILITIES, timeout=10).status == 200
            connection.close()
            # One that it does not name.
            front.show(*certificate(tmp_path / "elsewhere"))
            front.heard.clear()
            with pytest.raises(StrangerError, match="another certificate"):
                connection.request("GET", CAPABILITIES, timeout=10)
            assert set(front.paths) == {"/v1/peer"}
        shown.unlink()
        answer = north.call.as_(None)("GET", "/v1/peer")
        assert (answer.status_code, code_of(answer)) == (503, "cloudlet.peer.failed")
        with east.connection(north) as connection, pytest.raises(UnreachableError):
            connection.request("GET", CAPABILITIES, timeout=10)


def test_a_wrong_clock_is_corrected(peers: tuple[Site, Site], monkeypatch: pytest.MonkeyPatch) -> None:
    east, west = peers
    late = ask(west, east.token(west, offset_seconds=-300))
    assert (late.status_code, code_of(late)) == (401, "cloudlet.peer.clock")
    assert late.headers["Date"]
    assert late.headers["WWW-Authenticate"] == "Cloudlet-Peer"
    real = time.time
    for seconds in (-300, 300, 86_400):
        monkeypatch.setattr(time, "time", lambda seconds=seconds: real() + seconds)
        with east.connection(west) as connection:
            assert connection.request("GET", CAPABILITIES, timeout=10).status == 200
            assert connection.request("GET", CAPABILITIES, timeout=10).status == 200
        monkeypatch.undo()


def test_a_clock_that_cannot_be_corrected(peers: tuple[Site, Site], middle: Between) -> None:
    east, west = peers
    made = []

    def make(method: str, path: str, ahead: float) -> str:
        made.append(ahead)
        return east.token(west, method, path, offset_seconds=-300)

    with PeerConnection(west.url, west.public_key, make) as connection, pytest.raises(PeerError) as refused:
        connection.request("GET", CAPABILITIES, timeout=10)
    assert (refused.value.status, refused.value.reason, len(made)) == (401, "clock", 2)


def test_a_token_is_used_once_and_for_one_request(peers: tuple[Site, Site]) -> None:
    east, west = peers
    token = east.token(west)
    assert ask(west, token).status_code == 200
    replayed = ask(west, token)
    assert (replayed.status_code, code_of(replayed)) == (401, "cloudlet.peer.unauthenticated")
    assert "used before" in replayed.text
    headers = {"Authorization": f"Cloudlet-Peer {token}"}
    assert west.call.as_(None)("GET", CAPABILITIES, headers=headers).status_code == 401
    for other in (
        east.token(west, "POST"),
        east.token(west, path="/v1/peer"),
        east.token(east),
        west.token(west),
        "",
        "x.y.z",
        "\xe9",
    ):
        assert ask(west, other).status_code == 401, other
    fresh = {"Authorization": f"cloudlet-peer {east.token(west)}"}
    assert west.call.as_(None)("GET", CAPABILITIES, headers=fresh).status_code == 200


def test_nobody_else_is_a_peer(both: tuple[Site, Site]) -> None:
    _, west = both
    for who in ("root", "mia", None):
        answer = west.call.as_(who)("GET", CAPABILITIES)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Cloudlet-Peer"
    assert ask(west, None).status_code == 401


def test_one_that_is_blocked(peers: tuple[Site, Site]) -> None:
    east, west = peers
    east.call.post(f"/v1/peers/{west.id}/refresh")
    events = len(west.call.events(kind="peer.blocked"))
    blocked = west.call.patch(f"/v1/peers/{east.id}", {"peer": {"state": "blocked"}})["peer"]
    assert blocked["state"] == "blocked"
    answer = ask(west, east.token(west))
    assert (answer.status_code, code_of(answer)) == (401, "cloudlet.peer.unauthenticated")
    assert "blocked" in answer.text
    assert west.call("POST", f"/v1/peers/{east.id}/refresh").status_code == 409
    there = east.call.post(f"/v1/peers/{west.id}/refresh")["peer"]
    assert "blocked" in there["error"]["detail"]
    assert there["capabilities"]["bases"], "what it said before is still shown"
    west.call.patch(f"/v1/peers/{east.id}", {"peer": {"state": "trusted", "name": "east"}})
    assert ask(west, east.token(west)).status_code == 200
    assert east.call.post(f"/v1/peers/{west.id}/refresh")["peer"]["error"] is None
    assert len(west.call.events(kind="peer.blocked")) == events + 1
    west.call.delete(f"/v1/peers/{east.id}")
    assert "does not know" in ask(west, east.token(west)).text


def test_where_peers_come_nothing_else_is_served(both: tuple[Site, Site]) -> None:
    _, west = both
    assert {"/v1/peer", CAPABILITIES} <= {operation.path for operation in PEERS_TABLE}
    door = Caller(west.url)
    door.session.verify = door.session.trust_env = False
    for operation in TABLE:
        path = operation.path.format(**dict.fromkeys(operation.parameters, MISSING))
        answer = door(operation.method, path)
        if operation not in PEERS_TABLE:
            assert answer.status_code == 404, path
            assert operation.method == "HEAD" or code_of(answer) == "cloudlet.api.no_such_path", path
        elif not operation.public:
            assert answer.status_code == 401, path


def test_the_operator_of_a_socket_is_nobody_at_the_peers_door(
    peers: tuple[Site, Site], made: Made, hashed: str, tmp_path: Path
) -> None:
    # As at home: a Unix socket, and no passwords.
    keys = tmp_path / "keys"
    file = settings_file(
        tmp_path, made, hashed, DEFAULT={"keys_dir": keys}, peers={"listen": "127.0.0.1:0"},
        api={"listen": f"unix:{tmp_path}/api.sock", "auth_strategy": "noauth"},
    )  # fmt: skip
    with served(file) as running:
        running.wait_log("peers reach it at https://127.0.0.1:")
        url = running.log.read_text().partition("peers reach it at ")[2].split()[0]
        for path, status in (
            ("/v1/instances", 404),
            ("/v1/peers", 404),
            (CAPABILITIES, 401),
            ("/v1/peer", 200),
        ):
            answer = requests.get(url + path, auth=("root", PASSWORD), verify=False, timeout=30)
            assert answer.status_code == status, path


def test_a_peer_beside_keystone(both: tuple[Site, Site], made: Made, hashed: str, tmp_path: Path) -> None:
    east, _ = both
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        closed = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    keystone = {
        "auth_type": "password", "auth_url": closed, "username": "cloudlet", "password": "x",
        "project_name": "service", "user_domain_id": "default", "project_domain_id": "default",
        "www_authenticate_uri": closed,
    }  # fmt: skip
    keys = tmp_path / "keys"
    file = settings_file(
        tmp_path, made, hashed, DEFAULT={"keys_dir": keys}, api={"auth_strategy": "keystone"},
        peers={"listen": "127.0.0.1:0"}, keystone_authtoken=keystone,
    )  # fmt: skip
    ring = KeyRing(keys)
    with served(file) as running:
        said = running.call.as_(None).get("/v1/peer")["peer"]
        assert said["public_key"] == base64.b64encode(ring.signer().public_raw).decode()
        tokens = PeerTokens(east.id, KeyRing(east.keys).signer().private)
        for url in (running.call.url, said["url"]):
            token = tokens.make("GET", CAPABILITIES, said["site_id"])
            headers = {"Authorization": f"Cloudlet-Peer {token}", "X-Auth-Token": "no token"}
            answer = requests.get(url + CAPABILITIES, headers=headers, verify=False, timeout=30)
            # Keystone is not asked; and the site does not know who calls.
            assert (answer.status_code, "does not know" in answer.text) == (401, True), answer.text
        assert running.call.as_(None)("GET", "/v1/instances").status_code == 401


def test_what_is_shown_is_a_certificate_of_the_key_and_tls_1_3(both: tuple[Site, Site]) -> None:
    _, west = both
    parts = urlsplit(west.url)
    address = parts.hostname, parts.port
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(address, 10) as plain, context.wrap_socket(plain) as spoken:
        assert spoken.version() == "TLSv1.3"
        shown = x509.load_der_x509_certificate(spoken.getpeercert(binary_form=True) or b"")
    assert shown.public_key().public_bytes_raw() == west.public_key  # type: ignore[union-attr]
    assert shown.subject.rfc4514_string() == f"CN={west.id}"
    assert shown.not_valid_after_utc.year == 9999
    shown.verify_directly_issued_by(shown)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(address, 10) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain)
    assert describe(west.url, timeout=10).site_id == west.id


@pytest.mark.slow
def test_a_restart_changes_nothing_for_peers(
    both: tuple[Site, Site], made: Made, hashed: str, tmp_path: Path
) -> None:
    east, _ = both
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    here, settings = tmp_path / "south", {"listen": f"127.0.0.1:{port}"}
    with ExitStack() as stack:
        with site_in(here, made, hashed, peers=settings) as south:
            assert south.url == f"https://127.0.0.1:{port}"
            south.adds(east)
            connection = stack.enter_context(closing(east.connection(south)))
            assert connection.request("GET", CAPABILITIES, timeout=10).status == 200
            shown = (here / "state" / "peers.pem").read_bytes()
            south.served.process.send_signal(signal.SIGHUP)
            south.served.wait_log("were read again")
            assert connection.request("GET", CAPABILITIES, timeout=10).status == 200
        assert south.served.process.returncode == 0
        with pytest.raises(UnreachableError):
            connection.request("GET", CAPABILITIES, timeout=10)
        with site_in(here, made, hashed, peers=settings) as south:
            assert connection.request("GET", CAPABILITIES, timeout=10).status == 200
            south.served.process.kill()
            south.served.process.wait()
        with site_in(here, made, hashed, peers=settings):
            # The connection that was kept is dead.
            assert connection.request("GET", CAPABILITIES, timeout=10).status == 200
        assert (here / "state" / "peers.pem").read_bytes() == shown


def test_errors_of_a_peer_have_their_codes(peers: tuple[Site, Site]) -> None:
    east, west = peers
    with east.connection(west) as connection:
        with pytest.raises(PeerError) as refused:
            connection.request("GET", "/v1/peer/no-such", timeout=10)
        assert (refused.value.status, refused.value.code) == (404, "cloudlet.api.no_such_path")
        with pytest.raises(PeerError) as refused:
            connection.request(
                "PUT", CAPABILITIES, body=iter([b"a"] * 3), headers={"Content-Length": "3"}, timeout=10
            )
        assert (refused.value.status, refused.value.reason) == (405, "method")
        with pytest.raises(PeerError) as refused:
            connection.request("GET", CAPABILITIES, query={"a": 1}, timeout=10)
        assert (refused.value.status, refused.value.reason) == (400, "invalid")
        assert connection.request("GET", CAPABILITIES, timeout=10).status == 200


def test_what_does_not_speak_tls_there(both: tuple[Site, Site]) -> None:
    east, west = both

    def said(url: str) -> str:
        with east.connection(west, url) as connection, pytest.raises(UnreachableError) as caught:
            connection.request("GET", CAPABILITIES, timeout=0.5)
        return caught.value.message

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        assert said(url) == f"{url} answers nothing for 0.5 s"
    plain = east.call.url.replace("http:", "https:")
    assert said(plain) == f"{plain} does not speak TLS there"
    with socket.create_server(("127.0.0.1", 0)) as ends:
        thread = threading.Thread(target=lambda: ends.accept()[0].close())
        thread.start()
        url = f"https://127.0.0.1:{ends.getsockname()[1]}"
        assert "_ssl.c" not in said(url)
        thread.join()
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert "TLS 1.3" in _said_to(old, said)


def _said_to(context: ssl.SSLContext, ask: Callable[[str], str]) -> str:
    """What is said of a server with this context, of which nobody hears an answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            plain, _ = listener.accept()
            with plain, pytest.raises(ssl.SSLError):
                context.wrap_socket(plain, server_side=True)

        thread = threading.Thread(target=serve)
        thread.start()
        found = ask(f"https://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
        return found


@pytest.mark.slow
def test_who_answers_slowly_or_without_end(both: tuple[Site, Site], tmp_path: Path) -> None:
    east, west = both
    signer = KeyRing(west.keys).signer()
    context = own_context(signer, west.id, tmp_path / "own.pem")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    ways: list[Callable[[ssl.SSLSocket], None]] = [
        lambda connection: ended.wait(30),
        lambda connection: _drip(connection, head, ended),
        lambda connection: _drip(connection, head + b"Content-Length: 1000\r\n\r\n", ended, b" "),
        lambda connection: _flood(connection, head + b"Content-Length: 100000000\r\n\r\n"),
        lambda connection: connection.sendall(b"SSH-2.0-x\r\n"),
        lambda connection: connection.sendall(head + b"Content-Length: 10\r\n\r\n{}"),
    ]  # fmt: skip
    for way in ways:
        ended = threading.Event()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=_answer, args=(listener, context, way))
            thread.start()
            url = f"https://127.0.0.1:{listener.getsockname()[1]}"
            with east.connection(west, url) as connection, pytest.raises(UnreachableError):
                connection.request("GET", CAPABILITIES, timeout=1)
            ended.set()
            thread.join()


def _answer(listener: socket.socket, context: ssl.SSLContext, way: Callable[[ssl.SSLSocket], None]) -> None:
    plain, _ = listener.accept()
    with plain, context.wrap_socket(plain, server_side=True) as connection:
        connection.recv(65536)
        try:
            way(connection)
        except OSError:
            return


def _drip(connection: ssl.SSLSocket, beginning: bytes, ended: threading.Event, letter: bytes = b"X") -> None:
    connection.sendall(beginning)
    while not ended.wait(0.05):
        connection.sendall(letter)


def _flood(connection: ssl.SSLSocket, beginning: bytes) -> None:
    connection.sendall(beginning)
    while True:
        connection.sendall(bytes(65536))


def test_a_request_that_nobody_wants_any_more_is_ended(both: tuple[Site, Site], tmp_path: Path) -> None:
    east, west = both
    context = own_context(KeyRing(west.keys).signer(), west.id, tmp_path / "own.pem")
    asked, ended, told = threading.Event(), threading.Event(), []

    def way(connection: ssl.SSLSocket) -> None:
        asked.set()
        ended.wait(30)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_answer, args=(listener, context, way))
        thread.start()
        connection = east.connection(west, f"https://127.0.0.1:{listener.getsockname()[1]}")

        def wait() -> None:
            with pytest.raises(UnreachableError) as lost:
                connection.request("GET", CAPABILITIES, timeout=60)
            told.append(lost.value)

        waiting = threading.Thread(target=wait)
        waiting.start()
        assert asked.wait(30)
        connection.close()
        waiting.join(30)
        assert told
        ended.set()
        thread.join()


def test_the_command_line(strangers: tuple[Site, Site], monkeypatch: pytest.MonkeyPatch) -> None:
    east, west = strangers
    users = Users(monkeypatch, east.call.url)
    shown = users("root", "site", "show", "-f", "value", "-c", "fingerprint")
    assert shown.out.strip() == east.fingerprint
    assert grouped(east.fingerprint) in users("root", "site", "show").out
    alone = users("root", "peer", "add", west.url)
    assert (alone.status, alone.out) == (5, "")
    assert grouped(west.fingerprint) in alone.err
    assert "--fingerprint" in alone.err
    assert users("root", "peer", "add", west.url, "--fingerprint", east.fingerprint).status == 7
    assert users.json("root", "peer", "list") == []
    assert users("mia", "peer", "list").status == 4
    added = users.json(
        "root", "peer", "add", west.url, "--name", "west", "--fingerprint", grouped(west.fingerprint)
    )
    assert (added["id"], added["name"], added["fingerprint"]) == (west.id, "west", west.fingerprint)
    assert "does not know" in added["error"]
    at_west = Users(monkeypatch, west.call.url)
    assert at_west.json("root", "peer", "add", east.url, "--yes")["error"] is None
    assert users.json("root", "peer", "refresh", "west")["error"] is None
    (listed,) = users.json("root", "peer", "list")
    assert (listed["name"], listed["state"], listed["error"]) == ("west", "trusted", None)
    assert users.json("root", "peer", "set", "west", "--block", "--name", "w")["state"] == "blocked"
    assert users("root", "peer", "set", "w").status == 2
    assert users.json("root", "peer", "set", west.id, "--trust", "--url", west.url)["state"] == "trusted"
    assert users.json("root", "peer", "show", "w")["capabilities"]["versions"] == [1]
    assert users("root", "peer", "delete", "w").status == 0
    assert users("root", "peer", "show", "w").status == 3


@pytest.mark.parametrize(("said", "status"), [(b"y\n", 0), (b"n\n", 4), (b"\n", 4)])
def test_a_person_is_asked(said: bytes, status: int, strangers: tuple[Site, Site]) -> None:
    east, west = strangers
    site = {"CLOUDLET_SITE": east.call.url, "CLOUDLET_USER": "root", "CLOUDLET_PASSWORD": PASSWORD}
    leader, follower = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "cloudlet.cli.app", "peer", "add", west.url, "-f", "json"],
            stdin=follower, stderr=follower, stdout=subprocess.PIPE, env={**os.environ, **site},
        )  # fmt: skip
        os.close(follower)
        seen = b""
        while b"[y/N]" not in seen:
            seen += os.read(leader, 4096)
        assert grouped(west.fingerprint).encode() in seen
        os.write(leader, said)
        out, _ = process.communicate(timeout=60)
    finally:
        os.close(leader)
    assert process.returncode == status
    if status:
        assert east.call.get("/v1/peers")["peers"] == []
    else:
        assert json.loads(out)["id"] == west.id


def test_the_sdk(strangers: tuple[Site, Site]) -> None:
    east, west = strangers
    with connect(east.call.url, user="root", password=PASSWORD) as site:
        with pytest.raises(UnconfirmedError) as unconfirmed:
            site.add_peer(west.url)
        assert unconfirmed.value.fingerprint == west.fingerprint
        peer = site.add_peer(west.url, west.fingerprint, "west")
        assert [one.id for one in site.peers(name="west")] == [peer.id]
        assert site.get_peer(peer.id).fingerprint == site.find_peer("west").fingerprint == west.fingerprint
        assert site.refresh_peer(peer).error
        assert site.update_peer(peer, state="blocked").state == "blocked"
        with pytest.raises(ConflictError):
            site.refresh_peer(peer)
        site.delete_peer(peer)
        assert list(site.peers()) == []
    with connect(east.call.url, user="mia", password=PASSWORD) as site, pytest.raises(RefusedError):
        list(site.peers())


def test_processes_that_share_a_job_board_share_the_peers_door() -> None:
    def app(environ: Any, start: Any) -> list[bytes]:
        start("204 No Content", [])
        return []

    def server(port: int) -> Server:
        return Server(Listening(host="127.0.0.1", port=port), app, threads=1, busy=1, shared=True)

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ExitStack() as stack:
        for one in (server(port), server(port)):
            thread = threading.Thread(target=one.serve)
            thread.start()
            stack.callback(thread.join)
            stack.callback(one.stop)
        for _ in range(20):  # each with a connection of its own, which the kernel gives to one of them
            assert requests.get(f"http://127.0.0.1:{port}/", timeout=10).status_code == 204


@pytest.mark.parametrize(
    ("peers", "said"),
    [
        ({"listen": "unix:/tmp/x"}, "is no Unix socket"),
        ({"listen": "nowhere"}, "cannot listen at"),
        ({"listen": "0.0.0.0:0"}, "url is missing"),
        ({"listen": "127.0.0.1:0", "url": "http://x"}, "write https://"),
        ({"listen": "127.0.0.1:0", "tls_certificate": "x.pem"}, "is for another TLS server"),
    ],
)
def test_settings_that_cannot_be(
    peers: dict[str, str], said: str, made: Made, hashed: str, tmp_path: Path
) -> None:
    file = settings_file(tmp_path, made, hashed, peers=peers)
    done = subprocess.run(serve_command(file), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_what_peers_are_told(made: Made, hashed: str, tmp_path: Path) -> None:
    for given, url in (
        ({}, ""),
        ({"listen": "10.0.0.1:8791"}, "https://10.0.0.1:8791"),
        ({"listen": "[fd00::1]:8791"}, "https://[fd00::1]:8791"),
        ({"listen": "0.0.0.0:1", "url": "https://edge.example.org/"}, "https://edge.example.org"),
    ):
        file = str(settings_file(tmp_path, made, hashed, peers=given))
        assert read_options(read_files(file), load(file)).peers.url == url
