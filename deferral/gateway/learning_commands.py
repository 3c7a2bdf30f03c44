"""The commands that learn from the record, and replace a router only if what they learned is better."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from deferral.command_line import Command, callers_errors
from deferral.errors import DataError
from deferral.gateway.database import reason_of
from deferral.gateway.opened import assumed_option, database_option, encoder_option, opened

if TYPE_CHECKING:
    from deferral.routing import Router

__all__ = ["cascade", "retrain"]


@click.command(cls=Command)
@click.argument("router", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--log",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The log that the router was fitted on; the new router learns from it as well.",
)
@encoder_option
@click.option("--drop-cascade", is_flag=True, help="Replace the router even if its cascade pays and would be lost.")
@click.option("--dry-run", is_flag=True, help="Judge only; change nothing.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the intervals.")
@assumed_option
@database_option
def retrain(
    router: Path,
    log: Path | None,
    encoder: Path | None,
    drop_cascade: bool,
    dry_run: bool,
    seed: int,
    assume_quality: float | None,
    database: str,
) -> None:
    """Learn a new router from the record; it replaces ROUTER (a folder) only if it is better with confidence.

    Exit status 0 if it is better, 3 if not.  Gateways on this database load it within a second or two.
    """
    from deferral.gateway.retrain import retrain as learn
    from deferral.routing import read_log

    old_log = None if log is None else read_log(log)
    with opened(database) as store:
        with _stages() as on_stage, callers_errors():
            verdict = learn(
                store.engine,
                router,
                old_log=old_log,
                assumed_quality=assume_quality,
                drop_cascade=drop_cascade,
                dry_run=dry_run,
                load=_load(encoder, "deferral.gateway.retrain.retrain"),
                seed=seed,
                on_stage=on_stage,
            )
        click.echo(verdict)
        if verdict.promoted:
            _announce(store.engine, router)
    if not verdict.better:
        sys.exit(3)
    if not dry_run:
        click.echo(f"{router} is the new router, {router}.previous the old one; gateways on this database load it in a second")


@click.command(cls=Command)
@click.argument("router", type=click.Path(exists=True, file_okay=False, path_type=Path))
@encoder_option
@click.option("--dry-run", is_flag=True, help="Judge only; change nothing.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@database_option
def cascade(router: Path, encoder: Path | None, dry_run: bool, seed: int, database: str) -> None:
    """Refit the cascade of ROUTER (a folder) on the record; the new one replaces the old only if it is better with confidence.

    Exit status 0 if it is better, 3 if not.  Gateways on this database load it within a second or two.
    """
    from deferral.gateway.cascade_retrain import retrain_cascade

    with opened(database) as store:
        with _stages() as on_stage, callers_errors():
            verdict = retrain_cascade(
                store.engine,
                router,
                dry_run=dry_run,
                load=_load(encoder, "deferral.gateway.cascade_retrain.retrain_cascade"),
                seed=seed,
                on_stage=on_stage,
            )
        click.echo(verdict)
        if verdict.promoted:
            _announce(store.engine, router)
    if not verdict.better:
        click.echo(f"{router} stays as it was")
        sys.exit(3)
    if dry_run:
        click.echo(f"dry run: without --dry-run, the new cascade would replace the one in {router}")
    else:
        click.echo(f"{router} has the new cascade; gateways on this database load it in a second")


def _load(encoder: Path | None, function: str) -> "Callable[[Path], Router]":
    """A usage error where the router wants another encoder; one that is a function cannot be named here."""
    from deferral.routing import Router

    def load(folder: Path) -> Router:
        try:
            return Router.load(folder, encoder=encoder)
        except DataError:
            raise
        except ValueError as error:
            raise click.UsageError(f"{error}; in Python, {function} accepts one") from None

    return load


def _announce(engine: Engine, router: Path) -> None:
    """Tell the gateways; what is in its place stays there if that fails."""
    from deferral.gateway.reloads import Reloads

    try:
        Reloads(engine).announce()
    except SQLAlchemyError as error:
        raise DataError(
            f"{router} is replaced, but the gateways could not be told: {reason_of(error)}; send SIGHUP to each, or POST "
            "/admin/reload"
        ) from error


@contextmanager
def _stages() -> Iterator[Callable[[str], None]]:
    """Says what is being done: in place on a terminal, else a line for each stage."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage: click.echo(stage, err=True)
        return
    with console.status("") as status:
        yield status.update
