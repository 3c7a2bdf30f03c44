"""The command `deferral gateway`: it parses and prints, and decides nothing."""

import csv
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from deferral.command_line import Commands, FiniteRange
from deferral.errors import DataError
from deferral.gateway.key_commands import keys
from deferral.gateway.keys import PREFIX
from deferral.gateway.opened import database_option, encoder_option, opened
from deferral.gateway.status import dollars

__all__ = ["gateway"]

_ELSEWHERE = {
    "ask": "deferral.gateway.asking_commands",
    "check": "deferral.gateway.check_command",
    "grade": "deferral.gateway.asking_commands",
}
_OUTCOMES = ("ok", "error", "cancelled", "refused", "truncated")
_assumed = click.option(
    "--assume-quality",
    type=FiniteRange(0, 1),
    help="Quality to assume for answers that nobody judged.  [default: they are left out]",
)


class _Commands(Commands):
    """Some import all that speaks HTTP; the other commands need not wait for that."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), *_ELSEWHERE])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in _ELSEWHERE:
            return getattr(import_module(_ELSEWHERE[name]), name)
        return super().get_command(context, name)


@click.group(cls=_Commands)
def gateway() -> None:
    """A gateway's first log, checks, API keys, record, retraining and status."""


gateway.add_command(keys)


@gateway.command()
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


@gateway.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@database_option
def backup(file: Path, database: str) -> None:
    """Copy an SQLite database to FILE, even while gateways write to it.

    Use pg_dump to copy a PostgreSQL database.
    """
    from deferral.gateway.backup import copy
    from deferral.gateway.database import connect

    try:
        # It may be of an older version, and stays so.
        engine = connect(database)
        with Console(stderr=True).status("copying"):
            copy(engine, file)
        engine.dispose()
    except DataError:
        raise
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    click.echo(f"wrote {file}")


@gateway.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--since", type=click.DateTime(), help="Only requests that arrived at this time (UTC) or later.")
@click.option("--until", type=click.DateTime(), help="Only requests that arrived before this time (UTC).")
@click.option("--replace", is_flag=True, help="Overwrite FILE if it exists.")
@_assumed
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


