"""What commands of `deferral route` show while they work, and a log that is read with that."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from deferral.routing.log_files import read_log
from deferral.routing.outcomes import Log, spelt_alike

__all__ = ["progress", "reading", "working"]


def progress(what: str) -> Progress:
    """A bar on a terminal; where nobody watches, one line."""
    console = Console(stderr=True)
    if not console.is_terminal:
        click.echo(what, err=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def working(what: str) -> Iterator[None]:
    """The same around work of which nobody knows how far it is."""
    with progress(what) as bar:
        bar.add_task(what, total=None)
        yield


def reading(path: Path) -> Log:
    """The log of a file; experts whose names look like one name are told."""
    with progress(f"reading {path.name}") as bar:
        task = bar.add_task(f"reading {path.name}", total=None)
        log = read_log(path, on_rows=lambda rows: bar.update(task, description=f"reading {path.name}, {rows:,} rows"))
    for group in spelt_alike(log.experts):
        click.echo(
            f"warning: treated as {len(group)} experts, but the names differ only in spelling: {', '.join(map(repr, group))}",
            err=True,
        )
    return log
