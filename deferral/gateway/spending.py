"""Who spent what: requests, tokens and dollars, by key, expert, day or month."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Any

from sqlalchemy import BigInteger, Engine, case, cast, func, literal, select, union_all

from deferral.gateway.schema import cascades, decisions, forgotten
from deferral.gateway.windows import QUARTER

__all__ = ["BY", "DELETED", "Spent", "spending"]

BY = ("key", "expert", "day", "month")
# What was deleted from the record is known by key and time alone, and for 32 days: as long as a budget can need it.
DELETED = "(deleted)"


@dataclass(slots=True)
class Spent:
    """Dollars, and what they were spent on; `estimated` of the requests have a price that is an estimate."""

    requests: int = 0
    estimated: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    price: float = 0.0

    def add(self, requests: int, estimated: int, input_tokens: int, output_tokens: int, price: float) -> None:
        self.requests += requests
        self.estimated += estimated
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens
        self.price += price


def spending(
    engine: Engine, names: Mapping[str, str], by: Sequence[str], *, since: float, until: float, zone: tzinfo = UTC
) -> dict[tuple[str, ...], Spent]:
    """What was spent on requests that arrived at since <= time < until, in the groups `by`, dearest first within each day.

    `names` has those of the keys by their ids.  Days and months are those of the zone.
    """
    if unknown := [one for one in by if one not in BY] or (by if len(set(by)) < len(by) or not by else []):
        raise ValueError(f"by: expected different ones of {', '.join(BY)}, at least one, got {', '.join(unknown) or 'none'}")
    found: dict[tuple[str, ...], Spent] = defaultdict(Spent)
    for key, expert, quarter, *figures in _rows(engine, since, until):
        moment = datetime.fromtimestamp(quarter * QUARTER, zone)
        told = {
            "key": names.get(key, key or "(no key)"),
            "expert": expert or "(nobody)",
            "day": moment.strftime("%Y-%m-%d"),
            "month": moment.strftime("%Y-%m"),
        }
        found[tuple(told[one] for one in by)].add(*figures)
    dates = [place for place, one in enumerate(by) if one in ("day", "month")]
    order = sorted(found, key=lambda group: ([group[place] for place in dates], -found[group].price, group))
    return {group: found[group] for group in order}


def _rows(engine: Engine, since: float, until: float) -> Iterator[Any]:
    """Key, expert, quarter of an hour since 1970, and the figures of each."""
    d, f, c = decisions.c, forgotten.c, cascades.c
    # PostgreSQL rounds where SQLite cuts.
    whole = func.floor if engine.dialect.name == "postgresql" else lambda value: value
    quarter = cast(whole(d.time / QUARTER), BigInteger)
    guessed = func.sum(case((d.estimated & (d.price > 0), 1), else_=0))
    sums = (func.count(), guessed, *map(func.sum, (d.input_tokens, d.output_tokens, d.price)))
    nothing = [literal(0)] * 4
    recent = (d.time >= since) & (d.time < until)
    kept = select(d.key, d.expert, quarter, *sums).where(recent).group_by(d.key, d.expert, quarter)
    # A first answer that was not given is on the bill of whoever gave it.
    both = select(decisions).join(cascades, c.decision == d.id).where(recent & (c.extra > 0))
    first = both.with_only_columns(d.key, c.first, quarter, *nothing, func.sum(c.extra)).group_by(d.key, c.first, quarter)
    second = both.with_only_columns(d.key, d.expert, quarter, *nothing, -func.sum(c.extra)).group_by(d.key, d.expert, quarter)
    gone = select(f.key, literal(DELETED), cast(whole(f.time / QUARTER), BigInteger), *nothing, f.price)
    gone = gone.where(f.time >= since, f.time < until)
    # One statement: what is deleted meanwhile must not be counted twice.
    with engine.connect() as connection:
        for key, expert, part, *counts, price in connection.execute(union_all(kept, first, second, gone)):
            yield (key, expert, part, *map(int, counts), float(price))
