"""Who calls: three ways to find out, chosen by ``auth_strategy``.

``noauth``: whoever may open the site's Unix socket is its operator. ``http_basic``: a file of users with
bcrypt hashes, projects and roles. ``keystone``: keystonemiddleware has verified a token before.

Beside each of them other cloudlets show a token of their own key, for the operations that are theirs.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import bcrypt

from cloudlet.api.faults import BusyError, ClockError, UnauthenticatedError
from cloudlet.errors import FailedError, RefusedError, UsageError
from cloudlet.service.peers import Peers
from cloudlet.store.rows import Peer
from cloudlet.store.tokens import TokenError, TokenTimeError
from cloudlet.transfer.peer import SCHEME

DEFAULT_PROJECT = "default"
UNAVAILABLE = "cloudlet.unavailable"
"""In WSGI's environment, where no client can write: why nobody knows who calls."""
_COST = 10
_REMEMBERED_SECONDS = 300.0
_MOST_REMEMBERED = 4096
_GUESS_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who calls, in which project, with which roles."""

    user_id: str
    project_id: str
    roles: frozenset[str]

    def credentials(self) -> dict[str, object]:
        """As oslo.policy wants it."""
        return {"user_id": self.user_id, "project_id": self.project_id, "roles": sorted(self.roles)}


OPERATOR = Identity("operator", DEFAULT_PROJECT, frozenset({"admin", "publisher", "member", "reader"}))
NOBODY = Identity("", "", frozenset())


class Strategy(Protocol):
    """A way to find out who calls."""

    challenge: str
    """For the header ``WWW-Authenticate``."""

    def identify(self, headers: Mapping[str, str]) -> Identity:
        """Who sent a request with these headers (their names as in WSGI's environment).

        :raises UnauthenticatedError: they do not show it.
        """


class NoAuth:
    """Everybody is the operator: only for a socket that nobody else can open."""

    challenge = ""

    def identify(self, headers: Mapping[str, str]) -> Identity:
        return OPERATOR


class Keystone:
    """Who keystonemiddleware says they are; ``uri`` is where they get a token."""

    def __init__(self, uri: str) -> None:
        self.challenge = f'Keystone uri="{uri}"'

    def identify(self, headers: Mapping[str, str]) -> Identity:
        if why := headers.get(UNAVAILABLE):
            raise FailedError(why, hint="try again; the server's log says more")
        if headers.get("HTTP_X_IDENTITY_STATUS") != "Confirmed":
            raise UnauthenticatedError("no valid token", hint="get a token from Keystone")
        # The middleware leaves this to us too. Who sends any service's token passes its access rules.
        if headers.get("HTTP_X_SERVICE_IDENTITY_STATUS", "Confirmed") != "Confirmed":
            raise UnauthenticatedError("the service's token is not valid", hint="leave X-Service-Token out")
        project = headers.get("HTTP_X_PROJECT_ID", "")
        if not project:
            raise UnauthenticatedError(
                "the token is for no project", hint="ask for a token scoped to a project"
            )
        roles = headers.get("HTTP_X_ROLES", "").split(",")
        return Identity(
            headers.get("HTTP_X_USER_ID", ""), project, frozenset(role.strip().lower() for role in roles)
        )


def identify_peer(headers: Mapping[str, str], peers: Peers) -> tuple[Identity, Peer]:
    """Which of the site's peers sent a request with these headers.

    :raises ClockError: its clock is another one.
    :raises UnauthenticatedError: they do not show it.
    """
    if not from_a_peer(headers):
        raise UnauthenticatedError("only other cloudlets call this", hint="they show a token of their key")
    token = headers["HTTP_AUTHORIZATION"].partition(" ")[2].strip()
    try:
        peer = peers.authenticate(token, headers["REQUEST_METHOD"], headers["PATH_INFO"])
    except TokenTimeError as error:
        raise ClockError(error.message, hint=error.hint) from error
    except TokenError as error:
        raise UnauthenticatedError(error.message, hint=error.hint) from error
    return Identity(f"peer:{peer.id}", "", frozenset({"peer"})), peer


def refuse_peer(headers: Mapping[str, str]) -> None:
    """That a request is not one that shows a peer's token: it would be for nothing here.

    :raises RefusedError: it does.
    """
    if from_a_peer(headers):
        raise RefusedError("another cloudlet may not do this", hint="what peers may do is below /v1/peer")


def from_a_peer(headers: Mapping[str, str]) -> bool:
    """Whether a request shows a peer's token, or what is meant to be one."""
    return headers.get("HTTP_AUTHORIZATION", "").partition(" ")[0].lower() == SCHEME.lower()


@dataclass(frozen=True, slots=True)
class User:
    """A line of the file of users."""

    name: str
    hash: str
    project: str = DEFAULT_PROJECT
    roles: frozenset[str] = frozenset({"member"})


class HttpBasic:
    """Users with passwords in a file, which is read again when it changes."""

    challenge = 'Basic realm="cloudlet", charset="UTF-8"'

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._users: dict[str, User] = {}
        self._read_at: tuple[int, int] | None = None
        self._known: dict[bytes, tuple[float, Identity]] = {}
        """Those who were here a moment ago: bcrypt is slow by design."""
        self._guessing = threading.Lock()
        self._key = secrets.token_bytes(32)
        self._nobody = bcrypt.hashpw(b"nobody", bcrypt.gensalt(_COST)).decode()

    def identify(self, headers: Mapping[str, str]) -> Identity:
        kind, _, encoded = headers.get("HTTP_AUTHORIZATION", "").partition(" ")
        if kind.lower() != "basic":
            raise UnauthenticatedError("no user and password were sent")
        try:
            name, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError) as error:
            raise UnauthenticatedError("the user and password cannot be read") from error
        self._read_if_changed()
        mark = hmac.new(self._key, encoded.encode(), sha256).digest()
        with self._lock:
            known = self._known.get(mark)
        if known and known[0] > time.monotonic():
            return known[1]
        user = self._users.get(name)
        # A user that is not there takes as long as one that is.
        if not self._right(password, user.hash if user else self._nobody) or not user:
            raise UnauthenticatedError("the user or the password is wrong")
        identity = Identity(user.name, user.project, user.roles)
        with self._lock:
            if len(self._known) >= _MOST_REMEMBERED:
                self._known.clear()
            self._known[mark] = time.monotonic() + _REMEMBERED_SECONDS, identity
        return identity

    def _right(self, password: str, hashed: str) -> bool:
        """Whether a password is right; guessing takes no more than one processor at a time."""
        if not self._guessing.acquire(timeout=_GUESS_SECONDS):
            raise BusyError("too many passwords are being checked")
        try:
            return _matches(password, hashed)
        finally:
            self._guessing.release()

    def _read_if_changed(self) -> None:
        try:
            stat = self._file.stat()
        except FileNotFoundError:
            raise UnauthenticatedError(
                "there are no users", hint="make one on the site: cloudlet-manage user set NAME"
            ) from None
        stamp = stat.st_mtime_ns, stat.st_ino
        with self._lock:
            if stamp != self._read_at:
                self._users = {user.name: user for user in read_users(self._file)}
                self._known.clear()
                self._read_at = stamp


