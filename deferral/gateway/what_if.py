"""What another price of an error would have cost and answered, from the decisions on record."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sqlalchemy import Engine, func, or_, select

from deferral.gateway.off_policy import Draws, doubly_robust
from deferral.gateway.schema import cascades, decisions, feedback

__all__ = ["Point", "WhatIf", "what_if"]

_ROWS = 5000
_POINTS = 25
_Z = 1.96


@dataclass(frozen=True)
class Point:
    """One setting: means and halves of their 95% intervals, and the share of the queries that each expert would get."""

    price_of_error: float  # dollars
    price: float  # dollars a query
    price_half: float
    quality: float
    quality_half: float
    shares: dict[str, float]


@dataclass(frozen=True)
class WhatIf:
    """The settings from the cheapest on, over the newest `rows` routed answers, `judged` of them with feedback.

    `explored` of them were drawn, with a propensity of at most 1/2, from another expert than the one of the lowest expected cost
    (what a conversation or a first answer keeps has a higher one): only through these is it known what experts answer that the
    router does not ask; without them that is its own estimate, and so are the intervals.
    """

    rows: int
    judged: int
    explored: int
    present: float | None  # the price of an error of the newest routed answer
    points: list[Point]
    qualities: dict[str, tuple[int, float]]  # expert: its answers with feedback, and their mean quality

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def what_if(engine: Engine, *, since: float, until: float) -> WhatIf:
    """Judge other settings by doubly robust means: since <= time < until, in seconds since 1970.

    A query would go to the expert of the lowest 1 - quality + price / price_of_error among those that it was allowed to; what
    that would have cost and how good the answer would have been is the router's estimate, corrected by 1 / propensity times its
    error wherever that expert was drawn.  Qualities are corrected on the rows with feedback alone, and are the router's own
    where there is none.  Dudík, Langford, Li, "Doubly Robust Policy Evaluation and Learning" (2011), eq. 2.
    """
    d, through = decisions.c, cascades.c
    opinion = select(func.avg(feedback.c.quality)).where(feedback.c.decision == d.id).scalar_subquery().label("quality")
    wanted = (
        select(
            d.chosen,
            d.propensity,
            d.expected,
            (d.price - func.coalesce(through.extra, 0.0)).label("price"),
            d.price_of_error,
            opinion,
        )
        .outerjoin(cascades, through.decision == d.id)
        # An answer that was kept by its log-probabilities, with certainty, says nothing of those that were not.
        .where(or_(through.decision.is_(None), through.ending.not_in(("kept", "deferred")), d.propensity < 1))
        .where(d.time >= since, d.time < until, d.requested == "auto", d.outcome == "ok", d.expert == d.chosen)
        .where(d.propensity > 0, d.price_of_error > 0)
        .order_by(d.time.desc())
        .limit(_ROWS)
    )
    with engine.connect() as connection:
        rows = connection.execute(wanted).all()
    if not rows:
        return WhatIf(0, 0, 0, None, [], {})
    expected = [json.loads(row.expected) for row in rows]
    experts = sorted({name for one in expected for name in one})
    quality, price = np.full((2, len(rows), len(experts)), np.nan)
    for place, (row, one) in enumerate(zip(rows, expected, strict=True)):
        for name, (good, dollars, cost) in one.items():
            if cost is not None or name == row.chosen:
                quality[place, experts.index(name)], price[place, experts.index(name)] = _number(good), _number(dollars)
    drawn = np.array([experts.index(row.chosen) if row.chosen in experts else -1 for row in rows])
    usable = (drawn >= 0) & ~np.isnan(quality[np.arange(len(rows)), drawn]) & ~np.isnan(price[np.arange(len(rows)), drawn])
    if not usable.any():
        return WhatIf(0, 0, 0, None, [], {})
    quality, price, drawn = quality[usable], price[usable], drawn[usable]
    propensity, present = np.array([(row.propensity, row.price_of_error) for row in rows])[usable].T
    best = np.nanargmin(1 - quality + price / present[:, None], axis=1)
    paid = np.array([row.price for row in rows])[usable]
    said = np.array([math.nan if row.quality is None else row.quality for row in rows])[usable]
    judged, rows_of_all = ~np.isnan(said), np.arange(len(drawn))
    priced = Draws(drawn, propensity, paid, price, rows_of_all)
    judgements = Draws(drawn[judged], propensity[judged], said[judged], quality[judged], rows_of_all[judged])
    points = []
    for error in _settings(quality, price):
        actions = np.nanargmin(1 - quality + price / error, axis=1)
        dollars = doubly_robust(priced, actions)
        good = doubly_robust(judgements, actions[judged]) if judged.any() else quality[rows_of_all, actions]
        shares = np.bincount(actions, minlength=len(experts)) / len(actions)
        points.append(Point(float(error), *_mean(dollars), *_mean(good), dict(zip(experts, shares.tolist(), strict=True))))
    own = {name: said[judged & (drawn == place)] for place, name in enumerate(experts)}
    return WhatIf(
        rows=len(drawn),
        judged=int(judged.sum()),
        explored=int(((drawn != best) & (propensity <= 0.5)).sum()),
        present=float(present[0]),
        points=points,
        qualities={name: (len(each), float(each.mean())) for name, each in own.items() if len(each)},
    )


def _settings(quality: np.ndarray, price: np.ndarray) -> np.ndarray:
    """Prices of an error from one at which (nearly) all go to the cheapest to one at which price hardly matters.  -> (G,)"""
    spread = np.nanmean(np.nanmax(price, 1) - np.nanmin(price, 1))
    gap = np.nanmean(np.nanmax(quality, 1) - np.nanmin(quality, 1))
    middle = spread / max(gap, 1e-3)
    return np.geomspace(max(middle / 30, 1e-9), max(middle * 100, 1e-7), _POINTS)


def _mean(values: np.ndarray) -> tuple[float, float]:
    half = _Z * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(half)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
