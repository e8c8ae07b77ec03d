"""What an operation is about, to find those of the same."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_NOUNS = ("instance", "overlay", "base")


def upgrade() -> None:
    with op.batch_alter_table("operations") as batch:
        batch.add_column(sa.Column("subject", sa.String(36), nullable=False, server_default=""))
        batch.create_index(batch.f("ix_operations_subject"), ["subject"])
    operations = sa.table("operations", sa.column("id"), sa.column("resources"), sa.column("subject"))
    connection = op.get_bind()
    for key, resources in connection.execute(sa.select(operations.c.id, operations.c.resources)).all():
        known = json.loads(resources) if isinstance(resources, str) else resources
        subject = next((known[noun] for noun in _NOUNS if noun in known), key)
        connection.execute(sa.update(operations).where(operations.c.id == key).values(subject=subject))
