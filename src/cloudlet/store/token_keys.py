"""The keys of access tokens: those that sign here, and those of the same provider that sign elsewhere.

``tokens/KID.pem`` is a private Ed25519 key (PKCS#8, only for its owner), ``tokens/KID.pub`` the public key
(PEM) of one whose tokens are accepted; KID is the key's thumbprint after RFC 7638. The newest private key
signs; the others go on being accepted until they are retired, so that tokens outlive a rotation. They are not
the keys of overlays (:mod:`~cloudlet.store.keyring`): who may publish an app may not say who is served.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from cloudlet.errors import NotFoundError, UsageError
from cloudlet.store.keyring import write_new

_KID = re.compile(r"[A-Za-z0-9_-]{43}")
_MOST_KEYS = 100


@dataclass(frozen=True, slots=True)
class TokenKey:
    """A key of the ring."""

    kid: str
    made_at: float
    """When its file was made, in seconds since 1970."""
    public: Ed25519PublicKey = field(repr=False)
    signs: bool = False


class TokenKeys:
    """The folder of the keys of access tokens."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tokens"
        self._lock = threading.Lock()
        self._names: set[str] = set()
        self._known: Mapping[str, TokenKey] = {}

    def all(self) -> Mapping[str, TokenKey]:
        """Every key whose tokens are accepted, by its thumbprint.

        The folder is read again when there are other names in it: a key's name says what it is.
        """
        try:
            names = {path.name for path in self._folder.iterdir()}
        except FileNotFoundError:
            names = set()
        with self._lock:
            if names != self._names:
                self._known, self._names = self._read(), names
            return self._known

    def rotate(self) -> TokenKey:
        """Make a key that signs from now on; those before it are accepted as before."""
        private = Ed25519PrivateKey.generate()
        kid = thumbprint(jwk_of(private.public_key()))
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        # The public half is what makes it a key of the ring: it comes last.
        write_new(self._folder / f"{kid}.pem", pem, 0o600)
        self._write_public(kid, private.public_key())
        return self.all()[kid]

    def signer(self) -> tuple[str, Ed25519PrivateKey]:
        """The newest key that signs here, and its thumbprint.

        :raises NotFoundError: there is none.
        """
        mine = [key for key in self.all().values() if key.signs]
        if not mine:
            raise NotFoundError(
                "this site has no key to sign access tokens with", hint="cloudlet-manage token-key rotate"
            )
        newest = max(mine, key=lambda key: (key.made_at, key.kid))
        private = load_pem_private_key((self._folder / f"{newest.kid}.pem").read_bytes(), None)
        assert isinstance(private, Ed25519PrivateKey)
        return newest.kid, private

    def retire(self, kid: str) -> None:
        """Accept no token of a key any more.

        :raises NotFoundError: there is none of this thumbprint.
        """
        if kid not in self.all():
            raise NotFoundError(f"there is no token key {kid[:64]!r}", hint="cloudlet-manage token-key list")
        (self._folder / f"{kid}.pub").unlink()
        (self._folder / f"{kid}.pem").unlink(missing_ok=True)

    def jwks(self) -> dict[str, Any]:
        """Every key that is accepted, as a set after RFC 7517."""
        return {
            "keys": [
                {**jwk_of(key.public), "kid": key.kid, "use": "sig", "alg": "EdDSA"}
                for key in sorted(self.all().values(), key=lambda key: (key.made_at, key.kid))
            ]
        }

    def trust(self, jwks: Any) -> list[str]:
        """Accept the tokens of every key in a set, such as another site's; the thumbprints of the new ones.

        :raises UsageError: it is no such set.
        """
        keys = jwks.get("keys") if isinstance(jwks, dict) else None
        if not isinstance(keys, list) or len(keys) > _MOST_KEYS:
            raise UsageError(
                "this is no set of keys", hint="it is what /.well-known/jwks.json of a site answers"
            )
        publics = [public_of(key) for key in keys]
        known, new = self.all(), []
        for public in publics:
            kid = thumbprint(jwk_of(public))
            if kid not in known:
                self._write_public(kid, public)
                new.append(kid)
        return new

    def _read(self) -> dict[str, TokenKey]:
        found = {}
        for path in self._folder.glob("*.pub"):
            if not _KID.fullmatch(path.stem):
                continue
            try:
                public = load_pem_public_key(path.read_bytes())
            except (ValueError, UnsupportedAlgorithm) as error:
                raise UsageError(f"{path} is not a public key") from error
            if not isinstance(public, Ed25519PublicKey) or thumbprint(jwk_of(public)) != path.stem:
                raise UsageError(f"{path} is not the key that its name says")
            signs = path.with_suffix(".pem").exists()
            found[path.stem] = TokenKey(path.stem, path.stat().st_mtime, public, signs)
        return found

    def _write_public(self, kid: str, public: Ed25519PublicKey) -> None:
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        write_new(self._folder / f"{kid}.pub", pem, 0o644)


def jwk_of(public: Ed25519PublicKey) -> dict[str, str]:
    """A public key as RFC 8037 has it."""
    return {
        "kty": "OKP",
        "crv": "Ed25519",
        "x": base64url(public.public_bytes(Encoding.Raw, PublicFormat.Raw)),
    }


def public_of(jwk: Any) -> Ed25519PublicKey:
    """The Ed25519 key that a JWK is.

    :raises UsageError: it is none, or is more than the public half of one.
    """
    wrong = UsageError("this is not the public half of an Ed25519 key as a JWK")
    if not isinstance(jwk, dict) or "d" in jwk or (jwk.get("kty"), jwk.get("crv")) != ("OKP", "Ed25519"):
        raise wrong
    x = jwk.get("x")
    if not isinstance(x, str) or not _KID.fullmatch(x):
        raise wrong
    return Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(x + "="))


def thumbprint(jwk: Mapping[str, str]) -> str:
    """The thumbprint of a public key: RFC 7638, with SHA-256."""
    needed = {name: jwk[name] for name in ("crv", "kty", "x", "y") if name in jwk}
    return base64url(sha256(json.dumps(needed, sort_keys=True, separators=(",", ":")).encode()).digest())


def base64url(data: bytes) -> str:
    """Base64 for URLs, without padding (RFC 7515)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
