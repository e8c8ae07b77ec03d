"""How alembic runs here: within the transaction of a connection that ``database.py`` hands over."""

from alembic import context

from cloudlet.store.database import VERSION_TABLE
from cloudlet.store.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table=VERSION_TABLE,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