@gateway.command()
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
@_assumed
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
    from deferral.routing import Router, read_log

    old_log = None if log is None else read_log(log)
    with opened(database) as store:
        with _stages() as on_stage, _encoder_of_ones_own("deferral.gateway.retrain.retrain"):
            verdict = learn(
                store.engine,
                router,
                old_log=old_log,
                assumed_quality=assume_quality,
                drop_cascade=drop_cascade,
                dry_run=dry_run,
                load=lambda folder: Router.load(folder, encoder=encoder),
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


@gateway.command()
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
    from deferral.routing import Router

    with opened(database) as store:
        with _stages() as on_stage, _encoder_of_ones_own("deferral.gateway.cascade_retrain.retrain_cascade"):
            verdict = retrain_cascade(
                store.engine,
                router,
                dry_run=dry_run,
                load=lambda folder: Router.load(folder, encoder=encoder),
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


@gateway.command()
@click.option("--by", multiple=True, type=click.Choice(["key", "expert", "day", "month"]), default=["key"], show_default=True)
@click.option(
    "--since", type=click.DateTime(), help="Only requests that arrived then or later, in --zone.  [default: 30 days ago]"
)
@click.option("--until", type=click.DateTime(), help="Only requests that arrived before then, in --zone.")
@click.option("--zone", default="UTC", show_default=True, help="Time zone of days and months, such as Europe/Berlin.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, unrounded, without a total.")
@database_option
def spending(by: tuple[str, ...], since: datetime | None, until: datetime | None, zone: str, as_csv: bool, database: str) -> None:
    """Who spent what: requests, tokens and dollars by key, expert, day or month (--by may be given several times).

    Of deleted requests, only the key, the time and the cost are known, and for at most 32 days: bill for a month before its
    requests are deleted.
    """
    from deferral.gateway.spending import spending as read
    from deferral.gateway.windows import time_zone

    try:
        where = time_zone(zone)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--zone") from None
    begin = time.time() - 30 * 86400 if since is None else since.replace(tzinfo=where).timestamp()
    end = math.inf if until is None else until.replace(tzinfo=where).timestamp()
    with opened(database) as store:
        issued = list(store.list())
        names = Counter(one.key.name for one in issued)
        # Two keys may have one name.
        told = {one.key.id: one.key.name if names[one.key.name] == 1 else f"{one.key.name} ({one.key.id})" for one in issued}
        try:
            found = read(store.engine, told, by, since=begin, until=min(end, 1e300), zone=where)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--by") from None
    heads = [*by, "requests", "estimated", "input_tokens", "output_tokens", "dollars"]
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerows([heads, *([*group, *astuple(spent)] for group, spent in found.items())])
        return
    table = Table(*(head.replace("_", " ") for head in heads), box=None)
    for group, spent in found.items():
        *counts, price = astuple(spent)
        table.add_row(*map(escape, group), *(f"{count:,}" for count in counts), dollars(price))
    Console().print(table)
    click.echo(f"{dollars(sum(spent.price for spent in found.values()))} in all")


@gateway.command()
@click.option(
    "--hours", type=FiniteRange(min=0, min_open=True), default=24.0, show_default=True, help="How many hours to look back."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--url", help="Also ask the gateway at this address, such as http://127.0.0.1:8080.")
@click.option("--admin-key", envvar="DEFERRAL_ADMIN_KEY", help="Admin key for /metrics at --url.  [default: $DEFERRAL_ADMIN_KEY]")
@database_option
def status(hours: float, as_json: bool, url: str | None, admin_key: str | None, database: str) -> None:
    """What the gateway did: requests, experts' shares, cost and saving, errors, feedback, budgets and active alarms."""
    from deferral.gateway.probe import probe
    from deferral.gateway.status import status as read

    now = time.time()
    with opened(database) as store:
        found = read(store.engine, list(store), since=now - 3600 * hours, now=now)
    running = None if url is None else probe(url, admin_key)
    if as_json:
        click.echo(json.dumps({**asdict(found), **({} if running is None else {"running": running})}))
        return
    console = Console()
    for table in found.tables():
        console.print(table)
    click.echo(found.summary(hours))
    if running is not None:
        click.echo(f"{url}: {running['ready']}")
        for name, value in running["metrics"].items():
            click.echo(f"  {name} {value:g}")
        if not running["metrics"]:
            why = "need the admin key" if not admin_key else "were refused for this admin key"
            click.echo(f"  its metrics {why}: --admin-key, or DEFERRAL_ADMIN_KEY", err=True)


@gateway.command()
@click.option("--key", help="Only decisions for this key, given by its name, its id or its displayed prefix.")
@click.option("--expert", help='Only decisions this expert answered; "" for those that nobody did.')
@click.option("--outcome", type=click.Choice(_OUTCOMES), help="Only decisions with this outcome.")
@click.option("--response", help="Only this response, however old, given by its x-deferral-id or the reply's own id.")
@click.option(
    "--hours", type=FiniteRange(min=0, min_open=True), default=24.0, show_default=True, help="How many hours to look back."
)
@click.option("--count", type=click.IntRange(1, 100_000), default=50, show_default=True, help="How many to show, newest first.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@database_option
def decisions(
    key: str | None,
    expert: str | None,
    outcome: str | None,
    response: str | None,
    hours: float,
    count: int,
    as_json: bool,
    database: str,
) -> None:
    """Show decisions on record, newest first: who was asked, why, and what came of it."""
    from deferral.gateway.history import answerers, recent, said

    since = None if response is not None else time.time() - 3600 * hours
    with opened(database) as store:
        issued = store.list()
        if key is not None:
            meant = [one.key.id for one in issued if key in (one.key.id, one.prefix, one.key.name)]
            if len(meant) != 1:
                why = f"is the name of {len(meant)} keys, {' and '.join(meant)}" if meant else "is not a key"
                raise click.BadParameter(f"{key!r} {why}; see `deferral gateway keys list`", param_hint="--key")
            [key] = meant
        found = recent(store.engine, count=count, since=since, key=key, expert=expert, outcome=outcome, response=response)
        others = [] if found or expert is None else answerers(store.engine, since=since)
    names = {one.key.id: one.key.name for one in issued}
    for one in found:
        click.echo(json.dumps(one) if as_json else said(one, names.get(one["key"], one["key"])))
    if not found:
        click.echo("no such decision is on record" + ("" if since is None else f" for the last {hours:g} hours"), err=True)
    if others and expert not in others:
        click.echo(
            f"{expert!r} answered nothing in that time; those who did: {', '.join(name or '(nobody)' for name in others)}",
            err=True,
        )


@gateway.command()
@click.option(
    "--hours", type=FiniteRange(min=0, min_open=True), default=24.0, show_default=True, help="How many hours to look back."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@database_option
def shadow(hours: float, as_json: bool, database: str) -> None:
    """How the candidate of `deferral serve --shadow` compares with the live router: agreement, and what it would have gained."""
    from deferral.gateway.agreement import agreement

    now = time.time()
    with opened(database) as store:
        found = agreement(store.engine, since=now - 3600 * hours, until=now)
    click.echo(json.dumps(asdict(found)) if as_json else found)


@contextmanager
def _encoder_of_ones_own(function: str) -> Iterator[None]:
    """A usage error where the router wants another encoder; one that is a function cannot be named here."""
    try:
        yield
    except DataError:
        raise
    except ValueError as error:
        raise click.UsageError(f"{error}; in Python, {function} accepts one") from None


def _announce(engine: Engine, router: Path) -> None:
    """Tell the gateways; what is in its place stays there if that fails."""
    from deferral.gateway.reloads import Reloads

    try:
        Reloads(engine).announce()
    except SQLAlchemyError as error:
        raise DataError(
            f"{router} is replaced, but the gateways could not be told: {getattr(error, 'orig', None) or error}; send SIGHUP to "
            "each, or POST /admin/reload"
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


def _seconds(moment: datetime) -> float:
    return moment.replace(tzinfo=UTC).timestamp()
