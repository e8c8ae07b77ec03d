"""On MariaDB any letter can be written, and letters are equal if they are the same: Mia is not mia.

New databases are made so (0001); what a database used before is what its server was configured to.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_OTHERS = """
    SELECT table_name FROM information_schema.tables
    WHERE table_schema = DATABASE() AND table_type = 'BASE TABLE' AND table_collation <> 'utf8mb4_bin'
"""


def upgrade() -> None:
    connection = op.get_bind()
    if connection.dialect.name not in ("mysql", "mariadb"):
        return
    op.execute("ALTER DATABASE CHARACTER SET utf8mb4 COLLATE utf8mb4_bin")
    others = [name for (name,) in connection.exec_driver_sql(_OTHERS)]
    # A column cannot be changed while another refers to it.
    keys = [(name, key) for name in others for key in sa.inspect(connection).get_foreign_keys(name)]
    for name, key in keys:
        op.drop_constraint(str(key["name"]), name, type_="foreignkey")
    for name in others:
        op.execute(f"ALTER TABLE `{name}` CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_bin")
    for name, key in keys:
        op.create_foreign_key(
            key["name"], name, key["referred_table"], key["constrained_columns"], key["referred_columns"],
            ondelete=key["options"].get("ondelete"),
        )  # fmt: skip
