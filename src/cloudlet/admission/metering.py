"""What an instance uses and what that costs: counted by the second, paid from what was reserved before.

A *meter* runs while an instance's lease does. It counts by the machine's own clock since its start
(``CLOCK_BOOTTIME``), which nobody sets: so a clock that is set back or forward changes nothing, nor does a
server that is killed and started again. From time to time it is *settled*: what was used since the last time
becomes a row of usage, is paid from the reservation, and the next interval is reserved, in one transaction of
the ledger. So no account is brought below what it may have: what runs on unpaid, as nobody could look, is
*waived*.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cloudlet.admission.pricing import Price
from cloudlet.errors import ConflictError, FailedError, NotFoundError
from cloudlet.store import ledger, tables
from cloudlet.store.ledger import ACCOUNTS, Account, AccountKind, Entry, Finding, Part
from cloudlet.store.rows import Owned, now

_BILLION = 10**9
_METER, _USAGE = tables.meters.c, tables.usage.c


@dataclass(frozen=True, slots=True)
class Reading:
    """What the clocks say."""

    boot: str
    """Which start of the machine ``clock_ns`` counts from."""
    clock_ns: int
    moment: datetime

    @classmethod
    def take(cls) -> Reading:
        """Look at the clocks."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(boot, time.clock_gettime_ns(time.CLOCK_BOOTTIME), now())


class MeterState(StrEnum):
    """Whether a meter counts."""

    HELD = "held"
    """The first interval is reserved, and nothing is used yet."""
    RUNNING = "running"
    STOPPED = "stopped"
    """Nothing is used, and nothing is reserved; it may run again."""
    CLOSED = "closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """What is counted of an instance, and how."""

    instance_id: str
    project_id: str
    user_id: str
    account_id: str | None
    """Who pays; None: nobody has to."""
    offer_id: str
    offer_version: int
    price: dict[str, Any]
    """As :meth:`Price.to_json` says, for as long as the instance is there."""
    interval_seconds: int
    state: MeterState = MeterState.HELD
    boot: str = ""
    clock_ns: int = 0
    """What the clock said when it began to run, or was settled, the last time."""
    elapsed_ns: int = 0
    """What it had counted by then."""
    counted_until: datetime | None = None
    """The moment up to which usage was written."""
    seconds: int = 0
    """Whole seconds that were written as usage."""
    charged: int = 0
    waived: int = 0
    reserved: int = 0
    intervals: int = 0
    """How many rows of usage there are."""
    postings: int = 0
    """How many transactions of the ledger are its."""

    @property
    def terms(self) -> Price:
        return Price.from_json(self.price)

    @property
    def paid_until(self) -> int | None:
        """The seconds of use, all in all, that are paid or reserved; None: all there will ever be."""
        return self.terms.reach(self.charged + self.waived + self.reserved)

    def elapsed(self, reading: Reading) -> int:
        """How long it has run, in nanoseconds. A start of the machine has ended what ran before."""
        more = reading.clock_ns - self.clock_ns
        runs = self.state is MeterState.RUNNING and reading.boot == self.boot
        return self.elapsed_ns + (max(0, more) if runs else 0)


@dataclass(frozen=True, slots=True)
class Usage:
    """What an instance used in an interval, and what that cost."""

    instance_id: str
    interval: int
    project_id: str
    user_id: str
    offer_id: str
    offer_version: int
    began_at: datetime
    ended_at: datetime
    seconds: int
    amount: int
    waived: int
    """What was not paid, as there was no credit left when it was looked at."""
    currency: str
    price: dict[str, Any]
    transaction: int | None
    """The number of the ledger's transaction that paid it."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What came of settling a meter."""

    meter: Meter
    seconds_left: int | None
    """How long what is reserved lasts; None: for ever. 0: it is used up."""
    usage: Usage | None = None


_METER_COLUMNS = [_METER[entry.name] for entry in fields(Meter)]
_USAGE_COLUMNS = [_USAGE[entry.name] for entry in fields(Usage)]


def get(connection: Connection, instance_id: str, *, lock: bool = False) -> Meter:
    """The meter of an instance.

    :param lock: nobody else changes it in this transaction.
    :raises NotFoundError: it has none.
    """
    query = sa.select(*_METER_COLUMNS).where(_METER.instance_id == instance_id)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise NotFoundError(f"instance {instance_id} has no meter", hint="")
    return _meter_of(row)


