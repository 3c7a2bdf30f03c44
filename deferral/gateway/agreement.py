"""How a candidate router that decided beside the live one compares with it: agreement, and what it would have gained."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy import Engine, Row, select

from deferral.gateway.export import DRAWN, allowed, by_chance, in_vain, whole
from deferral.gateway.off_policy import (
    FEWEST_SEEN,
    Draws,
    Z,
    alike,
    cautious_gain,
    doubly_robust,
    interval_of_mean,
    of_no_use,
    stakes,
)
from deferral.gateway.rows import BY_ANSWER
from deferral.gateway.schema import cascades, decisions, shadows
from deferral.routing.decisions import AT_RANDOM

__all__ = ["Agreement", "Gain", "agreement"]

_ROWS = 20_000


@dataclass(frozen=True)
class Gain:
    """What changing to the candidate saves, in errors a query, on the `rows` that were judged.

    `estimate` is doubly robust, `half` half its 95% interval, which allows for a failure, or a right answer, of either that was
    not seen; `weighted` is the self-normalised inverse propensity estimate.  `seen`: where the routers differ, the queries that
    drew the live choice, and the candidate's.
    """

    rows: int
    differ: int
    seen: tuple[int, int]
    estimate: float
    half: float
    weighted: float


@dataclass(frozen=True)
class Agreement:
    """Of the newest `rows` requests that the candidate (a fingerprint of its folder) decided as well; a 95% interval of Wilson.

    `pairs`: how often the live router chose the first expert where the candidate chose the second.  `gain` is None where nothing
    can be said, and `why_no_gain` says why.
    """

    candidate: str
    rows: int
    agree: int
    low: float
    high: float
    pairs: list[tuple[str, str, int]]
    gain: Gain | None
    why_no_gain: str

    def __str__(self) -> str:
        if not self.rows:
            return self.why_no_gain
        interval = f"{self.agree / self.rows:.1%} [{self.low:.1%}, {self.high:.1%}]"
        lines = [f"candidate {self.candidate}: agrees on {self.agree} of {self.rows} requests, {interval}"]
        lines += [f"  {live} -> {other}: {count}" for live, other, count in self.pairs if live != other]
        if (gain := self.gain) is None:
            return "\n".join([*lines, f"gain: not known, {self.why_no_gain}"])
        low, high = gain.estimate - gain.half, gain.estimate + gain.half
        lines += [
            f"gain: {gain.estimate:.4f} [{low:.4f}, {high:.4f}] errors a query (doubly robust), "
            f"{gain.weighted:.4f} (self-normalised weights)",
            f"from {gain.rows} judged answers; they differ on {gain.differ}, where {gain.seen[0]} different queries drew the "
            f"live choice, {gain.seen[1]} the candidate's",
        ]
        return "\n".join(lines)


def agreement(engine: Engine, *, since: float, until: float) -> Agreement:
    """Of the candidate that decided last: since <= time < until, in seconds since 1970.

    The candidate decides every request by itself, also in a conversation that stays where it is.  The live choice is the one
    without exploration: whom it asked, or, where that was a draw at random, the lowest expected cost of the others.  An answer
    that was kept or not by its log-probabilities was no choice of the router: that is the lowest expected cost, and such an
    answer counts for the gain only where it was drawn.

    The cost of an answer is (e (1 - quality) + price) / u, with e the request's price of an error and u the median of all; e
    counts up to 10 u, so that nobody's setting outweighs all others.  Where nobody was drawn it is the live router's expectation.
    Requests whose expert was certain, as before exploration began, count for no gain where others were drawn by chance.  The same
    query, asked again, is one draw.  Where experts are judged at different rates, or fail at such, an answer stands for
    as many as were not.
    """
    d, s, through = decisions.c, shadows.c, cascades.c
    within = (s.time >= since) & (s.time < until)
    with engine.connect() as connection:
        candidate = connection.execute(select(s.candidate).where(within).order_by(s.time.desc()).limit(1)).scalar()
        rows = connection.execute(
            select(s.chosen.label("other"), *DRAWN)
            .join(decisions, d.id == s.decision)
            .outerjoin(cascades, through.decision == d.id)
            .where(within, s.candidate == candidate)
            .order_by(s.time.desc())
            .limit(_ROWS)
        ).all()
    if candidate is None or not rows:
        return Agreement(
            "", 0, 0, 0.0, 1.0, [], None, "no candidate has decided anything in this time (serve with --shadow FOLDER)"
        )
    expected = [json.loads(row.expected) for row in rows]
    live = [_live(row, one) for row, one in zip(rows, expected, strict=True)]
    pairs = Counter((mine, row.other) for mine, row in zip(live, rows, strict=True))
    agree = sum(count for (mine, other), count in pairs.items() if mine == other)
    gain, why = _gain(rows, expected, live)
    listed = [(mine, other, count) for (mine, other), count in pairs.most_common()]
    return Agreement(candidate, len(rows), agree, *_wilson(agree, len(rows)), listed, gain, why)


def _live(row: Row, expected: dict[str, list]) -> str:
    costs = {name: cost for name, (_, _, cost) in expected.items() if cost is not None}
    if not _by_answer(row):
        if AT_RANDOM not in row.reason:
            return str(row.chosen)
        # Drawn at random, in the place of the one that the router, or the conversation, prefers.
        costs = {name: cost for name, cost in costs.items() if name != row.chosen}
    return min(costs, key=lambda name: costs[name], default=str(row.chosen))


def _by_answer(row: Row) -> bool:
    """Whether a first answer was kept or not by its log-probabilities."""
    return row.ending in BY_ANSWER


def _gain(rows: Sequence[Row], expected: list[dict], live: list[str]) -> tuple[Gain | None, str]:
    """-> the gain, or why it is not known"""
    drawn_among = [
        place
        for place, (row, one) in enumerate(zip(rows, expected, strict=True))
        if row.propensity and row.price_of_error
        and (row.propensity < 1 or not _by_answer(row))
        and {row.chosen, row.other, live[place]} <= one.keys()
    ]  # fmt: skip
    # What was certain to be drawn says nothing of the others, and it would be the estimate alone that does.
    with_chance = [p for p in drawn_among if by_chance(rows[p].propensity, allowed(rows[p].chosen, expected[p]))]
    drawn_among = with_chance or drawn_among
    answered = [place for place in drawn_among if whole(rows[place])]
    asked = Counter(rows[place].chosen for place in answered)
    asked.update(rows[place].chosen for place in drawn_among if in_vain(rows[place], rows[place]))
    usable = [place for place in answered if rows[place].quality is not None]
    if not usable:
        return None, "none of its answers was judged: send feedback"
    judged = Counter(rows[place].chosen for place in usable)
    experts = sorted({name for place in usable for name in expected[place]})
    index = {name: number for number, name in enumerate(experts)}
    asked_at = [rows[place].price_of_error for place in usable]
    unit = float(np.median(asked_at))
    error = stakes(asked_at, unit)
    estimate = np.full((len(usable), len(experts)), np.nan)
    for line, place in enumerate(usable):
        for name, (good, dollars, _) in expected[place].items():
            if good is not None and dollars is not None:
                estimate[line, index[name]] = error[line] * (1 - good) + dollars / unit
    old, new, drawn = (
        np.array([index[name] for name in names])
        for names in ([live[p] for p in usable], [rows[p].other for p in usable], [rows[p].chosen for p in usable])
    )
    propensity, paid = np.array([(rows[p].propensity, rows[p].price / unit) for p in usable]).T
    said = np.array([rows[p].quality for p in usable])
    heard = np.array([judged[rows[p].chosen] / asked[rows[p].chosen] for p in usable])
    group = alike([rows[place].draw for place in usable])
    worst = of_no_use(error, paid, drawn)
    draws = Draws(drawn, propensity, error * (1 - said) + paid, estimate, group, heard, worst, perfect=paid)
    differ = old != new
    seen = draws.seen(differ & (drawn == old)), draws.seen(differ & (drawn == new))
    if not differ.any():
        return None, f"the two decide the same on all {len(usable)} judged answers"
    if not seen[1]:
        return None, "nothing was explored: where the two differ, nobody was asked whom the candidate would ask (--explore 0.02)"
    if min(seen) < FEWEST_SEEN:
        return None, (
            f"too little was explored: where the two differ, {seen[0]} different queries drew the live choice and {seen[1]} the "
            f"candidate's, expected at least {FEWEST_SEEN} of each"
        )
    gains, stands_for = doubly_robust(draws, old) - doubly_robust(draws, new), 1 / heard
    gain, half = interval_of_mean(gains, stands_for, group)
    assert half is not None
    half = max(half, gain - cautious_gain(draws, old, new), -cautious_gain(draws, new, old) - gain)
    weight_old, weight_new = (draws.weight(policy) * differ * stands_for for policy in (old, new))
    weighted = np.average(draws.cost, weights=weight_old) - np.average(draws.cost, weights=weight_new)
    weighted *= np.average(differ, weights=stands_for)
    return Gain(len(usable), int(differ.sum()), seen, gain, half, float(weighted)), ""


def _wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share."""
    share, doubt = hits / count, Z**2 / count
    middle, half = share + doubt / 2, Z * math.sqrt(share * (1 - share) / count + doubt / (4 * count))
    return max((middle - half) / (1 + doubt), 0.0), min((middle + half) / (1 + doubt), 1.0)
