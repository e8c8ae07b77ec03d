"""A connection to another cloudlet: TLS 1.3 to the key that is pinned, and a token with each request.

Whom a certificate names and who has signed it is not looked at. It has to be of the pinned key itself; or,
where another TLS server is in front of the peer, the one whose SHA-256 the peer's description names, which is
asked for over that connection, made for that question, and signed by the pinned key. Before that is known
nothing but that question is sent. No redirect is followed, and no proxy used.
"""

from __future__ import annotations

import json as json_
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from hashlib import sha256
from http.client import HTTPException, HTTPMessage, HTTPResponse, HTTPSConnection, NotConnected
from typing import Any, Self
from urllib.parse import quote, urlencode, urlsplit

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloudlet.errors import CorruptError, FailedError, IntegrityError, UnreachableError
from cloudlet.transfer.description import Description, check_url

SCHEME = "Cloudlet-Peer"
"""Of the header ``Authorization``."""
CLOCK_REASON = "clock"
"""Of the answer to a token whose time is wrong, whatever was asked for."""
DESCRIPTION_PATH = "/v1/peer"
_MOST_ANSWER_BYTES = 4 << 20
_KEPT_SECONDS = 5.0
"""A connection that was not used for longer is not used again: the peer may end it at that moment."""
_CONNECT_SECONDS = 10.0
"""Longest time until somebody is connected, and until they have said a word of TLS, however long an answer
may take."""
_SILENT_SECONDS = 10.0
"""So long the other end's kernel may confirm nothing of what was sent, or asked of it while nothing was."""
_PROBE_AFTER, _PROBE_EVERY = 0.4, 0.2
"""Shares of that: until a line on which nothing is sent is tried, and between two attempts."""
_PIECE = 64 << 10
_NO_CLOUDLET_HINT = "give the URL that its operator sees in: cloudlet site show"
_UNREACHABLE_HINT = "is the peer served there, and can it be reached?"

_VERSIONS = dict.fromkeys(("TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL"), "TLS 1.3")
"""What is missing, by OpenSSL's reason."""

Tokens = Callable[[str, str, float], str]
"""Makes the token for a method and a path, by a clock that is so many seconds ahead."""
Body = bytes | Iterable[bytes] | None


class StrangerError(IntegrityError):
    """Who answers at the peer's URL has not shown the peer's key. No token was sent."""

    usual_hint = "if the peer has a new key, ask its operator for the fingerprint; delete it and add it again"


class PeerError(FailedError):
    """The peer answered, and the answer is an error."""

    def __init__(self, code: str, status: int, message: str, said: str = "") -> None:
        super().__init__(message)
        self.code = code
        """``cloudlet.NOUN.REASON``; empty where it is not a cloudlet that has answered."""
        self.status = status
        self.said = said
        """What it says, with what to do; empty where it is not a cloudlet that has answered."""

    @property
    def reason(self) -> str:
        """The last part of the code."""
        return self.code.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a peer answered."""

    status: int
    json: Any = None
    headers: HTTPMessage = field(default_factory=HTTPMessage)


class PeerConnection:
    """Requests to one peer, one after the other on a connection that is kept; for one thread."""

    def __init__(self, url: str, public_key: bytes, tokens: Tokens) -> None:
        """Nothing is connected yet.

        :param url: of the peer.
        :param public_key: raw, 32 bytes: what is pinned.
        :raises ImpossibleError: that is no URL of a cloudlet.
        """
        self._line = _Line(url, public_key)
        self._tokens = tokens
        self._ahead = 0.0
        """How many seconds the peer's clock is ahead of this one, as far as is known."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; for any thread: who waits for an answer gets an error, and does not ask again.
        The next request makes another connection.
        """
        self._line.end()

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int] | None = None,
        json: Any = None,
        body: Body = None,
        headers: Mapping[str, str] | None = None,
        timeout: float,
    ) -> Answer:
        """Ask the peer for something that may be asked for twice: a connection that was cut asks again.

        One on which nothing came does not.

        :param path: as the API has it, such as ``/v1/peer/handoffs``.
        :param json: the body, as a value; or ``body``: its bytes. Pieces need a ``Content-Length`` among the
            headers; where they come from an iterator, which goes only once, nothing is asked twice.
        :param timeout: seconds to connect (10 at most), for each piece that is sent, and for the answer as a
            whole. A peer whose kernel is silent for 10 s does not answer, whatever is allowed.
        :raises UnreachableError: the peer does not answer.
        :raises StrangerError: somebody else does.
        :raises PeerError: it answers with an error.
        """
        if json is not None:
            body = json_.dumps(json).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        repeatable = body is None or isinstance(body, bytes) or iter(body) is not body
        for corrected in (False, True):
            # Anew each time: a token is good for one request.
            answer = self._line.ask(
                method,
                f"{path}?{urlencode(query)}" if query else path,
                body,
                lambda: {**(headers or {}), "Authorization": f"{SCHEME} {self._token(method, path)}"},
                timeout,
                tries=2 if repeatable else 1,
            )
            problem = _problem(answer, self._line.url)
            if problem is None:
                return answer
            if corrected or problem.reason != CLOCK_REASON or not repeatable or not self._correct(answer):
                raise problem
        raise AssertionError  # the second one returns or raises

    def _token(self, method: str, path: str) -> str:
        return self._tokens(method, path, self._ahead)

    def _correct(self, answer: Answer) -> bool:
        """Take the peer's clock from its answer; whether it says anything of that."""
        with suppress(ValueError, TypeError, OverflowError):
            self._ahead = parsedate_to_datetime(answer.headers["Date"]).timestamp() - time.time()
            return True
        return False


