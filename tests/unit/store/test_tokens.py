"""Tokens of peers: what is accepted, and what is not, whoever has made it."""

from __future__ import annotations

import base64
import hmac
import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloudlet.errors import CapacityError
from cloudlet.store.tokens import PeerTokens, Seen, TokenError, TokenTimeError, issuer_of, verify

METHOD, PATH = "PUT", "/v1/peer/handoffs/1/records"


@dataclass
class Site:
    """A site that sends tokens, and one that looks at them."""

    private: Ed25519PrivateKey
    seen: Seen

    def token(self, **more: Any) -> str:
        return PeerTokens("source", self.private).make(METHOD, PATH, "target", **more)

    def look(self, token: str, **other: Any) -> Any:
        given = {
            "method": METHOD, "path": PATH, "public_key": self.private.public_key(), "audience": "target",
            "now": time.time(), "seen": self.seen,
        }  # fmt: skip
        return verify(token, **{**given, **other})

    def signed(self, headers: dict[str, Any] | None = None, **changes: Any) -> str:
        """A token by the site's key whose claims are others; None leaves one out."""
        now = int(time.time())
        claims = {
            "iss": "source", "aud": "target", "iat": now, "exp": now + 60, "jti": "an id", "htm": METHOD,
            "htu": PATH, **changes,
        }  # fmt: skip
        known = {name: value for name, value in claims.items() if value is not None}
        # Not by the library, which would not sign everything.
        return self.raw({"alg": "EdDSA", "typ": "JWT", **(headers or {})}, json.dumps(known).encode())

    def raw(self, header: dict[str, Any], payload: bytes) -> str:
        signed = f"{b64(json.dumps(header).encode())}.{b64(payload)}"
        return f"{signed}.{b64(self.private.sign(signed.encode()))}"


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.fixture
def site() -> Site:
    return Site(Ed25519PrivateKey.generate(), Seen())


def test_a_token_is_good_for_its_request(site: Site) -> None:
    token = site.token()
    assert issuer_of(token) == "source"
    claims = site.look(token)
    assert (claims["iss"], claims["aud"], claims["htm"], claims["htu"]) == ("source", "target", METHOD, PATH)
    assert claims["exp"] - claims["iat"] == 60
    assert site.look(site.token())["jti"] != claims["jti"]


def test_another_library_reads_it(site: Site) -> None:
    token = site.token()
    assert jwt.get_unverified_header(token)["alg"] == "EdDSA"
    read = jwt.decode(token, site.private.public_key(), algorithms=["EdDSA"], audience="target")
    assert read["iss"] == "source"


def test_a_token_comes_once(site: Site) -> None:
    token = site.token()
    site.look(token)
    with pytest.raises(TokenError, match="used before"):
        site.look(token)


def test_of_many_at_once_one_is_accepted(site: Site) -> None:
    token, accepted, start = site.token(), [], threading.Barrier(8)

    def look() -> None:
        start.wait()
        with suppress(TokenError):
            accepted.append(site.look(token))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(accepted) == 1


def test_what_is_refused_for_another_reason_is_not_used_up(site: Site) -> None:
    token = site.token()
    with pytest.raises(TokenError, match="another request"):
        site.look(token, path="/v1/peer/handoffs/2/records")
    site.look(token)


@pytest.mark.parametrize("seconds", [-119, 119])
def test_clocks_may_differ_a_little(site: Site, seconds: int) -> None:
    site.look(site.token(offset_seconds=seconds))


@pytest.mark.parametrize("seconds", [-125, 125, -86_400, 86_400])
def test_a_wrong_clock_is_told_from_all_else(site: Site, seconds: int) -> None:
    with pytest.raises(TokenTimeError):
        site.look(site.token(offset_seconds=seconds))
    with pytest.raises(TokenTimeError):
        site.look(site.token(), now=time.time() - seconds)
    site.look(site.token(offset_seconds=seconds), now=time.time() + seconds)
    for others in ({"audience": "other"}, {"method": "GET"}):
        with pytest.raises(TokenError) as refused:
            site.look(site.token(offset_seconds=seconds), **others)
        assert not isinstance(refused.value, TokenTimeError)


def test_one_that_lived_shorter_ends_sooner(site: Site) -> None:
    now = int(time.time())
    site.look(site.signed(iat=now - 50, exp=now - 45, jti="1"))
    with pytest.raises(TokenTimeError):
        site.look(site.signed(iat=now - 110, exp=now - 105, jti="2"))


