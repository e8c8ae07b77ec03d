"""The terms of an offer: what a user accepts. They are kept by version, and never changed afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, time
from enum import StrEnum
from typing import Any, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cloudlet.admission.pricing import Price
from cloudlet.admission.terms import DAYS, Area, Audience, Hours, Opening, Person, Point, area_of
from cloudlet.errors import UsageError

_HOUR = 3600


class Approval(StrEnum):
    """Who says that somebody may use an offer who has asked for it."""

    AUTOMATIC = "automatic"
    PROVIDER = "provider"
    INVITATION = "invitation"
    """Whoever has handed out a signed invitation."""


class Ending(StrEnum):
    """What becomes of instances when a subscription is suspended or ended."""

    PAUSE = "pause"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may be used; None: as much as there is."""

    instances_per_user: int | None = None
    instances: int | None = None
    """Of all users."""
    lease_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """What an offer says besides its name and its app."""

    price: Price = field(default_factory=Price)
    payment: str = "voucher"
    """Which of the payment plug-ins its users pay with, where it is not free."""
    audience: Audience = Audience.AUTHENTICATED
    names: frozenset[str] = frozenset()
    """Of the users, groups, projects or roles that it is for."""
    approval: Approval = Approval.AUTOMATIC
    limits: Limits = Limits()
    area: Area | None = None
    opening: Opening | None = None
    bearer: bool = False
    """Whether a token alone is enough, without proof of the device's key."""
    token_seconds: int = _HOUR
    ending: Ending = Ending.PAUSE

    def __post_init__(self) -> None:
        """Check what belongs together.

        :raises UsageError: it cannot be meant so.
        """
        named = self.audience not in (Audience.ANYONE, Audience.AUTHENTICATED)
        if named != bool(self.names):
            raise UsageError(f"an audience of {self.audience} names {'somebody' if named else 'nobody'}")
        if self.audience is Audience.ANYONE and not self.price.free:
            raise UsageError(
                "whoever nobody knows cannot pay", hint="have the audience authenticated, or make it free"
            )

    def is_for(self, person: Person) -> bool:
        """Whether somebody is of its audience."""
        return person.is_one_of(self.audience, self.names)

    def is_open(self, moment: datetime) -> bool:
        """Whether it may be used at a moment."""
        return self.opening is None or self.opening.has(moment)

    def covers(self, place: Point | None) -> bool:
        """Whether it may be used at a place; nowhere, if nobody knows where that is."""
        return self.area is None or (place is not None and self.area.has(place))

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """Read terms, as they are sent and kept.

        :raises UsageError: they cannot be meant so.
        """
        known = dict(said)
        audience = known.pop("audience", {})
        values: dict[str, Any] = {
            name: known[name] for name in ("payment", "bearer", "token_seconds") if name in known
        }
        if "price" in known:
            values["price"] = Price.from_json(known["price"])
        if audience:
            values["audience"] = Audience(audience["kind"])
            values["names"] = frozenset(audience.get("names", ()))
        if "approval" in known:
            values["approval"] = Approval(known["approval"])
        if "ending" in known:
            values["ending"] = Ending(known["ending"])
        if known.get("limits"):
            values["limits"] = Limits(**known["limits"])
        if known.get("area"):
            values["area"] = area_of(known["area"])
        if known.get("opening"):
            values["opening"] = _opening_of(known["opening"])
        return cls(**values)


def _opening_of(said: Mapping[str, Any]) -> Opening:
    try:
        zone = ZoneInfo(said["time_zone"])
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise UsageError(
            f"there is no time zone {said['time_zone'][:64]!r}", hint="such as America/Los_Angeles"
        ) from error
    hours = [
        Hours(
            frozenset(entry.get("days") or DAYS),
            time.fromisoformat(entry["begin"]),
            time.fromisoformat(entry["end"]),
        )
        for entry in said["hours"]
    ]
    return Opening(zone, tuple(hours))
