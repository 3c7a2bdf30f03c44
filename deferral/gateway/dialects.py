"""Transactions and statements that SQLite and PostgreSQL have each in its own way."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from sqlalchemy import Column, Connection, Dialect, Insert, Table, insert
from sqlalchemy.dialects import postgresql, sqlite

__all__ = ["adding", "alone", "clock", "delete_among", "if_alone", "insert_rows", "replacing", "writing"]


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


@cache
def _insert(table: Table, dialect: Dialect) -> str:
    if dialect.positional:
        return str(insert(table).compile(dialect=dialect))
    columns = ", ".join(dialect.identifier_preparer.format_column(column) for column in table.c)
    return f"INSERT INTO {table.name} ({columns}) VALUES ({', '.join(['%s'] * len(table.c))})"


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
