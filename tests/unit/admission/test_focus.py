"""Usage as CSV with FOCUS column names."""

from __future__ import annotations

import csv
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from cloudlet.admission import focus
from cloudlet.admission.metering import Usage
from cloudlet.admission.pricing import Metering, Price

ABOUT = focus.About("Edge Ltd", "site-id", "Shop 7")
BEGAN = datetime(2026, 12, 31, 23, 50, tzinfo=UTC)
USAGE = Usage(
    instance_id="instance",
    interval=1,
    project_id="default",
    user_id="mia",
    offer_id="offer",
    offer_version=2,
    began_at=BEGAN,
    ended_at=BEGAN + timedelta(seconds=900),
    seconds=900,
    amount=62_500,
    waived=0,
    currency="EUR",
    price=Price(Metering.HOUR, 250_000, "EUR").to_json(),
    transaction=7,
)


def rows_of(*usage: Usage) -> list[dict[str, str]]:
    return list(csv.DictReader("".join(focus.write(usage, ABOUT)).splitlines(keepends=True)))


def test_every_column_is_there_and_one_row_for_each_interval() -> None:
    rows = rows_of(USAGE, replace(USAGE, interval=2))
    assert len(rows) == 2
    assert set(rows[0]) == set(focus.COLUMNS)
    assert len(focus.COLUMNS) == 43
    assert list(focus.COLUMNS) == sorted(focus.COLUMNS)


def test_a_row_says_what_was_used_and_what_it_cost() -> None:
    (row,) = rows_of(USAGE)
    assert (row["BilledCost"], row["BillingCurrency"]) == ("0.0625", "EUR")
    assert (row["ChargePeriodStart"], row["ChargePeriodEnd"]) == (
        "2026-12-31T23:50:00Z",
        "2027-01-01T00:05:00Z",
    )
    assert (row["BillingPeriodStart"], row["BillingPeriodEnd"]) == (
        "2026-12-01T00:00:00Z",
        "2027-01-01T00:00:00Z",
    )
    assert (row["ConsumedQuantity"], row["ConsumedUnit"]) == ("900", "Seconds")
    assert Decimal(row["PricingQuantity"]) * Decimal(row["ListUnitPrice"]) == Decimal(row["ListCost"])
    assert (
        row["ChargeDescription"]
        == "Instance of offer offer, version 2: 0.25 EUR an hour, counted by the second"
    )


@pytest.mark.parametrize(
    ("price", "amount", "quantity", "unit"),
    [
        (Price(Metering.UNIT, 100_000, "EUR", 600), 200_000, "2", "Units"),
        (Price(Metering.FLAT, 500_000, "EUR"), 500_000, "1", "Leases"),
        (Price(), 0, "0.250000", "Hours"),
    ],
)
def test_a_price_is_for_what_it_is_for(price: Price, amount: int, quantity: str, unit: str) -> None:
    (row,) = rows_of(replace(USAGE, price=price.to_json(), amount=amount, currency=price.currency))
    assert (row["PricingQuantity"], row["PricingUnit"]) == (quantity, unit)
    assert row["BillingCurrency"] == (price.currency or "XXX")


def test_what_was_waived_is_listed_and_not_billed() -> None:
    (row,) = rows_of(replace(USAGE, amount=60_000, waived=2_500))
    assert (row["BilledCost"], row["ListCost"]) == ("0.06", "0.0625")


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", 'a,"b"\nc'])
def test_names_are_texts_and_no_formulas(name: str) -> None:
    (row,) = rows_of(replace(USAGE, user_id=name))
    assert row["BillingAccountId"] in (name, f"'{name}")
    assert row["BillingAccountId"][0] not in "=+-@"
