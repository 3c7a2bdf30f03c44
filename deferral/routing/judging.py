"""A router on queries that it was not fitted on, beside what it must beat: figures with intervals, and the curves behind them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deferral.intervals import Interval
from deferral.routing.evaluation import (
    PriceQualityCurve,
    aiq,
    apgr,
    best_expert,
    cpt,
    curve,
    hull,
    intervals_of,
    saving,
    static_curve,
    trade_offs,
)
from deferral.routing.held_out import random_folds
from deferral.routing.outcomes import Log
from deferral.routing.router import Router
from deferral.routing.shift import folds_of_groups
from deferral.routing.table import Table

__all__ = [
    "SHARES",
    "Evaluation",
    "Held",
    "at_settings",
    "bill",
    "check_full",
    "cross_fitted",
    "evaluation",
    "held",
    "joined",
    "query_folds",
    "subjects",
    "tag_folds",
]

SHARES = (1.0, 0.98, 0.95)
_USUAL_FOLDS = 5


@dataclass(frozen=True)
class Held:
    """What routers decided on queries that they were not fitted on, and what happened.  S settings of the trade-off."""

    experts: list[str]
    quality: np.ndarray  # (N, E) outcomes
    price: np.ndarray  # (N, E) dollars
    errors: np.ndarray  # (S,) the price of an error of each setting
    routed: np.ndarray  # (S, N) whom the router asks, fallback included
    learned: np.ndarray  # (S, N) whom its estimates would have it ask
    static: np.ndarray  # (S, N) the best single expert of the fit
    fallback: np.ndarray  # (S, N) bool
    margin: np.ndarray  # (N,) of two experts, the estimated quality of the second less that of the first; else 0


@dataclass(frozen=True)
class Evaluation:
    """Figures by policy, and the points (mean price, mean quality) of each curve."""

    rows: int
    groups: int | None  # subjects, over which the intervals are; None: over queries
    experts: list[str]
    best: str
    fallback: float
    figures: dict[str, dict[str, Interval]]
    over_static: dict[str, Interval]  # AIQ less that of the static mix of the fit, paired
    curves: dict[str, np.ndarray]

    @property
    def hulls(self) -> dict[str, np.ndarray]:
        """The corners that mixing two settings can reach."""
        return {name: hull(points) for name, points in self.curves.items()}


def held(router: Router, table: Table, errors: np.ndarray | None = None) -> Held:
    """What a router decides on a full table of other queries.  ValueError where an outcome is missing."""
    if sorted(table.experts) != sorted(router.experts):
        raise ValueError(f"expected outcomes of {', '.join(router.experts)}, got those of {', '.join(table.experts)}")
    check_full(table)
    order = [table.experts.index(name) for name in router.experts]
    quality, price = table.quality[:, order].astype(float), table.price[:, order]
    errors = trade_offs(price) if errors is None else errors
    estimated = router.fitted.estimate(router.encoder(table.queries))
    means, mean_price = router.fitted.means.astype(float), router.fitted.mean_price
    routed, learned, static, fallback = [], [], [], []
    for error in errors:
        # `trade_offs` begins with inf, which `plan` does not take.
        at = float(min(error, 1e12))
        plan = router.plan(price_of_error=at)
        decisions = router.decide_estimated(plan, estimated, table.queries)
        routed.append(decisions.actions)
        fallback.append(decisions.fallback)
        learned.append(router.cheapest(plan, estimated, table.queries))
        static.append(np.full(len(quality), int(np.lexsort((mean_price, 1 - means + mean_price / at))[0])))
    margin = estimated.quality[:, 1] - estimated.quality[:, 0] if len(means) == 2 else np.zeros(len(quality))
    return Held(
        router.experts, quality, price, errors, np.stack(routed), np.stack(learned), np.stack(static), np.stack(fallback), margin
    )


def cross_fitted(
    make: Callable[[], Router], table: Table, fold: np.ndarray, errors: np.ndarray | None = None
) -> Iterator[tuple[int, Held]]:
    """Each fold judged by a router that was fitted on the others.  (N,) folds -> (number of the fold, Held), one after another"""
    check_full(table)
    errors = trade_offs(table.price) if errors is None else errors
    for number in np.unique(fold):
        router = make().fit(table.rows(np.flatnonzero(fold != number)))
        yield int(number), held(router, table.rows(np.flatnonzero(fold == number)), errors)


def joined(parts: Sequence[Held]) -> Held:
    """The rows of all folds.

    Margins are taken around the mean of their fold's router: whose mean is high has been fitted on what is low in its own fold,
    and rows that are ranked together by such means are ranked against the truth.
    """
    # Where routers cannot tell queries apart, differences by rounding must not rank one fold above another.
    parts = [replace(part, margin=(part.margin - part.margin.mean()).round(12)) for part in parts]

    def along(axis: int, *names: str) -> dict[str, Any]:
        return {name: np.concatenate([getattr(part, name) for part in parts], axis=axis) for name in names}

    rows, settings = along(0, "quality", "price", "margin"), along(1, "routed", "learned", "static", "fallback")
    return replace(parts[0], **rows, **settings)


def at_settings(rows: Held, places: slice) -> Held:
    """Some of the settings alone."""
    names = ("errors", "routed", "learned", "static", "fallback")
    return replace(rows, **{name: getattr(rows, name)[places] for name in names})


def bill(rows: Held, *, group: np.ndarray | None = None, resamples: int = 1000, seed: int = 0) -> dict[str, dict[str, Interval]]:
    """At the one setting of `rows`: quality, dollars per 1,000 queries, and cost in errors a query, of every policy."""
    if len(rows.errors) != 1:
        raise ValueError(f"rows: expected one price of an error, got {len(rows.errors)}")
    error, count = float(rows.errors[0]), np.arange(len(rows.quality))
    cost = 1 - rows.quality + rows.price / error
    actions = {"routed": rows.routed[0], "static mix of the fit": rows.static[0]}
    actions |= {f"always {name}": np.full(len(count), place) for place, name in enumerate(rows.experts)}
    actions["oracle"] = cost.argmin(1)
    routed = cost[count, rows.routed[0]]

    def figures(chosen: np.ndarray) -> dict[str, Interval]:
        mine = cost[count, chosen]
        table = np.stack([rows.quality[count, chosen], 1000 * rows.price[count, chosen], mine, routed - mine])
        means = intervals_of(
            lambda weights: table @ weights / weights.sum(), len(count), group=group, resamples=resamples, seed=seed
        )
        return dict(zip(("quality", "dollars per 1,000", "cost", "routed less this"), means, strict=True))

    return {policy: figures(chosen) for policy, chosen in actions.items()}


def query_folds(table: Table, folds: int | None = None, *, seed: int = 0) -> np.ndarray:
    """Folds of queries at random, 5 where nothing is said.  -> (N,)"""
    folds = folds or _USUAL_FOLDS
    if len(table.queries) < folds:
        raise ValueError(f"expected at least {folds} queries, one per fold, got {len(table.queries)}")
    return random_folds(len(table.queries), folds, seed=seed)


def tag_folds(log: Log, table: Table, folds: int | None = None) -> np.ndarray:
    """Folds of whole subjects, the largest into the emptiest fold; 5, or one a subject where there are fewer.  -> (N,)"""
    subject, member = subjects(log, table)
    folds = folds or max(min(_USUAL_FOLDS, len(subject)), 2)
    if len(subject) < folds:
        advice = "ask for fewer folds (--folds)" if len(subject) > 1 else "judge by folds of queries instead (without --by-tag)"
        raise ValueError(
            f"tags: expected at least {folds} subjects, one per fold, got {len(subject)}: {', '.join(subject)}; {advice}"
        )
    return folds_of_groups(member, folds)


def subjects(log: Log, table: Table) -> tuple[list[str], np.ndarray]:
    """The subjects of a log, the first tags of its queries, and that of every query by its number.  -> S, (N,)"""
    first = {query: tags[0] for query, tags in _tags(log).items() if tags}
    if missing := [query for query in table.queries if query not in first]:
        raise ValueError(
            f"tags: {len(missing)} queries have no tag, the first is {missing[0][:60]!r}; expected a subject for each"
        )
    subject, member = np.unique([first[query] for query in table.queries], return_inverse=True)
    return subject.tolist(), member


def evaluation(rows: Held, *, group: np.ndarray | None = None, resamples: int = 1000, seed: int = 0) -> Evaluation:
    """AIQ, saving at 100, 98 and 95% of the best expert's quality, and for two experts APGR and CPT, with 95% intervals.

    RouterBench's and RouteLLM's definitions: see `deferral.routing.evaluation`.  Intervals are over the queries, or, with the
    number of the subject of each as `group` (N,), over subjects: what these say of subjects to come.
    """
    count = np.arange(len(rows.quality))
    curves = {
        "routed": PriceQualityCurve(rows.price[count, rows.routed], rows.quality[count, rows.routed]),
        "learned, without fallback": PriceQualityCurve(rows.price[count, rows.learned], rows.quality[count, rows.learned]),
        "static mix of the fit": PriceQualityCurve(rows.price[count, rows.static], rows.quality[count, rows.static]),
        "static mix of these rows": static_curve(rows.price, rows.quality),
        "oracle": curve(rows.quality, rows.price, rows.quality, rows.errors),
    }
    best = best_expert(rows.quality, rows.price)
    names = ["AIQ", *(f"saving at {100 * share:g}%" for share in SHARES)]

    def figures(weights: np.ndarray) -> np.ndarray:
        prices, qualities = weights @ rows.price / weights.sum(), weights @ rows.quality / weights.sum()
        found = []
        for one in curves.values():
            corners = hull(one.points(weights))
            found.append(aiq(corners, prices.min(), prices.max()))
            saved = [saving(corners, qualities[best], prices[best], share) for share in SHARES]
            # In a resample that never reaches the quality the saving is minus infinity.  If such samples were left out, a router
            # that reaches it only by chance would seem to reach it for sure.
            found += [-np.inf if np.isnan(one) and prices[best] > 0 else one for one in saved]
        return np.array([*found, *(found[len(names) * place] - found[2 * len(names)] for place in range(len(curves)))])

    none = Interval(np.nan, np.nan, np.nan)
    drawn = intervals_of(figures, len(rows.quality), group=group, resamples=resamples, seed=seed)
    flat = [none if one.estimate == -np.inf else one for one in drawn]
    by_policy = {
        policy: dict(zip(names, flat[len(names) * place : len(names) * (place + 1)], strict=True))
        for place, policy in enumerate(curves)
    }
    if len(rows.experts) == 2:
        for policy, values in _two_experts(rows, group, resamples, seed).items():
            by_policy.setdefault(policy, {}).update(values)
    for place, name in enumerate(rows.experts):
        one = intervals_of(
            lambda weights, place=place: np.array(  # type: ignore[misc]
                [weights @ rows.quality[:, place] / weights.sum(), weights @ rows.price[:, place] / weights.sum()]
            ),
            len(rows.quality),
            group=group,
            resamples=resamples,
            seed=seed,
        )
        by_policy[f"always {name}"] = {"quality": one[0], "price": one[1]}
    return Evaluation(
        len(rows.quality),
        None if group is None else len(np.unique(group)),
        rows.experts,
        rows.experts[best],
        float(rows.fallback.mean()),
        by_policy,
        dict(zip(curves, flat[-len(curves) :], strict=True)),
        {name: one.points() for name, one in curves.items()},
    )


def _two_experts(rows: Held, group: np.ndarray | None, resamples: int, seed: int) -> dict[str, dict[str, Interval]]:
    """APGR, CPT(50) and CPT(80) of the estimated gain, of random calls and of the oracle."""
    best = best_expert(rows.quality, rows.price)
    gain = rows.quality[:, best] - rows.quality[:, 1 - best]
    # The better expert is that of the rows that are judged, whichever each fold has taken for it.
    scores = {
        "learned, without fallback": rows.margin if best == 1 else -rows.margin,
        "random": np.zeros(len(gain)),
        "oracle": gain,
    }
    found = {}
    for policy, score in scores.items():
        one = intervals_of(
            lambda weights, score=score: np.array(  # type: ignore[misc]
                [apgr(score, gain, weights), cpt(score, gain, 0.5, weights), cpt(score, gain, 0.8, weights)]
            ),
            len(gain),
            group=group,
            resamples=resamples,
            seed=seed,
        )
        found[policy] = dict(zip(("APGR", "CPT(50)", "CPT(80)"), one, strict=True))
    return found


def check_full(table: Table) -> None:
    """ValueError where an outcome is missing."""
    if gap := table.gap:
        raise ValueError(
            f"expected every expert's outcome on every query: {gap}; a log of single answers is judged by "
            "`deferral route simulate`"
        )


def _tags(log: Log) -> dict[str, tuple[str, ...]]:
    codes, tags = log.column("query"), log.column("tags")
    tagged = np.flatnonzero(np.array([bool(some) for some in log.tag_sets])[tags])
    first = tagged[np.unique(codes[tagged], return_index=True)[1]]
    return {log.queries[codes[row]]: log.tag_sets[tags[row]] for row in first}