def refusal_in(error: BaseException) -> str:
    """What a peer has said that is behind an error, in its words; empty: none has said anything."""
    behind: BaseException | None = error
    while behind:
        if isinstance(behind, PeerError):
            return behind.said
        behind = behind.__cause__
    return ""


def describe(url: str, *, timeout: float) -> Description:
    """What the cloudlet at a URL says of itself, signed by the key that it names.

    Who answers has shown that the connection is of who has that key. Whose key it is nobody knows yet.

    :param timeout: seconds to connect (10 at most), and for the answer.
    :raises ImpossibleError: that is no URL of a cloudlet.
    :raises UnreachableError: nobody answers.
    :raises IntegrityError: what answers is no cloudlet, or others stand in between.
    """
    line = _Line(url, None)
    try:
        return line.describe(timeout)
    finally:
        line.close()


class _Line:
    """The connection itself: made when it is needed, verified before it is used, kept for a while."""

    def __init__(self, url: str, public_key: bytes | None) -> None:
        """Nothing is connected yet.

        :param public_key: whom it has to lead to; None: whoever is there.
        """
        check_url(url, "the peer's URL")
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        self._host, self._port = parts.hostname or "", parts.port or 443
        self._prefix = quote(parts.path, safe="%/:@!$&'()*+,;=~")
        self._public_key = public_key
        self._named = ""
        """SHA-256 of the certificate that the peer's description has named."""
        self._connection: _Connection | None = None
        self._used = 0.0
        self._asking = threading.Lock()
        """Held by the thread that asks."""
        self._ends = 0
        """How often nobody wanted to wait any more."""

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection:
            connection.end()

    def end(self) -> None:
        """Close it; who asks just now gets an error instead of an answer. For any thread."""
        self._ends += 1
        if connection := self._connection:
            connection.cut()
        # Who asks closes it: its descriptor's number could be another file's when they look at it next.
        if self._asking.acquire(blocking=False):
            try:
                self.close()
            finally:
                self._asking.release()

    def describe(self, timeout: float) -> Description:
        """The description of who is there, verified, and with it the connection."""
        with self._heard(timeout):
            connection = self._fresh(timeout)
            found = self._described(connection, timeout)
        if not _is(connection.certificate, found):
            raise StrangerError(f"{self.url} does not show the certificate that the cloudlet there names")
        return found

    def ask(
        self,
        method: str,
        target: str,
        body: Body,
        headers: Callable[[], Mapping[str, str]],
        timeout: float,
        *,
        tries: int,
    ) -> Answer:
        """The answer to a request; on a connection that was cut it is made again.

        :param headers: called for each try.
        """
        with self._asking:
            ends = self._ends
            try:
                while True:
                    tries -= 1
                    kept = self._kept()
                    try:
                        with self._heard(timeout):
                            connection = kept or self._verified(timeout)
                            if self._ends != ends:
                                raise NotConnected("the connection was ended here")
                            return self._asked(connection, method, target, body, headers(), timeout)
                    except UnreachableError as error:
                        silent = isinstance(error.__cause__, TimeoutError)
                        if not kept or not tries or silent or self._ends != ends:
                            raise
            finally:
                if self._ends != ends:
                    self.close()

    def _kept(self) -> _Connection | None:
        if self._connection and time.monotonic() - self._used > _KEPT_SECONDS:
            self.close()
        return self._connection

    def _verified(self, timeout: float) -> _Connection:
        """A new connection that is the peer's."""
        connection = self._fresh(timeout)
        if self._knows(connection.certificate):
            return connection
        self._ask_for_the_name(connection, timeout)
        if self._connection:
            return connection
        # A server that answers one request in a connection is known by its certificate in the next.
        connection = self._fresh(timeout)
        if not self._knows(connection.certificate):
            raise StrangerError(f"{self.url} shows one certificate after the other")
        return connection

    def _knows(self, shown: _Certificate) -> bool:
        return shown.public_key == self._public_key or (bool(self._named) and shown.digest == self._named)

    def _ask_for_the_name(self, connection: _Connection, timeout: float) -> None:
        """Have the peer say that the certificate is the one in front of it.

        :raises StrangerError: it does not.
        """
        try:
            found = self._described(connection, timeout)
        except IntegrityError as error:
            raise StrangerError(f"the peer's key is not shown there: {error.message}") from error
        if not _is(connection.certificate, found):
            raise StrangerError(f"{self.url} shows another certificate than the one that the peer names")
        self._named = found.certificate

    def _described(self, connection: _Connection, timeout: float) -> Description:
        nonce = secrets.token_hex(16)
        answer = self._asked(connection, "GET", f"{DESCRIPTION_PATH}?nonce={nonce}", None, {}, timeout)
        if answer.status >= 500:
            raise UnreachableError(f"{self.url} answers with status {answer.status}", hint=_UNREACHABLE_HINT)
        if answer.status != 200 or not isinstance(answer.json, dict):
            raise CorruptError(
                f"{self.url} is no cloudlet that others can reach (status {answer.status})",
                hint=_NO_CLOUDLET_HINT,
            )
        try:
            return Description.read(answer.json.get("peer"), nonce=nonce, public_key=self._public_key)
        except IntegrityError as error:
            raise type(error)(f"{self.url}: {error.message}", hint=_NO_CLOUDLET_HINT) from error

    def _fresh(self, timeout: float) -> _Connection:
        self.close()
        seconds = min(timeout, _CONNECT_SECONDS)
        connection = _Connection(self._host, self._port, seconds)
        try:
            connection.connect()
        except ssl.SSLError as error:
            connection.end()
            raise UnreachableError(
                f"{self.url} does not speak {_VERSIONS.get(error.reason or '', 'TLS')} there",
                hint=_UNREACHABLE_HINT,
            ) from error
        except TimeoutError as error:
            connection.end()
            raise UnreachableError(f"{self.url} {_said(error, seconds)}", hint=_UNREACHABLE_HINT) from error
        except BaseException:
            connection.end()
            raise
        self._connection = connection
        return connection

    def _asked(
        self,
        connection: _Connection,
        method: str,
        target: str,
        body: Body,
        headers: Mapping[str, str],
        timeout: float,
    ) -> Answer:
        if (sock := connection.sock) is None:
            raise NotConnected("the connection was ended here")
        sock.settimeout(timeout)
        usual = {"User-Agent": "cloudlet", "Accept": "application/json"}
        with suppress(ConnectionError):  # who refuses a body may answer before all of it has come
            connection.request(method, self._prefix + target, body, {**usual, **headers})
        sock.ends_at = time.monotonic() + timeout
        with connection.getresponse() as response:
            data = _read(response)
            answer = Answer(response.status, _parsed(response, data), response.headers)
        sock.ends_at = None
        if response.will_close:
            self.close()
        self._used = time.monotonic()
        return answer

    @contextmanager
    def _heard(self, timeout: float) -> Iterator[None]:
        """Within it, an error of the network is one of ours, and after any error the connection is ended.

        :param timeout: how many seconds somebody waits there.
        """
        try:
            yield
        except (OSError, HTTPException, UnicodeError) as error:
            self.close()
            raise UnreachableError(f"{self.url} {_said(error, timeout)}", hint=_UNREACHABLE_HINT) from error
        except BaseException:
            self.close()
            raise


