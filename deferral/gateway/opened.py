"""What several commands are given: the database and the encoder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from sqlalchemy.exc import SQLAlchemyError

from deferral.errors import DataError
from deferral.gateway.keys import Keys
from deferral.gateway.preparing import prepare
from deferral.gateway.settings import Settings

__all__ = ["database_option", "encoder_option", "opened"]

database_option = click.option(
    "--database",
    default=Settings.database,
    show_default=True,
    envvar="DEFERRAL_DATABASE",
    help="For keys and the record: the path of an SQLite file, or an SQLAlchemy URL.",
)

encoder_option = click.option(
    "--encoder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the sentence encoder that the router was fitted with, if it was.",
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
