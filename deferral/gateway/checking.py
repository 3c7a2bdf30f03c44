"""What a gateway needs before it goes live: its files, its database, its address and its experts, looked at and not changed."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sqlalchemy import Engine, null, select
from sqlalchemy.exc import SQLAlchemyError

from deferral.errors import DataError
from deferral.gateway.access import no_key
from deferral.gateway.aliases import Alias, aliases_in
from deferral.gateway.database import reason_of, shown
from deferral.gateway.experts_file import Expert, experts_in, tables
from deferral.gateway.generation import check_aliases, out_of_service
from deferral.gateway.keys import Key, key_of
from deferral.gateway.listening import listening
from deferral.gateway.preparing import look
from deferral.gateway.reaching import Reached, reach
from deferral.gateway.record import Record
from deferral.gateway.schema import VERSION
from deferral.gateway.schema import keys as table
from deferral.gateway.settings import Settings, is_loopback
from deferral.gateway.shadow import load_candidate
from deferral.gateway.state import load_router
from deferral.gateway.windows import time_zone
from deferral.routing.router import Router

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Checked", "Finding", "check"]

_T = TypeVar("_T")
# A query and an answer of so many tokens cost within so large a factor of what a router expects, if both are in dollars.
_USUAL_TOKENS, _FAR_OFF = 500, 1000
# The first version of the tables in which a key may end.
_KEYS_END = 6
# Dollars per million tokens: below that a price was most likely meant per token.
_CHEAP = 0.001


@dataclass(frozen=True)
class Finding:
    """What was found of a part: as it should be, worth a note, or a fault, with which the gateway or its requests would fail."""

    kind: Literal["good", "note", "fault"]
    part: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.part}: {self.text}"


@dataclass(frozen=True)
class Checked:
    """All that was looked at."""

    findings: tuple[Finding, ...]
    experts: tuple[Reached, ...]

    @property
    def ok(self) -> bool:
        """Whether the gateway would start and every expert answer, as far as could be seen."""
        return not any(finding.kind == "fault" for finding in self.findings)

    def table(self) -> "Table":
        """The experts, for a terminal."""
        from rich.markup import escape
        from rich.table import Table

        made = Table("expert", "reachable", "key accepted", "model served", "$ per million tokens", "one token")
        for column in made.columns:
            column.overflow = "fold"
        for found in self.experts:
            expert = found.expert
            made.add_row(
                escape(found.shown),
                found.reachable,
                found.key or "none set",
                f"{found.model} ({escape(expert.model)})",
                f"{expert.input_price:g} in, {expert.output_price:g} out"
                if expert.input_price or expert.output_price
                else "none given",
                "" if found.seconds is None else f"{found.seconds:.2f} s",
            )
        return made


def check(settings: Settings, *, ask: bool, on_stage: Callable[[str], None] = lambda stage: None) -> Checked:
    """Look at everything that `deferral serve` needs with these settings, and change nothing.

    Every expert is asked for its models, and with `ask` for a completion of one token, which costs what that costs.
    """
    findings: list[Finding] = []
    assert settings.router_folder is not None
    assert settings.experts_file is not None
    path = settings.experts_file
    router = _tried(findings, "router", lambda: load_router(settings))
    read = _tried(findings, "experts file", lambda: tables(path))
    experts = None if read is None else _tried(findings, "experts file", lambda: experts_in(path, *read))
    if router is not None and read is not None and experts is not None:
        findings += _together(router, experts)
        findings += _aliases(path, *read, router, experts)
    findings += _beside(settings)
    on_stage("looking at the database and the address")
    findings += _database(settings, experts)
    findings += _address(settings)
    reached: list[Reached] = []
    findings += _streams(experts or {}) + _prices(experts or {})
    if experts:
        on_stage(f"reaching {', '.join(experts)}")
        reached = asyncio.run(reach(experts.values(), ask=ask))
    for one in reached:
        findings += [Finding("fault", one.shown, text) for text in one.faults]
        findings += [Finding("note", one.shown, text) for text in one.notes]
    return Checked(tuple(findings), tuple(reached))


def _tried(findings: list[Finding], part: str, read: Callable[[], _T]) -> _T | None:
    """What was read, or a fault."""
    try:
        return read()
    except (ValueError, OSError, ImportError) as error:
        findings.append(Finding("fault", part, str(error)))
        return None


def _beside(settings: Settings) -> list[Finding]:
    """The candidate and the traces, where there are to be any."""
    found: list[Finding] = []
    if settings.shadow_folder is not None:
        candidate = settings.shadow_folder
        unread: list[Finding] = []
        _tried(unread, "candidate", lambda: load_candidate(candidate, settings.encoder))
        # The gateway starts without it.
        found += [replace(one, kind="note") for one in unread]
    if settings.traces:
        _tried(found, "traces", lambda: import_module("deferral.gateway.tracing"))
    return found


def _aliases(path: Path, text: str, read: Mapping[str, Any], router: Router, experts: Mapping[str, Expert]) -> list[Finding]:
    found: list[Finding] = []

    def looked_at() -> dict[str, Alias]:
        aliases = aliases_in(path, text, read, experts)
        check_aliases(router, experts, aliases)
        return aliases

    if aliases := _tried(found, "aliases", looked_at):
        found.append(Finding("good", "aliases", f"clients may also ask for {', '.join(aliases)}"))
    return found


def _streams(experts: Mapping[str, Expert]) -> list[Finding]:
    guessed = [name for name, expert in experts.items() if expert.output_price and not expert.stream_usage]
    text = (
        f"what streams of {', '.join(guessed)} cost is estimated from their text where the client asks for no usage; "
        "stream_usage = true has them report it, thoughts that are not shown included"
    )
    return [Finding("note", "streams", text)] if guessed else []


def _prices(experts: Mapping[str, Expert]) -> list[Finding]:
    found: list[Finding] = []
    for name, expert in experts.items():
        # Vectors have no output to be paid for, and who serves nothing else is reached by name only.
        prices = ("input_price", "output_price") if expert.route else ("input_price",)
        if missing := [price for price in prices if getattr(expert, price) == 0]:
            text = f"{' and '.join(missing)} 0: right for a server of your own, else budgets and savings count too little"
            found.append(Finding("note", name, text))
        if cheap := [price for price in prices if 0 < getattr(expert, price) < _CHEAP]:
            text = f"{' and '.join(cheap)} below ${_CHEAP:g} per million tokens: is it a price per token?"
            found.append(Finding("note", name, text))
    return found


def _together(router: Router, experts: Mapping[str, Expert]) -> list[Finding]:
    """The router's experts against those of the file."""
    found: list[Finding] = []
    missing = _tried(found, "experts file", lambda: out_of_service(router, experts))
    if missing is None:
        return found
    served = [name for name in router.experts if name not in missing]
    found.append(Finding("good", "router", f"knows {', '.join(router.experts)}; the file has {', '.join(served)} of them"))
    if missing:
        text = f"{', '.join(missing)} of the router is not in the file, or route = false, and so out of service"
        found.append(Finding("note", "router", text))
    for name, mean in zip(router.experts, router.fitted.mean_price.tolist(), strict=True):
        listed = experts[name].price(_USUAL_TOKENS, _USUAL_TOKENS) if name in served else 0.0
        if min(mean, listed) > 0 and max(mean, listed) > _FAR_OFF * min(mean, listed):
            text = (
                f"expects ${mean:.3g} a query of {name}, whose prices in the file make ${listed:.3g} of {_USUAL_TOKENS} tokens "
                "in and out: are those dollars per million tokens, and the log's dollars a query?"
            )
            found.append(Finding("note", "router", text))
    cascade = router.cascade
    if cascade is not None and (cascade.first in missing or not experts[cascade.first].logprobs):
        text = f"its cascade is not used: it needs {cascade.first} with logprobs = true, and a server that reports them"
        found.append(Finding("note", "router", text))
    return found


