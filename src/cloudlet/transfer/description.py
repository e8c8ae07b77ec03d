"""What a cloudlet says of itself to others: id, name, URL and key, signed with that key.

Who does not know the site yet learns from it which key to pin; who knows the key learns which certificate
another TLS server shows in front of the site. It holds nothing that is secret.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloudlet.errors import CorruptError, ImpossibleError, SignatureError
from cloudlet.overlay import canonical

KEY_BYTES = 32
_CONTEXT = b"cloudlet peer description 1\n"
"""Before what is signed: the key signs overlays and tokens, too."""
_SITE_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NONCE = re.compile(r"[0-9a-f]{0,64}")
_DIGEST = re.compile(r"([0-9a-f]{64})?")
_MEMBERS = ("site_id", "name", "url", "public_key", "fingerprint", "certificate", "nonce", "signature")
_MOST_LETTERS, _MOST_URL_LETTERS = 255, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A site as it describes itself."""

    site_id: str
    name: str
    url: str
    """Where it is reached; empty: nowhere."""
    public_key: bytes
    """Of Ed25519, raw."""
    certificate: str = ""
    """SHA-256 of the certificate that another TLS server shows at ``url``; empty: the site's own key does."""
    nonce: str = ""
    """What the asker made up, so that an old description is not taken for a new one."""
    signature: bytes = b""

    @property
    def fingerprint(self) -> str:
        """Of its key: BLAKE3, as hexadecimal digits."""
        return fingerprint_of(self.public_key)

    @property
    def message(self) -> bytes:
        """What is signed."""
        return _message(self.to_json())

    def to_json(self) -> dict[str, str]:
        """As it is on the wire."""
        return {
            "site_id": self.site_id,
            "name": self.name,
            "url": self.url,
            "public_key": base64.b64encode(self.public_key).decode(),
            "fingerprint": self.fingerprint,
            "certificate": self.certificate,
            "nonce": self.nonce,
            "signature": base64.b64encode(self.signature).decode(),
        }

    @classmethod
    def read(cls, said: Any, *, nonce: str, public_key: bytes | None = None) -> Self:
        """A description that came, verified.

        :param nonce: what was sent along with the question.
        :param public_key: whose it has to be; None: that of whatever key it names.
        :raises CorruptError: it is none.
        :raises SignatureError: it is not signed by the key, or was not made for this question.
        """
        if not isinstance(said, Mapping) or any(not isinstance(said.get(name), str) for name in _MEMBERS):
            raise CorruptError("what was answered is no description of a cloudlet")
        if not said["name"].isprintable() or not 0 < len(said["name"]) <= _MOST_LETTERS:
            raise CorruptError("the description's name is no line of text")
        for name, form in (("site_id", _SITE_ID), ("certificate", _DIGEST), ("nonce", _NONCE)):
            if not form.fullmatch(said[name]):
                raise CorruptError(f"the description's {name} is not of its form")
        if len(said["url"]) > _MOST_URL_LETTERS:
            raise CorruptError("the description's url is too long")
        found = cls(
            site_id=said["site_id"],
            name=said["name"],
            url=said["url"],
            public_key=_bytes(said["public_key"], KEY_BYTES),
            certificate=said["certificate"],
            nonce=said["nonce"],
            signature=_bytes(said["signature"], 64),
        )
        if public_key is not None and found.public_key != public_key:
            raise SignatureError("the site has another key than the one that is pinned")
        if found.fingerprint != said["fingerprint"] or found.nonce != nonce:
            raise SignatureError("the description was not made for this question")
        try:
            # All of it, also what a later version says and this one does not know.
            Ed25519PublicKey.from_public_bytes(found.public_key).verify(found.signature, _message(said))
        except (InvalidSignature, ValueError, RecursionError) as error:
            raise SignatureError("the description is not signed by the key that it names") from error
        return found


def fingerprint_of(public_key: bytes) -> str:
    """BLAKE3 of a raw public key, as hexadecimal digits; the key's id in overlays, too."""
    return blake3(public_key).hexdigest()


def grouped(fingerprint: str) -> str:
    """A fingerprint as people compare it: in groups of four."""
    return ":".join(fingerprint[at : at + 4] for at in range(0, len(fingerprint), 4))


def check_url(url: str, what: str) -> None:
    """That a URL is one at which a cloudlet can be reached: https, a host, and no more than a path.

    :param what: what the user calls it, such as ``peer.url``.
    :raises ImpossibleError: it is not.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme == "https" and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or "@" in parts.netloc or parts.query or parts.fragment or not url.isascii():
        raise ImpossibleError(f"{what}: it is no address of a cloudlet", hint="write https://HOST:PORT")


def _message(said: Mapping[str, Any]) -> bytes:
    return _CONTEXT + canonical.encode({name: value for name, value in said.items() if name != "signature"})


def _bytes(text: str, count: int) -> bytes:
    try:
        found = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CorruptError("the description's key or signature is not base64") from error
    if len(found) != count:
        raise CorruptError("the description's key or signature is not of its length")
    return found
