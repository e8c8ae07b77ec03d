"""The site's database: SQLite, PostgreSQL or MariaDB, and what differs between them.

A transaction is a function of a connection. It may run more than once (:meth:`Database.write` repeats what
lost a race), so that it changes nothing but the database. SQLite's writers take their lock when they begin:
whoever reads and then writes sees nothing change in between, as a lock of a row gives it elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from oslo_db import exception as db
from oslo_db.api import wrap_db_retry
from oslo_db.sqlalchemy import engines, exc_filters
from sqlalchemy.engine import Connection, Engine

from cloudlet.errors import ConflictError, FailedError, UsageError
from cloudlet.store import tables

VERSION_TABLE = "cloudlet_version"
"""Ours; others who keep tables in the same database (TaskFlow) use alembic's usual name."""
_RETRIES = 20
_BUSY_SECONDS = 30.0
_CONNECTIONS = 32

T = TypeVar("T")

Condition = Callable[[Connection], None]
"""Raises if something is not so, asked in the transaction that depends on it."""


class Database:
    """A database of a site; any number of threads and processes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = _engine(url)
        self.sqlite = self.engine.dialect.name == "sqlite"
        self._retried = wrap_db_retry(
            retry_interval=0.05, inc_retry_interval=True, max_retry_interval=1, max_retries=_RETRIES,
            retry_on_deadlock=True, retry_on_disconnect=True, jitter=True,
            exception_checker=lambda error: isinstance(error, db.DBError) and "locked" in str(error),
        )  # fmt: skip
        # SQLite has one writer at a time, and lets the others sleep and try again; a lock wakes them in time.
        self._turn: AbstractContextManager[Any] = threading.RLock() if self.sqlite else nullcontext()
        self._committed: list[Callable[[], None]] = []
        self._bound = threading.local()

    def when_committed(self, tell: Callable[[], None]) -> None:
        """Have ``tell`` called after each transaction that wrote, in the thread that committed it."""
        self._committed.append(tell)

    def write(self, work: Callable[[Connection], T]) -> T:
        """Do ``work`` in a transaction that may write; what lost a race is done again.

        :raises ConflictError: something that must be there once is there already.
        """
        condition: Condition | None = getattr(self._bound, "condition", None)
        if condition is None:
            return self._run(work, write=True)

        def bound(connection: Connection) -> T:
            condition(connection)
            return work(connection)

        result = self._run(bound, write=True)
        self._bound.condition = None
        return result

    @contextmanager
    def only_if(self, condition: Condition | None) -> Iterator[None]:
        """In the context, have this thread's first transaction that writes begin with a condition.

        So who asked for a change may bind it to something that whoever makes the change knows nothing of.
        """
        self._bound.condition = condition
        try:
            yield
        finally:
            self._bound.condition = None

    def read(self, work: Callable[[Connection], T]) -> T:
        """Do ``work`` in a transaction that only reads: all of it sees one moment."""
        return self._run(work, write=False)

    def create(self) -> None:
        """Bring the tables to this program's version; nothing happens where they are.

        :raises FailedError: they are of a later version.
        """
        with self.engine.connect() as connection:
            if self.version(connection) not in (None, *_known_versions()):
                raise FailedError(
                    "the database was written by a newer Cloudlet", hint="use that, or another database"
                )
        with self.engine.begin() as connection:
            command.upgrade(_alembic(connection), "head")

    def version(self, connection: Connection | None = None) -> str | None:
        """The version of its tables; None where there are none."""
        if connection is None:
            return self.read(self.version)
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        return context.get_current_revision()

    def fact(self, name: str) -> str:
        """Something that was decided when the tables were made."""
        query = sa.select(tables.facts.c.value).where(tables.facts.c.name == name)
        return str(self.read(lambda connection: connection.execute(query).scalar_one()))

    def close(self) -> None:
        """Close the connections that are not in use."""
        self.engine.dispose()

    def _run(self, work: Callable[[Connection], T], *, write: bool) -> T:
        def once() -> T:
            with self._turn if write else nullcontext(), self.engine.connect() as connection:
                options = connection.execution_options(writes=write)
                with options.begin():
                    return work(options)

        try:
            result: T = self._retried(once)()
        except db.DBDuplicateEntry as error:
            raise ConflictError(
                f"there is one with this {', '.join(error.columns) or 'name'} already", hint="give another"
            ) from error
        except db.DBConnectionError as error:
            raise FailedError("the database cannot be reached", hint="see the server's log") from error
        if write:
            for tell in self._committed:
                tell()
        return result


def latest_version() -> str:
    """The version of the tables that this program works with."""
    head = ScriptDirectory.from_config(_alembic()).get_current_head()
    assert head
    return head


def _known_versions() -> list[str]:
    return [script.revision for script in ScriptDirectory.from_config(_alembic()).walk_revisions()]


def _alembic(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(resources.files("cloudlet.store") / "migrations"))
    config.attributes["connection"] = connection
    return config


def _engine(url: str) -> Engine:
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        # There may be a password in it, and in what is said of it.
        raise UsageError(
            "[database] connection is not the URL of a database",
            hint="such as sqlite:////var/lib/cloudlet/site.sqlite; in a password, write @ / : as %40 %2F %3A",
        ) from None
    try:
        return _sqlite(parsed) if parsed.get_backend_name() == "sqlite" else _server(parsed)
    except sa.exc.NoSuchModuleError as error:
        raise UsageError(
            f"{parsed.drivername} is no kind of database that is known here",
            hint="it begins with sqlite, postgresql+psycopg2 or mysql+pymysql",
        ) from error
    except ImportError as error:
        raise UsageError(
            f"{parsed.drivername}: {error}", hint="pip install 'cloudlet[postgresql]' or 'cloudlet[mariadb]'"
        ) from error


def _server(url: sa.URL) -> Engine:
    if url.get_backend_name() in ("mysql", "mariadb") and "charset" not in url.query:
        url = url.update_query_dict({"charset": "utf8mb4"})  # else oslo.db takes one without all letters
    try:
        engine: Engine = engines.create_engine(
            url.render_as_string(hide_password=False),
            max_pool_size=_CONNECTIONS,
            max_retries=1,
            retry_interval=1,
        )
    except (db.DBConnectionError, sa.exc.OperationalError) as error:
        raise FailedError(
            f"the database {url.render_as_string()} cannot be reached", hint="start it, or correct [database]"
        ) from error
    return engine


def _sqlite(url: sa.URL) -> Engine:
    """An engine whose writers begin as such, and whose readers never wait for them."""
    if url.database:
        place = Path(url.database)
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # It holds secrets; what SQLite makes beside it is like it.
        place.touch(mode=0o600)
        with suppress(PermissionError):  # another user's
            place.chmod(place.stat().st_mode & 0o700)
    engine = sa.create_engine(
        url,
        poolclass=sa.QueuePool,
        pool_size=_CONNECTIONS,
        max_overflow=-1,
        connect_args={"check_same_thread": False, "timeout": _BUSY_SECONDS, "isolation_level": None},
    )
    exc_filters.register_engine(engine)

    @sa.event.listens_for(engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        # Who is going to write must not find out later that another was first.
        writes = connection.get_execution_options().get("writes", True)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
