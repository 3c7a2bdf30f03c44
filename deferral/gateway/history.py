"""The record over time, in steps of equal length, and the newest decisions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any

from sqlalchemy import Engine, func, or_, select

from deferral.gateway.off_policy import Z
from deferral.gateway.rows import id_kept, plain
from deferral.gateway.schema import decisions, minutes

__all__ = ["History", "Total", "answerers", "history", "recent", "said"]

_STEPS = 60
_MINUTE = 60


@dataclass(frozen=True)
class Total:
    """What one expert answered; "" is nobody.  Dollars, and seconds on the mean, None where nothing was timed."""

    requests: int
    failed: int
    price: float
    latency_s: float | None


@dataclass(frozen=True)
class History:
    """Of S steps of `width` seconds from `start` on.  Prices in dollars.

    `saving` is what the tokens of the routed answers would have cost at the router's best expert, less what was paid;
    `saving_half` is half the 95% interval of its sum from `start` to the end of a step, as of independent requests; None where
    fewer than two were compared, which say nothing of their spread.
    """

    start: int
    width: int
    requests: list[int]
    price: list[float]
    saving: list[float]
    saving_half: list[float | None]
    experts: dict[str, list[int]]  # requests that each answered, whoever answered most first
    totals: dict[str, Total]
    routed: int
    compared: int  # routed answers that `saving` is about
    estimated: int  # answers whose price is an estimate


def history(engine: Engine, *, since: float, until: float) -> History:
    """Read it from the sums over the minutes that began at `since` or later, and before `until`, in seconds since 1970."""
    first, end = math.ceil(since / _MINUTE), math.ceil(until / _MINUTE)
    each = max(1, math.ceil((end - first) / _STEPS))
    steps = max(1, math.ceil((end - first) / each))
    m = minutes.c
    step = (m.minute - first) // each
    columns = [func.sum(column).label(column.name) for column in m if not column.primary_key]
    with engine.connect() as connection:
        rows = connection.execute(
            select(step.label("step"), m.expert, *columns).where(m.minute >= first, m.minute < end).group_by(step, m.expert)
        ).all()
    found = {name: [0.0] * steps for name in ("requests", "price", "saved", "saved_squared", "compared")}
    counts: dict[str, list[int]] = {}
    sums: dict[str, list[float]] = {}
    routed = estimated = 0
    for row in rows:
        for name, values in found.items():
            values[int(row.step)] += float(getattr(row, name))
        counts.setdefault(row.expert, [0] * steps)[int(row.step)] = int(row.requests)
        total = sums.setdefault(row.expert, [0.0] * 4)
        for place, value in enumerate((row.failed, row.price, row.timed, row.latency)):
            total[place] += float(value)
        routed, estimated = routed + int(row.routed), estimated + int(row.estimated)
    so_far = (accumulate(found[name]) for name in ("saved_squared", "saved", "compared"))
    half = [
        # The variance of a sum is the number of its terms times theirs.
        Z * math.sqrt(max(squares - saved * saved / count, 0.0) * count / (count - 1)) if count > 1 else None
        for squares, saved, count in zip(*so_far, strict=True)
    ]
    experts = dict(sorted(counts.items(), key=lambda entry: -sum(entry[1])))
    return History(
        start=first * _MINUTE,
        width=each * _MINUTE,
        requests=[int(count) for count in found["requests"]],
        price=found["price"],
        saving=found["saved"],
        saving_half=half,
        experts=experts,
        totals={
            name: Total(sum(experts[name]), int(failed), price, latency / timed if timed else None)
            for name, (failed, price, timed, latency) in ((name, sums[name]) for name in experts)
        },
        routed=routed,
        compared=int(sum(found["compared"])),
        estimated=estimated,
    )


def answerers(engine: Engine, *, since: float | None = None) -> list[str]:
    """Who answered requests from `since` on, by name; "" is nobody."""
    expert, time = decisions.c.expert, decisions.c.time
    with engine.connect() as connection:
        found = connection.execute(select(expert).where(*([] if since is None else [time >= since])).distinct())
        return sorted(found.scalars())


def recent(
    engine: Engine,
    *,
    count: int = 50,
    since: float | None = None,
    key: str | None = None,
    expert: str | None = None,
    outcome: str | None = None,
    response: str | None = None,
) -> list[dict[str, Any]]:
    """The newest decisions, newest first: who was asked and why, and what came of it.

    Only those that arrived at `since` or later; of one key, by its id; whom one expert answered ("": nobody); of one outcome;
    of one response, by the gateway's id or the reply's own.
    """
    d = decisions.c
    columns = (
        d.id, d.time, d.key, d.requested, d.expert, d.chosen, d.reason, d.propensity, d.price, d.estimated,
        d.input_tokens, d.output_tokens, d.latency_s, d.status, d.outcome, d.attempts, d.streamed, d.fast_path,
    )  # fmt: skip
    wanted = select(*columns).order_by(d.time.desc(), d.id.desc()).limit(count)
    if since is not None:
        wanted = wanted.where(d.time >= since)
    for column, value in ((d.key, key), (d.expert, expert), (d.outcome, outcome)):
        if value is not None:
            wanted = wanted.where(column == plain(value))
    if response is not None:
        wanted = wanted.where(or_(d.id == plain(response), d.reply_id == id_kept(response)))
    with engine.connect() as connection:
        rows = connection.execute(wanted).all()
    return [dict(row._mapping) for row in rows]


def said(one: Mapping[str, Any], key: str) -> str:
    """A decision as a line, with the name of its key."""
    when = datetime.fromtimestamp(one["time"], UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    took = "" if one["latency_s"] is None else f" in {one['latency_s']:.2f} s"
    asked = f"{key or 'anyone'} asked {one['requested']}, {one['expert'] or 'nobody'} answered"
    chance = "" if one["propensity"] is None else f" (with probability {one['propensity']:.3g})"
    cost = f"${one['price']:.3g}"
    line = f"{when} {one['id']} {asked}: {one['outcome']} ({one['status']}){took}, {cost}; {one['reason']}{chance}"
    # Some of it a client wrote, who might clear the screen of whoever reads it, or forge the next line.
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)
