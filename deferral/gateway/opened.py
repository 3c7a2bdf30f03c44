"""The database of a command: the option that names it, and what is in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import click
from sqlalchemy.exc import SQLAlchemyError

from deferral.errors import DataError
from deferral.gateway.database import prepare
from deferral.gateway.keys import Keys

__all__ = ["database_option", "opened"]

database_option = click.option(
    "--database",
    default="sqlite:///deferral-gateway.db",
    show_default=True,
    envvar="DEFERRAL_DATABASE",
    help="The gateway's database: the path of an SQLite file, or an SQLAlchemy URL.",
)


@contextmanager
def opened(database: str, *, create: bool = False) -> Iterator[Keys]:
    """The keys of a database, and with them its engine."""
    try:
        store = Keys(database)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--database") from None
    try:
        prepare(store.engine, create=create)
        store.refresh()
        yield store
    except SQLAlchemyError as error:
        raise DataError(f"the database fails: {getattr(error, 'orig', None) or error}") from error
    finally:
        store.close()
