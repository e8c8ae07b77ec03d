"""Accounts, and the ledger that says why they have what they have."""

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
    for table, columns in (
        ("accounts", ("project_id", "user_id")),
        ("ledger_transactions", ("subject",)),
        ("ledger_entries", ("account_id",)),
    ):
        with op.batch_alter_table(table) as batch:
            for column in columns:
                batch.create_index(batch.f(f"ix_{table}_{column}"), [column])
    counters = sa.table("counters", sa.column("name"), sa.column("value"))
    op.bulk_insert(counters, [{"name": "ledger", "value": 0}])
