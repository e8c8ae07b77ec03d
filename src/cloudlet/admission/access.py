"""Access tokens: what a device shows to be served, verified without asking anybody.

A token is a JWT (EdDSA) with the claims of RFC 9068: ``iss`` (the provider), ``sub`` (the user), ``aud``
(the cloudlets it is for, or all of the provider's), ``client_id`` (the device), ``scope``, ``iat``, ``exp``,
``jti``. Beside them stand ``project``, ``offer`` (the offer that it is for) and ``cnf.jkt``, the thumbprint
of the device's own key: whoever shows the token proves with it, for each request, that they have that key
(:mod:`~cloudlet.admission.dpop`). Where an offer allows it there is no ``cnf``: the token alone is enough.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudlet.errors import RefusedError
from cloudlet.store.token_keys import TokenKey

TYPE = "at+jwt"
EVERY_CLOUDLET = "cloudlet"
"""The audience of a token that is for all sites of its provider."""
ALGORITHM = "EdDSA"
MOST_LETTERS = 8192
_THUMBPRINT_LETTERS = frozenset(string.ascii_letters + string.digits + "-_")
_SIGNATURE_ONLY = {
    "verify_signature": True,
    **{f"verify_{claim}": False for claim in ("exp", "nbf", "iat", "aud", "iss", "sub", "jti")},
}
"""All else is looked at below, by the clock that is passed in."""


class AccessError(RefusedError):
    """An access token that is not accepted."""

    usual_hint = "get a new one: cloudlet token create"


class ExpiredError(AccessError):
    """It was good, and is too old."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a token says."""

    id: str
    issuer: str
    user_id: str
    project_id: str
    device_id: str
    audience: frozenset[str]
    offer_id: str
    issued_at: int
    """Seconds since 1970."""
    expires_at: int
    thumbprint: str | None = None
    """Of the device's key; None: whoever has the token may use it."""
    scope: frozenset[str] = frozenset({"instances"})

    def claims(self) -> dict[str, Any]:
        """As the token has them."""
        said: dict[str, Any] = {
            "iss": self.issuer,
            "sub": self.user_id,
            "aud": sorted(self.audience),
            "client_id": self.device_id,
            "scope": " ".join(sorted(self.scope)),
            "iat": self.issued_at,
            "exp": self.expires_at,
            "jti": self.id,
            "project": self.project_id,
            "offer": self.offer_id,
        }
        return said | ({"cnf": {"jkt": self.thumbprint}} if self.thumbprint else {})


def new_token_id() -> str:
    """An id for a new token."""
    return secrets.token_urlsafe(16)


def sign(access: Access, kid: str, private: Ed25519PrivateKey) -> str:
    """The token that says so."""
    return jwt.encode(access.claims(), private, ALGORITHM, headers={"typ": TYPE, "kid": kid})


def verify(
    token: str,
    keys: Mapping[str, TokenKey],
    issuer: str,
    audience: Collection[str],
    now: float,
    skew_seconds: float,
) -> Access:
    """What a token says, if it is one that is accepted.

    :param keys: those that are trusted, by their thumbprints.
    :param issuer: the provider.
    :param audience: names of this cloudlet; the token is for one of them.
    :param now: seconds since 1970.
    :param skew_seconds: how much the clock of who signed it may differ.
    :raises ExpiredError: it is too old.
    :raises AccessError: it is not signed by a trusted key, or not for this cloudlet, or is no token.
    """
    key = keys.get(_kid_of(token))
    if key is None:
        raise AccessError("the token is signed by a key that is not trusted here")
    try:
        claims = jwt.decode(token, key.public, algorithms=[ALGORITHM], options=_SIGNATURE_ONLY)
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
        raise AccessError("the token was changed, or is no token") from error
    access = _access_of(claims)
    if access.issuer != issuer:
        raise AccessError("the token is another provider's")
    if not access.audience & {EVERY_CLOUDLET, *audience}:
        raise AccessError("the token is for another cloudlet")
    if access.issued_at > now + skew_seconds:
        raise AccessError("the token is from the future", hint="set the clocks of both sites")
    if access.expires_at <= now - skew_seconds:
        raise ExpiredError("the token has expired")
    return access


def _kid_of(token: str) -> str:
    """The key that a token says it is signed by: a name to look up, and nothing else is done with it."""
    if len(token) > MOST_LETTERS:
        raise AccessError("the token is too long")
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
        raise AccessError("this is no token") from error
    if header.get("typ") not in (TYPE, f"application/{TYPE}"):
        raise AccessError("this is no access token")
    kid = header.get("kid")
    return kid if isinstance(kid, str) else ""


def _access_of(claims: Mapping[str, Any]) -> Access:
    audience = claims.get("aud")
    if isinstance(audience, str):
        audience = [audience]
    if not isinstance(audience, list) or not all(isinstance(one, str) for one in audience):
        raise AccessError("the token does not say whom it is for")
    return Access(
        id=_text(claims, "jti"),
        issuer=_text(claims, "iss"),
        user_id=_text(claims, "sub"),
        project_id=_text(claims, "project"),
        device_id=_text(claims, "client_id"),
        audience=frozenset(audience),
        offer_id=_text(claims, "offer"),
        issued_at=_moment(claims, "iat"),
        expires_at=_moment(claims, "exp"),
        thumbprint=_thumbprint(claims["cnf"]) if "cnf" in claims else None,
        scope=frozenset(_text(claims, "scope").split()),
    )


def _thumbprint(confirmation: Any) -> str:
    """Of the key that the token is bound to; one that is bound in another way is not good for anything."""
    found = confirmation.get("jkt") if isinstance(confirmation, dict) else None
    if not isinstance(found, str) or len(found) != 43 or not _THUMBPRINT_LETTERS.issuperset(found):
        raise AccessError("the token is bound in a way that is not known here")
    return found


def _text(claims: Mapping[str, Any], name: str) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or not value or len(value) > 255:
        raise AccessError(f"the token does not say {name}")
    return value


def _moment(claims: Mapping[str, Any], name: str) -> int:
    value = claims.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise AccessError(f"the token does not say {name}")
    return value