def running(connection: Connection) -> list[Meter]:
    """All meters that run."""
    query = sa.select(*_METER_COLUMNS).where(_METER.state == MeterState.RUNNING)
    return [_meter_of(row) for row in connection.execute(query.order_by(_METER.instance_id))]


def admit(
    connection: Connection,
    instance: Owned,
    price: Price,
    account: Account | None,
    *,
    offer_id: str,
    offer_version: int,
    interval_seconds: int,
) -> Meter:
    """Give an instance a meter, and reserve its first interval.

    :param account: who pays; None for what is free.
    :raises CreditError: there is not enough for the interval.
    """
    if not price.free and account is None:
        raise FailedError(f"nobody pays for instance {instance.id}")
    meter = Meter(
        instance_id=instance.id,
        project_id=instance.project_id,
        user_id=instance.user_id,
        account_id=account.id if account and not price.free else None,
        offer_id=offer_id,
        offer_version=offer_version,
        price=price.to_json(),
        interval_seconds=interval_seconds,
    )
    connection.execute(sa.insert(tables.meters), _row_of(meter))
    return _reserve(connection, meter)


def start(connection: Connection, instance_id: str, reading: Reading) -> Meter:
    """Let a meter run from now on; one that was stopped reserves its next interval first.

    :raises CreditError: there is not enough for that.
    :raises ConflictError: it is closed.
    """
    meter = get(connection, instance_id, lock=True)
    if meter.state is MeterState.RUNNING:
        return meter
    if meter.state is MeterState.CLOSED:
        raise ConflictError(f"instance {instance_id} is over", hint="start another")
    if meter.state is MeterState.STOPPED:
        meter = _reserve(connection, meter)
    return _change(
        connection, meter, state=MeterState.RUNNING, boot=reading.boot, clock_ns=reading.clock_ns,
        counted_until=max(reading.moment, meter.counted_until or reading.moment),
    )  # fmt: skip


def settle(connection: Connection, instance_id: str, reading: Reading) -> Settled:
    """Pay what was used since the last time, and reserve the next interval, or as much of it as there is."""
    meter = get(connection, instance_id, lock=True)
    if meter.state is not MeterState.RUNNING:
        return Settled(meter, 0)
    return _settle(connection, meter, reading, MeterState.RUNNING)


def stop(connection: Connection, instance_id: str, reading: Reading) -> Settled:
    """Let it count no more: what was used is paid, and what is left of the reservation is free again."""
    meter = get(connection, instance_id, lock=True)
    if meter.state is not MeterState.RUNNING:
        return Settled(meter, 0)
    return _settle(connection, meter, reading, MeterState.STOPPED)


def close(connection: Connection, instance_id: str, reading: Reading) -> Settled:
    """The instance is over: as :func:`stop`, also of one that has never run, and for good."""
    meter = get(connection, instance_id, lock=True)
    if meter.state is MeterState.CLOSED:
        return Settled(meter, 0)
    if meter.state is MeterState.RUNNING:
        return _settle(connection, meter, reading, MeterState.CLOSED)
    if meter.reserved:
        meter = _post(connection, meter, "release", -meter.reserved, 0)
    return Settled(_change(connection, meter, state=MeterState.CLOSED), 0)


def of(
    connection: Connection, *, began: datetime | None = None, ended: datetime | None = None, **equal: str
) -> list[Usage]:
    """Usage that began from a moment on, and before another."""
    where = [_USAGE[name] == value for name, value in equal.items()]
    where += [_USAGE.began_at >= began] if began else []
    where += [_USAGE.began_at < ended] if ended else []
    query = sa.select(*_USAGE_COLUMNS).where(*where)
    return [
        Usage(*row)
        for row in connection.execute(query.order_by(_USAGE.began_at, _USAGE.instance_id, _USAGE.interval))
    ]


def verify(connection: Connection) -> Iterator[Finding]:
    """Compare meters, usage and the ledger, and say what cannot be so. Only the tables are looked at."""
    meters = {row.instance_id: _meter_of(row) for row in connection.execute(sa.select(*_METER_COLUMNS))}
    paid: set[int] = set()
    by_instance: dict[str, list[Usage]] = {instance_id: [] for instance_id in meters}
    for row in connection.execute(sa.select(*_USAGE_COLUMNS).order_by(_USAGE.instance_id, _USAGE.interval)):
        usage = Usage(*row)
        by_instance.setdefault(usage.instance_id, []).append(usage)
        paid |= {usage.transaction} if usage.transaction is not None else set()
    for instance_id, rows in by_instance.items():
        if meter := meters.get(instance_id):
            yield from _compare(connection, meter, rows)
        else:
            yield Finding(f"usage of instance {instance_id}", "it has no meter")
    yield from _compare_reservations(connection, meters.values())
    settled = sa.select(tables.ledger_transactions.c.number).where(
        tables.ledger_transactions.c.kind == "settle"
    )
    for number in connection.execute(settled).scalars():
        if number not in paid:
            yield Finding(f"transaction {number}", "there is no usage that it pays")


