"""Whom an offer is for, where, and when: conditions that are looked at and nothing else is done.

An area is CAMARA's (``Area`` of its common schemas): a circle, or a polygon of three to fifteen corners, on a
sphere. Hours are those of a place, in its time zone: a day on which its clocks are changed is like others.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, time
from enum import StrEnum
from typing import Any
from zoneinfo import ZoneInfo

from cloudlet.errors import UsageError

_EARTH_METERS = 6_371_008.8
"""Mean radius (IUGG)."""
_MOST_CORNERS = 15
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class Audience(StrEnum):
    """Whom an offer is for."""

    ANYONE = "anyone"
    """Also who has not shown who they are: whoever enrols a device."""
    AUTHENTICATED = "authenticated"
    USERS = "users"
    GROUPS = "groups"
    PROJECTS = "projects"
    ROLES = "roles"


@dataclass(frozen=True, slots=True)
class Person:
    """Who asks, as far as an audience is concerned. Without a user nobody knows who it is."""

    user_id: str = ""
    project_id: str = ""
    roles: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()

    def is_one_of(self, audience: Audience, names: Collection[str]) -> bool:
        """Whether an offer is for this person.

        :param names: of the users, groups, projects or roles that it is for.
        """
        match audience:
            case Audience.ANYONE:
                return True
            case Audience.AUTHENTICATED:
                return bool(self.user_id)
            case Audience.USERS:
                return bool(self.user_id) and self.user_id in names
            case Audience.GROUPS:
                return not self.groups.isdisjoint(names)
            case Audience.PROJECTS:
                return bool(self.project_id) and self.project_id in names
            case Audience.ROLES:
                return not self.roles.isdisjoint(names)


@dataclass(frozen=True, slots=True)
class Point:
    """A place, in degrees (WGS 84)."""

    latitude: float
    longitude: float

    def __post_init__(self) -> None:
        """Check it.

        :raises UsageError: it is nowhere.
        """
        if not (-90 <= self.latitude <= 90 and -180 <= self.longitude <= 180):
            raise UsageError(
                f"{self.latitude}, {self.longitude} is no place: latitude, then longitude, in degrees"
            )

    def meters_to(self, other: Point) -> float:
        """The distance on the sphere: haversine formula."""
        here, there = math.radians(self.latitude), math.radians(other.latitude)
        north = math.sin((there - here) / 2) ** 2
        east = math.sin(math.radians(other.longitude - self.longitude) / 2) ** 2
        return (
            2
            * _EARTH_METERS
            * math.asin(math.sqrt(min(1.0, north + math.cos(here) * math.cos(there) * east)))
        )


@dataclass(frozen=True, slots=True)
class Circle:
    """All places that are no farther than ``radius`` meters."""

    center: Point
    radius: float

    def __post_init__(self) -> None:
        """Check it.

        :raises UsageError: it has no size.
        """
        if not 0 < self.radius <= math.pi * _EARTH_METERS:
            raise UsageError("a circle has a radius of more than 0 meters")

    def has(self, place: Point) -> bool:
        return self.center.meters_to(place) <= self.radius


@dataclass(frozen=True, slots=True)
class Polygon:
    """All places within a boundary, whose sides are straight in degrees; it may lie across the date line."""

    boundary: tuple[Point, ...]

    def __post_init__(self) -> None:
        """Check it.

        :raises UsageError: it bounds nothing.
        """
        if not 3 <= len(self.boundary) <= _MOST_CORNERS or len(set(self.boundary)) < 3:
            raise UsageError(f"a polygon has 3 to {_MOST_CORNERS} corners, at least 3 of them different")

    def has(self, place: Point) -> bool:
        """Whether a ray to the north crosses the boundary an odd number of times; the boundary is within."""
        # As seen from the first corner, all others are at most half around the earth away.
        origin = self.boundary[0].longitude
        corners = [(_east_of(origin, corner.longitude), corner.latitude) for corner in self.boundary]
        x, y = _east_of(origin, place.longitude), place.latitude
        within = False
        for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
            beside = min(x1, x2) <= x <= max(x1, x2) and min(y1, y2) <= y <= max(y1, y2)
            if beside and (x2 - x1) * (y - y1) == (x - x1) * (y2 - y1):
                return True
            if (x1 > x) != (x2 > x) and y < y1 + (y2 - y1) * (x - x1) / (x2 - x1):
                within = not within
        return within


Area = Circle | Polygon


def area_of(said: Mapping[str, Any]) -> Area:
    """The area that a document describes: ``area_type`` is ``CIRCLE`` or ``POLYGON``.

    :raises UsageError: it describes none.
    """
    if said["area_type"] == "CIRCLE":
        return Circle(Point(**said["center"]), said["radius"])
    return Polygon(tuple(Point(**corner) for corner in said["boundary"]))


@dataclass(frozen=True, slots=True)
class Hours:
    """From a time of the day to another, on some days of the week; to an earlier one: of the next day."""

    days: frozenset[str]
    begin: time
    end: time

    def has(self, moment: datetime) -> bool:
        """Whether a moment, in the place's own time, is within."""
        at, day = moment.time(), moment.weekday()
        if self.begin < self.end:
            return DAYS[day] in self.days and self.begin <= at < self.end
        return (DAYS[day] in self.days and at >= self.begin) or (DAYS[day - 1] in self.days and at < self.end)


@dataclass(frozen=True, slots=True)
class Opening:
    """When an offer may be used: within any of its hours; always, where it names none."""

    zone: ZoneInfo
    hours: Sequence[Hours] = ()

    def has(self, moment: datetime) -> bool:
        """Whether it is open at a moment.

        :param moment: with its own zone, such as UTC.
        """
        here = moment.astimezone(self.zone)
        return not self.hours or any(hours.has(here) for hours in self.hours)


def _east_of(origin: float, longitude: float) -> float:
    """How far to the east of a meridian, in degrees, from -180 to below 180."""
    return (longitude - origin + 180) % 360 - 180
