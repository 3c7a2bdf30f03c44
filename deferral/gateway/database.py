"""The tables of the gateway, and a database to hold them.  What only SQLite understands is in this file."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Dialect,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    select,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

from deferral.errors import DataError

__all__ = ["VERSION", "connect", "decisions", "durable", "feedback", "forget", "insert_rows", "keys", "prepare", "texts"]

VERSION = 1
_BUSY_MS = 5000
_TRIES = 10

tables = MetaData()
decisions = Table(
    "decisions",
    tables,
    Column("id", String(64), primary_key=True),
    Column("reply_id", String(200), nullable=False),  # the id inside the upstream's reply
    Column("time", Float(53), nullable=False),
    Column("key", String(64), nullable=False),
    Column("requested", String(200), nullable=False),
    Column("expert", String(200), nullable=False),
    Column("chosen", String(200), nullable=False),
    Column("reason", Text, nullable=False),
    Column("propensity", Float(53)),
    Column("expected", Text, nullable=False),  # JSON: expert -> [quality, price, cost], cost null where it may not be asked
    Column("price_of_error", Float(53)),
    Column("best_price", Float(53)),
    Column("price", Float(53), nullable=False),
    Column("estimated", Boolean, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("first_byte_s", Float(53)),
    Column("latency_s", Float(53)),
    Column("status", Integer, nullable=False),
    Column("outcome", String(20), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("streamed", Boolean, nullable=False),
    Column("fast_path", Boolean, nullable=False),
    Index("decisions_by_time", "time"),
    Index("decisions_by_key", "key", "time", "price"),
    Index("decisions_by_reply", "reply_id", "key"),
)
feedback = Table(
    "feedback",
    tables,
    Column("decision", String(64), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("quality", Float(53), nullable=False),
    Column("time", Float(53), nullable=False),
    Index("feedback_by_time", "time"),
)
texts = Table(
    "texts",
    tables,
    Column("decision", String(64), primary_key=True),
    Column("query", Text, nullable=False),
    Column("time", Float(53), nullable=False),
    Column("expires", Float(53), nullable=False),
    Index("texts_by_expiry", "expires"),
    Index("texts_by_time", "time"),
)
keys = Table(
    "keys",
    tables,
    Column("id", String(64), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("experts", Text),  # JSON: names; null is all
    Column("requests_per_minute", Integer),
    Column("budget", Float(53)),
    Column("window", String(20), nullable=False),
    Column("zone", String(64), nullable=False),
    Column("admin", Boolean, nullable=False),
    Column("created", Float(53), nullable=False),
    Column("revoked", Float(53)),
)
version = Table("schema_version", tables, Column("version", Integer, primary_key=True, autoincrement=False))


def connect(url: str) -> Engine:
    """The database of an SQLAlchemy URL, or of the path of an SQLite file; nothing is opened yet."""
    try:
        parsed = make_url(url if "://" in url else f"sqlite:///{url}")
        if parsed.get_backend_name() != "sqlite":
            return create_engine(parsed, pool_pre_ping=True, hide_parameters=True)
        if parsed.database in (None, "", ":memory:") or str(parsed.database).startswith("file:"):
            raise ValueError(f"database: expected the path of a file, got {parsed.database!r}; what is in memory is lost")
        # What clients asked must not get into messages of errors.
        engine = create_engine(parsed, hide_parameters=True)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        # The URL itself may hold a password.
        raise ValueError(
            "database: expected the path of a file or an SQLAlchemy URL such as sqlite:///gateway.db or "
            f"postgresql+psycopg://user@host/name; {error if isinstance(error, ModuleNotFoundError) else 'got another'}"
        ) from None
    event.listen(engine, "connect", _set_pragmas)
    return engine


def prepare(engine: Engine, *, create: bool = True) -> None:
    """Create the tables that are missing; DataError where this is no database, or one of another version.

    Without `create` there must be a database, so that a misspelt path is an error and not an empty answer.
    """
    name = engine.url.render_as_string(hide_password=True)
    if engine.dialect.name == "sqlite":
        _check_file(Path(str(engine.url.database)), create)
    for tries_left in reversed(range(_TRIES)):
        try:
            found = _created(engine)
            break
        except DBAPIError as error:
            # Another process may be creating the same tables; whoever was late finds them soon.
            if not tries_left:
                raise DataError(f"{name}: the database cannot be opened, {error.orig}") from error
            time.sleep(0.02)
    if found != VERSION:
        raise DataError(f"{name}: expected tables of version {VERSION}, got {found}; use the deferral that wrote them")


def _created(engine: Engine) -> int:
    with engine.begin() as connection:
        version.create(connection, checkfirst=True)
        found = connection.execute(select(version.c.version)).scalars().all()
        if found and max(found) != VERSION:
            return max(found)
        tables.create_all(connection)
        if not found:
            connection.execute(insert(version).values(version=VERSION))
    return VERSION


def insert_rows(connection: Connection, table: Table, rows: Sequence[tuple]) -> None:
    """Insert rows, each with all columns of the table in order."""
    if not rows:
        return
    if connection.dialect.positional:
        # SQLAlchemy looks at every value of every row; a driver that takes tuples needs none of it.
        connection.exec_driver_sql(_insert(table, connection.dialect), list(rows))
    else:
        names = table.c.keys()
        connection.execute(insert(table), [dict(zip(names, row, strict=True)) for row in rows])


def durable(connection: Connection, wanted: bool) -> None:
    """Whether commits to come survive a power failure, or only the end of the process.  Not inside a transaction."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if wanted else 'NORMAL'}")


def forget(connection: Connection) -> bool:
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
    return str(insert(table).compile(dialect=dialect))


def _set_pragmas(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    # secure_delete overwrites deleted rows: text whose time is over must not be found in free pages.
    for pragma in (f"busy_timeout = {_BUSY_MS}", "journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _check_file(path: Path, create: bool) -> None:
    if not path.parent.is_dir():
        raise DataError(f"{path}: expected the folder {path.parent} to be there; create it first")
    if not create and not path.is_file():
        raise DataError(f"{path}: there is no database; expected the one that the gateway writes")
    # Readable by its owner alone: it holds who asked what.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
