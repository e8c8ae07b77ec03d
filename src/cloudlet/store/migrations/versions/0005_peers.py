"""Other cloudlets, with their keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from cloudlet.store.tables import Utc

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "peers",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("project_id", sa.String(length=255), nullable=False),
        sa.Column("user_id", sa.String(length=255), nullable=False),
        sa.Column("created_at", Utc(), nullable=False),
        sa.Column("updated_at", Utc(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("public_key", sa.String(length=64), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("certificate", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("capabilities", sa.JSON(), nullable=False),
        sa.Column("seen_at", Utc(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_peers")),
    )
    with op.batch_alter_table("peers") as batch:
        batch.create_index(batch.f("ix_peers_project_id"), ["project_id"])
        batch.create_index(batch.f("ix_peers_user_id"), ["user_id"])