def read_users(file: Path) -> list[User]:
    """The users in a file; none if it is not there.

    :raises UsageError: a line is not one.
    """
    users = []
    lines = file.read_text().splitlines() if file.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *rest = line.strip().split(":")
        if not name or not 1 <= len(rest) <= 3 or not rest[0].startswith("$2"):
            raise UsageError(f"{file}, line {number}: write NAME:BCRYPT[:PROJECT[:ROLE,ROLE]]")
        user = User(name, rest[0])
        if len(rest) > 1:
            roles = frozenset(rest[2].split(",")) if len(rest) > 2 else user.roles
            user = User(name, rest[0], rest[1] or DEFAULT_PROJECT, roles)
        users.append(user)
    return users


def write_users(file: Path, users: list[User]) -> None:
    """Replace the file of users; only its owner can read it."""
    lines = [f"{user.name}:{user.hash}:{user.project}:{','.join(sorted(user.roles))}\n" for user in users]
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = file.with_name(f".{file.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.writelines(lines)
    new.replace(file)


def hash_of(password: str) -> str:
    """What the file of users keeps of a password.

    :raises UsageError: it is longer than bcrypt looks.
    """
    if not password or len(password.encode()) > 72:
        raise UsageError("a password has 1 to 72 bytes")
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(_COST)).decode()


def first_user(file: Path) -> tuple[str, str] | None:
    """Make the operator's user where there is no file of users yet: its name and password, told only now."""
    if file.exists():
        return None
    password = secrets.token_urlsafe(18)
    write_users(file, [User("admin", hash_of(password), DEFAULT_PROJECT, OPERATOR.roles)])
    return "admin", password


def _matches(password: str, hashed: str) -> bool:
    try:
        return bcrypt.checkpw(password.encode()[:72], hashed.encode())
    except ValueError:
        return False
