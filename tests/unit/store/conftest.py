"""A database of each kind for every test of the store: SQLite, and real servers of PostgreSQL and MariaDB."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cloudlet.store import tables
from cloudlet.store.database import Database
from tests import databases

_numbers = itertools.count()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The servers that tests have asked for, by kind: started once, ended with the session."""
    with ExitStack() as stack:
        yield _Servers(stack, tmp_path_factory)


class _Servers(dict[str, str]):
    def __init__(self, stack: ExitStack, folders: pytest.TempPathFactory) -> None:
        super().__init__()
        self._stack = stack
        self._folders = folders

    def __missing__(self, kind: str) -> str:
        start = {"postgresql": databases.postgresql, "mariadb": databases.mariadb}[kind]
        self[kind] = self._stack.enter_context(start(self._folders.mktemp(kind)))
        return self[kind]


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def kind(request: pytest.FixtureRequest) -> str:
    """Of the test's database."""
    return str(request.param)


@pytest.fixture
def database_url(kind: str, servers: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """The URL of a database in which there is nothing at all."""
    if kind == "sqlite":
        yield f"sqlite:///{tmp_path / 'site.sqlite'}"
        return
    with databases.database_of(servers[kind], f"test{next(_numbers)}") as url:
        yield url


@pytest.fixture(scope="session")
def made(servers: dict[str, str]) -> Iterator[dict[str, str]]:
    """The URL, by kind, of a server's database with a site's tables: to make them takes a second."""
    with ExitStack() as stack:
        yield _Made(stack, servers)


class _Made(dict[str, str]):
    def __init__(self, stack: ExitStack, servers: dict[str, str]) -> None:
        super().__init__()
        self._stack = stack
        self._servers = servers

    def __missing__(self, kind: str) -> str:
        url = self[kind] = self._stack.enter_context(databases.database_of(self._servers[kind], "made"))
        opened = Database(url)
        opened.create()
        opened.close()
        return url


@pytest.fixture
def database(kind: str, made: dict[str, str], tmp_path: Path) -> Iterator[Database]:
    """A database with a site's tables, and no rows but those that a new one has."""
    opened = Database(f"sqlite:///{tmp_path / 'site.sqlite'}" if kind == "sqlite" else made[kind])
    if kind == "sqlite":
        opened.create()
    else:
        opened.write(_empty)
    yield opened
    opened.close()


def _empty(connection: Connection) -> None:
    kept = {"counters", "facts"}
    for table in reversed(tables.METADATA.sorted_tables):
        if table.name not in kept:
            connection.execute(sa.delete(table))
    connection.execute(sa.update(tables.counters).values(value=0))
    connection.execute(sa.delete(tables.facts).where(tables.facts.c.name != "site_id"))
