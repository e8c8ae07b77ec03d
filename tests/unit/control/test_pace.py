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


def test_a_limited_link_is_not_forecast_to_carry_more(clock: list[float]) -> None:
    one = Pace(Terms(bytes_per_second=MEGABIT), rate=100 * MEGABIT)
    begun = one.begun(30_000, 10_000)
    assert begun.seconds >= begun.bytes / MEGABIT


def test_in_the_middle_of_the_first_round_it_is_known_better(clock: list[float]) -> None:
    one = Pace(Terms(), rate=10 * MEGABIT)
    begun = one.begun(30_000, 10_000)
    within = one.within(4_000, 2_000_000)
    assert within.bytes == 6_000 * 500
    assert within.bytes / (10 * MEGABIT) < within.seconds < begun.seconds
    assert one.within(10_000, 5_000_000).seconds == one.within(10_000, 5_000_000).pause_seconds


def test_only_who_may_leave_memory_for_later_is_late(clock: list[float]) -> None:
    early, whole = Pace(Terms(deadline_seconds=5, early=True)), Pace(Terms(deadline_seconds=5))
    assert not early.is_late
    clock[0] += 6
    assert (early.is_late, whole.is_late) == (True, False)


def test_it_switches_early_when_rounds_bring_nothing(clock: list[float]) -> None:
    one = Pace(Terms(pause_seconds=0.1, deadline_seconds=600, early=True), rate=10 * MEGABIT)
    for number, size in enumerate((20_000_000, 10_000_000, 9_900_000, 9_000_000), 1):
        one.ended(Round(number, looked=30_000, changed=8000, bytes=size))
        left = one.forecast(30_000, 8000)
        assert one.leaves(left), "it does not fit"
        assert one.switches(left) == (number == 4), "two rounds in a row have brought nothing"


def test_it_does_not_switch_early_unless_it_may(clock: list[float]) -> None:
    one = Pace(Terms(pause_seconds=0.1, deadline_seconds=600), rate=10 * MEGABIT)
    for number in range(1, 6):
        one.ended(Round(number, looked=30_000, changed=8000, bytes=10_000_000))
    left = one.forecast(30_000, 8000)
    assert not one.switches(left)
    assert not one.leaves(left)


def test_what_fits_is_not_left(clock: list[float]) -> None:
    one = Pace(Terms(pause_seconds=0.1, early=True), rate=100 * MEGABIT)
    one.ended(Round(1, looked=30_000, changed=1000, bytes=1_000_000))
    left = one.forecast(10_000, 100)
    assert one.switches(left)
    assert not one.leaves(left)
    assert not left.can_be_lost


def test_an_early_switch_hardly_depends_on_what_is_left(clock: list[float]) -> None:
    one = Pace(Terms(early=True), rate=10 * MEGABIT)
    whole, early = one.forecast(30_000, 10_000), one.early(30_000, 10_000)
    assert whole.pause_seconds > 8
    assert early.pause_seconds < 0.2
    assert (early.bytes, early.seconds, early.can_be_lost) == (whole.bytes, whole.seconds, True)


def test_what_is_as_good_as_it_gets_is_not_waited_for(clock: list[float]) -> None:
    """Where the pause is too long whatever is sent, a round that brings nothing is the last one."""
    one = Pace(Terms(pause_seconds=0.1, deadline_seconds=600), rate=100 * MEGABIT, overhead=0.12)
    for number, size in enumerate((4_000_000, 600_000, 590_000, 580_000), 1):
        one.ended(Round(number, looked=30_000, changed=400, bytes=size))
        left = one.forecast(10_000, 400)
        assert left.pause_seconds > 0.1
        assert one.switches(left) == (number == 4)
    assert not one.leaves(left)


def test_a_round_that_saves_little_is_not_made(clock: list[float]) -> None:
    one = Pace(Terms(pause_seconds=0.1, deadline_seconds=600), rate=100 * MEGABIT, overhead=0.12)
    one.ended(Round(1, looked=30_000, changed=1000, bytes=1_000_000))
    assert one.switches(one.forecast(10_000, 200))
    assert not one.switches(one.forecast(10_000, 400))


def test_the_overhead_of_a_pause_is_what_was_neither_looked_at_nor_sent(clock: list[float]) -> None:
    one = Pace(Terms(), rate=10_000_000, overhead=0.05)
    overhead = one.overhead(pause=0.2, looked=10_000, sent=500_000)
    assert overhead == pytest.approx(0.2 - 0.014 - 0.05)
    assert one.overhead(pause=0.01, looked=10_000, sent=500_000) == 0.0
