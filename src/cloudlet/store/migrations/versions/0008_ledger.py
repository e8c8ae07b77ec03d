"""Accounts, the ledger that says why they have what they have, meters, and what they have counted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from cloudlet.store.tables import Utc

revision = "0008"
down_revision = "0007"

_SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "accounts",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("user_id", sa.String(length=255), nullable=False),
        sa.Column("created_at", Utc(), nullable=False),
        sa.Column("updated_at", Utc(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("available", sa.BigInteger(), nullable=False),
        sa.Column("reserved", sa.BigInteger(), nullable=False),
        sa.Column("lowest", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_accounts")),
        sa.UniqueConstraint(
            "project_id", "user_id", "kind", "currency",
            name=op.f("uq_accounts_project_id_user_id_kind_currency"),
        ),
    )  # fmt: skip
    op.create_table(
        "ledger_transactions",
        sa.Column("number", _SEQUENCE, autoincrement=False, nullable=False),
        sa.Column("time", Utc(), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("key", sa.String(length=120), nullable=False),
        sa.Column("subject", sa.String(length=36), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_ledger_transactions")),
        sa.UniqueConstraint("key", name=op.f("uq_ledger_transactions_key")),
    )
    op.create_table(
        "ledger_entries",
        sa.Column("number", _SEQUENCE, autoincrement=False, nullable=False),
        sa.Column("line", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("account_id", sa.String(length=36), nullable=False),
        sa.Column("part", sa.String(length=9), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name=op.f("fk_ledger_entries_account_id")),
        sa.ForeignKeyConstraint(
            ["number"], ["ledger_transactions.number"], name=op.f("fk_ledger_entries_number")
        ),
        sa.PrimaryKeyConstraint("number", "line", name=op.f("pk_ledger_entries")),
    )
    op.create_table(
        "meters",
        sa.Column("instance_id", sa.String(length=36), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("user_id", sa.String(length=255), nullable=False),
        sa.Column("account_id", sa.String(length=36), nullable=True),
        sa.Column("offer_id", sa.String(length=36), nullable=False),
        sa.Column("offer_version", sa.Integer(), nullable=False),
        sa.Column("price", sa.JSON(), nullable=False),
        sa.Column("interval_seconds", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=8), nullable=False),
        sa.Column("boot", sa.String(length=36), nullable=False),
        sa.Column("clock_ns", sa.BigInteger(), nullable=False),
        sa.Column("elapsed_ns", sa.BigInteger(), nullable=False),
        sa.Column("counted_until", Utc(), nullable=True),
        sa.Column("seconds", sa.BigInteger(), nullable=False),
        sa.Column("charged", sa.BigInteger(), nullable=False),
        sa.Column("waived", sa.BigInteger(), nullable=False),
        sa.Column("reserved", sa.BigInteger(), nullable=False),
        sa.Column("intervals", sa.Integer(), nullable=False),
        sa.Column("postings", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name=op.f("fk_meters_account_id")),
        sa.PrimaryKeyConstraint("instance_id", name=op.f("pk_meters")),
    )
    op.create_table(
        "usage",
        sa.Column("instance_id", sa.String(length=36), nullable=False),
        sa.Column("interval", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("user_id", sa.String(length=255), nullable=False),
        sa.Column("offer_id", sa.String(length=36), nullable=False),
        sa.Column("offer_version", sa.Integer(), nullable=False),
        sa.Column("began_at", Utc(), nullable=False),
        sa.Column("ended_at", Utc(), nullable=False),
        sa.Column("seconds", sa.BigInteger(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("waived", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("price", sa.JSON(), nullable=False),
        sa.Column("transaction", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("instance_id", "interval", name=op.f("pk_usage")),
    )
    for table, columns in (
        ("meters", ("user_id", "account_id", "offer_id", "state")),
        ("usage", ("project_id", "user_id", "offer_id", "began_at")),
        ("accounts", ("project_id", "user_id")),
        ("ledger_transactions", ("subject",)),
        ("ledger_entries", ("account_id",)),
    ):
        with op.batch_alter_table(table) as batch:
            for column in columns:
                batch.create_index(batch.f(f"ix_{table}_{column}"), [column])
    counters = sa.table("counters", sa.column("name"), sa.column("value"))
    op.bulk_insert(counters, [{"name": "ledger", "value": 0}])
