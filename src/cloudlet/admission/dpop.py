"""Proof that who shows a token has the key that it is bound to (DPoP, RFC 9449).

Each request has a proof of its own: a JWT (``typ: dpop+jwt``) signed by the device's key, which stands in its
header, over the method and the URL of the request (``htm``, ``htu``), the digest of the token (``ath``), a
moment, and an id that comes once. So a token that was stolen opens nothing, nor does a request that was
overheard.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Protocol
from urllib.parse import urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudlet.errors import RefusedError
from cloudlet.store.token_keys import base64url, thumbprint
from cloudlet.store.tokens import SIGNATURE_ONLY

TYPE = "dpop+jwt"
ALGORITHMS = {"EdDSA": ("OKP", "Ed25519"), "ES256": ("EC", "P-256")}
"""What devices may sign with, and the kind of key and curve of each: the second is what a browser has."""
MOST_LETTERS = 4096
_MOST_ID_LETTERS = 128
_PRIVATE = {"d", "p", "q", "dp", "dq", "qi", "k", "oth"}
_DEFAULT_PORTS = {"http": 80, "https": 443}


class ProofError(RefusedError):
    """A proof that proves nothing."""

    usual_hint = "make a proof for each request, with the key that the token is bound to"


class ProofTimeError(ProofError):
    """The proof is for this request, but too old or from the future: the clocks differ."""

    usual_hint = "set the device's clock"


class Once(Protocol):
    """Remembers what came, so that it does not come twice."""

    def add(self, issuer: str, token_id: str) -> None: ...


def make(
    private: Ed25519PrivateKey | EllipticCurvePrivateKey,
    jwk: Mapping[str, str],
    method: str,
    url: str,
    now: float,
    token: str | None = None,
) -> str:
    """A proof for one request.

    :param jwk: the public half of the key.
    :param url: of the request; what follows its path is left out.
    :param token: that is shown with it; None where one is asked for.
    """
    algorithm = "EdDSA" if isinstance(private, Ed25519PrivateKey) else "ES256"
    claims: dict[str, Any] = {
        "jti": secrets.token_urlsafe(16),
        "htm": method,
        "htu": url.partition("?")[0].partition("#")[0],
        "iat": int(now),
    }
    if token is not None:
        claims["ath"] = digest_of(token)
    return jwt.encode(claims, private, algorithm, headers={"typ": TYPE, "jwk": dict(jwk)})


def verify(
    proof: str, method: str, url: str, now: float, skew_seconds: float, once: Once, token: str | None = None
) -> str:
    """The thumbprint of the key that a proof was made with, if it is for this request.

    :param url: of the request.
    :param now: seconds since 1970.
    :param skew_seconds: how much the device's clock may differ.
    :param once: what came before; the proof is added to it if all else is right.
    :param token: that was shown with it; None where one is asked for.
    :raises ProofTimeError: only its time is wrong.
    :raises ProofError: it is for another request or another token, was used before, or is no proof.
    """
    algorithm, jwk = _header_of(proof)
    try:
        key = jwt.PyJWK(dict(jwk), algorithm)
        claims = jwt.decode(proof, key, algorithms=[algorithm], options=SIGNATURE_ONLY)
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
        raise ProofError("the proof is not signed by the key that it shows") from error
    proof_id = claims.get("jti")
    if not isinstance(proof_id, str) or not 0 < len(proof_id) <= _MOST_ID_LETTERS:
        raise ProofError("the proof has no id, or one that is too long")
    if claims.get("htm") != method:
        raise ProofError("the proof is for another method")
    if not isinstance(claims.get("htu"), str) or _place(claims["htu"]) != _place(url):
        raise ProofError(
            "the proof is for another URL",
            hint=f"the site is called {url.partition('?')[0]}: use that, or have public_url set",
        )
    if token is not None and not secrets.compare_digest(str(claims.get("ath", "")), digest_of(token)):
        raise ProofError("the proof is for another token")
    made = claims.get("iat")
    if not isinstance(made, (int, float)) or isinstance(made, bool) or not 0 <= made < 2**53:
        raise ProofError("the proof does not say when it was made")
    if abs(now - made) > skew_seconds:
        raise ProofTimeError(f"by this site's clock the proof is {now - made:.0f} seconds old")
    found = thumbprint(jwk)
    once.add(found, proof_id)
    return found


def digest_of(token: str) -> str:
    """What a proof says of the token that it goes with: ``ath``."""
    return base64url(sha256(token.encode()).digest())


def _header_of(proof: str) -> tuple[str, Mapping[str, str]]:
    """The algorithm and the public key that a proof shows; nothing else that a header names is followed."""
    if len(proof) > MOST_LETTERS:
        raise ProofError("the proof is too long")
    try:
        header = jwt.get_unverified_header(proof)
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
        raise ProofError("this is no proof") from error
    algorithm, jwk = header.get("alg"), header.get("jwk")
    if header.get("typ") != TYPE:
        raise ProofError("this is no proof: its type is not dpop+jwt")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise ProofError(f"a proof is signed with {' or '.join(ALGORITHMS)}")
    if not isinstance(jwk, dict) or not all(isinstance(value, str) for value in jwk.values()):
        raise ProofError("the proof shows no key")
    if _PRIVATE & jwk.keys():
        raise ProofError("the proof shows a private key", hint="make a new key: this one is everybody's now")
    if (jwk.get("kty"), jwk.get("crv")) != ALGORITHMS[algorithm]:
        raise ProofError("the proof's key is not of its algorithm")
    return algorithm, jwk


def _place(url: str) -> tuple[str, str, int | None, str] | None:
    """What two URLs of the same request have in common (RFC 3986, 6.2.2 and 6.2.3)."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    scheme = parts.scheme.lower()
    return scheme, (parts.hostname or "").lower(), port or _DEFAULT_PORTS.get(scheme), parts.path or "/"
