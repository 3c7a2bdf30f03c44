"""What another price of an error would have cost and answered, from the decisions on record."""

import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sqlalchemy import Engine, Select, or_, select

from deferral.gateway.export import DRAWN, in_vain, whole
from deferral.gateway.off_policy import FEWEST_SEEN, Draws, alike, doubly_robust, interval_of_mean, one_more
from deferral.gateway.rows import BY_ANSWER, ROUTED
from deferral.gateway.schema import cascades, decisions
from deferral.routing.decisions import AT_RANDOM

__all__ = ["Point", "WhatIf", "what_if"]

_ROWS, _AT_A_TIME = 5000, 500
# Expectations that are looked at: of 100 experts, those of 5,000 rows.
_NUMBERS = 500_000
_POINTS = 25
# A share of the queries, below which few answers are no reason to warn.
_WORTH_MENTIONING = 0.02
_NOBODY = -1


@dataclass(frozen=True)
class Point:
    """One setting: means and halves of their 95% intervals, and the share of the queries that each expert would get.

    A half is None where too little was seen for an interval: `price_guessed` and `quality_guessed` are the experts of whose
    answers, to queries that they get now or to those that they would get only then, fewer than 20 are on record, or judged; or
    who would get one in fifty of the queries where somebody else was certain to be asked.
    """

    price_of_error: float  # dollars
    price: float  # dollars a query
    price_half: float | None
    price_guessed: list[str]
    quality: float
    quality_half: float | None
    quality_guessed: list[str]
    shares: dict[str, float]


@dataclass(frozen=True)
class WhatIf:
    """The settings from the cheapest on, the present one among them, over the newest `rows` routed answers, `judged` of them.

    `explored` of them were drawn at random from another expert than the one of the lowest expected cost: only through these is it
    known what experts answer that the router does not ask; without them that is its own estimate.
    """

    rows: int
    judged: int
    explored: int
    present: float  # the router's price of an error
    points: list[Point]
    qualities: dict[str, tuple[int, float]]  # expert: its answers with feedback, and their mean quality


def what_if(engine: Engine, *, since: float, until: float, present: float) -> WhatIf:
    """Judge other settings by doubly robust means: since <= time < until, in seconds since 1970; `present` in dollars.

    A query would go to the expert of the lowest 1 - quality + price / price_of_error among those that it was allowed to; what
    that would have cost and how good the answer would have been is the router's estimate, corrected by 1 / propensity times its
    error wherever that expert was drawn and answered.  Qualities are corrected where there is feedback, by 1 / (propensity * the
    share of the expert's draws that have it), prices by the share that was answered: who is judged more often, or fails less
    often, must not count for more.  That is right where failures and feedback depend on nothing else that quality and price
    depend on.  Dudík, Langford, Li, "Doubly Robust Policy Evaluation and Learning" (2011), eq. 2.
    """
    d, through = decisions.c, cascades.c
    wanted = (
        select(*DRAWN)
        .outerjoin(cascades, through.decision == d.id)
        # An answer that was kept by its log-probabilities, with certainty, says nothing of those that were not.
        .where(or_(through.decision.is_(None), through.ending.not_in(BY_ANSWER), d.propensity < 1))
        .where(d.time >= since, d.time < until, d.requested == ROUTED, d.propensity > 0, d.price_of_error > 0)
        # What a client did wrong is neither an answer nor a failure, and there may be thousands of it.
        .where(or_(d.outcome == "ok", d.expert != d.chosen, d.outcome.in_(("truncated", "cancelled"))), d.outcome != "refused")
        .order_by(d.time.desc())
        .limit(_ROWS)
    )
    rows, experts = _read(engine, wanted)
    if not any(row.answered for row in rows):
        return WhatIf(0, 0, 0, present, [], {})
    quality, price = np.full((2, len(rows), len(experts)), np.nan)
    for number, row in enumerate(rows):
        quality[number, row.places], price[number, row.places] = row.expected
    # By name, whoever came first: that breaks ties.
    order = np.argsort(experts)
    experts, quality, price = sorted(experts), quality[:, order], price[:, order]
    drawn = np.argsort(order)[[row.drawn for row in rows]]
    propensity, asked_at = np.array([(row.propensity, row.price_of_error) for row in rows]).T
    best = np.nanargmin(1 - quality + price / asked_at[:, None], axis=1)
    paid = np.array([row.price for row in rows])
    answered = np.array([row.answered for row in rows])
    said = np.array([row.quality for row in rows])
    judged = ~np.isnan(said)
    group = alike([row.draw for row in rows])
    certain = (propensity == 1) & (np.isfinite(quality).sum(1) > 1)

    def draws_of(told: np.ndarray, cost: np.ndarray, estimate: np.ndarray) -> Draws:
        """Rows that tell nothing stay as what is expected; the others stand for them."""
        share = np.bincount(drawn[told], minlength=len(experts)) / np.maximum(np.bincount(drawn, minlength=len(experts)), 1)
        chance = np.where(told, propensity * share[drawn], 1.0)
        return Draws(np.where(told, drawn, _NOBODY), chance, cost, estimate, group)

    priced, judgements = draws_of(answered, paid, price), draws_of(judged, said, quality)
    points = []
    for error in _settings(quality, price, present):
        actions = np.nanargmin(1 - quality + price / error, axis=1)
        unknown = actions[certain & (actions != drawn)]
        few = [_unseen(actions, best, draws, unknown, experts) for draws in (priced, judgements)]
        costs, good = doubly_robust(priced, actions), doubly_robust(judgements, actions)
        cost, cost_half = _mean(costs, group)
        quality_then, quality_half = _mean(good, group)
        if quality_half is not None:
            quality_half = max(quality_half, _half_with_one_more(judgements, actions, best, good))
        shares = np.bincount(actions, minlength=len(experts)) / len(actions)
        by_name = dict(zip(experts, shares.tolist(), strict=True))
        halves = [None if less else half for half, less in zip((cost_half, quality_half), few, strict=True)]
        points.append(Point(float(error), cost, halves[0], few[0], quality_then, halves[1], few[1], by_name))
    own = {name: said[judged & (drawn == place)] for place, name in enumerate(experts)}
    return WhatIf(
        rows=int(answered.sum()),
        judged=int(judged.sum()),
        explored=int((answered & (drawn != best) & np.array([row.at_random for row in rows])).sum()),
        present=present,
        points=points,
        qualities={name: (len(each), float(each.mean())) for name, each in own.items() if len(each)},
    )


