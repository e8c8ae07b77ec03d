from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy.engine import Connection

from cloudlet.errors import ConflictError, FailedError, NotFoundError, UsageError
from cloudlet.store import journal, retries, tables
from cloudlet.store.database import VERSION_TABLE, Database, latest_version
from cloudlet.store.retries import Retry
from cloudlet.store.rows import APPS, INSTANCES, WEBHOOKS, App, Instance, InstanceState, now

OWNER = {"project_id": "p", "user_id": "u"}


def instance(**changes: object) -> Instance:
    values = {
        "name": "i",
        "base_identity": "b" * 64,
        "memory_bytes": 1 << 20,
        "disk_bytes": 1 << 30,
        "cpus": 1,
    }
    return Instance(**{**OWNER, **values, **changes})  # type: ignore[arg-type]


def add(database: Database, **changes: object) -> Instance:
    row = instance(**changes)
    return database.write(lambda connection: INSTANCES.insert(connection, row))


def test_the_migrations_make_what_the_tables_say(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": VERSION_TABLE, "compare_type": True}
        )
        assert compare_metadata(context, tables.METADATA) == []


def test_making_the_tables_again_changes_nothing(database: Database) -> None:
    site = database.fact("site_id")
    database.create()
    assert database.version() == latest_version()
    assert database.fact("site_id") == site


def test_tables_of_a_newer_program_are_left_alone(database: Database) -> None:
    def newer(connection: Connection) -> None:
        connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = 'later'"))

    database.write(newer)
    with pytest.raises(FailedError, match="newer"):
        database.create()


def test_a_row_is_taken_out_as_it_was_put_in(database: Database) -> None:
    row = add(database, metadata={"ä": "ö"}, expires_at=now(), endpoints=[{"url": "http://x"}])
    assert database.read(lambda connection: INSTANCES.get(connection, row.id)) == row


def test_a_change_that_comes_too_late_is_refused(database: Database) -> None:
    row = add(database)
    active = {"state": InstanceState.ACTIVE}
    with pytest.raises(ConflictError, match="is requested"):
        database.write(
            lambda connection: INSTANCES.update(connection, row.id, where=active, state=InstanceState.PAUSED)
        )
    with pytest.raises(NotFoundError):
        database.write(lambda connection: INSTANCES.update(connection, "none", name="x"))


def test_the_first_write_is_bound_to_a_condition_and_no_other(database: Database) -> None:
    row, asked = add(database), []

    def so(connection: Connection) -> None:
        asked.append(INSTANCES.get(connection, row.id, lock=True).name)

    def not_so(connection: Connection) -> None:
        raise ConflictError("it is not so")

    def rename(name: str) -> None:
        database.write(lambda connection: INSTANCES.update(connection, row.id, name=name))

    with database.only_if(so):
        assert database.read(lambda connection: INSTANCES.get(connection, row.id)).name == "i"
        assert asked == []
        rename("one")
        rename("two")
    assert asked == ["i"]
    with pytest.raises(ConflictError, match="not so"), database.only_if(not_so):
        rename("three")
    with database.only_if(not_so):
        elsewhere = threading.Thread(target=rename, args=("of another thread",))
        elsewhere.start()
        elsewhere.join()
    rename("four")
    with database.only_if(None):
        rename("five")
    assert database.read(lambda connection: INSTANCES.get(connection, row.id)).name == "five"


def test_rows_are_counted(database: Database) -> None:
    assert database.read(WEBHOOKS.count) == 0


def test_pages_of_a_list_hold_every_row_once(database: Database) -> None:
    moment = now()
    rows = [add(database, name=f"{number % 3}", created_at=moment) for number in range(10)]
    for descending in (False, True):
        seen: list[Instance] = []
        while True:
            marker = seen[-1].id if seen else None
            page = database.read(
                lambda connection, marker=marker, descending=descending: INSTANCES.list(  # type: ignore[misc]
                    connection, limit=3, marker=marker, sort="name", descending=descending
                )
            )
            seen += page
            if len(page) < 3:
                break
        assert {row.id for row in seen} == {row.id for row in rows}
        assert len(seen) == 10
        order = [(row.name, row.id) for row in seen]
        assert order == sorted(order, reverse=descending)


