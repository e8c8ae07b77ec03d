"""What use costs: a price, and what is due for so many seconds of it.

What is due is counted from the beginning of a lease each time, never interval by interval: so the sum of what
was charged is what the whole costs, however it was cut, and rounding is always in the user's favour.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from cloudlet.admission import money
from cloudlet.errors import UsageError

_HOUR = 3600


class Metering(StrEnum):
    """How a price is meant."""

    FREE = "free"
    HOUR = "hour"
    """For an hour, counted by the second."""
    UNIT = "unit"
    """For each unit of time that has begun."""
    FLAT = "flat"
    """For the whole lease, however long it is."""


@dataclass(frozen=True, slots=True)
class Price:
    """A price, in millionths of the currency's unit."""

    metering: Metering = Metering.FREE
    millionths: int = 0
    currency: str = ""
    """ISO 4217; empty where it is free."""
    unit_seconds: int = _HOUR
    """Of one that is for units."""

    def __post_init__(self) -> None:
        """Check it.

        :raises UsageError: it cannot be meant so.
        """
        if self.metering is Metering.FREE:
            if self.millionths or self.currency:
                raise UsageError("what is free has no price and no currency")
            return
        money.check_currency(self.currency)
        if not 0 < self.millionths <= money.MOST:
            raise UsageError("a price is above 0", hint="make it free instead")
        if self.unit_seconds < 1:
            raise UsageError("a unit of time has at least one second")

    @property
    def free(self) -> bool:
        return self.metering is Metering.FREE

    def due(self, seconds: int) -> int:
        """What the first so many whole seconds cost altogether."""
        match self.metering:
            case Metering.FREE:
                return 0
            case Metering.HOUR:
                return self.millionths * seconds // _HOUR
            case Metering.UNIT:
                return self.millionths * max(1, -(-seconds // self.unit_seconds))
            case Metering.FLAT:
                return self.millionths

    def reach(self, paid: int) -> int | None:
        """How many seconds altogether so much pays; None: any number; -1: not even the beginning."""
        match self.metering:
            case Metering.FREE:
                return None
            case Metering.HOUR:
                return ((paid + 1) * _HOUR - 1) // self.millionths if paid >= 0 else -1
            case Metering.UNIT:
                units = paid // self.millionths
                return units * self.unit_seconds if units > 0 else -1
            case Metering.FLAT:
                return None if paid >= self.millionths else -1

    def __str__(self) -> str:
        """As a user reads it: ``0.25 EUR an hour``."""
        match self.metering:
            case Metering.FREE:
                return "free"
            case Metering.HOUR:
                return f"{self._amount} an hour, counted by the second"
            case Metering.UNIT:
                return f"{self._amount} for each {_period(self.unit_seconds)} that has begun"
            case Metering.FLAT:
                return f"{self._amount} for each lease"

    @property
    def _amount(self) -> str:
        return money.shown(self.millionths, self.currency)

    def to_json(self) -> dict[str, Any]:
        """As it is kept and sent: ``{"metering": "hour", "amount": "0.25", "currency": "EUR"}``."""
        if self.free:
            return {"metering": self.metering.value}
        said = {
            "metering": self.metering.value,
            "amount": money.decimal(self.millionths),
            "currency": self.currency,
        }
        return said | ({"unit_seconds": self.unit_seconds} if self.metering is Metering.UNIT else {})

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read one.

        :raises UsageError: it is none.
        """
        known = dict(data)
        metering, text = Metering(known.pop("metering")), known.pop("amount", None)
        return cls(metering, money.amount(text) if text is not None else 0, **known)


def _period(seconds: int) -> str:
    for length, name in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds % length == 0:
            count = seconds // length
            return name if count == 1 else f"{count} {name}s"
    return "second" if seconds == 1 else f"{seconds} seconds"