class _Seen(NamedTuple):
    """A decision as far as it is looked at here; `expected` (2, n) has qualities and prices of the experts at `places`."""

    drawn: int
    places: np.ndarray
    expected: np.ndarray
    propensity: float
    price_of_error: float
    price: float
    answered: bool
    quality: float  # NaN without feedback
    at_random: bool
    draw: float | None


def _read(engine: Engine, wanted: Select) -> tuple[list[_Seen], list[str]]:
    """The rows that say what came of a draw, and the experts; of as many experts as may be, no more than fits into memory."""
    place: dict[str, int] = {}
    found, numbers = [], 0
    with engine.connect() as connection:
        for row in connection.execution_options(yield_per=_AT_A_TIME).execute(wanted):
            answered = whole(row)
            if not (answered or in_vain(row, row)):
                continue
            asked = {
                name: (_number(good), _number(dollars))
                for name, (good, dollars, cost) in json.loads(row.expected).items()
                if cost is not None or name == row.chosen
            }
            if np.isnan(asked.get(row.chosen, math.nan)).any():
                continue
            places = np.array([place.setdefault(name, len(place)) for name in asked])
            quality = row.quality if answered and row.quality is not None else math.nan
            found.append(
                _Seen(
                    place[row.chosen], places, np.array([*asked.values()]).T, row.propensity, row.price_of_error, row.price,
                    answered, quality, AT_RANDOM in row.reason, row.draw,
                )
            )  # fmt: skip
            numbers += len(asked)
            if numbers >= _NUMBERS:
                break
    return found, list(place)


def _settings(quality: np.ndarray, price: np.ndarray, present: float) -> np.ndarray:
    """Prices of an error from one at which (nearly) all go to the cheapest to one at which price hardly matters.  -> (G,)"""
    spread = np.nanmean(np.nanmax(price, 1) - np.nanmin(price, 1))
    gap = np.nanmean(np.nanmax(quality, 1) - np.nanmin(quality, 1))
    # Where all cost the same, every setting does the same.
    middle = spread / max(gap, 1e-3) if spread > 0 else present
    return np.union1d(np.geomspace(middle / 30, middle * 100, _POINTS), present)


def _unseen(actions: np.ndarray, best: np.ndarray, draws: Draws, unknown: np.ndarray, experts: list[str]) -> list[str]:
    """Experts too few of whose answers were seen among the queries that are theirs already, or among those that are not.

    `unknown` are the actions for queries of which nobody else could have been drawn: the answers to others say nothing of those.
    """
    theirs = 2 * actions + (actions != best)
    asked = np.bincount(theirs, minlength=2 * len(experts))
    seen = draws.action == actions
    # A query that was asked again was seen once.
    once = np.unique(np.stack([theirs[seen], draws.group[seen]]), axis=1)[0]
    known = np.bincount(once, minlength=2 * len(experts))
    few = np.logical_and(asked >= _WORTH_MENTIONING * len(actions), known < FEWEST_SEEN).reshape(-1, 2).any(1)
    few |= np.bincount(unknown, minlength=len(experts)) >= _WORTH_MENTIONING * len(actions)
    return [name for name, one in zip(experts, few, strict=True) if one]


def _half_with_one_more(draws: Draws, actions: np.ndarray, best: np.ndarray, values: np.ndarray) -> float:
    """Half the interval with one more answer like those that were drawn by chance, of no use or perfect, whichever says more.

    A few answers of heavy weight may hold none of a rare kind by luck, and their own spread then knows nothing of it.
    """
    seen, moved = actions == draws.action, actions != best
    of = np.ones(len(seen), bool)
    if (seen & moved).any():
        seen, of = seen & moved, moved
    if not seen.any():
        return 0.0
    group, halves = np.append(draws.group, draws.group.max() + 1), []
    for quality in (0.0, 1.0):
        mean, half = _mean(np.append(values, one_more(draws, actions, seen, quality, of=int(of.sum()))), group)
        assert half is not None
        halves.append(abs(mean - float(values.mean())) + half)
    return max(halves)


def _mean(values: np.ndarray, group: np.ndarray) -> tuple[float, float | None]:
    return interval_of_mean(values, np.ones(len(values)), group)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
