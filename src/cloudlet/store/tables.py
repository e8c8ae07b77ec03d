"""The tables of a site, and nothing of what they mean: the records that fill them stand in ``rows.py``.

Times are UTC; sizes are bytes; what has a shape of its own and is never searched is JSON.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

METADATA = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class Utc(sa.TypeDecorator[datetime]):
    """A moment, to the microsecond, on every database alike."""

    impl = sa.DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        return dialect.type_descriptor(
            mysql.DATETIME(fsp=6) if dialect.name in ("mysql", "mariadb") else sa.DateTime()
        )

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return value.astimezone(UTC).replace(tzinfo=None) if value else None

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value else None


_ID, _NAME, _DIGEST = sa.String(36), sa.String(255), sa.String(64)
_SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _owned() -> tuple[sa.Column[Any], ...]:
    """Columns of what somebody owns."""
    return (
        sa.Column("id", _ID, primary_key=True),
        sa.Column("project_id", _NAME, nullable=False, index=True),
        sa.Column("user_id", _NAME, nullable=False, index=True),
        sa.Column("created_at", Utc, nullable=False),
        sa.Column("updated_at", Utc, nullable=False),
    )


blobs = sa.Table(
    "blobs",
    METADATA,
    sa.Column("digest", _DIGEST, primary_key=True),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("used_at", Utc, nullable=False),
    sa.Column("kept", sa.Boolean, nullable=False),
)
blob_references = sa.Table(
    "blob_references",
    METADATA,
    sa.Column("digest", _DIGEST, sa.ForeignKey("blobs.digest"), primary_key=True),
    sa.Column("holder", sa.String(80), primary_key=True, index=True),
)
bases = sa.Table(
    "bases",
    METADATA,
    *_owned(),
    sa.Column("name", _NAME, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("size", sa.BigInteger),
    sa.Column("identity", _DIGEST, unique=True),
    sa.Column("description", sa.JSON),
    sa.Column("error", sa.JSON),
)
overlays = sa.Table(
    "overlays",
    METADATA,
    *_owned(),
    sa.Column("name", _NAME, nullable=False),
    sa.Column("public", sa.Boolean, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("url", sa.Text),
    sa.Column("size", sa.BigInteger),
    sa.Column("digest", _DIGEST, index=True),
    sa.Column("identity", _DIGEST, index=True),
    sa.Column("base_identity", _DIGEST, index=True),
    sa.Column("description", sa.JSON),
    sa.Column("error", sa.JSON),
)
apps = sa.Table(
    "apps",
    METADATA,
    *_owned(),
    sa.Column("name", _NAME, nullable=False),
    sa.Column("version", sa.String(128), nullable=False),
    sa.Column("public", sa.Boolean, nullable=False),
    sa.Column("descriptor", sa.JSON, nullable=False),
    sa.UniqueConstraint("project_id", "name", "version"),
)
instances = sa.Table(
    "instances",
    METADATA,
    *_owned(),
    sa.Column("name", _NAME, nullable=False),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("app_id", _ID, index=True),
    sa.Column("overlay_id", _ID, index=True),
    sa.Column("base_identity", _DIGEST, nullable=False),
    sa.Column("memory_bytes", sa.BigInteger, nullable=False),
    sa.Column("disk_bytes", sa.BigInteger, nullable=False),
    sa.Column("cpus", sa.Integer, nullable=False),
    sa.Column("order", sa.JSON, nullable=False),
    sa.Column("endpoints", sa.JSON, nullable=False),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Column("timings", sa.JSON, nullable=False),
    sa.Column("lease_seconds", sa.Integer),
    sa.Column("expires_at", Utc, index=True),
    sa.Column("warned", sa.Boolean, nullable=False),
    sa.Column("restart", sa.Boolean, nullable=False),
    sa.Column("restarts", sa.Integer, nullable=False),
    sa.Column("resume_at_start", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("epoch", sa.Integer, nullable=False, server_default="1"),
    sa.Column("moved_to", sa.JSON),
    sa.Column("error", sa.JSON),
)
operations = sa.Table(
    "operations",
    METADATA,
    *_owned(),
    sa.Column("kind", sa.String(40), nullable=False),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("resources", sa.JSON, nullable=False),
    sa.Column("input", sa.JSON, nullable=False),
    sa.Column("output", sa.JSON),
    sa.Column("steps", sa.JSON, nullable=False),
    sa.Column("error", sa.JSON),
    sa.Column("cancelled", sa.Boolean, nullable=False),
    sa.Column("subject", sa.String(36), nullable=False, index=True, server_default=""),
    sa.Column("request_id", sa.String(64), nullable=False),
)
events = sa.Table(
    "events",
    METADATA,
    sa.Column("number", _SEQUENCE, primary_key=True, autoincrement=False),
    sa.Column("time", Utc, nullable=False),
    sa.Column("kind", sa.String(60), nullable=False),
    sa.Column("project_id", _NAME, nullable=False, index=True),
    sa.Column("user_id", _NAME, nullable=False),
    sa.Column("noun", sa.String(20), nullable=False),
    sa.Column("resource_id", _ID, nullable=False),
    sa.Column("detail", sa.JSON, nullable=False),
)
counters = sa.Table(
    "counters",
    METADATA,
    sa.Column("name", sa.String(20), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)
webhooks = sa.Table(
    "webhooks",
    METADATA,
    *_owned(),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("kinds", sa.JSON, nullable=False),
    sa.Column("secret", sa.String(255), nullable=False),
    sa.Column("everything", sa.Boolean, nullable=False),
    sa.Column("after", sa.BigInteger, nullable=False),
)
deliveries = sa.Table(
    "deliveries",
    METADATA,
    sa.Column("webhook_id", _ID, sa.ForeignKey("webhooks.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("event", sa.JSON, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("next_at", Utc, nullable=False, index=True),
    sa.Column("dead", sa.Boolean, nullable=False),
    sa.Column("error", sa.Text),
)
peers = sa.Table(
    "peers",
    METADATA,
    *_owned(),
    sa.Column("name", _NAME, nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("public_key", _DIGEST, nullable=False),
    sa.Column("fingerprint", _DIGEST, nullable=False),
    sa.Column("certificate", _DIGEST, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("capabilities", sa.JSON, nullable=False),
    sa.Column("seen_at", Utc),
    sa.Column("error", sa.JSON),
)
handoffs = sa.Table(
    "handoffs",
    METADATA,
    *_owned(),
    sa.Column("instance_id", _ID, nullable=False, index=True),
    sa.Column("direction", sa.String(8), nullable=False),
    sa.Column("peer_id", _ID, nullable=False, index=True),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("paused", sa.Boolean, nullable=False),
    sa.Column("order", sa.JSON, nullable=False),
    sa.Column("forecast", sa.JSON),
    sa.Column("statistics", sa.JSON, nullable=False),
    sa.Column("told", sa.JSON),
    sa.Column("error", sa.JSON),
)
accounts = sa.Table(
    "accounts",
    METADATA,
    *_owned(),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("currency", sa.String(3), nullable=False),
    sa.Column("available", sa.BigInteger, nullable=False),
    sa.Column("reserved", sa.BigInteger, nullable=False),
    sa.Column("lowest", sa.BigInteger),
    sa.UniqueConstraint("project_id", "user_id", "kind", "currency"),
)
ledger_transactions = sa.Table(
    "ledger_transactions",
    METADATA,
    sa.Column("number", _SEQUENCE, primary_key=True, autoincrement=False),
    sa.Column("time", Utc, nullable=False),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("key", sa.String(120), nullable=False, unique=True),
    sa.Column("subject", sa.String(36), nullable=False, index=True),
    sa.Column("detail", sa.JSON, nullable=False),
    sa.Column("digest", _DIGEST, nullable=False),
)
ledger_entries = sa.Table(
    "ledger_entries",
    METADATA,
    sa.Column(
        "number",
        _SEQUENCE,
        sa.ForeignKey("ledger_transactions.number"),
        primary_key=True,
        autoincrement=False,
    ),
    sa.Column("line", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("account_id", _ID, sa.ForeignKey("accounts.id"), nullable=False, index=True),
    sa.Column("part", sa.String(9), nullable=False),
    sa.Column("amount", sa.BigInteger, nullable=False),
)
meters = sa.Table(
    "meters",
    METADATA,
    sa.Column("instance_id", _ID, primary_key=True),
    sa.Column("project_id", _NAME, nullable=False),
    sa.Column("user_id", _NAME, nullable=False, index=True),
    sa.Column("account_id", _ID, sa.ForeignKey("accounts.id"), index=True),
    sa.Column("offer_id", _ID, nullable=False, index=True),
    sa.Column("offer_version", sa.Integer, nullable=False),
    sa.Column("price", sa.JSON, nullable=False),
    sa.Column("interval_seconds", sa.Integer, nullable=False),
    sa.Column("state", sa.String(8), nullable=False, index=True),
    sa.Column("boot", sa.String(36), nullable=False),
    sa.Column("clock_ns", sa.BigInteger, nullable=False),
    sa.Column("elapsed_ns", sa.BigInteger, nullable=False),
    sa.Column("counted_until", Utc),
    sa.Column("seconds", sa.BigInteger, nullable=False),
    sa.Column("charged", sa.BigInteger, nullable=False),
    sa.Column("waived", sa.BigInteger, nullable=False),
    sa.Column("reserved", sa.BigInteger, nullable=False),
    sa.Column("intervals", sa.Integer, nullable=False),
    sa.Column("postings", sa.Integer, nullable=False),
)
usage = sa.Table(
    "usage",
    METADATA,
    sa.Column("instance_id", _ID, primary_key=True),
    sa.Column("interval", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("project_id", _NAME, nullable=False, index=True),
    sa.Column("user_id", _NAME, nullable=False, index=True),
    sa.Column("offer_id", _ID, nullable=False, index=True),
    sa.Column("offer_version", sa.Integer, nullable=False),
    sa.Column("began_at", Utc, nullable=False, index=True),
    sa.Column("ended_at", Utc, nullable=False),
    sa.Column("seconds", sa.BigInteger, nullable=False),
    sa.Column("amount", sa.BigInteger, nullable=False),
    sa.Column("waived", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.String(3), nullable=False),
    sa.Column("price", sa.JSON, nullable=False),
    sa.Column("transaction", sa.BigInteger),
)
facts = sa.Table(
    "facts",
    METADATA,
    sa.Column("name", sa.String(20), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
retries = sa.Table(
    "retries",
    METADATA,
    sa.Column("user_id", _NAME, primary_key=True),
    sa.Column("key", sa.String(128), primary_key=True),
    sa.Column("fingerprint", _DIGEST, nullable=False),
    sa.Column("resource_id", _ID, nullable=False),
    sa.Column("created_at", Utc, nullable=False),
)
