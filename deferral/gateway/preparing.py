"""The tables of a database: made, brought up to date, or only looked for."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, false, insert, inspect, select
from sqlalchemy.exc import DBAPIError, OperationalError

from deferral.errors import DataError
from deferral.gateway.database import check_file, reason_of, shared, shown
from deferral.gateway.dialects import alone
from deferral.gateway.migrations import migrate
from deferral.gateway.schema import VERSION, decisions, tables, version

__all__ = ["look", "prepare"]

_TRIES = 10


def prepare(engine: Engine, *, create: bool = True) -> None:
    """Make the tables, or bring those of an older version up to date; DataError where this is no database, or a newer one.

    Whoever comes first does it, the others wait.  Without `create` there must be a database, so that a misspelt path is an
    error and not an empty answer.
    """
    name = shown(engine)
    if engine.dialect.name == "sqlite":
        check_file(Path(str(engine.url.database)), create)
    for tries_left in reversed(range(_TRIES)):
        try:
            found = _found(engine)
            if found < VERSION:
                found = _brought_up(engine)
            break
        except DBAPIError as error:
            # Another process may just be giving a new SQLite file its write-ahead log.
            if not tries_left or (shared(engine) and isinstance(error, OperationalError)):
                raise DataError(f"{name}: the database cannot be opened, {reason_of(error)}") from error
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
        raise DataError(f"{name}: the database cannot be used, {reason_of(error)}") from error
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