@dataclass(frozen=True, slots=True)
class _Certificate:
    """What who answers has shown; TLS has proven that they have its key."""

    digest: str
    """SHA-256, as hexadecimal digits."""
    public_key: bytes
    """Raw, if it is of Ed25519; else empty."""

    @classmethod
    def of(cls, der: bytes) -> Self:
        try:
            key = x509.load_der_x509_certificate(der).public_key()
        except (ValueError, UnsupportedAlgorithm):
            return cls(sha256(der).hexdigest(), b"")
        raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw) if isinstance(key, Ed25519PublicKey) else b""
        return cls(sha256(der).hexdigest(), raw)


def _is(shown: _Certificate, described: Description) -> bool:
    """Whether a certificate is the one of who describes themselves so."""
    return shown.public_key == described.public_key or shown.digest == described.certificate


class _Socket(ssl.SSLSocket):
    """A socket from which a whole answer has to come in time, not just some of it now and then."""

    ends_at: float | None = None

    def recv_into(self, *given: Any, **named: Any) -> int:
        if self.ends_at is not None:
            left = self.ends_at - time.monotonic()
            if left <= 0:
                raise TimeoutError("the answer did not come in time")
            self.settimeout(left)
        return super().recv_into(*given, **named)


class _Connection(HTTPSConnection):
    """TLS 1.3 with whoever is there; ``certificate`` says who that is."""

    sock: _Socket | None
    certificate: _Certificate
    auto_open = 0
    """Who is there is to be looked at each time: a request does not connect by itself."""

    def __init__(self, host: str, port: int, timeout: float) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.sslsocket_class = _Socket
        super().__init__(host, port, timeout=timeout, context=context)

    def connect(self) -> None:
        super().connect()
        assert self.sock
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _notice_silence(self.sock)
        self.certificate = _Certificate.of(self.sock.getpeercert(binary_form=True) or b"")

    def cut(self) -> None:
        """Carry nothing any more; whoever reads from it or writes to it is woken."""
        if sock := self.sock:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of TLS there would be more to do

    def end(self) -> None:
        """End it."""
        self.cut()
        with suppress(OSError):
            self.close()


