"""The path of many queries, in arrays: what every expert costs, who is the cheapest, and who is asked in the end.

Of one query `one_query` says the same, where the learned policy decides and nobody is drawn at random.
"""

from collections.abc import Sequence

import numpy as np

from deferral.routing.decisions import Decisions
from deferral.routing.fitted import Estimates, Fitted
from deferral.routing.planning import Plan
from deferral.routing.prices import characters_of
from deferral.routing.static import chances, drawn_from, explored

__all__ = ["LEAST_TRUST", "decided", "probabilities", "weighed"]

# A query that is trusted less is given to the static mix.
LEAST_TRUST = 0.1


def weighed(
    state: Fitted, plan: Plan, estimated: Estimates, characters: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Price and cost of every expert, the cheapest, and whether the static mix decides.  -> (N, E), (N, E), (N,), (N,)"""
    price = state.priced(characters, estimated.dearness)
    cost = 1 - estimated.quality.astype(np.float64) + price / plan.price_of_error
    if plan.closed is not None:
        cost[:, plan.closed] = np.inf
    # Ties go to the cheaper expert.
    order = state.cheapest_first
    best = order.take(cost.take(order, axis=1).argmin(1))
    return price, cost, best, np.ones(len(cost), bool) if plan.why_fallback else estimated.trust < LEAST_TRUST


def probabilities(plan: Plan, best: np.ndarray, fallback: np.ndarray, explore: float) -> np.ndarray:
    """With which each expert is asked, where these are the cheapest.  (N,), (N,) bool -> (N, E)"""
    usual = np.where(fallback[:, None], plan.mix, np.eye(len(plan.mix))[best])
    return chances(usual, plan.mask, explore)


def decided(state: Fitted, plan: Plan, estimated: Estimates, queries: Sequence[str], *, explore: float, salt: str) -> Decisions:
    """Who is asked: the cheapest, whom the static mix draws, or, of a share of the queries, anyone, to learn."""
    price, cost, best, fallback = weighed(state, plan, estimated, characters_of(queries))
    actions, propensity, drawn = best, np.ones(len(queries)), None
    some = bool(np.logical_or.reduce(fallback))
    if some:
        actions = np.where(fallback, drawn_from(plan.mix, queries, salt), best)
    if explore > 0:
        usual, drawn = actions, explored(plan.mask, explore, queries, salt)
        actions = np.where(drawn >= 0, drawn, usual)
        drawn = np.where(drawn == usual, -1, drawn)
    if explore > 0 or some:
        propensity = probabilities(plan, best, fallback, explore)[np.arange(len(queries)), actions]
    return Decisions(
        list(state.experts), actions, estimated.quality, price, cost, propensity, fallback, estimated.similarity,
        plan.price_of_error, plan.why_fallback, drawn=drawn,
    )  # fmt: skip
