"""A connection on which nothing comes: it is noticed, nobody is kept in it, and it is not asked twice."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from cloudlet.errors import UnreachableError
from cloudlet.transfer import peer as module
from cloudlet.transfer.peer import PeerConnection

LONG = 60.0
"""Seconds that are allowed for an answer, and that nobody waits here."""


@dataclass
class Server:
    """A peer that does with each connection what a test wants."""

    listener: socket.socket
    public_key: bytes
    does: Callable[[ssl.SSLSocket], None]
    accepted: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.listener.getsockname()[1]}"

    def hang(self, _: object = None) -> None:
        """Answer nothing, and read nothing."""
        self.over.wait(LONG)


def context_in(folder: Path) -> tuple[ssl.SSLContext, bytes]:
    """A server's context with a key of its own, and that key."""
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a peer of tests")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, None)
    )
    file = folder / "own.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(private + made.public_bytes(Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context, key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    context, public_key = context_in(tmp_path)
    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = Server(listener, public_key, answer_all)

        def serve(plain: socket.socket) -> None:
            with suppress(OSError), context.wrap_socket(plain, server_side=True) as connection:
                found.does(connection)
            plain.close()

        def accept() -> None:
            with suppress(OSError):
                while True:
                    plain, _ = listener.accept()
                    found.accepted += 1
                    threads.append(threading.Thread(target=serve, args=(plain,)))
                    threads[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield found
        finally:
            found.over.set()
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for thread in threads:
                thread.join()


def answer(connection: ssl.SSLSocket) -> bool:
    """Answer one request; whether there was one."""
    heard = b""
    while not heard.endswith(b"\r\n\r\n"):
        piece = connection.recv(4096)
        if not piece:
            return False
        heard += piece
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
    return True


def answer_all(connection: ssl.SSLSocket) -> None:
    while answer(connection):
        pass


@contextmanager
def to(server: Server) -> Iterator[PeerConnection]:
    with PeerConnection(server.url, server.public_key, lambda *_: "token") as connection:
        yield connection


def ask(connection: PeerConnection, timeout: float = LONG) -> int:
    return connection.request("GET", "/v1/peer/capabilities", timeout=timeout).status


def answers_once(server: Server) -> Callable[[ssl.SSLSocket], None]:
    """What answers the first request of a connection only."""

    def does(connection: ssl.SSLSocket) -> None:
        if answer(connection):
            server.hang()

    return does


def test_a_connection_that_was_cut_is_made_again(server: Server) -> None:
    server.does = lambda connection: answer(connection) and None
    with to(server) as connection:
        assert [ask(connection) for _ in range(3)] == [200, 200, 200]
    assert server.accepted == 3


def test_who_is_silent_is_not_asked_once_more(server: Server) -> None:
    server.does = answers_once(server)
    with to(server) as connection:
        assert ask(connection) == 200
        with pytest.raises(UnreachableError, match=r"answers nothing for 0\.5 s"):
            ask(connection, timeout=0.5)
    assert server.accepted == 1


def test_who_was_told_that_nobody_waits_does_not_ask_again(server: Server) -> None:
    server.does = answers_once(server)
    lost: list[UnreachableError] = []
    with to(server) as connection:
        assert ask(connection) == 200

        def wait() -> None:
            with pytest.raises(UnreachableError) as caught:
                ask(connection)
            lost.append(caught.value)

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.2)
        connection.close()
        waiting.join(10.0)
        assert lost
        assert server.accepted == 1
        assert ask(connection) == 200, "another connection"


def test_nor_does_who_is_still_sending(server: Server) -> None:
    server.does = server.hang
    ended = threading.Event()
    with to(server) as connection:

        def send() -> None:
            with pytest.raises(UnreachableError):
                connection.request("PUT", "/v1/peer/records", body=bytes(32 << 20), timeout=LONG)
            ended.set()

        sending = threading.Thread(target=send)
        sending.start()
        time.sleep(0.5)
        assert not ended.is_set()
        connection.close()
        sending.join(10.0)
        assert ended.is_set()
    assert server.accepted == 1


def test_who_says_no_word_of_tls_is_not_waited_for_as_for_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 0.3)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        connection = stack.enter_context(PeerConnection(url, bytes(32), lambda *_: "token"))
        began = time.monotonic()
        with pytest.raises(UnreachableError, match=r"answers nothing for 0\.3 s"):
            ask(connection)
        assert time.monotonic() - began < 5


def test_who_reads_nothing_is_noticed_by_the_kernel(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENT_SECONDS", 1.0)
    server.does = server.hang
    with to(server) as connection:
        began = time.monotonic()
        with pytest.raises(UnreachableError):
            connection.request("PUT", "/v1/peer/records", body=bytes(32 << 20), timeout=LONG)
        assert time.monotonic() - began < 15
    assert server.accepted == 1


def test_packets_that_vanish_are_noticed_within_ten_seconds(server: Server) -> None:
    with to(server) as connection:
        assert ask(connection) == 200
        kept = connection._line._connection
        assert kept
        assert kept.sock

        def option(level: int, name: int) -> int:
            assert kept.sock
            return kept.sock.getsockopt(level, name)

        assert option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
        assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle = option(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        every = option(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        assert (10 - idle) % every == 0, "a probe when the time is over"
