"""One schema on both databases, and the way to it from an older one."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, Table, insert, inspect, select
from sqlalchemy.exc import DBAPIError

from deferral.cli import main
from deferral.errors import DataError
from deferral.gateway import database as module
from deferral.gateway import preparing
from deferral.gateway.backup import copy
from deferral.gateway.database import connect, shown
from deferral.gateway.dialects import alone, clock, writing
from deferral.gateway.keys import Keys
from deferral.gateway.migrations import migrate
from deferral.gateway.preparing import prepare
from deferral.gateway.record import Record
from deferral.gateway.schema import (
    VERSION,
    alarms,
    decisions,
    feedback,
    forgotten,
    grants,
    keys,
    looks,
    minutes,
    notices,
    reloads,
    shadows,
    texts,
    version,
)  # fmt: skip

FIRST = (Path(__file__).parent / "gateway_version_1.sql").read_text(encoding="utf-8")


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    made = connect(database)
    yield made
    made.dispose()


@pytest.fixture
def first_version(engine: Engine) -> Engine:
    """Rows in the tables of version 1."""
    with engine.begin() as connection:
        for statement in FIRST.strip().removesuffix(";").split(";\n"):
            connection.exec_driver_sql(statement)
    return engine


def shape(engine: Engine) -> dict:
    look = inspect(engine)
    return {
        name: (
            [(column["name"], column["nullable"]) for column in look.get_columns(name)],
            look.get_pk_constraint(name)["constrained_columns"],
            sorted((index["name"], index["column_names"]) for index in look.get_indexes(name)),
        )
        for name in look.get_table_names()
    }


def rows(engine: Engine, *tables: Table) -> dict[str, list]:
    """All that version 1 knew of some tables."""
    found = {}
    with engine.connect() as connection:
        for table in tables or (decisions, feedback, keys, texts):
            columns = [column for column in table.c if column.name not in ("kind", "draw", "former", "former_until", "ends")]
            found[table.name] = connection.execute(select(*columns).order_by(*table.primary_key)).all()
    return found


def test_an_older_database_comes_to_what_a_new_one_is_and_keeps_its_rows(first_version: Engine, tmp_path: Path) -> None:
    before = rows(first_version)
    assert [len(found) for found in before.values()] == [2, 1, 1, 1]
    prepare(first_version)
    assert rows(first_version) == before
    new = connect(str(tmp_path / "new.db"))
    prepare(new)
    assert shape(first_version) == shape(new)
    with first_version.connect() as connection:
        assert connection.execute(select(version.c.version)).scalars().all() == [VERSION]
    prepare(first_version)
    new.dispose()


def test_version_2_with_rows_comes_to_the_version_of_today(first_version: Engine) -> None:
    given = {
        minutes: {column.name: 1.0 for column in minutes.c} | {"expert": "small"},
        forgotten: {"key": "k", "time": 900.0, "price": 0.5},
        grants: {"key": "k", "start": 0.0, "worker": "w", "granted": 1.0, "spent": 0.5, "seen": 5.0},
        reloads: {"id": 1, "count": 7},
    }
    with first_version.begin() as connection:
        migrate(connection, 1, 2)
        connection.execute(minutes.delete())
        for table, values in given.items():
            connection.execute(insert(table).values(values))
    tables = (decisions, feedback, keys, texts, *given)
    before = rows(first_version, *tables)
    assert [len(found) for found in before.values()] == [2, 1, 1, 1, *[1] * len(given)]
    prepare(first_version)
    assert rows(first_version, *tables) == before
    with first_version.connect() as connection:
        assert connection.execute(select(version.c.version)).scalars().all() == [VERSION]
        assert connection.execute(select(decisions.c.kind)).scalars().all() == [None, None]
        assert connection.execute(select(decisions.c.draw)).scalars().all() == [None, None]
        assert connection.execute(select(keys.c.former, keys.c.former_until, keys.c.ends)).all() == [(None, None, None)]
        for table in (alarms, looks, notices, shadows):
            assert connection.execute(select(table)).all() == []


def test_a_gateway_that_opens_an_older_database_goes_on_where_it_was(first_version: Engine, database: str) -> None:
    record, store = Record(database), Keys(database)
    record.start()
    store.start()
    assert record.spent("k", 1001.0) == 0.5
    [key] = store
    assert (key.name, key.budget) == ("bob", 1.0)
    store.close()
    record.stop()


def test_many_who_open_an_older_database_at_once_bring_it_up_once(
    first_version: Engine, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    engines, faults = [connect(database) for _ in range(5)], []

    def open_it(engine: Engine) -> None:
        try:
            prepare(engine)
        except Exception as fault:
            faults.append(fault)

    threads = [threading.Thread(target=open_it, args=[engine]) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert sum(f"the database goes to version {VERSION}" in line.message for line in caplog.records) == 1
    for engine in engines:
        engine.dispose()


def test_a_step_that_fails_leaves_the_database_as_it_was(first_version: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    before, fault = shape(first_version), RuntimeError("no more")

    def half(*arguments) -> None:
        whole(*arguments)
        raise fault

    whole = preparing.migrate
    monkeypatch.setattr(preparing, "migrate", half)
    with pytest.raises(RuntimeError, match="no more"):
        prepare(first_version)
    assert shape(first_version) == before
    monkeypatch.undo()
    prepare(first_version)
    assert shape(first_version) != before


def test_a_newer_database_is_refused_and_not_touched(first_version: Engine) -> None:
    with first_version.begin() as connection:
        connection.exec_driver_sql(f"UPDATE schema_version SET version = {VERSION + 1}")
    before = shape(first_version)
    with pytest.raises(DataError, match=f"expected tables of version {VERSION} or older, got {VERSION + 1}"):
        prepare(first_version)
    assert shape(first_version) == before


def test_a_database_of_others_is_refused_and_not_touched(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE keys (door INTEGER)")
    with pytest.raises(DataError, match="expected an empty database or one of a gateway; it has another's table keys"):
        prepare(engine)
    assert inspect(engine).get_table_names() == ["keys"]


def test_what_a_vanished_machine_has_locked_is_free_again(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not database.startswith("postgresql"):
        pytest.skip("an SQLite file is locked by processes of one machine, which sees them end")
    monkeypatch.setitem(module._SESSION, "idle_in_transaction_session_timeout", "100ms")
    engines = [connect(database) for _ in range(2)]
    with engines[0].connect() as vanished, engines[1].connect() as other:
        given = {"tcp_user_timeout": "20000", "keepalives_idle": "15"}
        assert given.items() <= vanished.connection.driver_connection.info.get_parameters().items()  # type: ignore[union-attr]
        held = alone(vanished, "budget k")
        held.__enter__()
        with alone(other, "budget k"):
            pass
        assert vanished.connection.driver_connection is not None
        with pytest.raises(DBAPIError):
            held.__exit__(None, None, None)
        vanished.invalidate()
    for engine in engines:
        engine.dispose()


def test_a_copy_is_whole_while_others_write_and_of_the_version_that_it_was(tmp_path: Path) -> None:
    engine = connect(str(tmp_path / "gateway.db"))
    with engine.begin() as connection:
        for statement in FIRST.strip().removesuffix(";").split(";\n"):
            connection.exec_driver_sql(statement)
    target = tmp_path / "copy.db"
    with engine.connect() as connection, writing(connection):
        connection.execute(decisions.delete())
        main(["gateway", "backup", str(target), "--database", str(tmp_path / "gateway.db")])
        connection.rollback()
        connection.exec_driver_sql("BEGIN")
    copied = connect(str(target))
    assert rows(copied) == rows(engine)
    assert sorted(path.name for path in tmp_path.iterdir() if "copy" in path.name and "-" not in path.name) == ["copy.db"]
    assert target.stat().st_mode & 0o777 == 0o600
    with pytest.raises(DataError, match="there is a file already"):
        copy(engine, target)
    with pytest.raises(DataError, match="there is no database"):
        copy(connect(str(tmp_path / "none.db")), tmp_path / "other.db")
    with pytest.raises(DataError, match="create it first"):
        copy(engine, tmp_path / "nowhere" / "other.db")
    (tmp_path / "notes.txt").write_text("no database " * 100)
    with pytest.raises(DataError, match="the copy cannot be made, DatabaseError: file is not a database"):
        copy(connect(str(tmp_path / "notes.txt")), tmp_path / "other.db")
    assert not list(tmp_path.glob("*other.db*"))
    with pytest.raises(ValueError, match="pg_dump"):
        copy(connect("postgresql://u:secret@127.0.0.1:1/d"), tmp_path / "other.db")
    copied.dispose()
    engine.dispose()


def test_under_one_name_there_is_one_transaction_at_a_time(engine: Engine) -> None:
    prepare(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE counter (n INTEGER)")
        connection.exec_driver_sql("INSERT INTO counter VALUES (0)")

    def count() -> None:
        for _ in range(20):
            with engine.connect() as connection, alone(connection, "counter"):
                n = connection.exec_driver_sql("SELECT n FROM counter").scalar_one()
                connection.exec_driver_sql(f"UPDATE counter SET n = {n + 1}")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT n FROM counter").scalar_one() == 80
        assert clock(connection) > 1.7e9


def test_what_cannot_be_a_database_is_refused_by_what_it_is() -> None:
    for url, words in {
        "mysql+pymysql://u:secret@h/d": "mysql is neither",
        "nonsense://u:secret@h": "nonsense is neither",
        "://": "got another",
        "sqlite://": "what is in memory is lost",
    }.items():
        with pytest.raises(ValueError, match=words) as refused:
            connect(url)
        assert "secret" not in str(refused.value)
    with pytest.raises(DataError, match="cannot be opened") as closed:
        prepare(connect("postgresql://u:secret@127.0.0.1:1/d"))
    assert "secret" not in str(closed.value)


def test_no_password_stands_in_a_message() -> None:
    for url in (
        "postgresql+psycopg://me:hush-hush@127.0.0.1:1/gateway",
        "postgresql+psycopg://me@127.0.0.1:1/gateway?password=hush-hush&sslpassword=hush-hush&application_name=gateway",
    ):
        engine = connect(url)
        assert "hush-hush" not in shown(engine)
        assert shown(engine).startswith("postgresql+psycopg://me")
        with pytest.raises(DataError) as refused:
            prepare(engine)
        assert "hush-hush" not in str(refused.value)
        engine.dispose()
    # The @ of the password was taken for the one before the host.
    for password in ("hush@hush-hush", "hush@hush/hush-hush", "hush@hush:hush-hush", "hush@hush?hush-hush"):
        with pytest.raises(ValueError, match="written %40") as refused:
            connect(f"postgresql+psycopg://me:{password}@127.0.0.1/gateway")
        assert "hush-hush" not in str(refused.value)
