"""How a hand-off goes along: when it switches, and what it expects. No clock is waited for."""

from __future__ import annotations

import pytest

from cloudlet.control import pace
from cloudlet.control.pace import LEVELS, Pace, Round, Terms

MEGABIT = 125_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def test_it_switches_when_what_is_left_fits(clock: list[float]) -> None:
    one = Pace(Terms(pause_seconds=0.1), rate=100 * MEGABIT)
    one.ended(Round(1, looked=30_000, changed=1000, bytes=1_000_000))
    assert one.switches(one.forecast(10_000, 100))
    assert not one.switches(one.forecast(10_000, 5000)), "5 MB at 100 Mbit/s are 0.4 s"


def test_it_switches_before_the_deadline_however_much_is_left(clock: list[float]) -> None:
    one = Pace(Terms(pause_seconds=0.1, deadline_seconds=40), rate=10 * MEGABIT)
    one.ended(Round(1, looked=30_000, changed=10_000, bytes=10_000_000))
    left = one.forecast(30_000, 10_000)
    assert left.pause_seconds == pytest.approx(8.1, abs=0.1)
    assert not one.switches(left)
    clock[0] += 30
    assert one.switches(left), "another round of 8 s and a pause of 8 s would end after the deadline"


def test_the_forecast_follows_what_pages_took_lately(clock: list[float]) -> None:
    one = Pace(Terms(), rate=100 * MEGABIT)
    before = one.forecast(0, 1000)
    one.ended(Round(1, changed=1000, bytes=4_000_000))
    one.ended(Round(2, changed=0, bytes=100))
    assert one.page_bytes() == 4000
    assert one.forecast(0, 1000).bytes > before.bytes


def test_the_link_decides_how_hard_it_compresses(clock: list[float]) -> None:
    one = Pace(Terms())
    held = 0.0
    assert one.level == LEVELS[0]
    for _ in range(10):  # the link holds up the pages all the time
        clock[0] += 1
        held += 1
        one.adjust(held, 10 * MEGABIT)
    assert one.level == LEVELS[-1]
    for _ in range(10):  # it never does
        clock[0] += 1
        one.adjust(held, 1000 * MEGABIT)
    assert one.level == LEVELS[0]


def test_the_first_forecast_is_of_all_of_it(clock: list[float]) -> None:
    one = Pace(Terms(), rate=100 * MEGABIT)
    begun = one.begun(30_000, 10_000)
    assert begun.bytes == one.forecast(30_000, 10_000).bytes
    assert begun.pause_seconds < begun.seconds
