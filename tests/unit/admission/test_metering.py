"""Meters: each second is counted once and paid once, whatever clocks, servers and accounts do meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import settings as tried
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from sqlalchemy.engine import Connection

from cloudlet.admission import metering
from cloudlet.admission.metering import Meter, MeterState, Reading, Settled
from cloudlet.admission.pricing import Metering, Price
from cloudlet.errors import ConflictError, CreditError
from cloudlet.store import ledger, tables
from cloudlet.store.database import Database
from cloudlet.store.ledger import ACCOUNTS, Account, AccountKind, Entry, Part
from cloudlet.store.rows import Owned

HOURLY = Price(Metering.HOUR, 3_600_000, "EUR")
"""A thousandth of a Euro for each second."""
BEGAN = datetime(2026, 3, 29, 0, 30, tzinfo=UTC)
"""The night on which clocks in Europe are changed."""
OFFER = "0f0e0d0c-0b0a-0908-0706-050403020100"


@dataclass
class Bench:
    """A database with a user, and clocks that go as they are told."""

    database: Database
    reading: Reading = field(default_factory=lambda: Reading("boot", 5_000_000_000, BEGAN))
    number: int = 0

    def pass_(self, seconds: float) -> None:
        later = round(seconds * 10**9)
        self.reading = replace(
            self.reading,
            clock_ns=self.reading.clock_ns + later,
            moment=self.reading.moment + timedelta(seconds=seconds),
        )

    def set_clock(self, seconds: float) -> None:
        self.reading = replace(self.reading, moment=self.reading.moment + timedelta(seconds=seconds))

    def restart(self, seconds: float = 60) -> None:
        """The machine is started again."""
        self.number += 1
        moment = self.reading.moment + timedelta(seconds=seconds)
        self.reading = Reading(f"boot {self.number}", 1_000_000_000, moment)

    def account(self, user: str = "mia") -> Account:
        return self.database.write(lambda connection: ledger.account_of(connection, "p", user, "EUR"))

    def give(self, amount: int, user: str = "mia") -> None:
        self.number += 1
        account, key = self.account(user), f"gift:{self.number}"

        def give(connection: Connection) -> None:
            vouchers = ledger.provider_account(connection, AccountKind.VOUCHERS, "EUR")
            entries = (
                Entry(vouchers.id, Part.AVAILABLE, -amount), Entry(account.id, Part.AVAILABLE, amount),
            )  # fmt: skip
            ledger.post(connection, "redeem", key, entries)

        self.database.write(give)

    def admit(self, price: Price = HOURLY, interval: int = 300, user: str = "mia") -> str:
        instance, account = Owned(project_id="p", user_id=user), None if price.free else self.account(user)
        terms = {"offer_id": OFFER, "offer_version": 1, "interval_seconds": interval}
        self.database.write(lambda connection: metering.admit(connection, instance, price, account, **terms))  # type: ignore[arg-type]
        return instance.id

    def do(self, what: Callable[..., Any], instance: str) -> Any:
        return self.database.write(lambda connection: what(connection, instance, self.reading))

    def meter(self, instance: str) -> Meter:
        return self.database.read(lambda connection: metering.get(connection, instance))

    def have(self, user: str = "mia") -> tuple[int, int]:
        account = self.account(user)
        row = self.database.read(lambda connection: ACCOUNTS.get(connection, account.id))
        return row.available, row.reserved

    def usage(self, instance: str) -> list[metering.Usage]:
        return self.database.read(lambda connection: metering.of(connection, instance_id=instance))

    def findings(self) -> list[str]:
        def find(connection: Connection) -> list[str]:
            return [str(one) for look in (ledger.verify, metering.verify) for one in look(connection)]

        return self.database.read(find)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    database = Database(f"sqlite:///{tmp_path / 'site.sqlite'}")
    database.create()
    made = Bench(database)
    yield made
    assert made.findings() == []
    database.close()


def started(bench: Bench, **how: Any) -> str:
    instance = bench.admit(**how)
    bench.do(metering.start, instance)
    return instance


def test_an_interval_is_reserved_used_and_paid(bench: Bench) -> None:
    bench.give(1_000_000)
    instance = started(bench)
    assert bench.have() == (700_000, 300_000)
    bench.pass_(100)
    settled = bench.do(metering.settle, instance)
    assert (settled.seconds_left, settled.usage.seconds, settled.usage.amount) == (300, 100, 100_000)
    assert bench.have() == (600_000, 300_000)
    bench.pass_(50)
    bench.do(metering.close, instance)
    assert bench.have() == (850_000, 0)
    assert [(row.seconds, row.amount) for row in bench.usage(instance)] == [(100, 100_000), (50, 50_000)]


def test_nothing_is_paid_for_what_never_ran(bench: Bench) -> None:
    bench.give(1_000_000)
    instance = bench.admit()
    bench.pass_(1000)
    bench.do(metering.close, instance)
    assert bench.have() == (1_000_000, 0)
    assert bench.usage(instance) == []


def test_who_has_not_enough_for_an_interval_is_not_admitted(bench: Bench) -> None:
    bench.give(299_999)
    with pytest.raises(CreditError):
        bench.admit()
    assert bench.have() == (299_999, 0)


def test_the_last_of_it_is_reserved_as_far_as_it_goes(bench: Bench) -> None:
    bench.give(400_000)
    instance = started(bench)
    bench.pass_(250)
    assert bench.do(metering.settle, instance).seconds_left == 150
    assert bench.have() == (0, 150_000)
    bench.pass_(150)
    settled = bench.do(metering.settle, instance)
    assert (settled.seconds_left, settled.meter.reserved) == (0, 0)
    assert bench.have() == (0, 0)
    bench.do(metering.stop, instance)
    with pytest.raises(CreditError):
        bench.do(metering.start, instance)
    bench.give(300_000)
    bench.do(metering.start, instance)
    assert bench.have() == (0, 300_000)


def test_what_ran_on_unpaid_is_waived_and_no_account_goes_below_nothing(bench: Bench) -> None:
    bench.give(350_000)
    instance = started(bench)
    bench.pass_(500)  # nobody could look
    settled = bench.do(metering.settle, instance)
    assert (settled.usage.seconds, settled.usage.amount, settled.usage.waived) == (500, 350_000, 150_000)
    assert settled.seconds_left == 0
    assert bench.have() == (0, 0)
    bench.give(1_000_000)
    bench.pass_(10)
    assert bench.do(metering.settle, instance).usage.amount == 10_000, (
        "what was waived is not asked for later"
    )


def test_parts_of_seconds_are_counted_once_they_are_whole(bench: Bench) -> None:
    bench.give(1_000_000)
    instance = started(bench)
    for _ in range(10):
        bench.pass_(0.7)
        bench.do(metering.settle, instance)
    assert sum(row.seconds for row in bench.usage(instance)) == 7
    assert bench.meter(instance).charged == 7_000


@pytest.mark.parametrize("change", [-86_400, -3600, 3600, 86_400 * 400])
def test_a_clock_that_is_set_changes_no_charge(change: float, bench: Bench) -> None:
    bench.give(10_000_000)
    instance = started(bench)
    bench.pass_(100)
    bench.set_clock(change)
    bench.do(metering.settle, instance)
    bench.pass_(100)
    bench.set_clock(-change)
    bench.do(metering.stop, instance)
    bench.set_clock(change)
    bench.do(metering.start, instance)
    bench.pass_(50)
    bench.do(metering.close, instance)
    rows = bench.usage(instance)
    assert [row.seconds for row in sorted(rows, key=lambda row: row.interval)] == [100, 100, 50]
    assert bench.meter(instance).charged == 250_000


def test_a_machine_that_was_started_again_ran_nothing_meanwhile(bench: Bench) -> None:
    bench.give(10_000_000)
    instance = started(bench)
    bench.pass_(100)
    bench.do(metering.settle, instance)
    bench.pass_(30)
    bench.restart(10_000)
    bench.do(metering.stop, instance)
    bench.do(metering.start, instance)
    bench.pass_(5)
    bench.do(metering.close, instance)
    assert bench.meter(instance).seconds == 105


def test_a_unit_is_paid_when_it_begins_and_a_flat_price_once(bench: Bench) -> None:
    bench.give(10_000_000)
    unit = started(bench, price=Price(Metering.UNIT, 1_000_000, "EUR", 600))
    flat = started(bench, price=Price(Metering.FLAT, 2_000_000, "EUR"))
    for instance in (unit, flat):
        bench.do(metering.settle, instance)
    assert (bench.meter(unit).charged, bench.meter(flat).charged) == (1_000_000, 2_000_000)
    bench.pass_(599)
    assert bench.do(metering.settle, flat).seconds_left is None
    assert bench.do(metering.settle, unit).meter.reserved == 1_000_000, (
        "the next unit begins in this interval"
    )
    bench.pass_(2)
    for instance in (unit, flat):
        bench.do(metering.stop, instance)
        bench.do(metering.start, instance)
        bench.do(metering.close, instance)
    assert (bench.meter(unit).charged, bench.meter(flat).charged) == (2_000_000, 2_000_000)


def test_what_is_free_is_counted_and_not_paid(bench: Bench) -> None:
    instance = started(bench, price=Price())
    bench.pass_(100)
    assert bench.do(metering.settle, instance).seconds_left is None
    bench.pass_(1)
    bench.do(metering.close, instance)
    assert [(row.seconds, row.amount, row.transaction) for row in bench.usage(instance)] == [
        (100, 0, None), (1, 0, None),
    ]  # fmt: skip


def test_what_is_over_does_not_begin_again(bench: Bench) -> None:
    bench.give(1_000_000)
    instance = started(bench)
    bench.do(metering.close, instance)
    assert bench.do(metering.close, instance) == Settled(bench.meter(instance), 0)
    with pytest.raises(ConflictError, match="is over"):
        bench.do(metering.start, instance)


USAGE, METERS, TRANSACTIONS = tables.usage, tables.meters, tables.ledger_transactions
TAMPERINGS: dict[str, sa.Executable] = {
    "seconds of usage": sa.update(USAGE).where(USAGE.c.interval == 1).values(seconds=USAGE.c.seconds + 1),
    "an amount of usage": sa.update(USAGE).where(USAGE.c.interval == 1).values(amount=USAGE.c.amount - 1),
    "what was waived": sa.update(USAGE).where(USAGE.c.interval == 1).values(waived=1),
    "who used it": sa.update(USAGE).where(USAGE.c.interval == 1).values(user_id="tom"),
    "a price": sa.update(USAGE).where(USAGE.c.interval == 1).values(price={"metering": "free"}),
    "a price everywhere": sa.update(METERS).values(price=Price(Metering.HOUR, 1, "EUR").to_json()),
    "what paid it": sa.update(USAGE).where(USAGE.c.interval == 1).values(transaction=1),
    "a time": sa.update(USAGE).where(USAGE.c.interval == 2).values(began_at=BEGAN, ended_at=BEGAN),
    "usage that is gone": sa.delete(USAGE).where(USAGE.c.interval == 2),
    "all usage": sa.delete(USAGE),
    "a meter that is gone": sa.delete(METERS),
    "a meter's count": sa.update(METERS).values(seconds=1),
    "a meter's charge": sa.update(METERS).values(charged=1),
    "a meter's reservation": sa.update(METERS).values(reserved=0),
    "a meter's state": sa.update(METERS).values(state="closed"),
}


@pytest.mark.parametrize("kind", TAMPERINGS)
def test_what_was_tampered_with_is_found(kind: str, bench: Bench) -> None:
    bench.give(10_000_000)
    instance = started(bench)
    for _ in range(2):
        bench.pass_(100)
        bench.do(metering.settle, instance)
    assert bench.findings() == []

    class UndoError(Exception): ...

    def tamper(connection: Connection) -> None:
        connection.execute(TAMPERINGS[kind])
        assert [*ledger.verify(connection), *metering.verify(connection)] != []
        raise UndoError

    with pytest.raises(UndoError):
        bench.database.write(tamper)


class MeterMachine(RuleBasedStateMachine):
    """Instances of two users come and go, while clocks, accounts and servers do what they want."""

    instances = Bundle("instances")

    def __init__(self) -> None:
        super().__init__()
        database = Database("sqlite://")
        database.create()
        self.bench = Bench(database)
        self.ran: dict[str, int] = {}
        """Nanoseconds that each has run and that can be known."""
        self.since: dict[str, int] = {}
        self.looked: dict[str, int] = {}

    def teardown(self) -> None:
        for instance in list(self.ran):
            self.end(instance, metering.close)
        assert self.bench.findings() == []
        assert all(self.bench.have(user)[1] == 0 for user in ("mia", "tom"))
        self.bench.database.close()

    @initialize(amount=st.integers(0, 10**7))
    def begin(self, amount: int) -> None:
        if amount:
            self.bench.give(amount)

    @rule(user=st.sampled_from(["mia", "tom"]), amount=st.integers(1, 10**6))
    def give(self, user: str, amount: int) -> None:
        self.bench.give(amount, user)

    @rule(
        target=instances,
        user=st.sampled_from(["mia", "tom"]),
        price=st.sampled_from(
            [HOURLY, Price(Metering.HOUR, 7, "EUR"), Price(Metering.UNIT, 50_000, "EUR", 90), Price(),
             Price(Metering.FLAT, 100_000, "EUR"), Price(Metering.HOUR, 999_999_999, "EUR")]
        ),
        interval=st.sampled_from([1, 10, 300, 3600]),
    )  # fmt: skip
    def admit(self, user: str, price: Price, interval: int) -> Any:
        try:
            instance = self.bench.admit(price, interval, user)
        except CreditError as error:
            assert error.available < error.wanted
            return multiple()
        self.ran[instance] = 0
        return instance

    @rule(instance=instances)
    def start(self, instance: str) -> None:
        before = self.bench.meter(instance)
        try:
            self.bench.do(metering.start, instance)
        except (CreditError, ConflictError):
            assert self.bench.meter(instance) == before
            return
        if before.state is not MeterState.RUNNING:
            self.since[instance] = self.bench.reading.clock_ns

    @rule(instance=instances, again=st.booleans())
    def settle(self, instance: str, again: bool) -> None:
        settled = self.bench.do(metering.settle, instance)
        if again:
            assert self.bench.do(metering.settle, instance).meter == settled.meter

    @rule(instance=instances)
    def stop(self, instance: str) -> None:
        self.end(instance, metering.stop)

    @rule(instance=instances)
    def close(self, instance: str) -> None:
        self.end(instance, metering.close)

    def end(self, instance: str, how: Callable[..., Any]) -> None:
        self.bench.do(how, instance)
        if (since := self.since.pop(instance, None)) is not None:
            self.ran[instance] += self.bench.reading.clock_ns - since

    @rule(seconds=st.floats(0, 10_000))
    def time_passes(self, seconds: float) -> None:
        self.bench.pass_(seconds)

    @rule(seconds=st.floats(-(10**7), 10**7))
    def the_clock_is_set(self, seconds: float) -> None:
        self.bench.set_clock(seconds)

    @rule(instance=instances)
    def a_server_is_killed_amid_it(self, instance: str) -> None:
        class KilledError(Exception): ...

        before, have = self.bench.meter(instance), self.bench.have()

        def killed(connection: Connection) -> None:
            metering.settle(connection, instance, self.bench.reading)
            raise KilledError

        with pytest.raises(KilledError):
            self.bench.database.write(killed)
        assert (self.bench.meter(instance), self.bench.have()) == (before, have)

    @rule()
    def the_machine_is_started_again(self) -> None:
        for instance in list(self.since):
            self.end(instance, metering.stop)
        self.bench.restart()

    @invariant()
    def each_second_is_counted_once(self) -> None:
        for instance, ran in self.ran.items():
            since = self.since.get(instance)
            total = ran + (self.bench.reading.clock_ns - since if since is not None else 0)
            assert self.bench.meter(instance).elapsed(self.bench.reading) == total
            rows = self.bench.usage(instance)
            assert sum(row.seconds for row in rows) <= total // 10**9
            if since is None:
                assert sum(row.seconds for row in rows) == total // 10**9

    @invariant()
    def nobody_is_below_nothing(self) -> None:
        for user in ("mia", "tom"):
            available, reserved = self.bench.have(user)
            assert available >= 0
            assert reserved >= 0


TestMeterMachine = MeterMachine.TestCase
TestMeterMachine.settings = tried(max_examples=10, stateful_step_count=20, deadline=None)