def _database(settings: Settings, experts: Mapping[str, Expert] | None) -> list[Finding]:
    found: list[Finding] = []
    record = _tried(
        found,
        "database",
        lambda: Record(
            settings.database,
            store_text=settings.store_text,
            retention_days=settings.retention_days,
            record_days=settings.record_days,
        ),
    )
    if record is None:
        return found
    try:
        version = _tried(found, "database", lambda: look(record.engine))
        if version is None:
            return found
        issued = _issued(record.engine, version) if version else []
    except SQLAlchemyError as error:
        return [Finding("fault", "database", f"its keys cannot be read, {reason_of(error)}")]
    finally:
        record.engine.dispose()
    name = shown(record.engine)
    if version == 0:
        found.append(Finding("good", "database", f"{name} can be written; its tables will be made"))
    elif version < VERSION:
        text = f"{name} has tables of version {version}; they go to {VERSION}, and there is no way back: make a copy before"
        found.append(Finding("note", "database", text))
    else:
        found.append(Finding("good", "database", f"{name} has tables of version {version}, and can be written"))
    return found + _who_may_ask(settings, issued, experts)


def _issued(engine: Engine, version: int) -> list[tuple[Key, bool]]:
    """Every key that ever was, and whether it is valid; in tables of any version."""
    names = ["id", "name", "experts", "requests_per_minute", "budget", "window", "zone", "admin", "revoked"]
    ends = table.c.ends if version >= _KEYS_END else null().label("ends")
    with engine.connect() as connection:
        rows = connection.execute(select(*(table.c[name] for name in names), ends)).all()
    return [(key_of(row), row.revoked is None and (row.ends is None or time.time() < row.ends)) for row in rows]


