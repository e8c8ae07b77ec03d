"""Real database servers for tests: started in a folder, reached by a Unix socket, gone at the end."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import sqlalchemy as sa

DEADLINE = 60.0
_POSTGRESQL = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """A PostgreSQL server; the URL of its administrator."""
    assert _POSTGRESQL, "PostgreSQL is missing: tools/setup test"
    programs = _POSTGRESQL[-1]
    data = folder / "data"
    user = _owned_by("postgres", folder)
    _run([programs / "initdb", "--pgdata", data, "--auth=trust", "--username=root", "--no-sync"], user)
    options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
    # At SIGTERM it would wait until its last client goes.
    with _server([programs / "postgres", "-D", data, *options], user, folder, signal.SIGINT):
        _listening(folder / ".s.PGSQL.5432")
        yield _ready(f"postgresql+psycopg2://root@/{{name}}?host={folder}", "postgres")


@contextmanager
def mariadb(folder: Path) -> Iterator[str]:
    """A MariaDB server; the URL of its administrator."""
    server = shutil.which("mariadbd") or "/usr/sbin/mariadbd"
    assert Path(server).exists(), "MariaDB is missing: tools/setup test"
    user = _owned_by("mysql", folder)
    data, place = folder / "data", folder / "socket"
    _run(
        [
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={data}",
            # At its start a server removes what any other has in their common folder.
            f"--tmpdir={folder}",
            "--auth-root-authentication-method=normal",
        ],
        user,
    )
    options = [f"--datadir={data}", f"--socket={place}", "--skip-networking", "--skip-log-bin"]
    options += [f"--tmpdir={folder}"]
    options += ["--innodb-flush-log-at-trx-commit=0", f"--pid-file={folder / 'pid'}"]
    with _server([server, "--no-defaults", *options], user, folder):
        _listening(place)
        yield _ready(f"mysql+pymysql://root@localhost/{{name}}?unix_socket={place}", "mysql")


@contextmanager
def database_of(administrator: str, name: str) -> Iterator[str]:
    """A new and empty database of a server; its URL."""
    engine = sa.create_engine(administrator, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield sa.make_url(administrator).set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            force = " WITH (FORCE)" if engine.dialect.name == "postgresql" else ""
            connection.exec_driver_sql(f"DROP DATABASE {name}{force}")
        engine.dispose()


def _owned_by(name: str, folder: Path) -> str | None:
    """Give a folder to a server's user, as whom it runs where we are root."""
    if os.getuid():
        return None
    account = pwd.getpwnam(name)
    os.chown(folder, account.pw_uid, account.pw_gid)
    # Whoever runs as another user has to get there.
    for above in folder.parents:
        if above.stat().st_uid == 0 and above != Path("/") and not above.stat().st_mode & 0o001:
            above.chmod(above.stat().st_mode | 0o011)
    return name


def _run(command: Sequence[str | Path], user: str | None) -> None:
    done = subprocess.run(command, user=user, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def _server(
    command: Sequence[str | Path], user: str | None, folder: Path, ending: signal.Signals = signal.SIGTERM
) -> Iterator[None]:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, user=user, cwd="/", stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        yield
    finally:
        process.send_signal(ending)
        process.wait(DEADLINE)


def _listening(place: Path) -> None:
    """Wait until somebody listens: a client of theirs that is refused may leave a socket open."""
    deadline = time.monotonic() + DEADLINE
    while True:
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(str(place))
            return
        assert time.monotonic() < deadline, f"nobody listens at {place}"
        time.sleep(0.05)


def _ready(url: str, name: str) -> str:
    deadline = time.monotonic() + DEADLINE
    engine = sa.create_engine(url.format(name=name))
    while True:
        try:
            with engine.connect():
                pass
            engine.dispose()
            return url.format(name=name)
        except sa.exc.OperationalError:
            assert time.monotonic() < deadline, "the database does not answer"
            time.sleep(0.1)
