"""A database for the tables of the gateway: where it is, how its connections are set, and how they end."""

import os
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError, SQLAlchemyError

from deferral.errors import DataError, installing

__all__ = [
    "LOCK_S",
    "STATEMENT_S",
    "Replaced",
    "check_file",
    "connect",
    "durable",
    "file_of",
    "hang_up",
    "reason_of",
    "scrub",
    "shared",
    "shown",
    "still_there",
    "wait_for",
]

_BUSY_MS = 5000
# A peer that has vanished without a word is given up within half a minute; systems by themselves wait 15 minutes, or hours.
_PATIENCE = {
    "connect_timeout": 5,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
# The same from the server's side: else the locks of a machine that has lost its power would keep all others waiting.
_SESSION = {
    "idle_in_transaction_session_timeout": "60s",
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}


# The longest that a gateway waits for a lock, and for a statement: whoever locks a table must not stop it.
LOCK_S, STATEMENT_S = 3.0, 10.0
# The open connections of each PostgreSQL engine: a statement without an answer can be ended only from another thread.
_opened: WeakKeyDictionary[Engine, WeakSet[Any]] = WeakKeyDictionary()


class Replaced(SQLAlchemyError):
    """The file of the database is gone, or another has its name: what is written to it nobody would find."""


def connect(url: str, *, lock_s: float = 0.0, statement_s: float = 0.0) -> Engine:
    """The database of an SQLAlchemy URL, or of the path of an SQLite file; nothing is opened yet.

    On PostgreSQL a statement fails that waits longer than `lock_s` for a lock, or takes longer than `statement_s`; 0: never.
    """
    expected = "the path of a file or an SQLAlchemy URL such as sqlite:///gateway.db or postgresql+psycopg://user@host/name"
    if "://" in url and url.count("@") > 1:
        # All that follows the first @, the end of a password too, would be taken for the host, and named in errors.
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


def reason_of(error: Exception) -> str:
    """Why the database fails; its first line alone, since others may quote what was to be written."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return f"{type(cause).__name__}: {cause}".splitlines()[0]


def shown(engine: Engine) -> str:
    """Its address for messages, without passwords."""
    url = engine.url
    hidden = {name: "***" for name in url.query if "pass" in name.lower()}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def shared(engine: Engine) -> bool:
    """True for a server database, which several machines may use."""
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
        # By a copy of the descriptor: the driver's own must not be closed under it.
        with suppress(OSError, connection.Error), socket.socket(fileno=os.dup(connection.fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)


def durable(connection: Connection, wanted: bool) -> None:
    """Whether commits to come survive a power failure, or only the end of the process.  Not inside a transaction."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if wanted else 'NORMAL'}")


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


def check_file(path: Path, create: bool) -> None:
    """DataError where there is no such SQLite file, or no folder to make one in."""
    if not path.parent.is_dir():
        raise DataError(f"{path}: expected the folder {path.parent} to be there; create it first")
    if not create and not path.is_file():
        message = "expected the one that the gateway writes; --database or DEFERRAL_DATABASE names it"
        raise DataError(f"{path}: there is no database; {message}")
    # Readable by its owner alone: it holds who asked what.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
