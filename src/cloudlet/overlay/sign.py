"""Signatures around an overlay: the head of a file, and signing an existing file anew.

The engine holds no keys: who signs passes a callable, as who verifies does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

from blake3 import blake3

from cloudlet.overlay.header import HEADER_BYTES, KEY_ID_BYTES, SIGNATURE_BYTES, Header
from cloudlet.overlay.reader import OverlayReader, Progress

Sign = Callable[[bytes], tuple[bytes, bytes]]
"""``sign(message)`` returns the key id (32 bytes) and the signature (64 bytes)."""


def write_head(out: BinaryIO, root: bytes, parts_bytes: int, sign: Sign | None) -> Header:
    """Write header, root and signature of an overlay whose parts will follow."""
    unsigned = Header(0, len(root), blake3(root).digest(), HEADER_BYTES + len(root) + parts_bytes)
    header = unsigned if sign is None else unsigned.with_signatures(1)
    out.write(header.encode() + root)
    if sign is not None:
        key_id, signature = sign(header.message(root))
        if len(key_id) != KEY_ID_BYTES or len(key_id) + len(signature) != SIGNATURE_BYTES:
            raise ValueError(f"a key id of {len(key_id)} and a signature of {len(signature)} bytes")
        out.write(key_id + signature)
    return header


def resign(reader: OverlayReader, out: BinaryIO, sign: Sign | None, progress: Progress | None = None) -> str:
    """Copy an overlay with another signature or with none; returns its unchanged identity.

    Nothing is decompressed, but every part is checked against its digest on the way: a key should
    not vouch for a damaged file. On an error ``out`` is incomplete and must be discarded.

    :raises IntegrityError: the overlay is truncated or corrupt.
    """
    header = write_head(out, reader.root_bytes, reader.root.parts_bytes, sign)
    for part in reader.parts():
        out.write(part.blob)
        if progress is not None:
            progress(reader.offset, reader.header.file_bytes)
    return header.identity(reader.root_bytes)
