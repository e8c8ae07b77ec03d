from __future__ import annotations

import io

import pytest

from cloudlet.errors import CorruptError
from cloudlet.overlay.apply import verify_only
from cloudlet.overlay.reader import OverlayReader
from cloudlet.overlay.sign import resign

from .world import Key, Ring, World, page, unsigned

ONE, OTHER = Key(1, "publisher"), Key(2, "provider")


@pytest.fixture(scope="module")
def plain(world: World) -> bytes:
    return world.create({i: page(i + 1) for i in range(5)})[0]


def signed(data: bytes, key: Key | None) -> bytes:
    out = io.BytesIO()
    identity = resign(unsigned(data), out, None if key is None else key.sign)
    assert identity == unsigned(data).identity
    return out.getvalue()


def test_signing_anew_changes_nothing_else(world: World, plain: bytes) -> None:
    once = signed(plain, ONE)
    again = signed(once, OTHER)
    assert OverlayReader(io.BytesIO(once), Ring([ONE]).verify).signed_by == "publisher"
    reader = OverlayReader(io.BytesIO(again), Ring([OTHER]).verify)
    verify_only(reader)
    assert reader.signed_by == "provider"
    assert len(once) == len(again) == len(plain) + 96
    assert signed(again, None) == plain
    assert world.create({i: page(i + 1) for i in range(5)}, sign=ONE.sign)[0] == once


def test_nobody_vouches_for_a_damaged_file(plain: bytes) -> None:
    with pytest.raises(CorruptError):
        signed(plain[:-1] + bytes([plain[-1] ^ 1]), ONE)


def test_a_signature_has_its_size(plain: bytes) -> None:
    with pytest.raises(ValueError, match="key id of 3"):
        resign(unsigned(plain), io.BytesIO(), lambda message: (b"abc", bytes(64)))
