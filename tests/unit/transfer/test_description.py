"""What a cloudlet says of itself: signed, strict, and of nobody else."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cloudlet.errors import CorruptError, ImpossibleError, IntegrityError, SignatureError
from cloudlet.overlay import canonical
from cloudlet.transfer.description import Description, check_url, fingerprint_of, grouped

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NONCE = "00ff" * 8


def signed(key: Ed25519PrivateKey = KEY, **changes: Any) -> Description:
    values: dict[str, Any] = {
        "site_id": "0b6ad9ac-7b1f-4b3e-9a3c-5d7f0e1c2b3a",
        "name": "edge ä",
        "url": "https://edge.example.org",
        "public_key": key.public_key().public_bytes_raw(),
        "certificate": "ab" * 32,
        "nonce": NONCE,
        **changes,
    }
    unsigned = Description(**values)
    return replace(unsigned, signature=key.sign(unsigned.message))


def wire(found: Description) -> dict[str, Any]:
    """As it comes out of JSON."""
    return dict(json.loads(json.dumps(found.to_json())))


def test_what_was_signed_is_read() -> None:
    made = signed()
    assert Description.read(wire(made), nonce=NONCE) == made
    assert Description.read(wire(made), nonce=NONCE, public_key=made.public_key) == made
    plain = signed(certificate="", url="", nonce="")
    assert Description.read(wire(plain), nonce="") == plain


def test_what_a_later_version_adds_is_signed_too() -> None:
    said = {**wire(signed()), "region": "north"}
    with pytest.raises(SignatureError):
        Description.read(said, nonce=NONCE)
    rest = {name: value for name, value in said.items() if name != "signature"}
    signature = KEY.sign(b"cloudlet peer description 1\n" + canonical.encode(rest))
    said["signature"] = base64.b64encode(signature).decode()
    assert Description.read(said, nonce=NONCE).site_id == said["site_id"]


@pytest.mark.parametrize("name", sorted(signed().to_json()))
def test_each_member_is_signed_and_needed(name: str) -> None:
    said = wire(signed())
    other = wire(signed(Ed25519PrivateKey.generate(), name="x", url="", certificate="", nonce="00"))
    other["site_id"] = other["site_id"].replace("0b6", "0b7")
    with pytest.raises(IntegrityError):
        Description.read({**said, name: other[name]}, nonce=NONCE)
    for wrong in (None, 7, [], "", "\x1b[2J", "x" * 5000):
        if (name, wrong) not in ((name, said[name]),):
            with pytest.raises(IntegrityError):
                Description.read({**said, name: wrong}, nonce=NONCE)
    del said[name]
    with pytest.raises(CorruptError):
        Description.read(said, nonce=NONCE)


def test_a_description_is_of_one_question_and_one_key() -> None:
    other = Ed25519PrivateKey.generate()
    with pytest.raises(SignatureError, match="this question"):
        Description.read(wire(signed()), nonce="00")
    with pytest.raises(SignatureError, match="pinned"):
        Description.read(wire(signed()), nonce=NONCE, public_key=other.public_key().public_bytes_raw())
    # Signed by a key that is not the one it names.
    mine = signed()
    forged = replace(mine, signature=other.sign(mine.message))
    with pytest.raises(SignatureError, match="not signed"):
        Description.read(wire(forged), nonce=NONCE)
    # By the right key, but as something else.
    elsewhere = replace(mine, signature=KEY.sign(mine.message.partition(b"\n")[2]))
    with pytest.raises(SignatureError, match="not signed"):
        Description.read(wire(elsewhere), nonce=NONCE)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner)))
def test_anything_else_is_refused(value: Any) -> None:
    for said in (value, dict.fromkeys(signed().to_json(), value), {**wire(signed()), "more": value}):
        with pytest.raises(IntegrityError):
            Description.read(said, nonce=NONCE)


def test_names_that_would_steer_a_terminal() -> None:
    for name in ("", "a\nb", "\x1b[2J", "x" * 256):
        with pytest.raises(CorruptError):
            Description.read(wire(signed(name=name)), nonce=NONCE)


def test_fingerprints_are_read_by_people() -> None:
    text = fingerprint_of(bytes(32))
    assert len(text) == 64
    assert grouped(text).replace(":", "") == text
    assert {len(part) for part in grouped(text).split(":")} == {4}


@pytest.mark.parametrize(
    "url", ["https://a", "https://a:1", "https://[fd00::1]:8791/", "https://a/edge", "https://10.0.0.1:8791"]
)
def test_addresses_of_cloudlets(url: str) -> None:
    check_url(url, "url")


@pytest.mark.parametrize(
    "url",
    [
        "", "a", "http://a", "https://", "https:///x", "https://a:0", "https://a:65536", "https://a:b",
        "https://u@a", "https://u:p@a", "https://a?b", "https://a#b", "https://[", "https://ä", "file:///etc",
        "https://a:-1",
    ],
)  # fmt: skip
def test_what_is_none(url: str) -> None:
    with pytest.raises(ImpossibleError, match=r"peer\.url"):
        check_url(url, "peer.url")
