"""A copy of a database that gateways write to."""

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from deferral.errors import DataError
from deferral.gateway.database import check_file, reason_of, shared

__all__ = ["copy"]


def copy(engine: Engine, path: Path) -> None:
    """Copy an SQLite file, as it is at one moment, whoever writes meanwhile and whatever the version of its tables.

    DataError where it cannot be read, or the copy not be written, or would replace a file.  An interrupted one leaves none.
    """
    if shared(engine):
        raise ValueError("a PostgreSQL database is copied by its own means: pg_dump --format custom --file FILE URL")
    check_file(Path(str(engine.url.database)), create=False)
    if path.exists():
        raise DataError(f"{path}: there is a file already; expected the name of a new one")
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        check_file(partial, create=True)
        with engine.connect() as connection, closing(sqlite3.connect(partial)) as target:
            connection.connection.driver_connection.backup(target)  # type: ignore[union-attr]
            # With a write-ahead log, two more files would appear beside the copy as soon as somebody opens it.
            target.execute("PRAGMA journal_mode = DELETE")
        os.replace(partial, path)
    except (sqlite3.Error, DBAPIError, OSError) as error:
        raise DataError(f"{path}: the copy cannot be made, {reason_of(error)}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
