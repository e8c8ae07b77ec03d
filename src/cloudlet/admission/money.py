"""Money, exactly: an amount is a whole number of millionths of a currency's unit.

Six places are enough for a price per hour that is metered by the second, and sums of whole numbers are exact
in every database. On the wire an amount is a decimal string.
"""

from __future__ import annotations

import re

from babel.numbers import get_currency_precision, list_currencies

from cloudlet.errors import UsageError

MILLIONTHS = 10**6
PLACES = 6
MOST = 10**15
"""The largest amount: a thousand million units. Sums of millions of them fit 64 bits."""
_DECIMAL = re.compile(r"([0-9]{1,10})(?:\.([0-9]{1,6}))?")


def amount(text: str) -> int:
    """The millionths of a decimal such as ``0.25``.

    :raises UsageError: it is not a decimal, is negative, has more than six places, or is too large.
    """
    if not (found := _DECIMAL.fullmatch(text)):
        raise UsageError(
            f"{text[:64]!r} is no amount of money",
            hint=f"write a decimal with up to {PLACES} places, such as 0.25",
        )
    whole, places = found.groups(default="")
    millionths = int(whole) * MILLIONTHS + int(places.ljust(PLACES, "0"))
    if millionths > MOST:
        raise UsageError(f"{text[:64]} is too large: the most is {shown(MOST)}")
    return millionths


def decimal(millionths: int) -> str:
    """An amount as it goes over the wire: exact, and without zeros that say nothing."""
    whole, part = divmod(abs(millionths), MILLIONTHS)
    places = f"{part:06d}".rstrip("0")
    return f"{'-' if millionths < 0 else ''}{whole}{'.' + places if places else ''}"


def shown(millionths: int, currency: str = "") -> str:
    """An amount for people, with the currency's usual places at least: ``0.50 EUR``."""
    whole, _, places = decimal(millionths).partition(".")
    usual = get_currency_precision(currency) if currency else 2
    places = places.ljust(usual, "0")
    return f"{whole}{'.' + places if places else ''}{' ' + currency if currency else ''}"


def check_currency(code: str) -> str:
    """A currency's code, if ISO 4217 knows it.

    :raises UsageError: it does not.
    """
    if code not in list_currencies():
        raise UsageError(f"{code[:16]!r} is no currency", hint="write its ISO 4217 code, such as EUR or USD")
    return code
