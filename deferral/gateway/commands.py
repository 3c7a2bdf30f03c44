"""The commands `deferral gateway` and `deferral serve`: they parse and print, and decide nothing."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from deferral.errors import DataError
from deferral.gateway.database import prepare
from deferral.gateway.experts_file import expert_names
from deferral.gateway.keys import PREFIX, Issued, Keys
from deferral.gateway.windows import WINDOWS

__all__ = ["gateway"]

_database = click.option(
    "--database",
    default="sqlite:///deferral-gateway.db",
    show_default=True,
    envvar="DEFERRAL_DATABASE",
    help="The gateway's database: the path of an SQLite file, or an SQLAlchemy URL.",
)
_assumed = click.option(
    "--assume-quality",
    type=click.FloatRange(0, 1),
    help="Quality of answers that nobody judged.  [default: they are left out]",
)


@click.group()
def gateway() -> None:
    """Keys, record, retraining and status of a gateway."""


@gateway.group()
def keys() -> None:
    """Who may ask: create, list and revoke API keys."""


@keys.command()
@click.argument("name")
@click.option("--expert", "experts", multiple=True, help="Only this expert; may be given several times.")
@click.option(
    "--experts",
    "experts_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The gateway's experts file, to look up the names that --expert gives.",
)
@click.option("--requests-per-minute", type=click.IntRange(min=1), help="At most so many in any 60 seconds.")
@click.option("--budget", type=click.FloatRange(min=0, min_open=True), help="Dollars in each window.")
@click.option("--window", type=click.Choice(WINDOWS), default="month", show_default=True, help="The budget's calendar window.")
@click.option("--zone", default="UTC", show_default=True, help="The time zone in which windows begin, as Europe/Berlin.")
@click.option("--admin", is_flag=True, help="For the admin endpoints, and for nothing else.")
@_database
def create(
    name: str,
    experts: tuple[str, ...],
    experts_file: Path | None,
    requests_per_minute: int | None,
    budget: float | None,
    window: Any,
    zone: str,
    admin: bool,
    database: str,
) -> None:
    """Make a key for NAME, and print it: this once, since only its hash is kept."""
    if experts_file is not None:
        known = expert_names(experts_file)
        if unknown := [each for each in experts if each not in known]:
            raise click.BadParameter(f"{experts_file} has no {unknown[0]!r}; it has {', '.join(known)}", param_hint="--expert")
    with _opened(database, create=True) as store:
        try:
            token, key = store.create(
                name,
                experts=experts or None,
                requests_per_minute=requests_per_minute,
                budget=budget,
                window=window,
                zone=zone,
                admin=admin,
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    if experts and experts_file is None:
        click.echo(f"whether there is an expert {', '.join(experts)} was not looked up; --experts FILE does that", err=True)
    click.echo(f"key {key.id} for {name}; it is valid within two seconds, and shown this once:", err=True)
    click.echo(token)


@keys.command("list")
@_database
def list_keys(database: str) -> None:
    """All keys that ever were."""
    table = Table("id", "name", "experts", "a minute", "budget", "created", "revoked")
    for place in (0, 5, 6):  # what is cut off there cannot be guessed
        table.columns[place].no_wrap = True
    for column in table.columns:
        column.overflow = "fold"
    with _opened(database) as store:
        for issued in store.list():
            table.add_row(*_cells(issued))
    Console().print(table)


@keys.command()
@click.argument("id")
@_database
def revoke(id: str, database: str) -> None:
    """End the key ID; a running gateway refuses it within two seconds."""
    with _opened(database) as store:
        known = store.revoke(id)
        so_named = [key.id for key in store if key.name == id]
    if not known:
        named = f" but a name; keys are revoked by their id, {' or '.join(so_named)}" if so_named else ""
        raise click.BadParameter(f"{id!r} is no valid key{named}; see `deferral gateway keys list`", param_hint="ID")
    click.echo(f"{id} is revoked")


@gateway.command()
@click.option("--key", help="All that is on record of this key, by its id or the prefix that is shown.")
@click.option("--response", help="One response, by x-deferral-id or by the reply's own id.")
@click.confirmation_option(prompt="It cannot be undone.  Delete it?")
@_database
def forget(key: str | None, response: str | None, database: str) -> None:
    """Delete decisions, judgements and texts from the record; what they cost stays in the key's budget."""
    from deferral.gateway.forgetting import forget as delete

    if (key is None) == (response is None):
        raise click.UsageError("expected either --key or --response")
    identity = None if key is None else key.removeprefix(PREFIX)
    with _opened(database) as store, Console(stderr=True).status("deleting") as shown:
        gone = delete(store.engine, key=identity, response=response, progress=lambda so_far: shown.update(str(so_far)))
    if not gone.decisions:
        raise DataError(f"nothing is on record of {key or response!r}; what was just answered is written a moment later")
    click.echo(gone)


