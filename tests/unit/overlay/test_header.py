from __future__ import annotations

import pytest
from blake3 import blake3

from cloudlet.errors import CorruptError, LimitError, TruncatedError, VersionError
from cloudlet.overlay.header import HEADER_BYTES, Header

HEADER = Header(0, 2, blake3(b"{}").digest(), 58)


def changed(offset: int, data: bytes) -> bytes:
    encoded = HEADER.encode()
    return encoded[:offset] + data + encoded[offset + len(data) :]


def test_it_reads_what_it_writes() -> None:
    assert len(HEADER.encode()) == HEADER_BYTES
    assert Header.decode(HEADER.encode()) == HEADER
    HEADER.check_root(b"{}")


@pytest.mark.parametrize(
    ("offset", "data", "error"),
    [
        (0, b"\x88", CorruptError),
        (4, b"\n", CorruptError),
        (8, b"\x01\x00", VersionError),
        (8, b"\x03\x00", VersionError),
        (10, b"\x02\x00", CorruptError),
        (12, b"\x01\x00\x00\x00", LimitError),
        (12, b"\x01\x00\x01\x00", LimitError),
    ],
)
def test_it_is_checked(offset: int, data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        Header.decode(changed(offset, data))


def test_an_overlay_of_before_is_to_be_made_again() -> None:
    with pytest.raises(VersionError, match="make it again with this version"):
        Header.decode(changed(8, b"\x01\x00"))
    with pytest.raises(VersionError, match="use a newer Cloudlet"):
        Header.decode(changed(8, b"\x03\x00"))


def test_a_short_one_is_truncated() -> None:
    with pytest.raises(TruncatedError):
        Header.decode(HEADER.encode()[:55])


def test_another_root_is_refused() -> None:
    with pytest.raises(CorruptError):
        HEADER.check_root(b"[]")


def test_the_identity_does_not_depend_on_the_signature() -> None:
    signed = HEADER.with_signatures(1)
    assert (signed.signatures, signed.file_bytes) == (1, 58 + 96)
    assert signed.identity(b"{}") == HEADER.identity(b"{}")
    assert signed.message(b"{}") != HEADER.message(b"{}")