def _who_may_ask(settings: Settings, issued: list[tuple[Key, bool]], experts: Mapping[str, Expert] | None) -> list[Finding]:
    found = []
    clients = [key for key, valid in issued if valid and not key.admin]
    if clients:
        found.append(Finding("good", "keys", f"{len(clients)} for clients"))
    elif not is_loopback(settings.host):
        found.append(Finding("fault", "keys", no_key(settings.host)))
    elif any(not key.admin for key, _ in issued):
        text = "nobody may ask: there were keys, and none is left for clients; `deferral gateway keys create NAME` makes one"
        found.append(Finding("fault", "keys", text))
    else:
        text = "there is none, so that whoever is on this machine may ask; `deferral gateway keys create NAME` makes one"
        found.append(Finding("note", "keys", text))
    for key in clients:
        if key.budget is not None:
            _tried(found, "keys", partial(_window, key))
        if key.experts is None or experts is None:
            continue
        if unknown := sorted(key.experts - set(experts)):
            kind: Literal["fault", "note"] = "fault" if len(unknown) == len(key.experts) else "note"
            only = " only" if kind == "fault" else ""
            text = f"{key.id} ({key.name}) may{only} ask {', '.join(unknown)}, which the experts file does not have"
            found.append(Finding(kind, "keys", f"{text}; `deferral gateway keys set {key.id} --expert NAME` says whom else"))
    return found


def _window(key: Key) -> None:
    """ValueError where this machine cannot say when the window of its budget ends."""
    try:
        time_zone(key.zone)
    except ValueError as error:
        raise ValueError(f"the budget of {key.id} ({key.name}) cannot be kept here: {error}") from None


def _address(settings: Settings) -> list[Finding]:
    try:
        listening(settings.host, settings.port).close()
    except DataError as error:
        return [Finding("fault", "address", f"{error} (--port 0 leaves this out, where the gateway that is there stays)")]
    return [Finding("good", "address", f"{settings.host}:{settings.port} is free")]
