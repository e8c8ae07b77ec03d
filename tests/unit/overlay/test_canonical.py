from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlet.errors import CorruptError
from cloudlet.overlay import canonical
from cloudlet.overlay.canonical import Fields

VALUES = st.recursive(
    st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abcé"), inner),
    max_leaves=12,
)


@given(VALUES)
def test_what_is_written_is_read(value: object) -> None:
    assert canonical.decode(canonical.encode(value), "x") == value


@pytest.mark.parametrize(
    "data",
    [
        b'{"b":1,"a":2}',
        b'{"a": 1}',
        b'{"a":1,"a":1}',
        b'{"a":1.0}',
        b'{"a":1e3}',
        b'{"a":NaN}',
        b'{"a":-0}',
        b'{"a":"\\u0041"}',
        b'{"a":"\\ud800"}',
        b"\xff",
        b"{}\n",
        b"",
        b"[" * 60_000,
        b"9" * 60_000,
    ],
)
def test_any_other_form_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptError):
        canonical.decode(data, "x")


@pytest.mark.parametrize("value", [[], {"a": 1}, {"a": 1, "b": 2, "c": 3}, None])
def test_exactly_the_keys_that_are_known(value: object) -> None:
    with pytest.raises(CorruptError, match="thing"):
        Fields(value, "thing", ("a", "b"))


@pytest.mark.parametrize("value", [True, -1, 11, "1", None])
def test_an_integer_has_type_and_range(value: object) -> None:
    with pytest.raises(CorruptError, match=r"thing\.a"):
        Fields({"a": value}, "thing", "a").integer("a", 0, 10)


@pytest.mark.parametrize("value", ["two\nlines", "\x1b[31m", "\u202e", "x" * 11, 5])
def test_a_text_is_one_printable_line(value: object) -> None:
    with pytest.raises(CorruptError):
        Fields({"a": value}, "thing", "a").text("a", 10)


@pytest.mark.parametrize("value", ["AB" * 32, "ab" * 31, "zz" * 32, 5])
def test_a_digest_is_64_small_hexadecimal_digits(value: object) -> None:
    with pytest.raises(CorruptError):
        Fields({"a": value}, "thing", "a").digest("a")
