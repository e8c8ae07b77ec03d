"""Access tokens: what a device shows to be served, verified without asking anybody.

A token has the claims of RFC 9068: ``iss`` (the provider), ``sub`` (the user), ``aud`` (the cloudlets it is
for, or all of the provider's), ``client_id`` (the device), ``scope``, ``iat``, ``exp``, ``jti``. Beside them
stand ``project``, ``offer`` (the offer that it is for) and ``cnf.jkt``, the thumbprint of the device's own
key: whoever shows the token proves with it, for each request, that they have that key
(:mod:`~cloudlet.admission.dpop`). Where an offer allows it there is no ``cnf``: the token alone is enough.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudlet.admission import signed
from cloudlet.admission.signed import Claims, SignedError
from cloudlet.store.token_keys import TokenKey

TYPE = "at+jwt"
EVERY_CLOUDLET = "cloudlet"
"""The audience of a token that is for all sites of its provider."""
_WHAT = "token"
_THUMBPRINT_LETTERS = frozenset(string.ascii_letters + string.digits + "-_")


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
    return signed.sign(TYPE, access.claims(), kid, private)


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
    :raises SignedError: it is not signed by a trusted key, or not for this cloudlet, or is no token.
    """
    claims = Claims.of(_WHAT, TYPE, token, keys, issuer)
    access = Access(
        id=claims.text("jti"),
        issuer=issuer,
        user_id=claims.text("sub"),
        project_id=claims.text("project"),
        device_id=claims.text("client_id"),
        audience=claims.texts("aud"),
        offer_id=claims.text("offer"),
        issued_at=claims.number("iat"),
        expires_at=claims.number("exp"),
        thumbprint=_thumbprint(claims.get("cnf")) if claims.has("cnf") else None,
        scope=frozenset(claims.text("scope").split()),
    )
    if not access.audience & {EVERY_CLOUDLET, *audience}:
        raise SignedError("the token is for another cloudlet")
    claims.check_time(now, skew_seconds)
    return access


def _thumbprint(confirmation: Any) -> str:
    """Of the key that the token is bound to; one that is bound in another way is not good for anything."""
    found = confirmation.get("jkt") if isinstance(confirmation, dict) else None
    if not isinstance(found, str) or len(found) != 43 or not _THUMBPRINT_LETTERS.issuperset(found):
        raise SignedError("the token is bound in a way that is not known here")
    return found
