"""The commands that tell what the gateway did, and change nothing."""

import csv
import json
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, astuple
from datetime import datetime

import click
from rich.markup import escape
from rich.table import Table

from deferral.command_line import Command, FiniteRange
from deferral.gateway.opened import database_option, opened
from deferral.gateway.status import dollars
from deferral.printed import print_whole

__all__ = ["decisions", "shadow", "spending", "status"]

_OUTCOMES = ("ok", "error", "cancelled", "refused", "truncated")
_hours_option = click.option(
    "--hours", type=FiniteRange(min=0, min_open=True), default=24.0, show_default=True, help="How many hours to look back."
)


@click.command(cls=Command)
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
    print_whole(table)
    click.echo(f"{dollars(sum(spent.price for spent in found.values()))} in all")


@click.command(cls=Command)
@_hours_option
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
    for table in found.tables():
        print_whole(table)
    click.echo(found.summary(hours))
    if running is not None:
        click.echo(f"{url}: {running['ready']}")
        for name, value in running["metrics"].items():
            click.echo(f"  {name} {value:g}")
        if not running["metrics"]:
            why = "need the admin key" if not admin_key else "were refused for this admin key"
            click.echo(f"  its metrics {why}: --admin-key, or DEFERRAL_ADMIN_KEY", err=True)


@click.command(cls=Command)
@click.option("--key", help="Only decisions for this key, given by its name, its id or its displayed prefix.")
@click.option("--expert", help='Only decisions this expert answered; "" for those that nobody did.')
@click.option("--outcome", type=click.Choice(_OUTCOMES), help="Only decisions with this outcome.")
@click.option("--response", help="Only this response, however old, given by its x-deferral-id or the reply's own id.")
@_hours_option
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


@click.command(cls=Command)
@_hours_option
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@database_option
def shadow(hours: float, as_json: bool, database: str) -> None:
    """How the candidate of `deferral serve --shadow` compares with the live router: agreement, and what it would have gained."""
    from deferral.gateway.agreement import agreement

    now = time.time()
    with opened(database) as store:
        found = agreement(store.engine, since=now - 3600 * hours, until=now)
    click.echo(json.dumps(asdict(found)) if as_json else found)
