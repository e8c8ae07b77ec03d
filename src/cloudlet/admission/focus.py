"""Usage as the FinOps world reads it: CSV with the columns of FOCUS 1.0.

Columns that say nothing here (commitments, zones) are there and empty, since the specification has them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from cloudlet.admission import money
from cloudlet.admission.metering import Usage
from cloudlet.admission.pricing import Metering, Price

COLUMNS = (
    "AvailabilityZone", "BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency",
    "BillingPeriodEnd", "BillingPeriodStart", "ChargeCategory", "ChargeClass", "ChargeDescription",
    "ChargeFrequency", "ChargePeriodEnd", "ChargePeriodStart", "CommitmentDiscountCategory",
    "CommitmentDiscountId", "CommitmentDiscountName", "CommitmentDiscountStatus", "CommitmentDiscountType",
    "ConsumedQuantity", "ConsumedUnit", "ContractedCost", "ContractedUnitPrice", "EffectiveCost",
    "InvoiceIssuerName", "ListCost", "ListUnitPrice", "PricingCategory", "PricingQuantity", "PricingUnit",
    "ProviderName", "PublisherName", "RegionId", "RegionName", "ResourceId", "ResourceName", "ResourceType",
    "ServiceCategory", "ServiceName", "SkuId", "SkuPriceId", "SubAccountId", "SubAccountName", "Tags",
)  # fmt: skip
"""Of FOCUS 1.0, in the order of the alphabet."""
_NO_CURRENCY = "XXX"
"""Of ISO 4217: no currency is involved. What is free has no other, and the column may not be empty."""
_HOUR = 3600


@dataclass(frozen=True, slots=True)
class About:
    """What the rows have in common."""

    provider: str
    """Who sells it, and writes the bill."""
    site_id: str
    site_name: str


def write(rows: Iterable[Usage], about: About) -> Iterator[str]:
    """The lines of the file: that with the names of the columns, and one for each interval of usage."""
    yield _line(COLUMNS)
    for usage in rows:
        said = _said(usage, about)
        yield _line([said.get(column, "") for column in COLUMNS])


def _said(usage: Usage, about: About) -> dict[str, str]:
    price = Price.from_json(usage.price)
    cost = money.decimal(usage.amount)
    listed = money.decimal(usage.amount + usage.waived)
    begin, end = _month_of(usage.began_at)
    quantity, unit = _priced(usage, price)
    unit_price = money.decimal(price.millionths)
    return {
        "BilledCost": cost,
        "BillingAccountId": usage.user_id,
        "BillingAccountName": usage.user_id,
        "BillingCurrency": usage.currency or _NO_CURRENCY,
        "BillingPeriodStart": _text(begin),
        "BillingPeriodEnd": _text(end),
        "ChargeCategory": "Usage",
        "ChargeDescription": f"Instance of offer {usage.offer_id}, version {usage.offer_version}: {price}",
        "ChargeFrequency": "One-Time" if price.metering is Metering.FLAT else "Usage-Based",
        "ChargePeriodStart": _text(usage.began_at),
        "ChargePeriodEnd": _text(usage.ended_at),
        "ConsumedQuantity": str(usage.seconds),
        "ConsumedUnit": "Seconds",
        "ContractedCost": cost,
        "ContractedUnitPrice": unit_price,
        "EffectiveCost": cost,
        "InvoiceIssuerName": about.provider,
        "ListCost": listed,
        "ListUnitPrice": unit_price,
        "PricingCategory": "Standard",
        "PricingQuantity": quantity,
        "PricingUnit": unit,
        "ProviderName": about.provider,
        "PublisherName": about.provider,
        "RegionId": about.site_id,
        "RegionName": about.site_name,
        "ResourceId": usage.instance_id,
        "ResourceType": "Instance",
        "ServiceCategory": "Compute",
        "ServiceName": "Cloudlet",
        "SkuId": usage.offer_id,
        "SkuPriceId": f"{usage.offer_id}/{usage.offer_version}",
        "SubAccountId": usage.project_id,
        "SubAccountName": usage.project_id,
    }


def _priced(usage: Usage, price: Price) -> tuple[str, str]:
    """How much of what the price is for."""
    match price.metering:
        case Metering.UNIT:
            return str((usage.amount + usage.waived) // price.millionths), "Units"
        case Metering.FLAT:
            return str((usage.amount + usage.waived) // price.millionths), "Leases"
        case _:
            return f"{usage.seconds / _HOUR:.6f}", "Hours"


def _month_of(moment: datetime) -> tuple[datetime, datetime]:
    """The month in which a moment is, from its first moment to the next one's."""
    begin = moment.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return begin, begin.replace(year=begin.year + begin.month // 12, month=begin.month % 12 + 1)


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _line(values: Iterable[str]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerow([_harmless(value) for value in values])
    return out.getvalue()


def _harmless(value: str) -> str:
    """A text that no spreadsheet takes for a formula: names are what users have chosen."""
    return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
