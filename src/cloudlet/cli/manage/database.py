"""A site's database as one who looks after it opens it: nothing is made or changed on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from cloudlet.errors import NotFoundError
from cloudlet.store.database import Database, latest_version

SYNC = "cloudlet-manage db sync"


@contextmanager
def opened(url: str) -> Iterator[Database]:
    """A database at this program's version.

    :raises NotFoundError: it is not there, or not at this version.
    """
    if (found := version_of(url)) != latest_version():
        raise NotFoundError(
            f"the site's database is of version {found or 'none'}, not {latest_version()}",
            hint=f"bring it there: {SYNC}",
        )
    database = Database(url)
    try:
        yield database
    finally:
        database.close()


def version_of(url: str) -> str | None:
    """The version of a database; None if there is none.

    :raises FailedError: it cannot be reached.
    """
    if not _may_be_there(url):
        return None
    database = Database(url)
    try:
        return database.version()
    finally:
        database.close()


def _may_be_there(url: str) -> bool:
    """SQLite would make the file only because somebody looks for it."""
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        return True  # opening it tells what is wrong
    return parsed.get_backend_name() != "sqlite" or not parsed.database or Path(parsed.database).exists()
