"""The path of one query, after `Fitted.estimate_one`, beside that of arrays in `many_queries`: the same answers without them.

A gateway decides query by query, in some tenths of a millisecond.  An array of a few numbers takes longer to make than they take
to be added up, so what the arrays say is written a second time here, on plain numbers; a test holds the two together.
"""

from collections.abc import Sequence
from math import inf

import numpy as np

from deferral.routing.decisions import Decision, why_learned
from deferral.routing.fitted import Fitted
from deferral.routing.prices import LEAST_SHARE
from deferral.routing.vectors import Vectors

__all__ = ["decision_of_one", "price_of_one"]


def price_of_one(state: Fitted, query: str, dearness: np.ndarray | None = None) -> list[float]:
    """`Fitted.priced`; by its length alone where no more is known of it.  (E,) -> E"""
    characters = len(query)
    if dearness is None:
        return [base + characters * rate for base, rate, _ in state.rates]
    by_length = [base + max(characters, floor) * rate for base, rate, floor in state.rates]
    means, above = state.mean_prices, dearness.tolist()
    return [max(price + more * mean, LEAST_SHARE * price) for price, more, mean in zip(by_length, above, means, strict=True)]


def decision_of_one(
    state: Fitted,
    query: str,
    vectors: Vectors,
    known: tuple[np.ndarray, float, float, np.ndarray | None],
    *,
    price_of_error: float,
    closed: Sequence[int],
) -> Decision:
    """`many_queries.decided` where the learned policy decides and nobody is drawn.

    `known` is what `Fitted.estimate_one` said, `closed` who may not be asked.
    """
    estimate, similarity, _, dearness = known
    quality = estimate.tolist()
    price = price_of_one(state, query, dearness)
    cost = [1 - value + dollars / price_of_error for value, dollars in zip(quality, price, strict=True)]
    for place in closed:
        cost[place] = inf
    # Ties go to the cheaper expert.
    best = min(state.cheapest_places, key=cost.__getitem__)
    if min(quality) < 0 or max(quality) > 1:
        quality = [min(max(value, 0.0), 1.0) for value in quality]
    names = state.experts
    return Decision(
        names[best],
        dict(zip(names, quality, strict=True)),
        dict(zip(names, price, strict=True)),
        dict(zip(names, cost, strict=True)),
        1.0,
        False,
        similarity,
        why_learned(names[best], best, quality, price, cost, price_of_error),
        _kind(state, vectors),
    )


def _kind(state: Fitted, vectors: Vectors) -> str:
    """`Fitted.kinds_of`."""
    return state.kind_names[(state.kinds[0] @ vectors.dense[0]).argmax()] if state.kind_names else ""
