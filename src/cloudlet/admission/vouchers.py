"""Vouchers and invitations: documents that a provider signs and hands out, each good once or so often.

A *voucher* is credit: an amount in a currency. It names the site that keeps it (``aud``), and that site alone
books it, once, under its id: so it can be redeemed there while the site is cut off from all others, and not
at two sites at the same moment. Another site that is shown one asks that site.

An *invitation* lets people accept an offer that is not for everybody, so many of them until it expires.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudlet.admission import money, signed
from cloudlet.admission.signed import Claims, SignedError
from cloudlet.errors import UsageError
from cloudlet.store.token_keys import TokenKey

VOUCHER_TYPE = "cloudlet-voucher+jwt"
INVITATION_TYPE = "cloudlet-invitation+jwt"


def new_document_id() -> str:
    """An id for a new document."""
    return secrets.token_urlsafe(16)


@dataclass(frozen=True, slots=True)
class Voucher:
    """What a voucher says."""

    id: str
    issuer: str
    site_id: str
    """Where it is booked."""
    amount: int
    """Millionths of the currency's unit."""
    currency: str
    issued_at: int
    """Seconds since 1970."""
    expires_at: int

    def sign(self, kid: str, private: Ed25519PrivateKey) -> str:
        """The voucher itself, to be handed out."""
        said: dict[str, Any] = {
            "iss": self.issuer,
            "aud": self.site_id,
            "jti": self.id,
            "amount": money.decimal(self.amount),
            "currency": self.currency,
            "iat": self.issued_at,
            "exp": self.expires_at,
        }
        return signed.sign(VOUCHER_TYPE, said, kid, private)

    @classmethod
    def verify(
        cls, text: str, keys: Mapping[str, TokenKey], issuer: str, now: float, skew_seconds: float
    ) -> Voucher:
        """What a voucher says, if the provider has signed it. Whether it was used is not in it.

        :raises ExpiredError: it is too old.
        :raises SignedError: it is not the provider's, or none.
        """
        claims = Claims.of("voucher", VOUCHER_TYPE, text, keys, issuer)
        try:
            amount, currency = (
                money.amount(claims.text("amount")),
                money.check_currency(claims.text("currency")),
            )
        except UsageError as error:
            raise SignedError(f"the voucher is for nothing: {error.message}") from error
        claims.check_time(now, skew_seconds)
        return cls(
            claims.text("jti"), issuer, claims.text("aud"), amount, currency, claims.number("iat"),
            claims.number("exp"),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Invitation:
    """What an invitation says."""

    id: str
    issuer: str
    offer_id: str
    uses: int
    """How many people may accept it."""
    issued_at: int
    """Seconds since 1970."""
    expires_at: int

    def sign(self, kid: str, private: Ed25519PrivateKey) -> str:
        """The invitation itself, to be handed out."""
        said = {
            "iss": self.issuer,
            "jti": self.id,
            "offer": self.offer_id,
            "uses": self.uses,
            "iat": self.issued_at,
            "exp": self.expires_at,
        }
        return signed.sign(INVITATION_TYPE, said, kid, private)

    @classmethod
    def verify(
        cls, text: str, keys: Mapping[str, TokenKey], issuer: str, now: float, skew_seconds: float
    ) -> Invitation:
        """What an invitation says, if the provider has signed it. How often it was used is not in it.

        :raises ExpiredError: it is too old.
        :raises SignedError: it is not the provider's, or none.
        """
        claims = Claims.of("invitation", INVITATION_TYPE, text, keys, issuer)
        claims.check_time(now, skew_seconds)
        return cls(
            claims.text("jti"), issuer, claims.text("offer"), claims.number("uses"), claims.number("iat"),
            claims.number("exp"),
        )  # fmt: skip
