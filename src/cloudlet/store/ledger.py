"""The ledger: what each account has, and why. Double entry, only ever added to, exact.

A *transaction* moves money between accounts, in two entries or more that add up to nothing: so none is made
and none is lost. An account of a user has two parts, what is *available* and what is *reserved* for something
that goes on; the provider's accounts say where money came from and went to. Amounts are whole millionths of
the currency's unit.

Transactions are numbered without a gap, under a lock that a writer holds to the end of its own transaction of
the database, and each has a digest over itself and the one before. A *key* names what a transaction is for:
who posts it again, after a crash, finds that it is there. :func:`verify` proves all of this from the tables
alone.

Who holds this lock may write events, and not the other way round: else two could wait for each other.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from blake3 import blake3
from sqlalchemy.engine import Connection

from cloudlet.errors import ConflictError, CreditError, FailedError
from cloudlet.store import tables
from cloudlet.store.rows import SITE, Owned, Rows, now

_NAMESPACE = uuid.UUID("6b1f7a0e-9b1c-5d0e-8a51-3f0c8f2f1d11")
"""Of the ids of the provider's accounts."""
_FIRST_DIGEST = "0" * 64
_COUNTER = "ledger"


class AccountKind(StrEnum):
    """Whose account it is, or what the provider has it for."""

    USER = "user"
    REVENUE = "revenue"
    """What users have used."""
    VOUCHERS = "vouchers"
    """What came with vouchers; below zero, as it went to users."""
    PAYMENTS = "payments"
    """What came with paid invoices; below zero."""
    CORRECTIONS = "corrections"
    """What an operator gave or took."""


class Part(StrEnum):
    """Of an account."""

    AVAILABLE = "available"
    RESERVED = "reserved"


@dataclass(frozen=True, slots=True, kw_only=True)
class Account(Owned):
    """What somebody has in one currency."""

    kind: AccountKind = AccountKind.USER
    currency: str
    available: int = 0
    reserved: int = 0
    lowest: int | None = 0
    """Below this, what is available may not be brought; less than 0: so much may be owed. None: anything."""


@dataclass(frozen=True, slots=True)
class Entry:
    """So much more, or less, in a part of an account."""

    account_id: str
    part: Part
    amount: int


@dataclass(frozen=True, slots=True)
class Transaction:
    """Entries that belong together."""

    number: int
    time: datetime
    kind: str
    key: str
    """What it is for; there is one transaction for each."""
    subject: str
    """The id of what it is about, such as an instance; may be empty."""
    detail: Mapping[str, Any]
    digest: str
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in the tables that cannot be so."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


ACCOUNTS = Rows("account", Account, tables.accounts)

_ACCOUNT, _TRANSACTION, _ENTRY = tables.accounts.c, tables.ledger_transactions.c, tables.ledger_entries.c
_MINE = tables.counters.c.name == _COUNTER
# Written once: to write a query costs more than to answer it.
_LOCKED = sa.select(tables.counters.c.value).where(_MINE).with_for_update()
_COUNTED = sa.update(tables.counters).where(_MINE).values(value=sa.bindparam("number"))
_LAST_DIGEST = sa.select(_TRANSACTION.digest).where(_TRANSACTION.number == sa.bindparam("last"))
_INSERT, _INSERT_ENTRIES = sa.insert(tables.ledger_transactions), sa.insert(tables.ledger_entries)
_BALANCED = (
    sa.update(tables.accounts)
    .where(_ACCOUNT.id == sa.bindparam("key"))
    .values(
        available=_ACCOUNT.available + sa.bindparam("more"),
        reserved=_ACCOUNT.reserved + sa.bindparam("more_reserved"),
        updated_at=sa.bindparam("moment"),
    )
)
_COLUMNS = [_TRANSACTION[name] for name in ("number", "time", "kind", "key", "subject", "detail", "digest")]
_BY_KEY = sa.select(*_COLUMNS).where(_TRANSACTION.key == sa.bindparam("wanted"))


def account_of(connection: Connection, project_id: str, user_id: str, currency: str) -> Account:
    """The account of a user in a currency: opened, with nothing in it, where there is none."""
    _lock(connection)
    found = ACCOUNTS.find(
        connection, project_id=project_id, user_id=user_id, kind=AccountKind.USER, currency=currency
    )
    return found or ACCOUNTS.insert(
        connection, Account(project_id=project_id, user_id=user_id, currency=currency)
    )


def provider_account(connection: Connection, kind: AccountKind, currency: str) -> Account:
    """The provider's account of a kind in a currency: opened where there is none."""
    _lock(connection)
    own_id = str(uuid.uuid5(_NAMESPACE, f"{kind}:{currency}"))
    if found := ACCOUNTS.find(connection, id=own_id):
        return found
    opened = Account(id=own_id, project_id="", user_id=SITE, kind=kind, currency=currency, lowest=None)
    return ACCOUNTS.insert(connection, opened)