def _compare(connection: Connection, meter: Meter, rows: list[Usage]) -> Iterator[Finding]:
    where = f"usage of instance {meter.instance_id}"
    if [row.interval for row in rows] != list(range(1, meter.intervals + 1)):
        yield Finding(where, f"it has {len(rows)} intervals, and its meter counted {meter.intervals}")
    seconds = charged = waived = 0
    ended: datetime | None = None
    for row in rows:
        what = f"{where}, interval {row.interval}"
        if ended and row.began_at < ended:
            yield Finding(what, "it overlaps the one before")
        if row.ended_at - row.began_at != timedelta(seconds=row.seconds):
            yield Finding(what, f"it is {row.ended_at - row.began_at} long, and says {row.seconds} s")
        if (row.user_id, row.offer_id, row.offer_version, row.price) != (
            meter.user_id, meter.offer_id, meter.offer_version, meter.price,
        ):  # fmt: skip
            yield Finding(what, "it is another's, or on other terms, than its meter says")
        seconds, charged, waived = seconds + row.seconds, charged + row.amount, waived + row.waived
        ended = row.ended_at
        # What was used up to here costs this much, however it was cut.
        if charged + waived != meter.terms.due(seconds):
            yield Finding(
                what, f"{charged + waived} millionths were charged or waived, not {meter.terms.due(seconds)}"
            )
        yield from _compare_paid(connection, meter, row, what)
    if (seconds, charged) != (meter.seconds, meter.charged):
        yield Finding(
            where, f"its meter says {meter.seconds} s and {meter.charged}, not {seconds} s and {charged}"
        )
    if waived != meter.waived:
        yield Finding(where, "its meter waived another amount")


def _compare_paid(connection: Connection, meter: Meter, row: Usage, what: str) -> Iterator[Finding]:
    if meter.account_id is None:
        if row.amount or row.transaction is not None:
            yield Finding(what, "it is free, and was paid")
        return
    key = sa.select(tables.ledger_transactions.c.key).where(
        tables.ledger_transactions.c.number == row.transaction
    )
    found = ledger.find(connection, connection.execute(key).scalar_one_or_none() or "")
    if not found or found.kind != "settle" or found.subject != meter.instance_id:
        yield Finding(what, f"transaction {row.transaction} does not pay it")
        return
    if (found.detail.get("seconds"), found.detail.get("amount")) != (row.seconds, row.amount):
        yield Finding(what, f"transaction {found.number} pays something else")
    mine = sum(entry.amount for entry in found.entries if entry.account_id == meter.account_id)
    if mine != -row.amount:
        yield Finding(what, f"transaction {found.number} takes {-mine} millionths for it, not {row.amount}")


def _compare_reservations(connection: Connection, meters: Any) -> Iterator[Finding]:
    held: dict[str, int] = {}
    for meter in meters:
        if meter.account_id:
            held[meter.account_id] = held.get(meter.account_id, 0) + meter.reserved
        if meter.reserved and meter.state in (MeterState.STOPPED, MeterState.CLOSED):
            yield Finding(f"meter of instance {meter.instance_id}", f"it is {meter.state}, and holds credit")
    for account in ACCOUNTS.list(connection, kind=AccountKind.USER):
        if account.reserved != held.get(account.id, 0):
            yield Finding(
                f"account {account.id}",
                f"{account.reserved} millionths are reserved, and {held.get(account.id, 0)} by meters",
            )


def _reserve(connection: Connection, meter: Meter) -> Meter:
    """Reserve the first interval, or the next of one that was stopped: all of it."""
    price = meter.terms
    wanted = price.due(meter.seconds + meter.interval_seconds) - meter.charged - meter.waived
    return _post(connection, meter, "reserve", max(0, wanted), 0) if meter.account_id else meter


