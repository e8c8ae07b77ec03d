"""The ledger: nothing is made or lost, nobody goes below what they may, and tampering is found."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import settings as tried
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from sqlalchemy.engine import Connection

from cloudlet.errors import ConflictError, CreditError, FailedError
from cloudlet.store import ledger, tables
from cloudlet.store.database import Database
from cloudlet.store.ledger import ACCOUNTS, Account, AccountKind, Entry, Part

AVAILABLE, RESERVED = Part.AVAILABLE, Part.RESERVED


def opened(database: Database, user: str = "mia", currency: str = "EUR") -> Account:
    return database.write(lambda connection: ledger.account_of(connection, "p", user, currency))


def provider(database: Database, kind: AccountKind = AccountKind.REVENUE, currency: str = "EUR") -> Account:
    return database.write(lambda connection: ledger.provider_account(connection, kind, currency))


def move(database: Database, kind: str, key: str, *entries: Entry, **detail: object) -> ledger.Transaction:
    return database.write(lambda connection: ledger.post(connection, kind, key, entries, **detail))


def give(database: Database, account: Account, amount: int, key: str) -> None:
    vouchers = provider(database, AccountKind.VOUCHERS, account.currency)
    move(
        database, "redeem", key, Entry(vouchers.id, AVAILABLE, -amount), Entry(account.id, AVAILABLE, amount)
    )


def reserve(database: Database, account: Account, amount: int, key: str) -> None:
    move(database, "reserve", key, Entry(account.id, AVAILABLE, -amount), Entry(account.id, RESERVED, amount))


def settle(database: Database, account: Account, amount: int, used: int, key: str) -> None:
    revenue = provider(database, currency=account.currency)
    move(
        database, "settle", key, Entry(account.id, RESERVED, -amount), Entry(revenue.id, AVAILABLE, used),
        Entry(account.id, AVAILABLE, amount - used),
    )  # fmt: skip


def now_of(database: Database, account: Account) -> tuple[int, int]:
    row = database.read(lambda connection: ACCOUNTS.get(connection, account.id))
    return row.available, row.reserved


def findings(database: Database, known: dict[int, str] | None = None) -> list[str]:
    return database.read(lambda connection: [str(found) for found in ledger.verify(connection, known)])


def test_money_is_moved_and_each_account_says_why(database: Database) -> None:
    account = opened(database)
    give(database, account, 100, "voucher:1")
    reserve(database, account, 60, "reserve:1")
    assert now_of(database, account) == (40, 60)
    settle(database, account, 60, 25, "settle:1")
    assert now_of(database, account) == (75, 0)
    told = database.read(lambda connection: ledger.of_account(connection, account.id))
    assert [transaction.kind for transaction, _ in told] == ["redeem", "reserve", "settle"]
    assert [sum(entry.amount for entry in mine) for _, mine in told] == [100, 0, -25]
    assert findings(database) == []


def test_the_entries_of_an_account_come_in_pages(database: Database) -> None:
    account = opened(database)
    for number in range(7):
        give(database, account, 1 + number, f"voucher:{number}")
    first = database.read(lambda connection: ledger.of_account(connection, account.id, limit=4))
    after = first[-1][0].number
    rest = database.read(lambda connection: ledger.of_account(connection, account.id, after=after, limit=4))
    assert [mine[0].amount for _, mine in first + rest] == [1, 2, 3, 4, 5, 6, 7]


def test_nobody_has_less_than_they_may(database: Database) -> None:
    account = opened(database)
    give(database, account, 10, "voucher:1")
    with pytest.raises(CreditError) as refused:
        reserve(database, account, 11, "reserve:1")
    assert (refused.value.available, refused.value.wanted, refused.value.currency) == (10, 11, "EUR")
    assert now_of(database, account) == (10, 0)
    database.write(lambda connection: ledger.set_lowest(connection, account, -5, "limit:1"))
    reserve(database, account, 15, "reserve:1")
    assert now_of(database, account) == (-5, 15)
    assert findings(database) == []


def test_a_limit_that_was_lowered_does_not_keep_money_from_coming(database: Database) -> None:
    account = opened(database)
    database.write(lambda connection: ledger.set_lowest(connection, account, -50, "limit:1"))
    reserve(database, account, 50, "reserve:1")
    database.write(lambda connection: ledger.set_lowest(connection, account, 0, "limit:2"))
    give(database, account, 20, "voucher:1")
    assert now_of(database, account) == (-30, 50)
    with pytest.raises(CreditError):
        reserve(database, account, 1, "reserve:2")
    assert findings(database) == []


def test_what_is_reserved_once_is_not_settled_twice(database: Database) -> None:
    account = opened(database)
    give(database, account, 10, "voucher:1")
    reserve(database, account, 10, "reserve:1")
    settle(database, account, 10, 10, "settle:1")
    with pytest.raises(FailedError, match="reserved"):
        settle(database, account, 10, 10, "settle:2")


def test_one_key_moves_money_once(database: Database) -> None:
    account = opened(database)
    give(database, account, 10, "voucher:1")
    give(database, account, 10, "voucher:1")
    assert now_of(database, account) == (10, 0)
    with pytest.raises(ConflictError, match="something else"):
        give(database, account, 11, "voucher:1")
    assert findings(database) == []


def test_money_is_not_made(database: Database) -> None:
    account = opened(database)
    with pytest.raises(FailedError, match="add up"):
        move(database, "redeem", "key", Entry(account.id, AVAILABLE, 1))


def test_what_fails_leaves_no_gap_and_no_trace(database: Database) -> None:
    account = opened(database)

    def fail(connection: Connection) -> None:
        ledger.set_lowest(connection, account, -1, "limit:1")
        raise FailedError("no")

    with pytest.raises(FailedError, match="no"):
        database.write(fail)
    give(database, account, 1, "voucher:1")
    assert database.read(ledger.head)[0] == 1
    assert findings(database) == []


def test_the_last_cent_is_spent_once(database: Database) -> None:
    account = opened(database)
    give(database, account, 10_000, "voucher:1")
    together, done = threading.Barrier(8), []

    def spend(number: int) -> None:
        together.wait()
        try:
            reserve(database, account, 10_000, f"reserve:{number}")
            done.append(number)
        except CreditError:
            pass

    threads = [threading.Thread(target=spend, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 1
    assert now_of(database, account) == (0, 10_000)
    assert findings(database) == []


def test_one_account_for_each_user_and_currency(database: Database) -> None:
    assert opened(database).id == opened(database).id
    assert len({opened(database).id, opened(database, "tom").id, opened(database, currency="USD").id}) == 3
    assert provider(database).id == provider(database).id


def _changed(table: sa.Table, **values: object) -> Callable[[Connection], None]:
    def change(connection: Connection) -> None:
        where = table.c.number == 3 if "number" in table.c else table.c.kind == "user"
        if table is tables.ledger_entries:
            where = sa.and_(where, table.c.line == 0)
        connection.execute(sa.update(table).where(where).values(values))

    return change


def _entries_gone(connection: Connection) -> None:
    connection.execute(sa.delete(tables.ledger_entries).where(tables.ledger_entries.c.number == 3))


def _transaction_gone(connection: Connection) -> None:
    _entries_gone(connection)
    connection.execute(sa.delete(tables.ledger_transactions).where(tables.ledger_transactions.c.number == 3))


def _only_the_transaction_gone(connection: Connection) -> None:
    connection.execute(sa.delete(tables.ledger_transactions).where(tables.ledger_transactions.c.number == 3))


def _one_more(connection: Connection) -> None:
    """Added with a digest that was not made for it."""
    number, digest = ledger.head(connection)
    row = connection.execute(
        sa.select(tables.ledger_transactions).where(tables.ledger_transactions.c.number == 1)
    ).one()
    connection.execute(
        sa.insert(tables.ledger_transactions).values(
            {**row._mapping, "number": number + 1, "key": "x", "digest": digest}
        )
    )


def _swapped(connection: Connection) -> None:
    numbers = tables.ledger_entries.c.number
    for before, after in ((2, 99), (3, 2), (99, 3)):
        connection.execute(sa.update(tables.ledger_entries).where(numbers == before).values(number=after))


def _whole_posts(connection: Connection) -> None:
    """Both sides of an amount, and what the accounts say, are changed alike."""
    entries, accounts = tables.ledger_entries.c, tables.accounts.c
    connection.execute(
        sa.update(tables.ledger_entries).where(entries.number == 1).values(amount=entries.amount * 2)
    )
    more = sa.case((accounts.kind == "user", 100), (accounts.kind == "vouchers", -100), else_=0)
    connection.execute(sa.update(tables.accounts).values(available=accounts.available + more))


TAMPERINGS: dict[str, Callable[[Connection], None]] = {
    "an amount": _changed(tables.ledger_entries, amount=-1),
    "a part": _changed(tables.ledger_entries, part="available"),
    "a kind": _changed(tables.ledger_transactions, kind="redeem"),
    "a key": _changed(tables.ledger_transactions, key="other"),
    "a subject": _changed(tables.ledger_transactions, subject="other"),
    "a detail": _changed(tables.ledger_transactions, detail={"seconds": 1}),
    "a digest": _changed(tables.ledger_transactions, digest="0" * 64),
    "a time": _changed(tables.ledger_transactions, time=sa.text("'2020-01-01 00:00:00.000000'")),
    "a number": _changed(tables.ledger_transactions, number=77),
    "what is available": _changed(tables.accounts, available=10**9),
    "what is reserved": _changed(tables.accounts, reserved=0),
    "a limit": _changed(tables.accounts, lowest=-1000),
    "entries that are gone": _entries_gone,
    "a transaction that is gone": _transaction_gone,
    "a transaction that is gone without its entries": _only_the_transaction_gone,
    "an account that is gone": lambda connection: (
        connection.execute(sa.delete(tables.accounts).where(tables.accounts.c.kind == "user")) and None
    ),
    "a transaction that was added": _one_more,
    "amounts on both sides": _whole_posts,
    "entries under another transaction": _swapped,
    "the count": lambda connection: (
        connection.execute(
            sa.update(tables.counters).where(tables.counters.c.name == "ledger").values(value=9)
        )
        and None
    ),
}


@pytest.mark.parametrize("kind", TAMPERINGS)
def test_what_was_tampered_with_is_found(kind: str, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'site.sqlite'}")
    database.create()
    account = opened(database)
    give(database, account, 100, "voucher:1")
    reserve(database, account, 60, "reserve:1")
    settle(database, account, 60, 25, "settle:1")
    reserve(database, account, 10, "reserve:2")
    assert findings(database) == []
    # Who tampers does not ask for foreign keys to be kept.
    with sa.create_engine(f"sqlite:///{tmp_path / 'site.sqlite'}").begin() as connection:
        TAMPERINGS[kind](connection)
    assert findings(database) != []
    database.close()


def test_an_end_that_was_cut_off_is_found_by_who_kept_its_digest(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'site.sqlite'}")
    database.create()
    account = opened(database)
    give(database, account, 100, "voucher:1")
    kept = dict([database.read(ledger.head)])
    give(database, account, 1, "voucher:2")
    assert findings(database, kept) == []
    give_up = dict([database.read(ledger.head)])

    def cut(connection: Connection) -> None:
        for table in (tables.ledger_entries, tables.ledger_transactions):
            connection.execute(sa.delete(table).where(table.c.number == 2))
        columns = tables.accounts.c
        less = sa.case((columns.kind == "user", -1), else_=1)
        connection.execute(sa.update(tables.accounts).values(available=columns.available + less))
        connection.execute(
            sa.update(tables.counters).where(tables.counters.c.name == "ledger").values(value=1)
        )

    database.write(cut)
    assert findings(database) == []
    assert findings(database, kept) == []
    assert findings(database, give_up) == ["transaction 2: it was kept elsewhere, and is not here"]
    database.close()


class LedgerMachine(RuleBasedStateMachine):
    """Anything in any order, beside sums that are kept by hand."""

    accounts = Bundle("accounts")
    reservations = Bundle("reservations")

    def __init__(self) -> None:
        super().__init__()
        self.database = Database("sqlite://")
        self.database.create()
        self.have: dict[str, list[int]] = {}
        """By account: available, reserved, lowest."""
        self.given = 0
        self.keys = 0
        self.rows: dict[str, Account] = {}

    def teardown(self) -> None:
        assert findings(self.database) == []
        self.database.close()

    def key(self) -> str:
        self.keys += 1
        return f"key:{self.keys}"

    @rule(target=accounts, user=st.sampled_from(["mia", "tom"]), currency=st.sampled_from(["EUR", "USD"]))
    def open(self, user: str, currency: str) -> str:
        account = opened(self.database, user, currency)
        self.have.setdefault(account.id, [0, 0, 0])
        self.rows[account.id] = account
        return account.id

    @rule(account=accounts, amount=st.integers(1, 10**12))
    def give(self, account: str, amount: int) -> None:
        give(self.database, self.rows[account], amount, self.key())
        self.have[account][0] += amount

    @rule(account=accounts, lowest=st.integers(-(10**6), 0))
    def limit(self, account: str, lowest: int) -> None:
        key, row = self.key(), self.rows[account]
        self.database.write(lambda connection: ledger.set_lowest(connection, row, lowest, key))
        self.have[account][2] = lowest

    @rule(target=reservations, account=accounts, amount=st.integers(1, 10**12))
    def reserve(self, account: str, amount: int) -> object:
        available, _, lowest = self.have[account]
        try:
            reserve(self.database, self.rows[account], amount, self.key())
        except CreditError as error:
            assert available - amount < lowest
            assert (error.available, error.wanted) == (available - lowest, amount)
            return multiple()
        assert available - amount >= lowest
        self.have[account][0] -= amount
        self.have[account][1] += amount
        return account, amount

    @rule(reservation=consumes(reservations), data=st.data())
    def settle(self, reservation: tuple[str, int], data: st.DataObject) -> None:
        account, amount = reservation
        used = data.draw(st.integers(0, amount))
        key = self.key()
        for _ in range(2):  # who asks again is told of the same
            settle(self.database, self.rows[account], amount, used, key)
        self.have[account][0] += amount - used
        self.have[account][1] -= amount

    @invariant()
    def accounts_have_what_they_should(self) -> None:
        for account, (available, reserved, _) in self.have.items():
            assert now_of(self.database, self.rows[account]) == (available, reserved)
        total = sa.select(sa.func.coalesce(sa.func.sum(tables.ledger_entries.c.amount), 0))
        assert self.database.read(lambda connection: connection.execute(total).scalar_one()) == 0


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = tried(max_examples=12, stateful_step_count=25, deadline=None)