def post(
    connection: Connection, kind: str, key: str, entries: Sequence[Entry], *, subject: str = "", **detail: Any
) -> Transaction:
    """Move money; or, where there is a transaction with this key, say which that is.

    :param key: up to 120 letters; what is moved under one key is moved once.
    :param detail: what else there is to say, in texts and whole numbers.
    :raises CreditError: an account would have less available than it may.
    :raises ConflictError: there is one with this key that moves something else.
    """
    number = _lock(connection) + 1
    moved = tuple(entry for entry in entries if entry.amount)
    if sum(entry.amount for entry in moved):
        raise FailedError(f"the entries of {key} do not add up to nothing")
    if known := find(connection, key):
        if (known.kind, known.entries) != (kind, moved):
            raise ConflictError(f"transaction {known.number} is for {key} already, and moves something else")
        return known
    time = now()
    _balance(connection, moved, time)
    last = connection.execute(_LAST_DIGEST, {"last": number - 1}).scalar_one_or_none() or _FIRST_DIGEST
    made = Transaction(number, time, kind, key, subject, detail, "", moved)
    made = replace(made, digest=_digest_of(made, last))
    connection.execute(_INSERT, {column.name: getattr(made, column.name) for column in _COLUMNS})
    if moved:
        lines = [
            {
                "number": number,
                "line": line,
                "account_id": entry.account_id,
                "part": entry.part,
                "amount": entry.amount,
            }
            for line, entry in enumerate(moved)
        ]
        connection.execute(_INSERT_ENTRIES, lines)
    connection.execute(_COUNTED, {"number": number})
    return made


def set_lowest(connection: Connection, account: Account, lowest: int, key: str, **detail: Any) -> Account:
    """Say how far an account may go below zero; the ledger notes it, since it decides what may be moved."""
    post(connection, "limit", key, (), subject=account.id, lowest=lowest, **detail)
    return ACCOUNTS.update(connection, account.id, lowest=lowest)


def find(connection: Connection, key: str) -> Transaction | None:
    """The transaction with a key."""
    row = connection.execute(_BY_KEY, {"wanted": key}).one_or_none()
    return replace(Transaction(*row), entries=_entries_of(connection, row.number)) if row else None


def of_account(
    connection: Connection, account_id: str, *, after: int = 0, limit: int = 100
) -> list[tuple[Transaction, list[Entry]]]:
    """The transactions that concern an account, in their order, each with the account's own entries."""
    query = (
        sa.select(*_COLUMNS, _ENTRY.account_id, _ENTRY.part, _ENTRY.amount)
        .join_from(tables.ledger_transactions, tables.ledger_entries)
        .where(_ENTRY.account_id == account_id, _TRANSACTION.number > after)
        .order_by(_TRANSACTION.number, _ENTRY.line)
    )
    found: dict[int, tuple[Transaction, list[Entry]]] = {}
    # An account has at most two entries in a transaction.
    for *said, owner, part, amount in connection.execute(query.limit(2 * limit)):
        transaction = Transaction(*said)
        entries = found.setdefault(transaction.number, (transaction, []))[1]
        entries.append(Entry(owner, Part(part), amount))
    return list(found.values())[:limit]


def head(connection: Connection) -> tuple[int, str]:
    """The number of the last transaction and its digest, which stands for all before it.

    Whoever keeps these can tell later whether the end of the ledger was cut off.
    """
    last = _TRANSACTION.number.desc()
    query = sa.select(_TRANSACTION.number, _TRANSACTION.digest).order_by(last).limit(1)
    row = connection.execute(query).one_or_none()
    return (int(row[0]), str(row[1])) if row else (0, _FIRST_DIGEST)


@dataclass(slots=True)
class _Replayed:
    """What an account has as the transactions say, one after the other."""

    account: Account
    parts: dict[Part, int] = field(default_factory=lambda: dict.fromkeys(Part, 0))
    lowest: int | None = 0


def verify(connection: Connection, known: Mapping[int, str] | None = None) -> Iterator[Finding]:
    """Go through the whole ledger, and say what cannot be so. Nothing but the tables is looked at.

    :param known: numbers of transactions, and the digests that were kept of them elsewhere.
    """
    counted = _lock(connection)
    accounts = {
        row.id: _Replayed(row, lowest=None if row.kind is not AccountKind.USER else 0)
        for row in ACCOUNTS.list(connection)
    }
    last, digest = 0, _FIRST_DIGEST
    for transaction in _all(connection):
        where = f"transaction {transaction.number}"
        if transaction.number != last + 1:
            yield Finding(where, f"it follows transaction {last}: one is missing")
        if _digest_of(transaction, digest) != transaction.digest:
            yield Finding(where, "it is not what its digest was made of, or one before it is not")
        if known and known.get(transaction.number, transaction.digest) != transaction.digest:
            yield Finding(where, "its digest is not the one that was kept of it")
        yield from _replay(where, transaction, accounts)
        last, digest = transaction.number, transaction.digest
    if counted != last:
        yield Finding("the ledger", f"it ends with transaction {last}, and {counted} were counted")
    for number in sorted(known or ()):
        if number > last:
            yield Finding(f"transaction {number}", "it was kept elsewhere, and is not here")
    yield from _compare(accounts.values())
    yield from _orphans(connection)


