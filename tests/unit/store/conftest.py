"""A database of each kind for every test of the store: SQLite, and real servers of PostgreSQL and MariaDB."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

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
def database_url(request: pytest.FixtureRequest, servers: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'site.sqlite'}"
        return
    with databases.database_of(servers[request.param], f"test{next(_numbers)}") as url:
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A database with a site's tables."""
    opened = Database(database_url)
    opened.create()
    yield opened
    opened.close()
