"""The commands `deferral gateway keys`: they parse and print, and decide nothing."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deferral.command_line import FiniteRange
from deferral.gateway.experts_file import expert_names
from deferral.gateway.keys import Issued, Key, UnknownKey
from deferral.gateway.opened import database_option, opened
from deferral.gateway.windows import WINDOWS, minute_of, with_article

__all__ = ["keys"]

_experts_file = click.option(
    "--experts",
    "experts_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The gateway's experts file, to check the names given with --expert.",
)
_rate, _budget = click.IntRange(min=1, max=1_000_000), FiniteRange(min=0, min_open=True)
_days = click.option("--days", type=FiniteRange(0, 36500, min_open=True), help="The key ends so many days from now.")
_DAY = 86400.0
_SOON = "a running gateway applies it within two seconds"


@click.group()
def keys() -> None:
    """Create, list, change, rotate and revoke API keys."""


@keys.command()
@click.argument("name")
@click.option("--expert", "experts", multiple=True, help="Allow only this expert; may be given several times.")
@_experts_file
@click.option("--requests-per-minute", type=_rate, help="The most requests in any 60 seconds.")
@click.option("--budget", type=_budget, help="The most dollars in each window.")
@click.option("--window", type=click.Choice(WINDOWS), help="The budget's calendar window.  [default: month]")
@click.option("--zone", help="The time zone in which windows begin, such as Europe/Berlin.  [default: UTC]")
@_days
@click.option("--admin", is_flag=True, help="Make a key for the admin endpoints, and for nothing else.")
@database_option
def create(
    name: str,
    experts: tuple[str, ...],
    experts_file: Path | None,
    requests_per_minute: int | None,
    budget: float | None,
    days: float | None,
    admin: bool,
    database: str,
    **windows: Any,
) -> None:
    """Create a key for NAME and print it.  It is shown only this once, since only its hash is kept."""
    _look_up(experts, experts_file)
    given = {option: value for option, value in windows.items() if value is not None}
    if given and budget is None:
        raise click.UsageError(f"--{next(iter(given))} needs --budget")
    with opened(database, create=True) as store, _usage():
        so_named = [key.id for key in store if key.name == name and not key.over]
        token, key = store.create(
            name,
            experts=experts or None,
            requests_per_minute=requests_per_minute,
            budget=budget,
            ends=_ends(days),
            admin=admin,
            **given,
        )
    _say_what_was_not_looked_up(experts, experts_file)
    if so_named:
        was = f"{name} had a valid key before, {' and '.join(so_named)}, which stays valid"
        click.echo(f"{was}; `deferral gateway keys set` and `rotate` change one, and now need its id", err=True)
    click.echo(f"key {key.id} for {name}; it is valid within two seconds, and shown only this once:", err=True)
    click.echo(token)


@keys.command("set")
@click.argument("key", metavar="NAME")
@click.option("--name", help="A new name for the key.")
@click.option("--expert", "experts", multiple=True, help="Allow only this expert; may be given several times.")
@click.option("--all-experts", is_flag=True, help="Remove the restriction to some experts.")
@_experts_file
@click.option("--requests-per-minute", type=_rate, help="The most requests in any 60 seconds.")
@click.option("--any-rate", is_flag=True, help="Remove the rate limit.")
@click.option("--budget", type=_budget, help="The most dollars in each window.")
@click.option("--no-budget", is_flag=True, help="Remove the budget.")
@click.option("--window", type=click.Choice(WINDOWS), help="The budget's calendar window.")
@click.option("--zone", help="The time zone in which windows begin, such as Europe/Berlin.")
@_days
@click.option("--no-end", is_flag=True, help="The key does not end.")
@database_option
def change(
    key: str,
    experts: tuple[str, ...],
    all_experts: bool,
    experts_file: Path | None,
    requests_per_minute: int | None,
    any_rate: bool,
    budget: float | None,
    no_budget: bool,
    days: float | None,
    no_end: bool,
    database: str,
    **others: str | None,
) -> None:
    """Change settings of the key NAME; those not given stay as they are, and so do its token, its spending and its record.

    NAME is the key's name, or its id where several have that name.
    """
    _look_up(experts, experts_file)
    settings: dict[str, Any] = {name: value for name, value in others.items() if value is not None}
    for name, option, value, flag, lifted in (
        ("experts", "--expert", experts or None, "--all-experts", all_experts),
        ("requests_per_minute", "--requests-per-minute", requests_per_minute, "--any-rate", any_rate),
        ("budget", "--budget", budget, "--no-budget", no_budget),
        ("ends", "--days", _ends(days), "--no-end", no_end),
    ):
        if lifted and value is not None:
            raise click.UsageError(f"expected either {option} or {flag}")
        if lifted or value is not None:
            settings[name] = value
    if not settings:
        raise click.UsageError("nothing to change; `deferral gateway keys set --help` lists the settings")
    with opened(database) as store, _usage():
        before, after = store.change(key, **settings)
    _say_what_was_not_looked_up(experts, experts_file)
    if before == after:
        click.echo(f"key {after.id} for {after.name} already has these settings")
        return
    was, now = ({name: _shown(one, name) for name in settings} for one in (before, after))
    changed = [f"{name} {was[name]} -> {now[name]}" for name in settings if getattr(before, name) != getattr(after, name)]
    click.echo(f"key {after.id} for {after.name}: {'; '.join(changed)}; {_SOON}")


@keys.command()
@click.argument("key", metavar="NAME")
@click.option(
    "--grace-hours",
    type=FiniteRange(0, 8760),
    default=0.0,
    help="Hours for which the previous token stays valid beside the new one.  [default: it ends at once]",
)
@database_option
def rotate(key: str, grace_hours: float, database: str) -> None:
    """Give the key NAME a new token and print it.  It is shown only this once, since only its hash is kept.

    NAME is the key's name, or its id where several have that name.  Everything else stays.  At most two tokens are valid: one
    that an earlier rotation left valid ends.
    """
    with opened(database) as store, _usage():
        token, issued = store.rotate(key, grace_hours=grace_hours)
    until = _former_until(issued)
    ends = "ends now" if until is None or issued.key.over else f"is valid until {minute_of(until)}"
    if issued.key.over:
        ends += f", but the key has ended: no token of it is valid before `deferral gateway keys set {issued.key.id} --days`"
    click.echo(f"key {issued.key.id} for {issued.key.name}: the previous token {ends}; {_SOON}; shown only this once:", err=True)
    click.echo(token)


@keys.command("list")
@database_option
def list_keys(database: str) -> None:
    """List all keys, revoked ones too."""
    with opened(database) as store:
        issued = store.list()
    now = time.time()
    former = [_former(one, now) for one in issued]
    ends = ["" if one.key.ends is None else minute_of(one.key.ends) for one in issued]
    more = [(title, cells) for title, cells in (("ends", ends), ("former token until", former)) if any(cells)]
    table = Table("id", "name", "experts", "a minute", "budget", "created", "revoked", *(title for title, _ in more))
    for place in (0, 5, 6):  # what is cut off there cannot be guessed
        table.columns[place].no_wrap = True
    for column in table.columns:
        column.overflow = "fold"
    for row, one in enumerate(issued):
        table.add_row(*_cells(one), *(cells[row] for _, cells in more))
    Console().print(table)


@keys.command()
@click.argument("id")
@database_option
def revoke(id: str, database: str) -> None:
    """Revoke the key ID; a running gateway refuses it within two seconds."""
    with opened(database) as store:
        known = store.revoke(id)
        so_named = [key.id for key in store if key.name == id]
    if not known:
        named = f"; it is a name, and keys are revoked by their id, {' or '.join(so_named)}" if so_named else ""
        raise click.BadParameter(f"{id!r} is not a valid key{named}; see `deferral gateway keys list`", param_hint="ID")
    click.echo(f"{id} is revoked")


def _ends(days: float | None) -> float | None:
    return None if days is None else time.time() + _DAY * days


def _look_up(experts: tuple[str, ...], experts_file: Path | None) -> None:
    if experts_file is None:
        return
    known = expert_names(experts_file)
    if unknown := [each for each in experts if each not in known]:
        raise click.BadParameter(f"{experts_file} has no {unknown[0]!r}; it has {', '.join(known)}", param_hint="--expert")


def _say_what_was_not_looked_up(experts: tuple[str, ...], experts_file: Path | None) -> None:
    if experts and experts_file is None:
        click.echo(f"not checked whether {', '.join(experts)} exists among the experts; --experts FILE does that", err=True)


@contextmanager
def _usage() -> Iterator[None]:
    """What the keys refuse is a mistake in the command's arguments."""
    try:
        yield
    except UnknownKey as error:
        raise click.BadParameter(f"{error}; see `deferral gateway keys list`", param_hint="NAME") from None
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _shown(key: Key, setting: str) -> str:
    if setting == "experts":
        return "all" if key.experts is None else ", ".join(sorted(key.experts))
    value = getattr(key, setting)
    if value is None:
        return "none"
    return f"${value:g}" if setting == "budget" else minute_of(value) if setting == "ends" else str(value)


def _cells(issued: Issued) -> list[str]:
    key = issued.key
    return [
        key.id,
        escape(key.name) + (" (admin)" if key.admin else ""),
        escape(_shown(key, "experts")),
        "" if key.requests_per_minute is None else str(key.requests_per_minute),
        "" if key.budget is None else f"${key.budget:g} {with_article(key.window)}, {key.zone}",
        minute_of(issued.created)[:10],
        "" if issued.revoked is None else minute_of(issued.revoked)[:10],
    ]


def _former_until(issued: Issued) -> float | None:
    """Until when the token before its last is valid: no longer than the key."""
    until, ends = issued.former_until, issued.key.ends
    return until if until is None or ends is None else min(until, ends)


def _former(issued: Issued, now: float) -> str:
    until = _former_until(issued) if issued.revoked is None else None
    return "" if until is None or until <= now else minute_of(until)
