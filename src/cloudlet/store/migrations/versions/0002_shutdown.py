"""Instances that were suspended because the machine was shut down."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.batch_alter_table("instances") as batch:
        batch.add_column(
            sa.Column("resume_at_start", sa.Boolean(), nullable=False, server_default=sa.false())
        )
