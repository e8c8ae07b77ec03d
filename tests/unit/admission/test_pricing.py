"""Money and prices: exact, never negative, and the same sum however a lease is cut into intervals."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlet.admission import money
from cloudlet.admission.pricing import Metering, Price
from cloudlet.errors import UsageError

AMOUNTS = st.integers(1, money.MOST)
SECONDS = st.integers(0, 40 * 365 * 86_400)


@st.composite
def prices(draw: st.DrawFn) -> Price:
    metering = draw(st.sampled_from(Metering))
    if metering is Metering.FREE:
        return Price()
    return Price(
        metering, draw(AMOUNTS), draw(st.sampled_from(["EUR", "USD", "JPY"])), draw(st.integers(1, 10**6))
    )


@pytest.mark.parametrize(
    ("text", "millionths"),
    [
        ("0.25", 250_000),
        ("1", 1_000_000),
        ("0.000001", 1),
        ("007", 7_000_000),
        ("0", 0),
        ("1.500000", 1_500_000),
    ],
)
def test_an_amount_is_read(text: str, millionths: int) -> None:
    assert money.amount(text) == millionths


@pytest.mark.parametrize(
    "text",
    ["", "x", "-1", "-0.000001", "0.0000001", "NaN", "Infinity", "1,5", "1e2", "1e999999999", "1e-999999999",
     "1000000001", "٣", "0x10", " ", "1 EUR"],
)  # fmt: skip
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        money.amount(text)


@given(st.integers(0, money.MOST))
def test_an_amount_comes_back_as_it_was_said(millionths: int) -> None:
    assert money.amount(money.decimal(millionths)) == millionths
    assert money.amount(money.shown(millionths)) == millionths


def test_an_amount_is_shown_as_its_currency_is_used_to() -> None:
    assert money.shown(500_000, "EUR") == "0.50 EUR"
    assert money.shown(2_000_000, "JPY") == "2 JPY"
    assert money.shown(1_234_567, "USD") == "1.234567 USD"
    assert money.shown(-250_000, "EUR") == "-0.25 EUR"


@pytest.mark.parametrize("code", ["", "eur", "ABC", "EURO", "€"])
def test_a_currency_is_one_that_there_is(code: str) -> None:
    with pytest.raises(UsageError, match="no currency"):
        money.check_currency(code)


@given(prices(), SECONDS, SECONDS)
def test_time_costs_nothing_or_more(price: Price, seconds: int, more: int) -> None:
    assert 0 <= price.due(seconds) <= price.due(seconds + more)


@given(AMOUNTS, SECONDS)
def test_an_hour_is_rounded_in_favour_of_the_user_and_by_less_than_a_millionth(
    amount: int, seconds: int
) -> None:
    exact = Fraction(amount * seconds, 3600)
    assert 0 <= exact - Price(Metering.HOUR, amount, "EUR").due(seconds) < 1


@given(prices(), st.integers(0, money.MOST))
def test_what_was_paid_reaches_exactly_so_far(price: Price, paid: int) -> None:
    reach = price.reach(paid)
    if reach is None:
        assert price.due(10**9) <= paid or price.free
    elif reach < 0:
        assert price.due(0) > paid
    else:
        assert price.due(reach) <= paid < price.due(reach + 1)


@given(prices(), st.lists(st.integers(0, 10_000), max_size=20))
def test_however_a_lease_is_cut_it_costs_the_same(price: Price, cuts: list[int]) -> None:
    at, charged = 0, price.due(0)
    for length in cuts:
        charged += price.due(at + length) - price.due(at)
        at += length
    assert charged == price.due(sum(cuts))


@given(prices())
def test_a_price_is_read_as_it_was_written(price: Price) -> None:
    again = Price.from_json(price.to_json())
    assert again.due(12_345) == price.due(12_345)
    assert again.to_json() == price.to_json()


@pytest.mark.parametrize(
    ("price", "text"),
    [
        (Price(), "free"),
        (Price(Metering.HOUR, 250_000, "EUR"), "0.25 EUR an hour, counted by the second"),
        (Price(Metering.UNIT, 100_000, "EUR", 900), "0.10 EUR for each 15 minutes that has begun"),
        (Price(Metering.FLAT, 2_000_000, "JPY"), "2 JPY for each lease"),
    ],
)
def test_a_price_says_what_it_is(price: Price, text: str) -> None:
    assert str(price) == text


@pytest.mark.parametrize(
    "said",
    [
        {"metering": "free", "amount": "1", "currency": "EUR"},
        {"metering": "hour", "amount": "0", "currency": "EUR"},
        {"metering": "hour", "amount": "1", "currency": "XXZ"},
        {"metering": "hour", "amount": "1"},
        {"metering": "unit", "amount": "1", "currency": "EUR", "unit_seconds": 0},
    ],
)
def test_a_price_that_cannot_be_meant_is_refused(said: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Price.from_json(said)
