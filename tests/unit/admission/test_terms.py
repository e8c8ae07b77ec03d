"""Whom an offer is for, where and when; also across the date line, midnight, and a change of clocks."""

from __future__ import annotations

from datetime import UTC, datetime, time
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlet.admission.terms import (
    DAYS,
    Audience,
    Circle,
    Hours,
    Opening,
    Person,
    Point,
    Polygon,
    area_of,
)
from cloudlet.errors import UsageError

MIA = Person("mia", "garbage", frozenset({"member"}), frozenset({"drivers"}))
NOBODY = Person()
SAN_JOSE = Point(37.3382, -121.8863)
LOS_ANGELES = ZoneInfo("America/Los_Angeles")
POINTS = st.builds(Point, st.floats(-89, 89), st.floats(-180, 180))


@pytest.mark.parametrize(
    ("audience", "names", "mia", "nobody"),
    [
        (Audience.ANYONE, (), True, True),
        (Audience.AUTHENTICATED, (), True, False),
        (Audience.USERS, ("mia", "tom"), True, False),
        (Audience.USERS, ("tom",), False, False),
        (Audience.USERS, ("",), False, False),
        (Audience.GROUPS, ("drivers",), True, False),
        (Audience.GROUPS, ("pilots",), False, False),
        (Audience.PROJECTS, ("garbage",), True, False),
        (Audience.PROJECTS, ("",), False, False),
        (Audience.ROLES, ("member",), True, False),
        (Audience.ROLES, ("admin",), False, False),
    ],
)
def test_whom_an_offer_is_for(audience: Audience, names: tuple[str, ...], mia: bool, nobody: bool) -> None:
    assert (MIA.is_one_of(audience, names), NOBODY.is_one_of(audience, names)) == (mia, nobody)


def test_a_circle_has_what_is_near() -> None:
    circle = Circle(SAN_JOSE, 20_000)
    assert circle.has(SAN_JOSE)
    assert circle.has(Point(37.3541, -121.9552))  # Santa Clara, 6 km
    assert not circle.has(Point(37.7749, -122.4194))  # San Francisco, 68 km


def test_a_distance_is_the_known_one() -> None:
    london, paris = Point(51.5074, -0.1278), Point(48.8566, 2.3522)
    assert london.meters_to(paris) == pytest.approx(343_556, rel=1e-3)
    assert Point(0, 179.9).meters_to(Point(0, -179.9)) == pytest.approx(22_239, rel=1e-3)


@given(POINTS, POINTS)
def test_a_distance_is_the_same_both_ways_and_a_circle_ends_there(one: Point, other: Point) -> None:
    distance = one.meters_to(other)
    assert distance == pytest.approx(other.meters_to(one), abs=1e-3)
    if 1 < distance < 20_000_000:
        assert Circle(one, distance * 1.001).has(other)
        assert not Circle(one, distance * 0.999).has(other)


SQUARE = Polygon((Point(37, -122), Point(37, -121), Point(38, -121), Point(38, -122)))
ACROSS = Polygon((Point(-10, 170), Point(-10, -170), Point(10, -170), Point(10, 170)))
SPIKED = Polygon((Point(0, 0), Point(0, 10), Point(10, 10), Point(5, 5), Point(10, 0)))


@pytest.mark.parametrize(
    ("polygon", "place", "within"),
    [
        (SQUARE, SAN_JOSE, True),
        (SQUARE, Point(36.99, -121.5), False),
        (SQUARE, Point(37.5, -120.99), False),
        (SQUARE, Point(37, -121.5), True),  # on its side
        (SQUARE, Point(38, -121), True),  # at its corner
        (SQUARE, Point(37.5, 58.5), False),  # the other side of the earth
        (ACROSS, Point(0, 180), True),
        (ACROSS, Point(0, -180), True),
        (ACROSS, Point(0, 175), True),
        (ACROSS, Point(0, 0), False),
        (ACROSS, Point(11, 180), False),
        (SPIKED, Point(2, 5), True),
        (SPIKED, Point(7, 5), False),
        (SPIKED, Point(7, 1), True),
    ],
)
def test_a_polygon_has_what_is_within_its_boundary(polygon: Polygon, place: Point, within: bool) -> None:
    assert polygon.has(place) == within
    backwards = Polygon(tuple(reversed(polygon.boundary)))
    assert backwards.has(place) == within