def _notice_silence(sock: socket.socket) -> None:
    """Have the kernel end a connection whose other end confirms nothing: nobody says so if packets vanish."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_SILENT_SECONDS * 1000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(_SILENT_SECONDS * _PROBE_AFTER)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(_SILENT_SECONDS * _PROBE_EVERY)))


def _said(error: Exception, timeout: float) -> str:
    """What an error of the network says of who should have answered within so many seconds."""
    if isinstance(error, TimeoutError) and error.errno is None:  # of a socket, or of TLS on it
        return f"answers nothing for {timeout:g} s"
    if isinstance(error, ssl.SSLError):
        cut = isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError))
        why = "the connection was cut" if cut else f"TLS failed ({error.reason or 'for no reason given'})"
    else:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return f"does not answer: {why}"


def _read(response: HTTPResponse) -> bytes:
    data = bytearray()
    while piece := response.read(_PIECE):
        data += piece
        if len(data) > _MOST_ANSWER_BYTES:
            raise HTTPException("the answer is too long")
    if response.length:
        raise HTTPException("the answer was cut")
    return bytes(data)


def _parsed(response: HTTPResponse, data: bytes) -> Any:
    """The answer as JSON; None if it is something else."""
    if response.headers.get_content_type() != "application/json":
        return None
    with suppress(ValueError, RecursionError):
        return json_.loads(data)
    return None


def _problem(answer: Answer, url: str) -> PeerError | None:
    """The error that an answer is."""
    if answer.status < 300:
        return None
    said: Any = None
    with suppress(LookupError, TypeError):
        said = answer.json["errors"][0]
    if not isinstance(said, Mapping):
        return PeerError("", answer.status, f"{url} answers with status {answer.status}")
    detail = str(said.get("detail", ""))[:1000]
    return PeerError(str(said.get("code", ""))[:100], answer.status, f"the peer says: {detail}", detail)
