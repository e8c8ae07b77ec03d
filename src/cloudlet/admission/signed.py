"""What a provider signs: access tokens, invitations, vouchers: JWTs (EdDSA, RFC 8037), each of its own type.

Whoever has the provider's set of keys can look at them without asking anybody. The key is looked up by its
name among those that are trusted; nothing else that a header says is followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudlet.errors import RefusedError
from cloudlet.store.token_keys import TokenKey
from cloudlet.store.tokens import SIGNATURE_ONLY

ALGORITHM = "EdDSA"
MOST_LETTERS = 8192
_MOST_TEXT_LETTERS = 255


class SignedError(RefusedError):
    """It is not what the provider has signed, or is for somebody or some time else."""


class ExpiredError(SignedError):
    """It was good, and is too old."""


def sign(kind: str, claims: Mapping[str, Any], kid: str, private: Ed25519PrivateKey) -> str:
    """A document that says so.

    :param kind: its media type, without ``application/``.
    """
    return jwt.encode(dict(claims), private, ALGORITHM, headers={"typ": kind, "kid": kid})


class Claims:
    """What a document says, once its signature was found to be the provider's."""

    def __init__(self, what: str, said: Mapping[str, Any]) -> None:
        self._what = what
        self._said = said

    @classmethod
    def of(cls, what: str, kind: str, document: str, keys: Mapping[str, TokenKey], issuer: str) -> Claims:
        """Read a document.

        :param what: what a user calls it, such as ``voucher``.
        :param keys: those that are trusted, by their thumbprints.
        :param issuer: the provider.
        :raises SignedError: it is none, or another provider's.
        """
        key = keys.get(_kid_of(what, kind, document))
        if key is None:
            raise SignedError(f"the {what} is signed by a key that is not trusted here")
        try:
            said = jwt.decode(document, key.public, algorithms=[ALGORITHM], options=SIGNATURE_ONLY)
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            raise SignedError(f"the {what} was changed, or is none") from error
        found = cls(what, said)
        if found.text("iss") != issuer:
            raise SignedError(f"the {what} is another provider's")
        return found

    def has(self, name: str) -> bool:
        return name in self._said

    def get(self, name: str) -> Any:
        """What it says, unchecked; None if it does not."""
        return self._said.get(name)

    def text(self, name: str) -> str:
        """A text of 1 to 255 letters.

        :raises SignedError: it says none.
        """
        value = self._said.get(name)
        if not isinstance(value, str) or not 0 < len(value) <= _MOST_TEXT_LETTERS:
            raise SignedError(f"the {self._what} does not say {name}")
        return value

    def texts(self, name: str) -> frozenset[str]:
        """A text, or a list of them.

        :raises SignedError: it says neither.
        """
        value = self._said.get(name)
        several = [value] if isinstance(value, str) else value
        if not isinstance(several, list) or not all(isinstance(one, str) for one in several):
            raise SignedError(f"the {self._what} does not say {name}")
        return frozenset(several)

    def number(self, name: str) -> int:
        """A whole number, 0 or more: of seconds since 1970, say.

        :raises SignedError: it says none.
        """
        value = self._said.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
            raise SignedError(f"the {self._what} does not say {name}")
        return value

    def check_time(self, now: float, skew_seconds: float) -> None:
        """That it is good at a moment.

        :param now: seconds since 1970.
        :param skew_seconds: how much the clock of who signed it may differ.
        :raises ExpiredError: it is too old.
        :raises SignedError: it is from the future.
        """
        if self.number("iat") > now + skew_seconds:
            raise SignedError(f"the {self._what} is from the future", hint="set the clocks of both sites")
        if self.number("exp") <= now - skew_seconds:
            raise ExpiredError(f"the {self._what} has expired")


def _kid_of(what: str, kind: str, document: str) -> str:
    """The key that a document says it is signed by: a name to look up, and nothing else."""
    if len(document) > MOST_LETTERS:
        raise SignedError(f"the {what} is too long")
    try:
        header = jwt.get_unverified_header(document)
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
        raise SignedError(f"this is no {what}", hint="copy all of it") from error
    if header.get("typ") not in (kind, f"application/{kind}"):
        raise SignedError(f"this is no {what}, but something else that the provider signs")
    kid = header.get("kid")
    return kid if isinstance(kid, str) else ""