@given(
    st.floats(-40, 40),
    st.floats(-180, 180),
    st.floats(0.1, 40),
    st.floats(-0.99, 0.99),
    st.floats(-0.99, 0.99),
)
def test_a_rectangle_has_its_inside_wherever_it_lies(
    latitude: float, longitude: float, size: float, north: float, east: float
) -> None:
    def corner(y: int, x: int) -> Point:
        return Point(latitude + y * size, (longitude + x * size + 180) % 360 - 180)

    polygon = Polygon((corner(-1, -1), corner(-1, 1), corner(1, 1), corner(1, -1)))
    assert polygon.has(Point(latitude + north * size, (longitude + east * size + 180) % 360 - 180))
    assert not polygon.has(Point(latitude + 1.1 * size, longitude))
    assert not polygon.has(Point(latitude, (longitude + 1.1 * size + 180) % 360 - 180))


def test_an_area_is_read_as_camara_writes_it() -> None:
    here = {"latitude": 37.3382, "longitude": -121.8863}
    assert area_of({"area_type": "CIRCLE", "center": here, "radius": 500}) == Circle(SAN_JOSE, 500)
    corners = [here, {"latitude": 1, "longitude": 2}, {"latitude": 3, "longitude": 4}]
    assert area_of({"area_type": "POLYGON", "boundary": corners}).has(SAN_JOSE)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Point(91, 0),
        lambda: Point(0, 181),
        lambda: Point(float("nan"), 0),
        lambda: Circle(SAN_JOSE, 0),
        lambda: Circle(SAN_JOSE, float("inf")),
        lambda: Polygon((SAN_JOSE, Point(0, 0))),
        lambda: Polygon((SAN_JOSE,) * 3),
        lambda: Polygon(tuple(Point(0, x) for x in range(16))),
    ],
)
def test_what_is_no_area_is_refused(wrong: object) -> None:
    with pytest.raises(UsageError):
        wrong()  # type: ignore[operator]


def opening(begin: str, end: str, days: str = "mon tue wed thu fri") -> Opening:
    hours = Hours(frozenset(days.split()), time.fromisoformat(begin), time.fromisoformat(end))
    return Opening(LOS_ANGELES, (hours,))


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=LOS_ANGELES)


def test_an_offer_without_hours_is_always_open() -> None:
    assert Opening(LOS_ANGELES).has(datetime.now(UTC))


@pytest.mark.parametrize(
    ("moment", "is_open"),
    [
        ("2026-11-30T08:00", True),  # a Monday
        ("2026-11-30T07:59:59", False),
        ("2026-11-30T17:59:59", True),
        ("2026-11-30T18:00", False),
        ("2026-11-29T12:00", False),
    ],
)
def test_hours_begin_with_the_first_second_and_end_before_the_last(moment: str, is_open: bool) -> None:
    assert opening("08:00", "18:00").has(at(moment).astimezone(UTC)) == is_open


@pytest.mark.parametrize(
    ("moment", "is_open"),
    [
        ("2026-12-04T22:00", True),  # a Friday
        ("2026-12-05T05:59", True),  # the night that began on Friday
        ("2026-12-05T22:00", False),
        ("2026-11-30T05:00", False),  # the night that would have begun on Sunday
    ],
)
def test_a_night_belongs_to_the_day_on_which_it_begins(moment: str, is_open: bool) -> None:
    assert opening("22:00", "06:00").has(at(moment)) == is_open


@pytest.mark.parametrize("day", ["2026-03-08", "2026-11-01"])  # the clocks are changed at 2 o'clock
def test_a_day_on_which_clocks_are_changed_opens_at_its_own_time(day: str) -> None:
    shop = opening("08:00", "18:00", " ".join(DAYS))
    assert not shop.has(at(f"{day}T07:59").astimezone(UTC))
    assert shop.has(at(f"{day}T08:00").astimezone(UTC))
    assert shop.has(at(f"{day}T17:59").astimezone(UTC))
    assert not shop.has(at(f"{day}T18:00").astimezone(UTC))


@given(st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1)), st.integers(0, 23), st.integers(0, 23))
def test_any_moment_is_within_hours_or_within_the_others(moment: datetime, begin: int, end: int) -> None:
    every = frozenset(DAYS)
    if begin != end:
        here = moment.replace(tzinfo=UTC)
        hours = Opening(LOS_ANGELES, (Hours(every, time(begin), time(end)),))
        others = Opening(LOS_ANGELES, (Hours(every, time(end), time(begin)),))
        assert hours.has(here) != others.has(here)