def test_what_is_there_once_is_not_put_in_twice(database: Database) -> None:
    app = App(**OWNER, name="a", version="1", descriptor={})
    database.write(lambda connection: APPS.insert(connection, app))
    again = App(**OWNER, name="a", version="1", descriptor={})
    with pytest.raises(ConflictError, match="already"):
        database.write(lambda connection: APPS.insert(connection, again))


def test_any_letter_is_itself_and_no_other(database: Database) -> None:
    names = ["ä 🌩", "a", "A", "ä", "Ä", "ß", "ss", "\u4e91"]
    for name in names:
        app = App(project_id="p", user_id=name, name=name, version="1", descriptor={})
        database.write(lambda connection, app=app: APPS.insert(connection, app))  # type: ignore[misc]
    for name in names:
        for key in ("name", "user_id"):
            (found,) = database.read(lambda connection, given={key: name}: APPS.list(connection, **given))  # type: ignore[misc]
            assert found.name == name
    assert [app.name for app in database.read(lambda connection: APPS.list(connection, user_id="b"))] == []


@pytest.mark.parametrize("kind", ["mariadb"], indirect=True)
def test_what_another_server_made_of_letters_is_put_right(database_url: str) -> None:
    database = Database(database_url)
    database.create()

    def spoil(connection: Connection) -> None:
        connection.exec_driver_sql("ALTER DATABASE CHARACTER SET latin1 COLLATE latin1_swedish_ci")
        keys = [
            (name, key)
            for name in tables.METADATA.tables
            for key in sa.inspect(connection).get_foreign_keys(name)
        ]
        for name, key in keys:
            connection.exec_driver_sql(f"ALTER TABLE {name} DROP FOREIGN KEY {key['name']}")
        for name in tables.METADATA.tables:
            connection.exec_driver_sql(f"ALTER TABLE `{name}` CONVERT TO CHARACTER SET latin1")
        for name, key in keys:
            connection.exec_driver_sql(
                f"ALTER TABLE {name} ADD CONSTRAINT {key['name']} FOREIGN KEY "
                f"({key['constrained_columns'][0]}) REFERENCES {key['referred_table']} "
                f"({key['referred_columns'][0]}) ON DELETE {key['options'].get('ondelete', 'RESTRICT')}"
            )
        for later in (
            "ALTER TABLE operations DROP COLUMN subject, DROP COLUMN output",
            "ALTER TABLE instances DROP COLUMN epoch, DROP COLUMN moved_to",
            "DROP TABLE handoffs",
            "DROP TABLE peers",
            "DROP TABLE ledger_entries, ledger_transactions, meters, `usage`, accounts",
            "DELETE FROM counters WHERE name = 'ledger'",
        ):
            connection.exec_driver_sql(later)
        connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '0002'"))

    database.write(spoil)
    app = App(**OWNER, name="ä", version="1", descriptor={})
    database.write(lambda connection: APPS.insert(connection, app))
    database.create()
    for name in ("🌩", "A", "a"):
        another = App(**OWNER, name=name, version="1", descriptor={})
        database.write(lambda connection, another=another: APPS.insert(connection, another))  # type: ignore[misc]
    assert database.read(lambda connection: APPS.get(connection, app.id)) == app
    database.close()


def test_an_error_leaves_nothing(database: Database) -> None:
    def fails(connection: Connection) -> None:
        INSTANCES.insert(connection, instance())
        journal.emit(connection, "instance", "requested", instance())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        database.write(fails)
    assert database.read(INSTANCES.list) == []
    assert database.read(journal.last_number) == 0


