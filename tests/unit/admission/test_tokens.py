"""Access tokens and proofs: what is accepted, and everything that is not, each for its own reason."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloudlet.admission import access, dpop
from cloudlet.admission.access import Access
from cloudlet.admission.dpop import ProofError, ProofTimeError
from cloudlet.admission.signed import MOST_LETTERS, ExpiredError, SignedError
from cloudlet.errors import NotFoundError, UsageError
from cloudlet.store.token_keys import TokenKeys, base64url, jwk_of, thumbprint
from cloudlet.store.tokens import Seen, TokenError

NOW = 1_800_000_000.0
ISSUER, SITE = "https://provider.example.org", "0f0e0d0c-0b0a-0908-0706-050403020100"
URL = "https://edge.example.org/v1/instances"
SKEW = 60.0


@pytest.fixture
def keys(tmp_path: Path) -> TokenKeys:
    ring = TokenKeys(tmp_path)
    ring.rotate()
    return ring


@pytest.fixture
def device() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def said(**changes: Any) -> Access:
    usual = Access(
        id=access.new_token_id(),
        issuer=ISSUER,
        user_id="mia",
        project_id="default",
        device_id="phone",
        audience=frozenset({SITE}),
        offer_id="offer",
        issued_at=int(NOW),
        expires_at=int(NOW) + 3600,
    )
    return replace(usual, **changes)


def verified(token: str, keys: TokenKeys, now: float = NOW) -> Access:
    return access.verify(token, keys.all(), ISSUER, [SITE], now, SKEW)


def test_a_token_says_what_it_was_made_to_say(keys: TokenKeys) -> None:
    made = said(thumbprint="a" * 43)
    assert verified(access.sign(made, *keys.signer()), keys) == made


def test_a_token_for_every_cloudlet_is_for_this_one(keys: TokenKeys) -> None:
    made = said(audience=frozenset({access.EVERY_CLOUDLET}))
    assert verified(access.sign(made, *keys.signer()), keys) == made


def test_a_token_outlives_a_rotation_and_not_its_key(keys: TokenKeys) -> None:
    kid, private = keys.signer()
    token = access.sign(said(), kid, private)
    time.sleep(0.01)  # the newest key is told by its file's time
    keys.rotate()
    assert keys.signer()[0] != kid
    verified(token, keys)
    keys.retire(kid)
    with pytest.raises(SignedError, match="not trusted"):
        verified(token, keys)


def test_another_site_of_the_provider_verifies_with_its_set_of_keys(keys: TokenKeys, tmp_path: Path) -> None:
    other = TokenKeys(tmp_path / "other")
    token = access.sign(said(), *keys.signer())
    with pytest.raises(SignedError, match="not trusted"):
        verified(token, other)
    new = other.trust(json.loads(json.dumps(keys.jwks())))
    assert new == [keys.signer()[0]]
    assert other.trust(keys.jwks()) == []
    verified(token, other)
    with pytest.raises(NotFoundError, match="no key to sign"):
        other.signer()


def test_the_clock_of_the_signer_may_differ_a_little(keys: TokenKeys) -> None:
    token = access.sign(said(), *keys.signer())
    verified(token, keys, NOW - SKEW)
    verified(token, keys, NOW + 3600 + SKEW - 1)


def _header(token: str, **changes: Any) -> str:
    head, body, signature = token.split(".")
    header = json.loads(base64.urlsafe_b64decode(head + "=="))
    return ".".join((base64url(json.dumps(header | changes).encode()), body, signature))


def _none(token: str) -> str:
    head, body, _ = _header(token, alg="none").split(".")
    return f"{head}.{body}."


def _hmac(token: str, keys: TokenKeys) -> str:
    """Signed with the public key as if it were a secret."""
    (key,) = keys.jwks()["keys"]
    claims = jwt.decode(token, options={"verify_signature": False})
    return jwt.encode(claims, key["x"], "HS256", headers={"typ": access.TYPE, "kid": key["kid"]})


REFUSED: dict[str, tuple[Callable[[str, TokenKeys], str], str]] = {
    "no token": (lambda token, keys: "x", "no token"),
    "an empty one": (lambda token, keys: "", "no token"),
    "a long one": (lambda token, keys: token + "A" * MOST_LETTERS, "too long"),
    "alg none": (lambda token, keys: _none(token), "changed"),
    "alg HS256": (_hmac, "changed"),
    "a kid outside": (lambda token, keys: _header(token, kid="../../../etc/shadow"), "not trusted"),
    "a kid that is no text": (lambda token, keys: _header(token, kid=["x"]), "no token|not trusted"),
    "a URL of keys": (lambda token, keys: _header(token, kid="x", jku="http://evil.example"), "not trusted"),
    "of another type": (lambda token, keys: _header(token, typ="JWT"), "no token, but something else"),
    "another body": (lambda token, keys: token.replace(".", ".e", 1), "changed"),
    "another signature": (lambda token, keys: token[:-4] + "AAAA", "changed"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_token_of_the_provider_is_refused(kind: str, keys: TokenKeys) -> None:
    change, reason = REFUSED[kind]
    token = access.sign(said(), *keys.signer())
    verified(token, keys)
    with pytest.raises(SignedError, match=reason):
        verified(change(token, keys), keys)


def test_a_token_that_another_key_signed_is_refused(keys: TokenKeys, tmp_path: Path) -> None:
    forger = TokenKeys(tmp_path / "forger")
    forger.rotate()
    with pytest.raises(SignedError, match="not trusted"):
        verified(access.sign(said(), *forger.signer()), keys)
    with pytest.raises(SignedError, match="changed"):  # under the name of one that is trusted
        verified(access.sign(said(), keys.signer()[0], forger.signer()[1]), keys)


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"issuer": "https://other.example.org"}, SignedError, "another provider"),
        ({"audience": frozenset({"another"})}, SignedError, "another cloudlet"),
        ({"audience": frozenset()}, SignedError, "another cloudlet"),
        ({"issued_at": int(NOW + SKEW) + 2}, SignedError, "future"),
        ({"expires_at": int(NOW - SKEW)}, ExpiredError, "expired"),
        ({"user_id": ""}, SignedError, "does not say sub"),
        ({"project_id": "p" * 300}, SignedError, "does not say project"),
        ({"thumbprint": "../x"}, SignedError, "bound in a way"),
        ({"expires_at": True}, SignedError, "does not say exp"),
        ({"issued_at": -1}, SignedError, "does not say iat"),
    ],
)
def test_a_token_for_others_or_another_time_is_refused(
    changes: dict[str, Any], error: type[Exception], reason: str, keys: TokenKeys
) -> None:
    with pytest.raises(error, match=reason):
        verified(access.sign(said(**changes), *keys.signer()), keys)


@pytest.mark.parametrize(
    ("claim", "value"),
    [("cnf", {}), ("cnf", {"x5t#S256": "a" * 43}), ("cnf", None), ("aud", 7), ("aud", [7])],
)
def test_a_claim_that_cannot_be_understood_is_not_passed_over(
    claim: str, value: Any, keys: TokenKeys
) -> None:
    kid, private = keys.signer()
    claims = said().claims() | {claim: value}
    token = jwt.encode(claims, private, "EdDSA", headers={"typ": access.TYPE, "kid": kid})
    with pytest.raises(SignedError):
        verified(token, keys)


def proof(
    device: Ed25519PrivateKey, method: str = "POST", url: str = URL, at: float = NOW, **more: Any
) -> str:
    return dpop.make(device, jwk_of(device.public_key()), method, url, at, **more)


def proven(
    text: str, once: Seen | None = None, method: str = "POST", url: str = URL, token: str | None = None
) -> str:
    return dpop.verify(text, method, url, NOW, SKEW, once or Seen(), token)


def test_a_proof_is_of_the_key_that_made_it(device: Ed25519PrivateKey) -> None:
    assert proven(proof(device)) == thumbprint(jwk_of(device.public_key()))
    assert proven(proof(device, token="t"), token="t") == thumbprint(jwk_of(device.public_key()))


def test_a_browsers_key_is_as_good() -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    numbers = private.public_key().public_numbers()
    jwk = {
        "kty": "EC", "crv": "P-256",
        "x": base64url(numbers.x.to_bytes(32, "big")), "y": base64url(numbers.y.to_bytes(32, "big")),
    }  # fmt: skip
    assert proven(dpop.make(private, jwk, "POST", URL, NOW)) == thumbprint(jwk)


def test_a_thumbprint_is_that_of_the_standard() -> None:
    """The example of RFC 8037, appendix A.3."""
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
    assert thumbprint(jwk) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


@pytest.mark.parametrize(
    ("asked", "said_to_be"),
    [
        (f"{URL}?limit=1", URL),
        ("https://EDGE.example.org:443/v1/instances", URL),
        ("http://edge:80/", "http://edge"),
        (f"{URL}#x", URL),
    ],
)
def test_a_url_is_the_same_in_other_letters(device: Ed25519PrivateKey, asked: str, said_to_be: str) -> None:
    proven(proof(device, url=said_to_be), url=asked)
    proven(proof(device, url=asked), url=said_to_be)


def test_a_proof_comes_once(device: Ed25519PrivateKey) -> None:
    once, text = Seen(), proof(device)
    proven(text, once)
    with pytest.raises(TokenError, match="used before"):
        proven(text, once)


@pytest.mark.parametrize(
    ("how", "error", "reason"),
    [
        ({"method": "GET"}, ProofError, "another method"),
        ({"url": "https://edge.example.org/v1/apps"}, ProofError, "another URL"),
        ({"url": "http://edge.example.org/v1/instances"}, ProofError, "another URL"),
        ({"url": "https://evil.example.org/v1/instances"}, ProofError, "another URL"),
        ({"url": "https://edge.example.org:99999/"}, ProofError, "another URL"),
        ({"at": NOW - SKEW - 1}, ProofTimeError, "61 seconds old"),
        ({"at": NOW + SKEW + 1}, ProofTimeError, "-61 seconds old"),
    ],
)
def test_a_proof_for_another_request_is_refused(
    how: dict[str, Any], error: type[Exception], reason: str, device: Ed25519PrivateKey
) -> None:
    with pytest.raises(error, match=reason):
        proven(proof(device, **how))


def test_a_proof_for_another_token_is_refused(device: Ed25519PrivateKey) -> None:
    for text in (proof(device), proof(device, token="other")):
        with pytest.raises(ProofError, match="another token"):
            proven(text, token="token")


def _private(device: Ed25519PrivateKey) -> str:
    raw = device.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    return dpop.make(device, {**jwk_of(device.public_key()), "d": base64url(raw)}, "POST", URL, NOW)


def _of_another(device: Ed25519PrivateKey) -> str:
    """It shows somebody else's key."""
    return dpop.make(device, jwk_of(Ed25519PrivateKey.generate().public_key()), "POST", URL, NOW)


