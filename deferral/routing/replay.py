"""What a policy would have been worth on a log that another one wrote: off-policy estimates with intervals.

Every logged outcome is one decision: a query, the expert that was asked, the propensity with which it was, and what came of it.
Where no propensity is logged, the assumption is that who was asked did not depend on the query, and the propensity is the
expert's share of the outcomes without one.  In a full table each expert answered each query, whatever the log says of
propensities: there a query is as many decisions as there are experts, each taken with the same probability, which is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deferral.intervals import Interval, bootstrap, interval
from deferral.routing.outcomes import Log, check_price_of_error

__all__ = ["METHODS", "Events", "Replay", "as_logged", "events_of", "replay"]

METHODS = ("ips", "self-normalised", "doubly robust")


@dataclass(frozen=True)
class Events:
    """Logged decisions.  N of them, on M queries, of E experts."""

    queries: list[str]  # M
    query: np.ndarray  # (N,) index of the query
    expert: np.ndarray  # (N,) index of the expert asked
    quality: np.ndarray  # (N,)
    price: np.ndarray  # (N,) dollars
    propensity: np.ndarray  # (N,)
    unlogged: np.ndarray  # (N,) bool, where the propensity is assumed

    @property
    def assumed(self) -> float:
        """The share of propensities that were not logged."""
        return float(self.unlogged.mean()) if len(self.unlogged) else 0.0

    def of_queries(self, kept: np.ndarray) -> "Events":
        """The decisions on some of the queries.  (M,) bool -> Events"""
        rows, place = kept[self.query], kept.cumsum() - 1
        return Events(
            [query for query, keep in zip(self.queries, kept, strict=True) if keep],
            place[self.query[rows]],
            self.expert[rows],
            self.quality[rows],
            self.price[rows],
            self.propensity[rows],
            self.unlogged[rows],
        )


def _full(log: Log) -> bool:
    """Whether every expert answered every query, and each as often."""
    cells = log.column("query").astype(np.int64) * len(log.experts) + log.column("expert")
    counts = np.bincount(cells, minlength=len(log.queries) * len(log.experts))
    return len(log) > 0 and bool(counts.min() == counts.max())


@dataclass(frozen=True)
class Replay:
    """The worth of a policy: its mean quality, price in dollars and cost in errors by each of `METHODS`."""

    quality: dict[str, Interval]
    price: dict[str, Interval]
    cost: dict[str, Interval]
    effective: float  # as many decisions of the policy itself would be as telling
    largest_weight: float


def events_of(log: Log, experts: Sequence[str]) -> Events:
    """The decisions of a log.  ValueError if it has outcomes of an expert that is not among these."""
    if unknown := [name for name in log.experts if name not in experts]:
        raise ValueError(f"the log has outcomes of {unknown[0]!r}, which is none of {', '.join(experts)}")
    expert = np.array([list(experts).index(name) for name in log.experts])[log.column("expert")]
    propensity = log.column("propensity").astype(float)
    missing = np.isnan(propensity)
    share = np.bincount(expert[missing], minlength=len(experts)) / max(missing.sum(), 1)
    if _full(log):
        missing, propensity = np.zeros(len(log), bool), np.full(len(log), 1 / len(log.experts))
    return Events(
        log.queries,
        log.column("query"),
        expert,
        log.column("quality").astype(float),
        log.column("price"),
        np.where(missing, share[expert], propensity),
        missing,
    )


def replay(
    events: Events,
    chances: np.ndarray,
    price_of_error: float,
    *,
    quality: np.ndarray,
    price: np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
) -> Replay:
    """The worth of the policy that asks each expert with these probabilities.  Events, (M, E), expected (M, E), (M, E) -> Replay

    With w = chance / propensity of the expert asked, r what came of it and q what is expected:  ips  mean(w r),
    self-normalised  sum(w r) / sum(w),  doubly robust  mean(sum_e chance_e q_e + w (r - q)).  The last is right on average if
    either the propensities or the expectations are.  Intervals resample whole queries.

    Dudík, Langford, Li, "Doubly Robust Policy Evaluation and Learning" (2011); Swaminathan and Joachims, "The Self-Normalized
    Estimator for Counterfactual Learning" (2015).
    """
    check_price_of_error(price_of_error)
    size = (len(events.queries), chances.shape[-1])
    for name, table in (("chances", chances), ("quality", quality), ("price", price)):
        if table.shape != size:
            raise ValueError(f"{name}: expected shape {size}, queries by experts, got {table.shape}")
    weight = chances[events.query, events.expert] / events.propensity

    ones = np.ones(len(weight))
    logged = {"quality": events.quality, "price": events.price, "cost": 1 - events.quality + events.price / price_of_error}
    expected = {"quality": quality, "price": price, "cost": 1 - quality + price / price_of_error}
    sums = []
    for name, outcome in logged.items():
        direct = (chances * expected[name]).sum(1)[events.query]
        off = weight * (outcome - expected[name][events.query, events.expert])
        sums += [(weight * outcome, ones), (weight * outcome, weight), (direct + off, ones)]
    found = _ratios(events, sums, resamples, seed)
    by_quality, by_price, by_cost = (dict(zip(METHODS, found[start : start + 3], strict=True)) for start in (0, 3, 6))
    total = weight.sum()
    effective = float(total**2 / (weight**2).sum()) if total > 0 else 0.0
    return Replay(by_quality, by_price, by_cost, effective, float(weight.max()))


def as_logged(events: Events, price_of_error: float, *, resamples: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """Mean quality, price and cost of the decisions that were taken."""
    ones = np.ones(len(events.query))
    values = (events.quality, events.price, 1 - events.quality + events.price / price_of_error)
    found = _ratios(events, [(value, ones) for value in values], resamples, seed)
    return dict(zip(("quality", "price", "cost"), found, strict=True))


def _ratios(events: Events, sums: Sequence[tuple[np.ndarray, np.ndarray]], resamples: int, seed: int) -> list[Interval]:
    """sum(above) / sum(below) for each pair, with intervals over samples of whole queries.  F pairs of (N,) -> F"""
    size = len(events.queries)
    above, below = (
        torch.from_numpy(np.stack([np.bincount(events.query, pair[part], size) for pair in sums], -1)) for part in (0, 1)
    )

    def figures(weights: Tensor) -> Tensor:
        return (weights @ above) / (weights @ below)

    estimates = figures(torch.ones(1, size, dtype=torch.float64))[0]
    resampled = bootstrap(figures, size, resamples=resamples, seed=seed)
    return [interval(float(estimate), resampled[:, place]) for place, estimate in enumerate(estimates)]
