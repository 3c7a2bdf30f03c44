"""The command `deferral gateway check`: it parses and prints, and decides nothing."""

import sys
from typing import Any

import click
from rich.console import Console

from deferral.command_line import callers_errors
from deferral.gateway.checking import check as look
from deferral.gateway.serve import serve, settings_of

__all__ = ["check"]


@click.command(params=list(serve.params))
@click.option("--ask", is_flag=True, help="Also ask every expert for a completion of one token, at its price.")
def check(ask: bool, log_level: str, **options: Any) -> None:
    """Look at all that `deferral serve` needs with the same options, before it goes live, and change nothing.

    Exit status 1 where the gateway would not start, or requests would fail; each line says what to do.
    """
    del log_level  # of a log that nobody writes here
    with callers_errors(click.UsageError):
        settings = settings_of(**options)
    with Console(stderr=True).status("reading") as shown:
        found = look(settings, ask=ask, on_stage=shown.update)
    if found.experts:
        Console().print(found.table())
    for finding in found.findings:
        click.echo(finding)
    if not found.ok:
        click.echo("it should not go live with these faults", err=True)
        sys.exit(1)
    click.echo("it can go live" if ask else "it can go live, as far as can be seen without --ask")
