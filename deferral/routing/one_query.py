"""The path of one query, beside that of arrays in `fitted` and `many_queries`: the same answers without the arrays.

A gateway decides query by query, in some tenths of a millisecond.  An array of a few numbers takes longer to make than they take
to be added up, so what the arrays say is written a second time here, on plain numbers; a test holds the two together.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

import numpy as np

from deferral.routing.decisions import Decision, why_learned
from deferral.routing.policies import Neighbours, Policy
from deferral.routing.prices import LEAST_SHARE, PriceModel
from deferral.routing.vectors import Vectors

__all__ = ["OneQuery"]


@dataclass(frozen=True)
class OneQuery:
    """What is expected of one query, and whom to ask.  Every field is that of `Fitted`, or follows from it."""

    experts: tuple[str, ...]
    cheapest_places: list[int]  # experts by their mean price
    means: np.ndarray  # (E,)
    prices: PriceModel
    mean_price: np.ndarray  # (E,)
    floor: np.ndarray  # (E,)
    extension: np.ndarray  # (E0, E)
    as_learned: bool  # whether the experts of today are those that were learned
    places: np.ndarray  # (E,)
    policies: tuple[Policy, ...]
    weights: tuple[float, ...]
    abroad: tuple[float, ...]
    memory: Neighbours
    familiar: tuple[np.ndarray, np.ndarray]
    reliance: float
    centres: np.ndarray  # (C, D) of the kinds of queries
    kind_names: list[str]

    def estimate(self, vectors: Vectors) -> tuple[np.ndarray, float, float, np.ndarray | None]:
        """`Fitted.estimate`; no dearness where a query's length says what it costs.  -> (E,), number, number, (E,) or None"""
        deviations, similarity, familiar, above = self.deviations(vectors)
        trust = familiar + (1 - familiar) * self.reliance
        quality = self.means + (deviations if self.as_learned else deviations @ self.extension)
        return quality, similarity, trust, None if above is None else self._of_today(above)

    def deviations(self, vectors: Vectors) -> tuple[np.ndarray, float, float, np.ndarray | None]:
        """`Fitted.deviations`, but for the estimators of no weight for this query.  -> (E0,), number, number, (E0,) or None"""
        above = None
        if self.memory in self.policies or self.memory.beside:
            nearby, similarity = self.memory.look_up_one(vectors)
            if self.memory.beside:
                learned = len(self.extension)
                nearby, above = nearby[:, :learned], nearby[0, learned:]
        else:
            similarity = self.memory.likeness_of_one(vectors)
        near = self._chance(similarity)
        shares, found = [], []
        for policy, weight, abroad in zip(self.policies, self.weights, self.abroad, strict=True):
            share = near * weight + (1 - near) * abroad
            if share > 0:
                shares.append(share)
                found.append(nearby if policy is self.memory else policy.deviations(vectors))
        if not found:
            return np.zeros(len(self.extension), np.float32), similarity, near, above
        return np.array(shares, np.float32) @ np.concatenate(found), similarity, near, above

    def _chance(self, similarity: float) -> float:
        """np.interp(similarity, *familiar)."""
        knots, chances = self._knots
        place = bisect_right(knots, similarity)
        if place in (0, len(knots)):
            return chances[max(place - 1, 0)]
        slope = (chances[place] - chances[place - 1]) / (knots[place] - knots[place - 1])
        return slope * (similarity - knots[place - 1]) + chances[place - 1]

    @cached_property
    def _knots(self) -> tuple[list[float], list[float]]:
        return self.familiar[0].tolist(), self.familiar[1].tolist()

    def _of_today(self, dearness: np.ndarray) -> np.ndarray:
        """`Fitted._of_today`.  (E0,) -> (E,)"""
        return dearness if self.as_learned else np.concatenate([dearness, np.zeros(1, dearness.dtype)])[self.places]

    def priced(self, query: str, dearness: np.ndarray | None = None) -> list[float]:
        """`Fitted.priced`; by its length alone where no more is known of it.  (E,) -> E"""
        characters = len(query)
        if dearness is None:
            return [base + characters * rate for base, rate, _ in self._rates]
        by_length = [base + max(characters, floor) * rate for base, rate, floor in self._rates]
        means, above = self._mean_prices, dearness.tolist()
        return [max(price + more * mean, LEAST_SHARE * price) for price, more, mean in zip(by_length, above, means, strict=True)]

    @cached_property
    def _mean_prices(self) -> list[float]:
        return self.mean_price.tolist()

    @cached_property
    def _rates(self) -> list[tuple[float, float, float]]:
        return list(zip(self.prices.base.tolist(), self.prices.per_character.tolist(), self.floor.tolist(), strict=True))

    def kind(self, vectors: Vectors) -> str:
        """`Fitted.kinds_of`."""
        return self.kind_names[(self.centres @ vectors.dense[0]).argmax()] if self.kind_names else ""

    def decision(
        self,
        query: str,
        vectors: Vectors,
        known: tuple[np.ndarray, float, float, np.ndarray | None],
        *,
        price_of_error: float,
        closed: Sequence[int],
    ) -> Decision:
        """`many_queries.decided` where the learned policy decides and nobody is drawn.

        `known` is what `estimate` said, `closed` who may not be asked.
        """
        estimate, similarity, _, dearness = known
        quality = estimate.tolist()
        price = self.priced(query, dearness)
        cost = [1 - value + dollars / price_of_error for value, dollars in zip(quality, price, strict=True)]
        for place in closed:
            cost[place] = inf
        # Ties go to the cheaper expert.
        best = min(self.cheapest_places, key=cost.__getitem__)
        if min(quality) < 0 or max(quality) > 1:
            quality = [min(max(value, 0.0), 1.0) for value in quality]
        names = self.experts
        return Decision(
            names[best],
            dict(zip(names, quality, strict=True)),
            dict(zip(names, price, strict=True)),
            dict(zip(names, cost, strict=True)),
            1.0,
            False,
            similarity,
            why_learned(names[best], best, quality, price, cost, price_of_error),
            self.kind(vectors),
        )