@gateway.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--since", type=click.DateTime(), help="Requests that arrived then or later (UTC).")
@click.option("--until", type=click.DateTime(), help="Requests that arrived before then (UTC).")
@_assumed
@_database
def export(file: Path, since: datetime | None, until: datetime | None, assume_quality: float | None, database: str) -> None:
    """Write the router's log, with propensities, to FILE (.jsonl or .parquet)."""
    from deferral.gateway.export import export as write

    times = {name: _seconds(value) for name, value in (("since", since), ("until", until)) if value is not None}
    with _opened(database) as store:
        click.echo(write(store.engine, file, assumed_quality=assume_quality, **times))
    click.echo(f"wrote {file}")


@gateway.command()
@click.argument("router", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--log",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The log that the router was fitted on, to learn from as well.",
)
@click.option(
    "--encoder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the sentence encoder that the router was fitted with, if it was.",
)
@click.option("--dry-run", is_flag=True, help="Judge, and change nothing.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the intervals.")
@_assumed
@_database
def retrain(
    router: Path,
    log: Path | None,
    encoder: Path | None,
    dry_run: bool,
    seed: int,
    assume_quality: float | None,
    database: str,
) -> None:
    """Learn a new router from the record; it replaces ROUTER (a folder) only if it is better with confidence.

    Exit status 0 if it is better, 3 if not.  Gateways that run on the database take it within a second or two.
    """
    from deferral.gateway.reloads import Reloads
    from deferral.gateway.retrain import retrain as learn
    from deferral.routing import Router, read_log

    old_log = None if log is None else read_log(log)
    with _opened(database) as store, _stages() as on_stage:
        try:
            verdict = learn(
                store.engine,
                router,
                old_log=old_log,
                assumed_quality=assume_quality,
                dry_run=dry_run,
                load=lambda folder: Router.load(folder, encoder=encoder),
                seed=seed,
                on_stage=on_stage,
            )
        except DataError:
            raise
        except ValueError as error:
            # An encoder that is a function cannot be named here.
            raise click.UsageError(f"{error}; in Python, deferral.gateway.retrain.retrain takes it") from None
        if verdict.promoted:
            Reloads(store.engine).announce()
    click.echo(verdict)
    if not verdict.better:
        sys.exit(3)
    if not dry_run:
        click.echo(f"{router} is the new router, {router}.previous the old one; gateways on this database take it in a second")


