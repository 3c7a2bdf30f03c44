"""The commands that take from the record: decisions deleted, the database copied, the router's log written."""

import sys
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console

from deferral.command_line import Command, callers_errors
from deferral.errors import DataError
from deferral.gateway.keys import PREFIX
from deferral.gateway.opened import assumed_option, database_option, opened

__all__ = ["backup", "export", "forget"]


@click.command(cls=Command)
@click.option("--key", help="Everything on record for this key, given by its id or its displayed prefix.")
@click.option("--response", help="One response, given by its x-deferral-id or the reply's own id.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
@database_option
def forget(key: str | None, response: str | None, yes: bool, database: str) -> None:
    """Delete decisions, judgements and texts from the record; what they cost still counts towards the key's budget."""
    from deferral.gateway.forgetting import forget as delete
    from deferral.gateway.forgetting import on_record

    if (key is None) == (response is None):
        raise click.UsageError("expected either --key or --response")
    identity = None if key is None else key.removeprefix(PREFIX)
    if not (identity or response):
        raise click.UsageError("expected the id of a key or of a response, got an empty one")
    with opened(database) as store:
        issued = [] if identity is None else [one.key for one in store.list()]
        named = [] if identity in [one.id for one in issued] else [one.id for one in issued if one.name == key]
        if named:
            why = f"is the name of a key; expected its id, {' or '.join(named)}"
            raise click.BadParameter(f"{key!r} {why}; see `deferral gateway keys list`", param_hint="--key")
        try:
            count = on_record(store.engine, key=identity, response=response)
            if not count:
                raise DataError(
                    f"nothing is on record for {key or response!r}; a new answer is recorded a moment after it is given"
                )
            if not (
                yes or click.confirm(f"Delete {count} decisions and everything that belongs to them?  This cannot be undone.")
            ):
                click.echo("nothing was deleted", err=True)
                sys.exit(1)
            with Console(stderr=True).status("deleting") as shown:
                gone = delete(store.engine, key=identity, response=response, progress=lambda so_far: shown.update(str(so_far)))
        except DataError:
            raise
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--response") from None
    click.echo(gone)


@click.command(cls=Command)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@database_option
def backup(file: Path, database: str) -> None:
    """Copy an SQLite database to FILE, even while gateways write to it.

    Use pg_dump to copy a PostgreSQL database.
    """
    from deferral.gateway.backup import copy
    from deferral.gateway.database import connect

    with callers_errors(click.UsageError):
        # It may be of an older version, and stays so.
        engine = connect(database)
        with Console(stderr=True).status("copying"):
            copy(engine, file)
        engine.dispose()
    click.echo(f"wrote {file}")


@click.command(cls=Command)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--since", type=click.DateTime(), help="Only requests that arrived at this time (UTC) or later.")
@click.option("--until", type=click.DateTime(), help="Only requests that arrived before this time (UTC).")
@click.option("--replace", is_flag=True, help="Overwrite FILE if it exists.")
@assumed_option
@database_option
def export(
    file: Path, since: datetime | None, until: datetime | None, replace: bool, assume_quality: float | None, database: str
) -> None:
    """Write the router's log, with propensities, to FILE (.jsonl, .ndjson or .parquet)."""
    if file.exists() and not replace:
        # The texts of an older one may be over their time in the record.
        raise click.ClickException(f"{file} already exists; name another file, or add --replace")
    from deferral.gateway.export import export as write

    times = {name: _seconds(value) for name, value in (("since", since), ("until", until)) if value is not None}
    with opened(database) as store:
        click.echo(write(store.engine, file, assumed_quality=assume_quality, **times))
    click.echo(f"wrote {file}")


def _seconds(moment: datetime) -> float:
    return moment.replace(tzinfo=UTC).timestamp()