def _replay(where: str, transaction: Transaction, accounts: Mapping[str, _Replayed]) -> Iterator[Finding]:
    sums: dict[str, int] = {}
    for entry in transaction.entries:
        if not (of := accounts.get(entry.account_id)):
            yield Finding(where, f"there is no account {entry.account_id}")
            continue
        of.parts[entry.part] += entry.amount
        currency = of.account.currency
        sums[currency] = sums.get(currency, 0) + entry.amount
        if of.parts[Part.RESERVED] < 0:
            yield Finding(where, f"it leaves less than nothing reserved in account {entry.account_id}")
        too_low = of.lowest is not None and of.parts[Part.AVAILABLE] < of.lowest
        if too_low and entry.part is Part.AVAILABLE and entry.amount < 0:
            yield Finding(where, f"it leaves less available in account {entry.account_id} than it may have")
    for currency, total in sums.items():
        if total:
            yield Finding(where, f"its entries in {currency} add up to {total} millionths, not to nothing")
    if transaction.kind == "limit" and (limited := accounts.get(transaction.subject)):
        limited.lowest = int(transaction.detail["lowest"])


def _compare(accounts: Any) -> Iterator[Finding]:
    for of in accounts:
        where = f"account {of.account.id}"
        for part, total in of.parts.items():
            if (said := getattr(of.account, part)) != total:
                yield Finding(where, f"{said} millionths are {part}, and its entries add up to {total}")
        if of.account.lowest != of.lowest:
            yield Finding(where, f"its lowest is {of.account.lowest}, and the ledger says {of.lowest}")


def _orphans(connection: Connection) -> Iterator[Finding]:
    known = sa.select(_TRANSACTION.number)
    query = sa.select(_ENTRY.number).where(_ENTRY.number.not_in(known)).distinct()
    for number in connection.execute(query).scalars():
        yield Finding(f"transaction {number}", "it has entries, and is not there itself")


def _lock(connection: Connection) -> int:
    """Be the only one who posts, to the end of the transaction; the number of the last that was posted."""
    return int(connection.execute(_LOCKED).scalar_one())


def _balance(connection: Connection, entries: Sequence[Entry], moment: datetime) -> None:
    """Change what accounts have.

    :raises CreditError: one would have less available than it may.
    """
    for account_id in sorted({entry.account_id for entry in entries}):
        mine = [entry for entry in entries if entry.account_id == account_id]
        more = sum(entry.amount for entry in mine if entry.part is Part.AVAILABLE)
        more_reserved = sum(entry.amount for entry in mine if entry.part is Part.RESERVED)
        account = ACCOUNTS.get(connection, account_id, lock=True)
        if more < 0 and account.lowest is not None and account.available + more < account.lowest:
            raise CreditError(
                "the account has not enough credit",
                available=account.available - account.lowest,
                wanted=-more,
                currency=account.currency,
            )
        if account.reserved + more_reserved < 0:
            raise FailedError(f"account {account_id} has less than that reserved")
        connection.execute(
            _BALANCED, {"key": account_id, "more": more, "more_reserved": more_reserved, "moment": moment}
        )


def _digest_of(transaction: Transaction, last: str) -> str:
    """BLAKE3 over what a transaction says and the digest of the one before it, as JSON."""
    said = [
        last,
        transaction.number,
        transaction.time.astimezone(UTC).isoformat(timespec="microseconds"),
        transaction.kind,
        transaction.key,
        transaction.subject,
        transaction.detail,
        [[entry.account_id, entry.part, entry.amount] for entry in transaction.entries],
    ]
    return blake3(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _entries_of(connection: Connection, number: int) -> tuple[Entry, ...]:
    query = sa.select(_ENTRY.account_id, _ENTRY.part, _ENTRY.amount).where(_ENTRY.number == number)
    rows = connection.execute(query.order_by(_ENTRY.line))
    return tuple(Entry(owner, Part(part), amount) for owner, part, amount in rows)


def _all(connection: Connection) -> Iterator[Transaction]:
    """Every transaction in its order, with its entries; not all of them in memory."""
    query = (
        sa.select(*_COLUMNS, _ENTRY.account_id, _ENTRY.part, _ENTRY.amount)
        .join_from(tables.ledger_transactions, tables.ledger_entries, isouter=True)
        .order_by(_TRANSACTION.number, _ENTRY.line)
        .execution_options(yield_per=1000)
    )
    for _, together in groupby(connection.execute(query), key=lambda row: row.number):
        rows = list(together)
        entries = tuple(Entry(owner, Part(part), amount) for *_, owner, part, amount in rows if owner)
        yield replace(Transaction(*rows[0][: len(_COLUMNS)]), entries=entries)
