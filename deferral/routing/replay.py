"""What a policy would have been worth on a log that another one wrote: off-policy estimates with intervals.

Every logged outcome is one decision: a query, the expert that was asked, the propensity with which it was, and what came of it.
Where no propensity is logged, the assumption is that who was asked did not depend on the query, and the propensity is the
expert's share of the outcomes without one.  A query that each expert answered, and as often, is as many decisions as it has
answers, each expert's taken with the same probability, which is exact: in a full table whatever the log says of propensities,
beside other decisions where it says nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deferral.intervals import Interval, bootstrap, interval
from deferral.routing.outcomes import Log
from deferral.routing.partial_logs import asked_together
from deferral.routing.table import array_of, check_price_of_error, decided_again

__all__ = ["METHODS", "Events", "Replay", "as_logged", "events_of", "replay"]

_ROUNDING = 1e-6
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


@dataclass(frozen=True)
class Replay:
    """The worth of a policy: its mean quality, price in dollars and cost in errors by each of `METHODS`."""

    quality: dict[str, Interval]
    price: dict[str, Interval]
    cost: dict[str, Interval]
    effective: float  # as many decisions of the policy itself would be as telling
    largest_weight: float


def events_of(log: Log, experts: Sequence[str], *, kept: np.ndarray | None = None) -> Events:
    """The decisions of a log, on the queries that are `kept` (Q,) bool.

    ValueError if it has outcomes of an expert that is not among these, or if experts were asked at once by their propensities.
    """
    if not isinstance(log, Log):
        raise TypeError(f"log: expected a Log, got {type(log).__name__}; read_log(path) reads a file")
    if unknown := [name for name in log.experts if name not in experts]:
        raise ValueError(f"the log has outcomes of {unknown[0]!r}, which is none of {', '.join(experts)}")
    kept = np.ones(len(log.queries), bool) if kept is None else np.asarray(kept)
    if kept.dtype != bool or kept.shape != (len(log.queries),):
        raise ValueError(
            f"kept: expected True or False for each of {len(log.queries)} queries, got {kept.dtype} of shape {kept.shape}"
        )
    rows = kept[log.column("query")]
    if not rows.any():
        raise ValueError("log: expected at least one outcome on a query that is kept, got none")
    query = (kept.cumsum() - 1)[log.column("query")[rows]]
    expert = np.array([list(experts).index(name) for name in log.experts], int)[log.column("expert")[rows]]
    propensity = log.column("propensity")[rows].astype(float)
    names, number = np.unique(expert, return_inverse=True)
    counts = np.bincount(query * len(names) + number, minlength=int(kept.sum()) * len(names)).reshape(-1, len(names))
    logged = np.full(counts.size, np.nan)
    logged[query * len(names) + number] = propensity
    again = decided_again(query, log.column("time")[rows].astype(float), propensity, int(kept.sum()))
    if asked_together(counts, logged.reshape(counts.shape), again):
        raise ValueError(
            "propensity: expected those of single decisions, which add up to 1 over the experts of a query; most queries with "
            "several outcomes here have more, as if their experts were asked at once: keep of each query one outcome, drawn by "
            "chance, with the propensity that it was asked and drawn"
        )
    everyone = (counts == counts[:, :1]).all(1) & (len(names) > 1)
    if not everyone.all():
        # In a log that also holds single decisions, a query with a propensity was drawn, though every expert may have answered
        # it.
        everyone &= np.bincount(query, ~np.isnan(propensity), len(counts)) == 0
    certain = everyone[query]
    missing = np.isnan(propensity) & ~certain
    share = np.bincount(expert[missing], minlength=len(experts)) / max(missing.sum(), 1)
    return Events(
        [text for text, keep in zip(log.queries, kept, strict=True) if keep],
        query,
        expert,
        log.column("quality")[rows].astype(float),
        log.column("price")[rows],
        np.where(certain, 1 / max(len(names), 1), np.where(missing, share[expert], propensity)),
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
    _check_events(events)
    chances, quality, price = array_of("chances", chances, 2), array_of("quality", quality, 2), array_of("price", price, 2)
    size = (len(events.queries), chances.shape[-1])
    for name, table in (("chances", chances), ("quality", quality), ("price", price)):
        if table.shape != size:
            raise ValueError(f"{name}: expected shape {size}, queries by experts, got {table.shape}")
    if (last := int(events.expert.max())) >= size[1]:
        raise ValueError(f"chances: expected a column for each of {last + 1} experts or more, got {size[1]}")
    off = (chances < -_ROUNDING).any(1) | (abs(chances.sum(1) - 1) > _ROUNDING)
    if off.any():
        row = int(off.argmax())
        raise ValueError(f"chances: expected probabilities that add up to 1, got {chances[row].tolist()} for query {row + 1}")
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
    check_price_of_error(price_of_error)
    _check_events(events)
    ones = np.ones(len(events.query))
    values = (events.quality, events.price, 1 - events.quality + events.price / price_of_error)
    found = _ratios(events, [(value, ones) for value in values], resamples, seed)
    return dict(zip(("quality", "price", "cost"), found, strict=True))


def _check_events(events: Any) -> None:
    if not isinstance(events, Events):
        raise TypeError(f"events: expected what events_of(log, experts) gives, got {type(events).__name__}")


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
