"""What several commands are given: the database, the encoder, and what answers are worth that nobody judged."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from sqlalchemy.exc import SQLAlchemyError

from deferral.command_line import FiniteRange
from deferral.errors import DataError
from deferral.gateway.database import reason_of
from deferral.gateway.keys import Keys
from deferral.gateway.preparing import prepare
from deferral.gateway.settings import Settings

__all__ = ["assumed_option", "database_option", "encoder_option", "opened"]

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

assumed_option = click.option(
    "--assume-quality",
    type=FiniteRange(0, 1),
    help="Quality to assume for answers that nobody judged.  [default: they are left out]",
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
        raise DataError(f"the database fails: {reason_of(error)}") from error
    finally:
        store.close()