@pytest.mark.parametrize(
    "other",
    [
        {"audience": "another"},
        {"method": "GET"},
        {"path": "/v1/peer/handoffs"},
        {"path": PATH + "/"},
        {"public_key": Ed25519PrivateKey.generate().public_key()},
    ],
    ids=lambda other: next(iter(other)),
)
def test_it_is_for_one_site_and_request_and_of_one_key(site: Site, other: dict[str, Any]) -> None:
    with pytest.raises(TokenError):
        site.look(site.token(), **other)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: None} for name in ("iss", "aud", "iat", "exp", "jti", "htm", "htu")),
        {"aud": ["target", "another"]}, {"iss": 7}, {"iss": ""}, {"jti": "x" * 65}, {"jti": ""}, {"jti": 1},
        {"iat": "now"}, {"iat": True}, {"exp": 2**60}, {"exp": time.time() + 3600}, {"iat": -1},
        {"iat": [1]}, {"exp": {"a": 1}}, {"iat": float("nan")}, {"exp": float("inf")},
        {"iat": time.time() + 30, "exp": time.time()},
    ],
    ids=" ".join,
)  # fmt: skip
def test_claims_that_are_missing_or_wrong(site: Site, changes: dict[str, Any]) -> None:
    site.look(site.signed(jti="as it should be"))
    with pytest.raises(TokenError):
        site.look(site.signed(**changes))


def test_no_other_algorithm_is_accepted(site: Site) -> None:
    public = site.private.public_key()
    payload = site.token().split(".")[1]
    raw = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    symmetric = b64(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
    forged = []
    for name in ("none", "None", "NONE", ""):
        head = b64(json.dumps({"alg": name, "typ": "JWT"}).encode())
        forged += [f"{head}.{payload}.", f"{head}.{payload}.{b64(b'x')}"]
    for secret in (raw, pem, pem.rstrip(), b""):
        signed = f"{symmetric}.{payload}"
        forged.append(f"{signed}.{b64(hmac.new(secret, signed.encode(), sha256).digest())}")
    claims = jwt.decode(site.token(), options={"verify_signature": False})
    forged.append(jwt.encode(claims, ec.generate_private_key(ec.SECP256R1()), "ES256"))
    forged.append(jwt.encode(claims, Ed25519PrivateKey.generate(), "EdDSA"))
    for token in forged:
        assert issuer_of(token) == "source", "it would be read"
        with pytest.raises(TokenError):
            site.look(token)


def test_a_key_in_the_token_is_for_nothing(site: Site) -> None:
    other = Ed25519PrivateKey.generate()
    x = b64(other.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))
    headers = {"jwk": {"kty": "OKP", "crv": "Ed25519", "x": x}, "jku": "https://127.0.0.1:9/", "kid": "../x"}
    with pytest.raises(TokenError):
        site.look(Site(other, site.seen).signed(headers))
    with pytest.raises(TokenError):
        site.look(site.signed({"crit": ["exp"]}, jti="2"))
    with pytest.raises(TokenError):
        site.look(site.signed({"crit": ["unheard-of"], "unheard-of": 1}, jti="3"))


def test_one_changed_letter(site: Site) -> None:
    token = site.token()
    for at in range(0, len(token) - 1, 7):  # in the last letter there are bits that say nothing
        changed = token[:at] + ("A" if token[at] != "A" else "Q") + token[at + 1 :]
        with pytest.raises(TokenError):
            site.look(changed)
    site.look(token)


@pytest.mark.parametrize(
    "garbage",
    [
        "", ".", "..", "...", "a.b.c", "\x00", "é.é.é", "x" * 5000, f"{b64(b'{}')}.{b64(b'{}')}.",
        b64(b"[" * 3000),
    ],
    ids=lambda text: repr(text)[:20],
)  # fmt: skip
def test_garbage(site: Site, garbage: str) -> None:
    with pytest.raises(TokenError):
        issuer_of(garbage)
    with pytest.raises(TokenError):
        site.look(garbage)


@pytest.mark.parametrize(
    "payload", [b"[]", b"7", b"null", b"\xff", b"{", b"[" * 2500, b'{"iss":"a","iss":1}']
)
def test_payloads_that_are_no_claims(site: Site, payload: bytes) -> None:
    token = site.raw({"alg": "EdDSA", "typ": "JWT"}, payload)
    with pytest.raises(TokenError):
        issuer_of(token)
    with pytest.raises(TokenError):
        site.look(token)


def test_what_is_remembered_has_a_bound(site: Site) -> None:
    few = Seen(3)
    first = [site.token() for _ in range(3)]
    for token in first:
        site.look(token, seen=few)
    with pytest.raises(CapacityError, match="too many"):
        site.look(site.token(), seen=few)
    for token in first:
        with pytest.raises(TokenError, match="used before"):
            site.look(token, seen=few)


def test_what_cannot_come_again_is_forgotten(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    few, began = Seen(1), time.monotonic()
    few.add("source", "1")
    monkeypatch.setattr(time, "monotonic", lambda: began + 239)
    with pytest.raises(CapacityError, match="too many"):
        few.add("source", "2")
    few.add("another source", "2")
    monkeypatch.setattr(time, "monotonic", lambda: began + 250)
    few.add("source", "2")


def test_two_sites_may_use_the_same_id(site: Site) -> None:
    site.look(site.signed(jti="1"))
    site.look(site.signed(iss="another", jti="1"))
