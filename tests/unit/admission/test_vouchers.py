"""Vouchers and invitations: those that the provider has signed, and no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloudlet.admission import signed
from cloudlet.admission.signed import ExpiredError, SignedError
from cloudlet.admission.vouchers import INVITATION_TYPE, VOUCHER_TYPE, Invitation, Voucher
from cloudlet.store.token_keys import TokenKeys

NOW, SKEW = 1_800_000_000.0, 60.0
ISSUER = "https://provider.example.org"
VOUCHER = Voucher("id", ISSUER, "site", 5_000_000, "EUR", int(NOW), int(NOW) + 86_400)
INVITATION = Invitation("id", ISSUER, "offer", 3, int(NOW), int(NOW) + 86_400)
EITHER = pytest.mark.parametrize("document", [VOUCHER, INVITATION], ids=["voucher", "invitation"])


@pytest.fixture
def keys(tmp_path: Path) -> TokenKeys:
    ring = TokenKeys(tmp_path)
    ring.rotate()
    return ring


def verified(document: Voucher | Invitation, text: str, keys: TokenKeys, now: float = NOW) -> Any:
    return type(document).verify(text, keys.all(), ISSUER, now, SKEW)


@EITHER
def test_it_says_what_it_was_made_to_say(document: Voucher | Invitation, keys: TokenKeys) -> None:
    assert verified(document, document.sign(*keys.signer()), keys) == document


@EITHER
def test_one_that_is_forged_or_another_providers_or_too_old_is_refused(
    document: Voucher | Invitation, keys: TokenKeys, tmp_path: Path
) -> None:
    forger = TokenKeys(tmp_path / "forger")
    forger.rotate()
    with pytest.raises(SignedError, match="not trusted"):
        verified(document, document.sign(*forger.signer()), keys)
    with pytest.raises(SignedError, match="changed"):
        verified(document, document.sign(keys.signer()[0], forger.signer()[1]), keys)
    with pytest.raises(SignedError, match="another provider"):
        verified(document, replace(document, issuer="other").sign(*keys.signer()), keys)
    with pytest.raises(ExpiredError, match="expired"):
        verified(document, document.sign(*keys.signer()), keys, NOW + 86_400 + SKEW)
    with pytest.raises(SignedError, match="future"):
        verified(document, document.sign(*keys.signer()), keys, NOW - SKEW - 1)
    with pytest.raises(SignedError, match="copy all of it"):
        verified(document, document.sign(*keys.signer())[:-90], keys)


def test_one_is_not_taken_for_the_other(keys: TokenKeys) -> None:
    with pytest.raises(SignedError, match="something else"):
        verified(VOUCHER, INVITATION.sign(*keys.signer()), keys)
    with pytest.raises(SignedError, match="something else"):
        verified(INVITATION, VOUCHER.sign(*keys.signer()), keys)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (VOUCHER_TYPE, {"amount": "-1"}),
        (VOUCHER_TYPE, {"amount": 5}),
        (VOUCHER_TYPE, {"amount": "99999999999"}),
        (VOUCHER_TYPE, {"currency": "XXZ"}),
        (VOUCHER_TYPE, {"jti": ""}),
        (VOUCHER_TYPE, {"aud": None}),
        (INVITATION_TYPE, {"uses": -1}),
        (INVITATION_TYPE, {"uses": True}),
        (INVITATION_TYPE, {"offer": 7}),
        (INVITATION_TYPE, {"exp": None}),
    ],
)
def test_what_cannot_be_understood_is_refused(kind: str, change: dict[str, Any], keys: TokenKeys) -> None:
    document = VOUCHER if kind == VOUCHER_TYPE else INVITATION
    usual = {
        "iss": ISSUER, "aud": "site", "jti": "id", "amount": "5", "currency": "EUR", "iat": int(NOW),
        "exp": int(NOW) + 9, "offer": "offer", "uses": 3,
    }  # fmt: skip
    verified(document, signed.sign(kind, usual, *keys.signer()), keys)
    with pytest.raises(SignedError):
        verified(document, signed.sign(kind, usual | change, *keys.signer()), keys)
