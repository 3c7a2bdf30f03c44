"""Whether the traffic has moved away from what the router was fitted on: what is seen, with an interval, beside what is allowed.

unlike: the share of the queries that would have to be of other kinds for the traffic to be made of the kinds of the log, in
their shares there (the distance in total variation).
quality: of each expert, the mean of the judged quality less the one that was expected of the answer.
price: of each expert, what its answers cost over what they were expected to cost; no answer counts for more than the one of
median expected price, so that the few of long documents do not stand for all.

Answers that were kept, or asked for, by the log-probabilities of a first one were chosen for more than was expected of them
before it: they do not count for the quality.

An alarm rises when the whole interval lies outside of what is allowed, and falls when the estimate is back inside.  The interval
is at such a level that over all looks of a month at all experts one alarm in ten months is false, however often the same answers
are looked at (a union bound), as long as requests are independent and what is allowed holds.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy import Column, Connection, Row, Select, exists, select

from deferral.gateway.rows import BY_ANSWER, ROUTED
from deferral.gateway.schema import cascades, decisions, feedback, own_price

__all__ = ["ALLOWED", "EVERY", "Expected", "Seen", "confidence", "interval", "looked_at", "price", "quality", "rings", "unlike"]

ALLOWED = {"unlike": (0.0, 0.25), "quality": (-0.05, math.inf), "price": (1 / 1.5, 1.5)}
EVERY = 600.0  # seconds between two looks
_MONTH = 30 * 86400.0
_FALSE_ALARMS = 0.1  # a month
# An answer counts as at most so many times what it was expected to cost: the bound that the interval needs.
_MOST_PRICE = 5.0
_ROWS = 5000
_IN_A_SLOT = 100


@dataclass(frozen=True)
class Expected:
    """What a router knows of its traffic: its experts, the kinds of queries and the share of each in its log.  C kinds."""

    experts: Sequence[str]
    kinds: Sequence[str]
    shares: np.ndarray  # (C,)


@dataclass(frozen=True)
class Seen:
    """Of one alarm and one expert ("" is all): an estimate from so many rows, and its interval; None where they are too few."""

    name: str
    expert: str
    rows: int
    found: float | None = None
    low: float | None = None
    high: float | None = None


def confidence(experts: int) -> float:
    """The chance that one of the intervals may miss, in a look at so many experts."""
    return _FALSE_ALARMS / (_MONTH / EVERY) / (1 + 2 * experts)


def rings(seen: Seen, was: bool) -> bool:
    """Whether the alarm rings after this look, if it did or did not before."""
    if seen.found is None or seen.low is None or seen.high is None:
        return False
    least, most = ALLOWED[seen.name]
    if was:
        return not least <= seen.found <= most
    return seen.low > most or seen.high < least


def unlike(counts: np.ndarray, shares: np.ndarray, level: float) -> Seen:
    """How many queries were of each kind, and the share of each in the log.  (C,), (C,)

    The estimate sum |counts / N - shares| / 2 exceeds the truth by at most sqrt(C / N) / 2 on the mean, and one query moves it by
    at most 1 / N: McDiarmid, "On the method of bounded differences" (1989).
    """
    size, kinds = int(counts.sum()), len(shares)
    if size < 2 or not kinds:
        return Seen("unlike", "", size)
    found = float(np.abs(counts / size - shares).sum() / 2)
    chance = math.sqrt(math.log(2 / level) / (2 * size))
    low = max(found - math.sqrt(kinds / size) / 2 - chance, 0.0)
    return Seen("unlike", "", size, found, low, min(found + chance, 1.0))


def quality(expert: str, judged: np.ndarray, expected: np.ndarray, level: float) -> Seen:
    """(N,) in [0, 1], (N,) in [0, 1]"""
    return _seen("quality", expert, judged - expected, -1.0, 1.0, level)


def price(expert: str, paid: np.ndarray, expected: np.ndarray, level: float) -> Seen:
    """Dollars.  (N,), (N,)"""
    rows, priced = len(paid), expected > 0
    if not priced.any():
        return Seen("price", expert, rows)
    paid, expected = paid[priced], expected[priced]
    weights = np.minimum(expected, np.median(expected))
    # At most 2, as half of them are at their largest.
    weights /= weights.mean()
    values = weights * np.minimum(paid / expected, _MOST_PRICE)
    return _seen("price", expert, values, 0.0, _MOST_PRICE * float(weights.max()), level)


def interval(values: np.ndarray, least: float, most: float, level: float) -> tuple[float, float]:
    """Where the mean of N >= 2 independent values in [least, most] lies, but for a chance of `level`.  (N,) -> low, high

    mean +- sqrt(2 V ln(4 / level) / N) + 7 (most - least) ln(4 / level) / (3 (N - 1)), V the sample variance.
    Maurer, Pontil, "Empirical Bernstein Bounds and Sample Variance Penalization" (2009), theorem 4, on both sides.
    """
    size, doubt = len(values), math.log(4 / level)
    half = math.sqrt(2 * values.var(ddof=1) * doubt / size) + 7 * (most - least) * doubt / (3 * (size - 1))
    mean = float(values.mean())
    return max(mean - half, least), min(mean + half, most)


def looked_at(connection: Connection, expected: Expected, now: float) -> list[Seen]:
    """Every alarm, from the newest 5,000 routed requests of a day and the newest 5,000 judgements of a week.

    At most 100 of five minutes, and of an hour: a burst must not stand for the whole.
    """
    d, experts = decisions.c, expected.experts
    level = confidence(len(experts))
    routed = select(d.expert, own_price, d.expected, d.outcome, d.kind).outerjoin(cascades, cascades.c.decision == d.id)
    rows = _spread(connection, routed.where(d.requested == ROUTED), d.time, now, slot=300.0, span=86400.0)
    said = select(d.expert, feedback.c.quality, d.expected).join(decisions, d.id == feedback.c.decision)
    # With an outer join PostgreSQL expects that hardly a decision lacks a cascade, and reads all decisions for each slot.
    first_decided = exists().where(cascades.c.decision == d.id, cascades.c.ending.in_(BY_ANSWER))
    judged = _spread(
        connection, said.where(d.requested == ROUTED, ~first_decided), feedback.c.time, now, slot=3600.0, span=604800.0
    )
    paid: dict[str, list[tuple[float, float]]] = {name: [] for name in experts}
    good: dict[str, list[tuple[float, float]]] = {name: [] for name in experts}
    for row in rows:
        if row.outcome == "ok" and row.expert in paid and (usual := _usual(row, 1)) is not None:
            paid[row.expert].append((row.price, usual))
    for row in judged:
        if row.expert in good and (usual := _usual(row, 0)) is not None:
            good[row.expert].append((row.quality, usual))
    place = {kind: number for number, kind in enumerate(expected.kinds)}
    # Kinds of another router, before a reload or on another machine, are others.
    known = np.array([place[row.kind] for row in rows if row.kind in place], int)
    return [
        unlike(np.bincount(known, minlength=len(place)), expected.shares, level),
        *(quality(name, *_columns(good[name]), level) for name in experts),
        *(price(name, *_columns(paid[name]), level) for name in experts),
    ]


def _seen(name: str, expert: str, values: np.ndarray, least: float, most: float, level: float) -> Seen:
    if len(values) < 2:
        return Seen(name, expert, len(values))
    return Seen(name, expert, len(values), float(values.mean()), *interval(values, least, most, level))


def _spread(connection: Connection, wanted: Select, moment: Column[float], now: float, *, slot: float, span: float) -> list[Row]:
    """The newest rows of a span of time, the newest first; at most 100 of each slot, so that they are from a while."""
    rows: list[Row] = []
    end, wanted = now, wanted.add_columns(moment.label("moment"))
    while len(rows) < _ROWS and end > now - span:
        within = wanted.where(moment > now - span, moment <= end)
        some = connection.execute(within.order_by(moment.desc()).limit(_IN_A_SLOT)).all()
        rows += some
        if len(some) < _IN_A_SLOT:
            break
        # The rest of a slot that is full is left out; rows that are further apart are all taken.
        end = min(end - slot, math.nextafter(some[-1].moment, 0.0))
    return rows[:_ROWS]


def _usual(row: Row, place: int) -> float | None:
    """Of who answered: 0 the quality, 1 the price in dollars; None where nothing was expected."""
    found = json.loads(row.expected).get(row.expert)
    return None if found is None else found[place]


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs, float).reshape(-1, 2)
    return table[:, 0], table[:, 1]
