"""The first 56 bytes of an overlay, its name (identity), and what a signature signs.

The header says how long the root is, what its digest is and how long the whole file is: enough to
refuse a wrong file before anything else is asked for.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Self

from blake3 import blake3

from cloudlet.errors import CorruptError, LimitError, TruncatedError, VersionError
from cloudlet.overlay.limits import ROOT_BYTES

MAGIC = b"\x89CLO\r\n\x1a\n"
VERSION = 2
HEADER_BYTES = 56
SIGNATURE_BYTES = 96
KEY_ID_BYTES = 32
SIGNED_PREFIX = b"cloudlet overlay 2\n"

_LAYOUT = struct.Struct("<8sHHI32sQ")


@dataclass(frozen=True, slots=True)
class Header:
    """Sizes in bytes; ``signatures`` is 0 or 1."""

    signatures: int
    root_bytes: int
    root_digest: bytes
    file_bytes: int

    @property
    def parts_start(self) -> int:
        """Where the first frame begins."""
        return HEADER_BYTES + self.root_bytes + self.signatures * SIGNATURE_BYTES

    def encode(self) -> bytes:
        return _LAYOUT.pack(
            MAGIC, VERSION, self.signatures, self.root_bytes, self.root_digest, self.file_bytes
        )

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a header and check it as far as it can be checked alone.

        :raises TruncatedError: too short.
        :raises CorruptError: not an overlay, or more than one signature.
        :raises VersionError: of another version.
        :raises LimitError: the root is declared too large or too small.
        """
        if len(data) < HEADER_BYTES:
            raise TruncatedError(f"the header ends after {len(data)} of {HEADER_BYTES} bytes")
        magic, version, signatures, root_bytes, root_digest, file_bytes = _LAYOUT.unpack(data)
        if magic != MAGIC:
            raise CorruptError("this is not an overlay: the file begins with other bytes")
        if version != VERSION:
            raise VersionError(
                f"the overlay has version {version}, this program reads {VERSION}",
                hint="make it again with this version" if version < VERSION else None,
            )
        if signatures > 1:
            raise CorruptError(f"the header declares {signatures} signatures, there may be one")
        if not 2 <= root_bytes <= ROOT_BYTES:
            raise LimitError(
                f"the header declares a root of {root_bytes} bytes; 2 to {ROOT_BYTES} are allowed"
            )
        return cls(signatures, root_bytes, root_digest, file_bytes)

    def check_root(self, root: bytes) -> None:
        """:raises CorruptError: these are not the bytes that the header speaks of."""
        if blake3(root).digest() != self.root_digest:
            raise CorruptError(f"the root (offset {HEADER_BYTES}) does not have the digest of the header")

    def with_signatures(self, signatures: int) -> Header:
        """The header of the same overlay, signed or not."""
        grown = (signatures - self.signatures) * SIGNATURE_BYTES
        return replace(self, signatures=signatures, file_bytes=self.file_bytes + grown)

    def identity(self, root: bytes) -> str:
        """The overlay's name: the same whether it is signed or not, and by whom."""
        return blake3(self.with_signatures(0).encode() + root).hexdigest()

    def message(self, root: bytes) -> bytes:
        """What a signature signs."""
        return SIGNED_PREFIX + self.encode() + root
