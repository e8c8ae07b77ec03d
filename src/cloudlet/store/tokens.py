"""Tokens of peers: who sends a request to another cloudlet, signed with the site's own key.

A token is a JWT (EdDSA, RFC 8037), good for one request: ``iss`` (who sends it), ``aud`` (the site that it is
for), ``iat``, ``exp``, ``jti``, ``htm`` and ``htu`` (method and path, after RFC 9449). See "Peers" in
``docs/formats/handoff.md``. Nothing here knows which sites are peers, and what a clock says is passed in.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from jwt.types import Options

from cloudlet.errors import CapacityError, RefusedError

LIFETIME_SECONDS = 60
SKEW_SECONDS = 120
"""How much older or younger a token may be than the clock of who looks at it says."""
_ALGORITHM = "EdDSA"
_MOST_LETTERS = 4096
_MOST_ID_LETTERS = 64
_MOST_SEEN = 65_536
"""Of one issuer: some 270 requests in each second, for as long as they are remembered."""
_UNVERIFIED = {"verify_signature": False}
SIGNATURE_ONLY: Options = {
    "verify_signature": True,
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
    "verify_aud": False,
    "verify_iss": False,
    "verify_sub": False,
    "verify_jti": False,
}
"""For PyJWT: all else is looked at by who asks, by the clock that is passed in."""


class TokenError(RefusedError):
    """A peer's token that is not accepted."""

    usual_hint = "a token is made anew for each request"


class TokenTimeError(TokenError):
    """The token is the peer's and for this request, but too old or from the future: the clocks differ."""

    usual_hint = "set the clocks of both sites"


class Seen:
    """The tokens that came, so that none comes twice; for any number of threads of one process.

    Each is remembered for as long as it could be accepted again. It is a process's own: another process of
    the site, and the next one after a restart, has not seen what this one has. That is why every message
    between peers is one that can be repeated.
    """

    def __init__(self, most: int = _MOST_SEEN) -> None:
        self._most = most
        self._until: dict[str, dict[str, float]] = {}
        """By issuer, so that one who sends many keeps nobody else away; in the order in which they came,
        which is that in which they are forgotten."""
        self._lock = threading.Lock()

    def add(self, issuer: str, token_id: str) -> None:
        """Note a token of an issuer who is known.

        :raises TokenError: it was here before.
        :raises CapacityError: this issuer has sent too many.
        """
        now = time.monotonic()
        with self._lock:
            until = self._until.setdefault(issuer, {})
            while until and (first := next(iter(until.items())))[1] <= now:
                del until[first[0]]
            if token_id in until:
                raise TokenError("the token was used before")
            if len(until) >= self._most:
                raise CapacityError("too many tokens came at once", hint="try again in a few minutes")
            until[token_id] = now + 2 * SKEW_SECONDS + 1


@dataclass(frozen=True, slots=True)
class PeerTokens:
    """Makes a site's tokens."""

    site_id: str
    private: Ed25519PrivateKey = field(repr=False)

    def make(self, method: str, url_path: str, audience: str, *, offset_seconds: float = 0) -> str:
        """A token for one request.

        :param url_path: as the API has it, without a query.
        :param audience: the id of the peer.
        :param offset_seconds: how much later it is at the peer than here.
        """
        issued = int(time.time() + offset_seconds)
        claims = {
            "iss": self.site_id,
            "aud": audience,
            "iat": issued,
            "exp": issued + LIFETIME_SECONDS,
            "jti": secrets.token_urlsafe(16),
            "htm": method,
            "htu": url_path,
        }
        return jwt.encode(claims, self.private, _ALGORITHM)


def issuer_of(token: str) -> str:
    """Who a token says has made it, to find the key with which to verify that.

    :raises TokenError: it is no token.
    """
    return _text(_claims(token, None, {"options": _UNVERIFIED}), "iss")


def verify(
    token: str,
    method: str,
    path: str,
    public_key: Ed25519PublicKey,
    audience: str,
    now: float,
    seen: Seen,
) -> Mapping[str, Any]:
    """The claims of a token that is good for a request.

    :param public_key: of the peer that ``iss`` names.
    :param audience: this site's id.
    :param now: seconds since 1970.
    :param seen: what came before; the token is added to it if all else is right.
    :raises TokenTimeError: only its time is wrong.
    :raises TokenError: it is not the peer's, or not for this request, or was used before.
    """
    claims = _claims(token, public_key, {"algorithms": [_ALGORITHM], "options": SIGNATURE_ONLY})
    issuer, token_id = _text(claims, "iss"), _text(claims, "jti")
    if len(token_id) > _MOST_ID_LETTERS:
        raise TokenError("the token's id is too long")
    if claims.get("aud") != audience:
        raise TokenError("the token is for another site")
    if (claims.get("htm"), claims.get("htu")) != (method, path):
        raise TokenError("the token is for another request")
    issued, expires = _moment(claims, "iat"), _moment(claims, "exp")
    if not 0 < expires - issued <= LIFETIME_SECONDS:
        raise TokenError(f"a token lives for {LIFETIME_SECONDS} seconds at most")
    if abs(now - issued) > SKEW_SECONDS or now > expires + SKEW_SECONDS - LIFETIME_SECONDS:
        raise TokenTimeError(f"by this site's clock the token is {now - issued:.0f} seconds old")
    seen.add(issuer, token_id)
    return claims


def _claims(token: str, key: Ed25519PublicKey | None, how: Mapping[str, Any]) -> Mapping[str, Any]:
    if len(token) > _MOST_LETTERS:
        raise TokenError("the token is too long")
    try:
        claims: Mapping[str, Any] = jwt.decode(token, key or "", **how)
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
        raise TokenError("the token is not signed by the peer's key, or is no token") from error
    return claims


def _text(claims: Mapping[str, Any], name: str) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or not value:
        raise TokenError(f"the token does not say {name}")
    return value


def _moment(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    if not isinstance(value, (int, float)) or not 0 <= value < 2**53:  # which NaN is not either
        raise TokenError(f"the token does not say {name}")
    return float(value)