@gateway.command()
@click.argument("router", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--encoder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the sentence encoder that the router was fitted with, if it was.",
)
@click.option("--dry-run", is_flag=True, help="Judge, and change nothing.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@_database
def cascade(router: Path, encoder: Path | None, dry_run: bool, seed: int, database: str) -> None:
    """Learn the cascade of ROUTER (a folder) again from the record; the new one replaces it only if it is better with confidence.

    Exit status 0 if it is, 3 if not.  Gateways that run on the database take it within a second or two.
    """
    from deferral.gateway.cascade_answers import answers_on_record
    from deferral.gateway.reloads import Reloads
    from deferral.routing import Router
    from deferral.routing.cascade_fitting import fit_cascade, gain_over

    loaded = Router.load(router, encoder=encoder)
    old, error = loaded.cascade, loaded.price_of_error
    if old is None:
        raise click.UsageError(f"{router} has no cascade; make the first with `deferral route cascade LOG -r {router}`")
    left_out: Counter[str] = Counter()
    with _opened(database) as store, _stages() as on_stage:
        on_stage("reading the record")
        answers = answers_on_record(store.engine, loaded.experts, old.first, left_out)
        on_stage(f"learning from {len(answers):,} answers of {old.first}")
        new = fit_cascade(answers, seed=seed)
        gain, half = gain_over(old, answers, error, seed=seed)
        better = new.why_not(error) == "" and gain > half
        if better and not dry_run:
            loaded.cascade = new
            loaded.save(router)
            Reloads(store.engine).announce()
    click.echo(new.report(error))
    click.echo("\n".join(f"{count} rows left out: {reason}" for reason, count in left_out.most_common()))
    click.echo(
        f"against the cascade that is there it saves {gain:.4f} ± {half:.4f} errors a query at ${error:.3g} an error (95%)"
    )
    if not better:
        click.echo(f"{router} stays as it was")
        sys.exit(3)
    click.echo("it would replace it" if dry_run else f"{router} has the new one; gateways on this database take it in a second")


@gateway.command()
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), default=24.0, show_default=True, help="How far back.")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON.")
@click.option("--url", help="Also ask the gateway that runs there, http://127.0.0.1:8080 say.")
@click.option("--admin-key", envvar="DEFERRAL_ADMIN_KEY", help="For /metrics at --url.  [default: $DEFERRAL_ADMIN_KEY]")
@_database
def status(hours: float, as_json: bool, url: str | None, admin_key: str | None, database: str) -> None:
    """What the gateway did: requests, experts' shares, cost and saving, errors, feedback, budgets, and alarms that ring."""
    from deferral.gateway.probe import probe
    from deferral.gateway.status import status as read

    now = time.time()
    with _opened(database) as store:
        found = read(store.engine, list(store), since=now - 3600 * hours, now=now)
    running = None if url is None else probe(url, admin_key)
    if as_json:
        click.echo(json.dumps({**found.as_json(), **({} if running is None else {"running": running})}))
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
            click.echo("  its metrics want the admin key: --admin-key, or DEFERRAL_ADMIN_KEY", err=True)


@gateway.command()
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), default=24.0, show_default=True, help="How far back.")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON.")
@_database
def shadow(hours: float, as_json: bool, database: str) -> None:
    """How the candidate of `deferral serve --shadow` compares with the live router: agreement, and what it would have gained."""
    from deferral.gateway.agreement import agreement

    now = time.time()
    with _opened(database) as store:
        found = agreement(store.engine, since=now - 3600 * hours, until=now)
    click.echo(json.dumps(found.as_json()) if as_json else found)


@contextmanager
def _opened(database: str, *, create: bool = False) -> Iterator[Keys]:
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


@contextmanager
def _stages() -> Iterator[Callable[[str], None]]:
    """Says what is being done: in place on a terminal, else a line for each stage."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage: click.echo(stage, err=True)
        return
    with console.status("") as status:
        yield status.update


def _cells(issued: Issued) -> list[str]:
    key = issued.key
    return [
        key.id,
        escape(key.name) + (" (admin)" if key.admin else ""),
        "all" if key.experts is None else escape(", ".join(sorted(key.experts))),
        "" if key.requests_per_minute is None else str(key.requests_per_minute),
        "" if key.budget is None else f"${key.budget:g} a {key.window}, {key.zone}",
        _day(issued.created),
        "" if issued.revoked is None else _day(issued.revoked),
    ]


def _day(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d")


def _seconds(moment: datetime) -> float:
    return moment.replace(tzinfo=UTC).timestamp()
