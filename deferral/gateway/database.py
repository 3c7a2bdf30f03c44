"""A database for the tables of the gateway.  What only SQLite or only PostgreSQL understands is in this file."""

import json
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Column, Connection, Dialect, Engine, Insert, Table, create_engine, event, false, insert, inspect, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError, SQLAlchemyError

from deferral.errors import DataError, installing
from deferral.gateway.migrations import migrate
from deferral.gateway.schema import VERSION, decisions, tables, version

__all__ = [
    "LOCK_S",
    "STATEMENT_S",
    "Replaced",
    "adding",
    "alone",
    "clock",
    "connect",
    "copy",
    "delete_among",
    "durable",
    "file_of",
    "hang_up",
    "if_alone",
    "insert_rows",
    "look",
    "prepare",
    "replacing",
    "scrub",
    "shared",
    "shown",
    "still_there",
    "wait_for",
    "writing",
]

_BUSY_MS = 5000
_TRIES = 10
# A peer that has vanished without a word is given up within half a minute; systems by themselves wait 15 minutes, or hours.
_PATIENCE = {
    "connect_timeout": 5,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
# The same from the server's side: what a machine had locked that lost its power would be locked for all others.
_SESSION = {
    "idle_in_transaction_session_timeout": "60s",
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}


# What a server gives a lock, and a statement that somebody waits for: who locks a table must not stop it.
LOCK_S, STATEMENT_S = 3.0, 10.0
# Of PostgreSQL, those that are open: a statement without an answer can be ended only from outside of its thread.
_opened: WeakKeyDictionary[Engine, WeakSet[Any]] = WeakKeyDictionary()


class Replaced(SQLAlchemyError):
    """The file of the database is gone, or another has its name: what is written to it nobody would find."""


def connect(url: str, *, lock_s: float = 0.0, statement_s: float = 0.0) -> Engine:
    """The database of an SQLAlchemy URL, or of the path of an SQLite file; nothing is opened yet.

    On PostgreSQL a statement fails that waits longer than `lock_s` for a lock, or takes longer than `statement_s`; 0: never.
    """
    expected = "the path of a file or an SQLAlchemy URL such as sqlite:///gateway.db or postgresql+psycopg://user@host/name"
    if "://" in url and url.count("@") > 1:
        # What follows the first would be taken for a host, and named by whoever cannot find it.
        raise ValueError(f"database: expected {expected}; a @ in a name or password is written %40")
    try:
        parsed = make_url(url if "://" in url else f"sqlite:///{url}")
    except (ArgumentError, ValueError):
        # The URL itself may hold a password.
        raise ValueError(f"database: expected {expected}; got another") from None
    try:
        backend = parsed.get_backend_name()
        if backend == "postgresql":
            if parsed.drivername == "postgresql":
                parsed = parsed.set(drivername="postgresql+psycopg")
            waits = {name: value for name, value in _PATIENCE.items() if name not in parsed.query}
            engine = create_engine(parsed, pool_pre_ping=True, max_overflow=5, hide_parameters=True, connect_args=waits)
            limits = {"lock_timeout": f"{1000 * lock_s:.0f}", "statement_timeout": f"{1000 * statement_s:.0f}"}
            opened = _opened[engine] = WeakSet()

            def begin(connection: Any, _: object) -> None:
                opened.add(connection)
                _set_session(connection, _SESSION | limits)

            event.listen(engine, "connect", begin)
            return engine
        if backend != "sqlite":
            raise ValueError(f"database: expected {expected}; {backend} is neither")
        if parsed.database in (None, "", ":memory:") or str(parsed.database).startswith("file:"):
            raise ValueError(f"database: expected the path of a file, got {parsed.database!r}; what is in memory is lost")
        # What clients asked must not get into messages of errors.
        engine = create_engine(parsed, hide_parameters=True)
    except ModuleNotFoundError as error:
        raise ValueError(f"database: {error}; PostgreSQL needs {installing('postgres')}") from None
    except (ArgumentError, NoSuchModuleError):
        raise ValueError(f"database: expected {expected}; got another") from None
    event.listen(engine, "connect", _set_pragmas)
    return engine


def shown(engine: Engine) -> str:
    """Its address for messages, without passwords."""
    url = engine.url
    hidden = {name: "***" for name in url.query if "pass" in name.lower()}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def shared(engine: Engine) -> bool:
    """Whether gateways on other machines may have the same database."""
    return engine.dialect.name != "sqlite"


def file_of(engine: Engine) -> tuple[int, int] | None:
    """What tells an SQLite file from any other; None where there is none, or the database is no file."""
    if shared(engine):
        return None
    try:
        status = os.stat(str(engine.url.database))
    except OSError:
        return None
    return status.st_dev, status.st_ino


def still_there(engine: Engine, file: tuple[int, int] | None) -> None:
    """Replaced where the database has another `file_of` it than this."""
    if file_of(engine) != file:
        raise Replaced(f"{shown(engine)}: the file is gone, or is another; put it back, or start the gateway again")


def wait_for(thread: threading.Thread, engine: Engine, seconds: float) -> bool:
    """Wait for the end of a thread that uses a database; what keeps it there for longer fails.  -> whether it has ended"""
    thread.join(seconds)
    if thread.is_alive():
        hang_up(engine)
        thread.join(seconds)
    return not thread.is_alive()


def hang_up(engine: Engine) -> None:
    """End what PostgreSQL has not answered yet: whoever waits for that gets an error."""
    for connection in list(_opened.get(engine, ())):
        # By a copy: what it is to the driver must not be closed under it.
        with suppress(OSError, connection.Error), socket.socket(fileno=os.dup(connection.fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)


def prepare(engine: Engine, *, create: bool = True) -> None:
    """Make the tables, or bring those of an older version up to date; DataError where this is no database, or a newer one.

    Whoever comes first does it, the others wait.  Without `create` there must be a database, so that a misspelt path is an
    error and not an empty answer.
    """
    name = shown(engine)
    if engine.dialect.name == "sqlite":
        _check_file(Path(str(engine.url.database)), create)
    for tries_left in reversed(range(_TRIES)):
        try:
            found = _found(engine)
            if found < VERSION:
                found = _brought_up(engine)
            break
        except DBAPIError as error:
            # An SQLite file may be in the middle of becoming one with a journal.
            if not tries_left or (shared(engine) and isinstance(error, OperationalError)):
                raise DataError(f"{name}: the database cannot be opened, {error.orig}") from error
            time.sleep(0.02)
    if found > VERSION:
        raise _newer(name, found)


def look(engine: Engine) -> int:
    """The version of the tables, 0 where there are none; nothing is changed.

    DataError where this is no database, cannot be reached or cannot be written, or is of a newer version.
    """
    name = shown(engine)
    if engine.dialect.name == "sqlite":
        path = Path(str(engine.url.database))
        if not path.exists():
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise DataError(f"{path}: cannot be made, {path.parent} is no folder that may be written to; create it first")
            return 0
    try:
        found = _found(engine)
        with engine.connect() as connection, _for_nothing(connection):
            if found == 0:
                tables.create_all(connection)
            else:
                # Nothing, but whoever may only read is refused.
                nothing = select(decisions.c.id).where(false())
                connection.execute(insert(decisions).from_select(["id"], nothing, include_defaults=False))
    except DBAPIError as error:
        raise DataError(f"{name}: the database cannot be used, {error.orig}") from error
    if found > VERSION:
        raise _newer(name, found)
    return found


@contextmanager
def _for_nothing(connection: Connection) -> Iterator[None]:
    """A transaction that could write, and of which nothing stays."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.rollback()


def _newer(name: str, found: int) -> DataError:
    return DataError(f"{name}: expected tables of version {VERSION} or older, got {found}; use the deferral that wrote them")


def _found(engine: Engine) -> int:
    with engine.connect() as connection:
        return _version(connection)


def _version(connection: Connection) -> int:
    """0 where there are no tables yet."""
    if not inspect(connection).has_table(version.name):
        return 0
    return max(connection.execute(select(version.c.version)).scalars(), default=0)


def _brought_up(engine: Engine) -> int:
    with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            # It takes as long as it takes, and the others wait for it.
            connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        with alone(connection, "schema"):
            return _made(connection)


def _made(connection: Connection) -> int:
    """In a transaction that is alone.  -> the version of the tables"""
    found = _version(connection)
    if found == 0:
        if others := sorted(set(inspect(connection).get_table_names()) & set(tables.tables)):
            name = shown(connection.engine)
            raise DataError(f"{name}: expected an empty database or one of a gateway; it has another's table {others[0]}")
        tables.create_all(connection)
        connection.execute(insert(version).values(version=VERSION))
    elif found < VERSION:
        migrate(connection, found, VERSION)
    return max(found, VERSION)


@contextmanager
def writing(connection: Connection) -> Iterator[None]:
    """A transaction that will write.

    On SQLite it waits for its turn here: one that began by reading may find that it is too late to write.
    """
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.rollback()
        raise
    connection.commit()


@contextmanager
def alone(connection: Connection, name: str) -> Iterator[None]:
    """A transaction of which there is one at a time under this name, over all processes and machines."""
    with writing(connection):
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"deferral {name}",))
        yield


@contextmanager
def if_alone(connection: Connection, name: str) -> Iterator[bool]:
    """What `alone` does, but it does not wait for other machines.  -> whether this is the one; False: do nothing"""
    with writing(connection):
        mine = True
        if connection.dialect.name == "postgresql":
            lock = "SELECT pg_try_advisory_xact_lock(hashtextextended(%s, 0))"
            mine = bool(connection.exec_driver_sql(lock, (f"deferral {name}",)).scalar_one())
        yield mine


def clock(connection: Connection) -> float:
    """The time that all who share the database agree on, in seconds since 1970."""
    if connection.dialect.name == "postgresql":
        return float(connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())").scalar_one())
    return time.time()


def replacing(connection: Connection, table: Table) -> Insert:
    """An insert that replaces the row of the same primary key, if there is one."""
    made = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(table)
    others = {column.name: made.excluded[column.name] for column in table.c if not column.primary_key}
    return made.on_conflict_do_update(index_elements=list(table.primary_key.columns), set_=others)


def adding(connection: Connection, table: Table) -> Insert:
    """An insert that adds its numbers to those of the row of the same primary key, if there is one."""
    return _adding(connection.dialect.name, table)


@cache
def _adding(dialect: str, table: Table) -> Insert:
    made = (postgresql if dialect == "postgresql" else sqlite).insert(table)
    sums = {column.name: column + made.excluded[column.name] for column in table.c if not column.primary_key}
    return made.on_conflict_do_update(index_elements=list(table.primary_key.columns), set_=sums)


def insert_rows(connection: Connection, table: Table, rows: Sequence[tuple]) -> None:
    """Insert rows, each with all columns of the table in order."""
    if rows:
        # SQLAlchemy looks at every value of every row; a driver that takes tuples needs none of it.
        connection.exec_driver_sql(_insert(table, connection.dialect), list(rows))


def delete_among(connection: Connection, column: Column[str], values: Sequence[str]) -> int:
    """Delete the rows of the column's table whose value is one of these.  -> how many"""
    name = column.table.name
    # One parameter: SQLAlchemy would look at each value, on the time of the requests.
    if connection.dialect.name == "postgresql":
        found = connection.exec_driver_sql(f"DELETE FROM {name} WHERE {column.name} = ANY(%s)", (list(values),))
    else:
        listed = f"DELETE FROM {name} WHERE {column.name} IN (SELECT value FROM json_each(?))"
        found = connection.exec_driver_sql(listed, (json.dumps(values),))
    return found.rowcount


def durable(connection: Connection, wanted: bool) -> None:
    """Whether commits to come survive a power failure, or only the end of the process.  Not inside a transaction."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if wanted else 'NORMAL'}")


def copy(engine: Engine, path: Path) -> None:
    """Copy an SQLite file, as it is at one moment, whoever writes meanwhile and whatever the version of its tables.

    DataError where it cannot be read, or the copy not be written, or would replace a file.  An interrupted one leaves none.
    """
    if shared(engine):
        raise ValueError("a PostgreSQL database is copied by its own means: pg_dump --format custom --file FILE URL")
    _check_file(Path(str(engine.url.database)), create=False)
    if path.exists():
        raise DataError(f"{path}: there is a file already; expected the name of a new one")
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        _check_file(partial, create=True)
        with engine.connect() as connection, closing(sqlite3.connect(partial)) as target:
            connection.connection.driver_connection.backup(target)  # type: ignore[union-attr]
            # Else two more files would lie beside it as soon as somebody looks into it.
            target.execute("PRAGMA journal_mode = DELETE")
        os.replace(partial, path)
    except (sqlite3.Error, DBAPIError, OSError) as error:
        raise DataError(f"{path}: the copy cannot be made, {getattr(error, 'orig', None) or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def scrub(connection: Connection) -> bool:
    """Deleted text leaves the journal as well.  False where a reader still needs it: try again later."""
    if connection.dialect.name != "sqlite":
        return True
    # It must not wait for readers: rows are waiting for the writer.
    connection.exec_driver_sql("PRAGMA busy_timeout = 0")
    try:
        return connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()[0][0] == 0
    except OperationalError:
        return False
    finally:
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {_BUSY_MS}")


@cache
def _insert(table: Table, dialect: Dialect) -> str:
    if dialect.positional:
        return str(insert(table).compile(dialect=dialect))
    columns = ", ".join(dialect.identifier_preparer.format_column(column) for column in table.c)
    return f"INSERT INTO {table.name} ({columns}) VALUES ({', '.join(['%s'] * len(table.c))})"


def _set_pragmas(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    # secure_delete overwrites deleted rows: text whose time is over must not be found in free pages.
    for pragma in (f"busy_timeout = {_BUSY_MS}", "journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _set_session(connection: Any, wanted: Mapping[str, str]) -> None:
    settings = ", ".join(f"set_config('{name}', '{value}', false)" for name, value in wanted.items())
    connection.execute(f"SELECT {settings}")
    connection.commit()


def _check_file(path: Path, create: bool) -> None:
    if not path.parent.is_dir():
        raise DataError(f"{path}: expected the folder {path.parent} to be there; create it first")
    if not create and not path.is_file():
        raise DataError(f"{path}: there is no database; expected the one that the gateway writes")
    # Readable by its owner alone: it holds who asked what.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