def test_events_have_numbers_without_gaps_in_the_order_of_commits(database: Database) -> None:
    row = instance()
    seen: list[int] = []
    done = threading.Event()

    def read() -> None:
        last = 0
        while not (done.is_set() and last == 80):
            events = database.read(lambda connection, last=last: journal.read(connection, last, 1000))  # type: ignore[misc]
            seen.extend(event.number for event in events)
            last = seen[-1] if seen else 0

    def write() -> None:
        for _ in range(20):
            database.write(lambda connection: journal.emit(connection, "instance", "active", row))

    reader = threading.Thread(target=read)
    reader.start()
    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    done.set()
    reader.join(60)
    assert seen == list(range(1, 81))


def test_two_processes_write_at_the_same_time(database: Database) -> None:
    program = """if True:
        import sys
        from cloudlet.store import journal
        from cloudlet.store.database import Database
        from tests.unit.store.test_database import instance
        database = Database(sys.argv[1])
        for _ in range(30):
            database.write(lambda connection: journal.emit(connection, "instance", "active", instance()))
    """
    url = database.engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-W", "ignore", "-c", program, url]
    root = Path(__file__).parents[3]
    processes = [subprocess.Popen(command, cwd=root) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    numbers = [event.number for event in database.read(lambda connection: journal.read(connection, 0, 1000))]
    assert numbers == list(range(1, 61))


def test_events_of_one_user_and_one_kind(database: Database) -> None:
    def write(connection: Connection) -> None:
        for user in ("u", "v"):
            row = instance(user_id=user)
            journal.emit(connection, "instance", "active", row)
            journal.emit(connection, "overlay", "active", row)

    database.write(write)
    found = database.read(
        lambda connection: journal.read(connection, 0, 10, project_id="p", user_id="v", kinds=("instance.",))
    )
    assert [(event.number, event.kind) for event in found] == [(3, "instance.active")]


def test_a_request_that_is_repeated_finds_what_it_made(database: Database) -> None:
    retry = Retry.of("u", "key", "instance.create", "{}")
    assert retries.known(database, retry) is None
    database.write(lambda connection: retries.remember(connection, retry, "made"))
    assert retries.known(database, retry) == "made"
    assert retries.known(database, Retry.of("v", "key", "instance.create", "{}")) is None
    with pytest.raises(ConflictError, match="another request"):
        retries.known(database, Retry.of("u", "key", "instance.create", '{"name":"x"}'))
    with pytest.raises(UsageError):
        Retry.of("u", "k" * 129, "instance.create", "{}")


@pytest.mark.parametrize("url", ["", "nonsense", "sqlite", "oracle://x", "postgres://u:secret@h/x"])
def test_what_is_no_url_of_a_database(url: str) -> None:
    with pytest.raises(UsageError):
        Database(url)


@pytest.mark.parametrize("url", ["u:secret@h/x", "postgresql://u:secret/more@h/x", "postgres://u:secret@h/x"])
def test_a_password_is_not_shown_with_a_url_that_is_wrong(url: str) -> None:
    with pytest.raises(UsageError) as raised:
        Database(url)
    assert "secret" not in str(raised.value)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(FailedError, match="cannot be reached"):
        Database("postgresql+psycopg2://x:y@127.0.0.1:1/z")


def test_a_copy_of_files_that_are_being_written_is_whole(tmp_path: Path) -> None:
    """What a backup takes while the process is stopped in the middle of a transaction."""
    database = Database(f"sqlite:///{tmp_path / 'site.sqlite'}")
    database.create()
    add(database, name="kept")
    copies = tmp_path / "copy"
    copies.mkdir()

    def copy_meanwhile(connection: Connection) -> None:
        for number in range(200):
            INSTANCES.insert(connection, instance(name=f"half {number}", metadata={"x": "y" * 1000}))
        for file in tmp_path.glob("site.sqlite*"):
            (copies / file.name).write_bytes(file.read_bytes())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        database.write(copy_meanwhile)
    database.close()
    copy = Database(f"sqlite:///{copies / 'site.sqlite'}")
    copy.create()
    assert [row.name for row in copy.read(INSTANCES.list)] == ["kept"]
    with copy.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
    copy.close()
