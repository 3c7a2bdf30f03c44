"""Experts that come and go, and other prices: what was learned stays, nothing is fitted anew."""

from dataclasses import replace

import numpy as np

from deferral.routing.fitted import Fitted
from deferral.routing.held_rows import beside
from deferral.routing.outcomes import check_text
from deferral.routing.partial_logs import LEAST_PROPENSITY
from deferral.routing.prices import PriceModel, fit_prices, repriced
from deferral.routing.static import fingerprints
from deferral.routing.table import Table
from deferral.routing.vectors import Vectors
from deferral.routing.verdicts import judged_again

__all__ = ["with_description", "with_outcomes", "with_prices", "without"]

_PRIOR = 5.0


def with_outcomes(state: Fitted, table: Table, vectors: Vectors) -> Fitted:
    """One expert more, from its outcomes on some queries: its deviation is a ridge combination of the others'.

    Its mean is found together with that: these queries may be easier than others.  They weigh by the inverse of their
    propensities where all are logged, and together as much as equal ones that say as much.
    """
    _check_new(state, table.experts[0])
    basis = state.deviations(vectors)[0]
    # Queries of the fit are known too well: of them, what was expected before they were.
    held, before = state.held.deviations_of(fingerprints(table.queries))
    basis[held] = before
    quality, chance = table.quality[:, 0].astype(np.float64), table.propensity[:, 0].astype(np.float64)
    size = basis.shape[1]
    common = np.full(size, 1 / size)
    weights = np.ones(len(quality)) if np.isnan(chance).any() else 1 / np.maximum(chance, LEAST_PROPENSITY)
    weights = np.minimum(weights / weights.mean(), max(len(weights) / _PRIOR, 1))
    weights = weights[:, None] * weights.sum() / (weights**2).sum()
    columns = np.concatenate([np.ones((len(basis), 1)), basis], axis=1)
    # Noise of a quality (about 0.2) over the variance expected of a coefficient (about 1 / E).
    penalty = np.diag([_PRIOR, *np.full(size, 0.2 * size)])
    off = quality - basis @ common - state.means.mean()
    mean, *slope = np.linalg.solve(columns.T @ (weights * columns) + penalty, (weights * columns).T @ off)
    mean = float(np.clip(mean + state.means.mean(), 0, 1))
    prices = fit_prices(table, weights)
    timed = ~np.isnan(table.latency)
    latency = float(np.average(table.latency[timed], weights=weights[timed])) if timed.any() else np.nan
    return _with(state, table.experts[0], mean, prices, latency, common + np.array(slope))


def with_description(state: Fitted, name: str, quality: float, price: float, per_character: float) -> Fitted:
    """One expert more, of which its mean quality and price are known."""
    _check_new(state, name)
    if not 0 <= quality <= 1 or not (0 <= price < np.inf and 0 <= per_character < np.inf):
        raise ValueError(
            f"expected a quality in [0, 1] and prices that are not negative, got {quality}, {price}, {per_character}"
        )
    size = len(state.extension)
    prices = PriceModel(np.array([price]), np.array([per_character]))
    return _with(state, name, quality, prices, np.nan, np.full(size, 1 / size))


def without(state: Fitted, name: str) -> Fitted:
    """One expert less."""
    if name not in state.experts:
        raise ValueError(f"{name!r} is no expert of this router; it has {', '.join(state.experts)}")
    if len(state.experts) == 1:
        raise ValueError(f"{name!r} is the only expert left; add another first")
    kept = np.array([place for place, expert in enumerate(state.experts) if expert != name])
    left = _columns(state, kept)
    newcomer = state.places[state.experts.index(name)] < 0
    return left if newcomer else judged_again(left)


def with_prices(state: Fitted, prices: PriceModel) -> Fitted:
    """The same experts at other prices, and the verdict at those."""
    mean_price = prices.base + prices.per_character * state.mean_length
    changed = replace(state, prices=prices, mean_price=mean_price)
    paid = repriced(state.held.price, state.by_length(state.held.length), changed.by_length(state.held.length))
    if state.judged is not None and not np.isnan(state.judged.oracle).any():
        # Every row was paid: none can have been paid less than nothing.
        means, paid = paid.mean(0), np.maximum(paid, 0)
        paid = paid * (np.maximum(means, 0) / np.maximum(paid.mean(0), 1e-300))
    return judged_again(replace(changed, held=replace(state.held, price=paid)))


def _columns(state: Fitted, kept: np.ndarray) -> Fitted:
    return replace(
        state,
        experts=tuple(state.experts[place] for place in kept),
        means=state.means[kept],
        prices=PriceModel(state.prices.base[kept], state.prices.per_character[kept]),
        mean_price=state.mean_price[kept],
        latency=state.latency[kept],
        extension=state.extension[:, kept],
        held=state.held.columns(kept),
        floor=state.floor[kept],
        places=state.places[kept],
    )


def _with(state: Fitted, name: str, mean: float, prices: PriceModel, latency: float, combination: np.ndarray) -> Fitted:
    mean_price = prices.base + prices.per_character * state.mean_length
    return replace(
        state,
        experts=(*state.experts, name),
        means=beside(state.means, np.array([mean])),
        prices=PriceModel(beside(state.prices.base, prices.base), beside(state.prices.per_character, prices.per_character)),
        mean_price=beside(state.mean_price, mean_price),
        latency=beside(state.latency, np.array([latency])),
        extension=beside(state.extension, combination[:, None]),
        held=state.held.widened(mean, combination, prices(state.held.length)),
        floor=beside(state.floor, np.zeros(1)),
        places=beside(state.places, np.array([-1])),
    )


def _check_new(state: Fitted, name: str) -> None:
    check_text("of the new expert", "expert", name)
    if name in state.experts:
        raise ValueError(f"{name!r} is an expert already; remove it first, or fit the router on all outcomes")