FORGED: dict[str, tuple[Callable[[Ed25519PrivateKey], str], str]] = {
    "no proof": (lambda device: "x.y.z", "no proof"),
    "alg none": (lambda device: _none(proof(device)), "signed with"),
    "alg HS256": (lambda device: _header(proof(device), alg="HS256"), "signed with"),
    "another algorithm than the key's": (lambda device: _header(proof(device), alg="ES256"), "its algorithm"),
    "no key": (lambda device: _header(proof(device), jwk=None), "no key"),
    "a key of numbers": (lambda device: _header(proof(device), jwk={"kty": 1}), "no key"),
    "a private key": (_private, "private key"),
    "another's key": (_of_another, "not signed by the key"),
    "a key that is none": (
        lambda device: _header(proof(device), jwk={"kty": "OKP", "crv": "Ed25519", "x": "AA"}),
        "not signed by the key",
    ),
    "another type": (lambda device: _header(proof(device), typ="JWT"), "its type"),
    "long": (lambda device: proof(device) + "A" * dpop.MOST_LETTERS, "too long"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_proof_is_refused(kind: str, device: Ed25519PrivateKey) -> None:
    make, reason = FORGED[kind]
    with pytest.raises(ProofError, match=reason):
        proven(make(device))


@pytest.mark.parametrize(
    "claims", [{"jti": ""}, {"jti": "x" * 129}, {"iat": "now"}, {"iat": True}, {"iat": None}, {"htu": 7}]
)
def test_a_proof_that_leaves_something_out_is_refused(
    claims: dict[str, Any], device: Ed25519PrivateKey
) -> None:
    usual = {"jti": "x", "htm": "POST", "htu": URL, "iat": int(NOW)}
    headers = {"typ": dpop.TYPE, "jwk": jwk_of(device.public_key())}
    with pytest.raises(ProofError):
        proven(jwt.encode(usual | claims, device, "EdDSA", headers=headers))


@pytest.mark.parametrize(
    "jwks",
    [
        None, {}, [], {"keys": 1}, {"keys": [1]}, {"keys": [{}]},
        {"keys": [{"kty": "OKP", "crv": "Ed25519"}]},
        {"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "short"}]},
        {"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "A" * 43, "d": "A" * 43}]},
        {"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "A" * 43}] * 101},
    ],
)  # fmt: skip
def test_a_set_of_keys_that_is_none_is_refused_as_a_whole(jwks: Any, tmp_path: Path) -> None:
    ring = TokenKeys(tmp_path)
    with pytest.raises(UsageError):
        ring.trust(jwks)
    assert ring.all() == {}


def test_a_file_that_is_not_the_key_of_its_name_is_refused(keys: TokenKeys, tmp_path: Path) -> None:
    kid, _ = keys.signer()
    other = TokenKeys(tmp_path / "other")
    (tmp_path / "tokens" / f"{other.rotate().kid}.pub").write_bytes(
        (tmp_path / "tokens" / f"{kid}.pub").read_bytes()
    )
    with pytest.raises(UsageError, match="not the key that its name says"):
        keys.all()


def test_the_private_key_is_its_owners_alone(keys: TokenKeys, tmp_path: Path) -> None:
    (file,) = (tmp_path / "tokens").glob("*.pem")
    assert file.stat().st_mode & 0o777 == 0o600