def _settle(connection: Connection, meter: Meter, reading: Reading, state: MeterState) -> Settled:
    price, elapsed_ns = meter.terms, meter.elapsed(reading)
    total = elapsed_ns // _BILLION
    more = total - meter.seconds
    owed = price.due(total) - meter.charged - meter.waived
    pay = reserve = 0
    if meter.account_id:
        account = ACCOUNTS.get(connection, meter.account_id, lock=True)
        free = account.available - (account.lowest or 0)
        pay = min(owed, meter.reserved + max(0, free))
        if state is MeterState.RUNNING:
            paid = meter.charged + meter.waived + owed
            reserve = _affordable(
                price, total, meter.interval_seconds, paid, meter.reserved - pay + max(0, free)
            )
    waived = owed - pay
    usage = None
    meter = _change(
        connection, meter, boot=reading.boot, clock_ns=reading.clock_ns, elapsed_ns=elapsed_ns, state=state
    )
    if more or owed:
        meter = _change(connection, meter, intervals=meter.intervals + 1)
        about = {"seconds": more, "amount": pay, "waived": waived, "interval": meter.intervals}
        meter, number = _posted(connection, meter, "settle", reserve - meter.reserved, pay, **about)
        usage = _write(connection, meter, more, pay, waived, number)
        assert meter.counted_until
        meter = _change(
            connection, meter, seconds=total, charged=meter.charged + pay, waived=meter.waived + waived,
            counted_until=usage.ended_at,
        )  # fmt: skip
    elif reserve != meter.reserved:
        kind = "reserve" if reserve > meter.reserved else "release"
        meter = _post(connection, meter, kind, reserve - meter.reserved, 0)
    reach = meter.paid_until if state is MeterState.RUNNING else total
    return Settled(meter, None if reach is None else max(0, reach - total), usage)


def _affordable(price: Price, total: int, interval: int, paid: int, free: int) -> int:
    """What to reserve for the next interval: the whole of it, or as far as so much goes."""
    reach = price.reach(paid + min(free, max(0, price.due(total + interval) - paid)))
    until = total + interval if reach is None else min(reach, total + interval)
    return max(0, price.due(until) - paid) if until >= total else 0


def _write(
    connection: Connection, meter: Meter, seconds: int, amount: int, waived: int, number: int | None
) -> Usage:
    began = meter.counted_until
    assert began
    usage = Usage(
        instance_id=meter.instance_id,
        interval=meter.intervals,
        project_id=meter.project_id,
        user_id=meter.user_id,
        offer_id=meter.offer_id,
        offer_version=meter.offer_version,
        began_at=began,
        ended_at=began + timedelta(seconds=seconds),
        seconds=seconds,
        amount=amount,
        waived=waived,
        currency=meter.terms.currency,
        price=meter.price,
        transaction=number,
    )
    connection.execute(
        sa.insert(tables.usage), {column.name: getattr(usage, column.name) for column in _USAGE_COLUMNS}
    )
    return usage


def _post(
    connection: Connection, meter: Meter, kind: str, more_reserved: int, pay: int, **about: int
) -> Meter:
    return _posted(connection, meter, kind, more_reserved, pay, **about)[0]


def _posted(
    connection: Connection, meter: Meter, kind: str, more_reserved: int, pay: int, **about: int
) -> tuple[Meter, int | None]:
    """Move money for a meter: into its reservation or out of it, and what is paid to the provider."""
    if not meter.account_id:
        return meter, None
    revenue = ledger.provider_account(connection, AccountKind.REVENUE, meter.terms.currency)
    entries = (
        Entry(meter.account_id, Part.RESERVED, more_reserved),
        Entry(meter.account_id, Part.AVAILABLE, -more_reserved - pay),
        Entry(revenue.id, Part.AVAILABLE, pay),
    )
    key = f"meter:{meter.instance_id}:{meter.postings + 1}"
    made = ledger.post(connection, kind, key, entries, subject=meter.instance_id, **about)
    changes = {"postings": meter.postings + 1, "reserved": meter.reserved + more_reserved}
    return _change(connection, meter, **changes), made.number


def _change(connection: Connection, meter: Meter, **changes: Any) -> Meter:
    connection.execute(
        sa.update(tables.meters).where(_METER.instance_id == meter.instance_id).values(changes)
    )
    return Meter(**{**_row_of(meter), **changes})


def _row_of(meter: Meter) -> dict[str, Any]:
    return {column.name: getattr(meter, column.name) for column in _METER_COLUMNS}


def _meter_of(row: Any) -> Meter:
    said = dict(row._mapping)
    return Meter(**{**said, "state": MeterState(said["state"])})
