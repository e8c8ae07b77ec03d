"""The terms of an offer, as they are written and as they are meant."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from cloudlet.admission.offers import Approval, Ending, Limits, Terms
from cloudlet.admission.pricing import Metering
from cloudlet.admission.terms import Audience, Person, Point
from cloudlet.errors import UsageError

PAID: dict[str, Any] = {
    "price": {"metering": "hour", "amount": "0.25", "currency": "USD"},
    "payment": "invoice",
    "audience": {"kind": "groups", "names": ["drivers"]},
    "approval": "invitation",
    "limits": {"instances_per_user": 1, "lease_seconds": 3600},
    "area": {"area_type": "CIRCLE", "center": {"latitude": 37.33, "longitude": -121.88}, "radius": 20000},
    "opening": {
        "time_zone": "America/Los_Angeles",
        "hours": [
            {"days": ["mon", "tue"], "begin": "06:00", "end": "18:00"},
            {"begin": "20:00", "end": "21:00"},
        ],
    },
    "ending": "delete",
}


def test_terms_are_meant_as_they_are_written() -> None:
    terms = Terms.from_json(PAID)
    assert (terms.price.metering, terms.price.millionths) == (Metering.HOUR, 250_000)
    assert (terms.payment, terms.approval, terms.ending) == ("invoice", Approval.INVITATION, Ending.DELETE)
    assert terms.limits == Limits(1, None, 3600)
    assert terms.is_for(Person("mia", groups=frozenset({"drivers"})))
    assert not terms.is_for(Person("tom"))
    assert terms.covers(Point(37.4, -121.9))
    assert not terms.covers(Point(48.1, 11.6))
    assert not terms.covers(None)
    assert terms.is_open(datetime(2026, 12, 1, 15, 0, tzinfo=UTC))  # a Tuesday, 7 o'clock there
    assert not terms.is_open(datetime(2026, 12, 2, 15, 0, tzinfo=UTC))
    assert terms.is_open(datetime(2026, 12, 3, 4, 30, tzinfo=UTC))  # a Wednesday evening there


def test_terms_that_say_nothing_are_free_and_for_everybody_who_is_known() -> None:
    terms = Terms.from_json({})
    assert terms.price.free
    assert terms.audience is Audience.AUTHENTICATED
    assert terms.is_open(datetime.now(UTC))
    assert terms.covers(None)
    assert not terms.bearer


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"audience": {"kind": "users"}}, "names somebody"),
        ({"audience": {"kind": "anyone", "names": ["mia"]}}, "names nobody"),
        ({"audience": {"kind": "anyone"}}, "cannot pay"),
        ({"opening": {"time_zone": "Mars/Olympus", "hours": []}}, "no time zone"),
        ({"opening": {"time_zone": "../../etc/passwd", "hours": []}}, "no time zone"),
        ({"opening": {"time_zone": "", "hours": []}}, "no time zone"),
        (
            {"area": {"area_type": "CIRCLE", "center": {"latitude": 99, "longitude": 0}, "radius": 1}},
            "no place",
        ),
        ({"price": {"metering": "hour", "amount": "-1", "currency": "USD"}}, "no amount"),
    ],
)
def test_terms_that_cannot_be_meant_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Terms.from_json({**PAID, **change})
