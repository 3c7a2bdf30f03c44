"""What a router has learned, and what it expects of queries by that.

Of one query it is written a second time, on plain numbers: see `one_query`.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from deferral.routing.held_out import Judged
from deferral.routing.held_rows import HeldRows, Search
from deferral.routing.policies import Neighbours, Policy
from deferral.routing.policies.centres import nearest_centre
from deferral.routing.prices import LEAST_SHARE, PriceModel
from deferral.routing.vectors import Vectors

__all__ = ["Estimates", "Fitted", "estimates_of_one"]


class Estimates(NamedTuple):
    """What is expected of N queries, whatever experts charge today."""

    quality: np.ndarray  # (N, E)
    similarity: np.ndarray  # (N,) to the log
    trust: np.ndarray  # (N,) how far the learned policy is trusted
    dearness: np.ndarray  # (N, E) what an answer costs above what the query's length says, in mean prices of the expert


def estimates_of_one(quality: np.ndarray, similarity: float, trust: float, dearness: np.ndarray | None) -> Estimates:
    """What `Fitted.estimate_one` returns, as arrays."""
    above = np.zeros(len(quality), np.float32) if dearness is None else dearness
    return Estimates(quality[None], np.array([similarity], np.float32), np.array([trust]), above[None])


@dataclass(frozen=True)
class Fitted:
    """The state of a router.  E0 experts were learned; `extension` (E0, E) makes the E experts of today out of them."""

    experts: tuple[str, ...]
    means: np.ndarray  # (E,)
    prices: PriceModel
    mean_price: np.ndarray  # (E,)
    latency: np.ndarray  # (E,), NaN where not known
    extension: np.ndarray  # (E0, E)
    policies: tuple[Policy, ...]  # those of positive weight, in the order of the weights
    weights: tuple[float, ...]  # for queries like those of the log
    abroad: tuple[float, ...]  # for queries of new subjects
    memory: Neighbours
    texts: tuple[str, ...]
    familiar: tuple[np.ndarray, np.ndarray]  # knots of similarity and of the chance that a query is like those of the log
    kinds: tuple[np.ndarray, np.ndarray]  # centres (C, D) of the log's queries and the share that is nearest to each
    reliance: float  # the share of a deviation that is relied on for new subjects
    judged: Judged | None
    winner: str
    held_costs: dict[str, float]
    held: HeldRows
    floor: np.ndarray  # (E,) characters below which a query costs no less, where neighbours say what it costs
    places: np.ndarray  # (E,) of each expert among those that were learned, -1 of those that came later
    room: str
    mean_length: float  # characters of a logged query

    @cached_property
    def cheapest_first(self) -> np.ndarray:
        """Experts by their mean price.  -> (E,)"""
        return np.argsort(self.mean_price, kind="stable")

    # The same numbers without arrays, for `one_query`.

    @cached_property
    def cheapest_places(self) -> list[int]:
        """`cheapest_first`."""
        return self.cheapest_first.tolist()

    @cached_property
    def mean_prices(self) -> list[float]:
        """`mean_price`."""
        return self.mean_price.tolist()

    @cached_property
    def rates(self) -> list[tuple[float, float, float]]:
        """Of each expert base, price per character, and floor."""
        return list(zip(self.prices.base.tolist(), self.prices.per_character.tolist(), self.floor.tolist(), strict=True))

    def priced(self, characters: np.ndarray, dearness: np.ndarray) -> np.ndarray:
        """What queries will cost at each expert, in dollars: by their length, and by what queries like them cost above that.

        (N,), (N, E) -> (N, E)
        """
        by_length = self.by_length(characters)
        return np.maximum(by_length + dearness * self.mean_price, LEAST_SHARE * by_length)

    def by_length(self, characters: np.ndarray) -> np.ndarray:
        """What the lengths of queries alone say.  (N,) -> (N, E)"""
        return self.prices.base + np.maximum(characters[:, None], self.floor) * self.prices.per_character

    @cached_property
    def search(self) -> Search:
        """Which price of an error meets what is asked for, on the rows held out."""
        return Search(self.held, self.priced(self.held.length, self.held.dearness), self.means, self.mean_price)

    def estimate(self, vectors: Vectors) -> Estimates:
        """What is expected of N queries.  Vectors -> Estimates"""
        if len(vectors) == 1:
            return estimates_of_one(*self.estimate_one(vectors))
        deviations, similarity, familiar, above = self.deviations(vectors)
        trust = familiar + (1 - familiar) * self.reliance
        quality = self.means + (deviations if self._as_learned else deviations @ self.extension)
        return Estimates(quality, similarity, trust, np.zeros_like(quality) if above is None else self._of_today(above))

    def estimate_one(self, vectors: Vectors) -> tuple[np.ndarray, float, float, np.ndarray | None]:
        """`estimate` of one query; no dearness where its length says what it costs.  -> (E,), number, number, (E,) or None"""
        deviations, similarity, familiar, above = self.deviations_one(vectors)
        trust = familiar + (1 - familiar) * self.reliance
        quality = self.means + (deviations if self._as_learned else deviations @ self.extension)
        return quality, similarity, trust, None if above is None else self._one_of_today(above)

    def _of_today(self, dearness: np.ndarray) -> np.ndarray:
        """Of the experts that were learned, those of the experts of today; of newcomers nothing is known.  (N, E0) -> (N, E)"""
        if self._as_learned:
            return dearness
        return np.concatenate([dearness, np.zeros((len(dearness), 1), dearness.dtype)], axis=1)[:, self.places]

    def _one_of_today(self, dearness: np.ndarray) -> np.ndarray:
        """`_of_today` of one query.  (E0,) -> (E,)"""
        return dearness if self._as_learned else np.concatenate([dearness, np.zeros(1, dearness.dtype)])[self.places]

    @cached_property
    def _as_learned(self) -> bool:
        return np.array_equal(self.extension, np.eye(len(self.extension)))

    def deviations(self, vectors: Vectors) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Expected quality above the mean, likeness, chance to be like the log, dearness.  -> (N, E0), (N,), (N,), (N, E0)"""
        if len(vectors) == 1:
            total, likeness, chance, dearness = self.deviations_one(vectors)
            return total[None], np.array([likeness], np.float32), np.array([chance]), None if dearness is None else dearness[None]
        nearby, above = np.zeros((len(vectors), len(self.extension)), np.float32), None
        if self.memory in self.policies or self.memory.beside:
            nearby, similarity = self.memory.look_up(vectors)
            if self.memory.beside:
                nearby, above = np.split(nearby, [len(self.extension)], axis=1)
        else:
            similarity = self.memory.likeness(vectors)
        familiar = np.interp(similarity, *self.familiar)
        if not self.policies:
            return np.zeros_like(nearby), similarity, familiar, above
        found = np.stack([nearby if policy is self.memory else policy.deviations(vectors) for policy in self.policies])
        near = familiar[:, None]
        weights = (near * self.weights + (1 - near) * self.abroad).astype(np.float32)
        return np.einsum("np,pne->ne", weights, found), similarity, familiar, above

    def deviations_one(self, vectors: Vectors) -> tuple[np.ndarray, float, float, np.ndarray | None]:
        """`deviations` of one query, less the estimators of no weight for it.  -> (E0,), number, number, (E0,) or None"""
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

    @cached_property
    def verdicts(self) -> dict[tuple[bytes, tuple[float, ...]], Judged]:
        """What `verdicts` has judged already: among whom, at which prices of an error."""
        return {}

    @cached_property
    def kind_names(self) -> list[str]:
        """Of each kind: a mark of this fit, and a number, since those of another fit are others."""
        mark = blake2b(np.ascontiguousarray(self.kinds[0]).tobytes(), digest_size=4).hexdigest()
        return [f"{mark}-{number}" for number in range(len(self.kinds[0]))]

    def kinds_of(self, vectors: Vectors) -> list[str]:
        """The kind that each query is of, "" where no kinds are known."""
        if not self.kind_names:
            return [""] * len(vectors)
        return [self.kind_names[number] for number in nearest_centre(vectors.dense, self.kinds[0]).tolist()]

    def quick_enough(self, mask: np.ndarray, most: float) -> np.ndarray:
        """The experts whose mean latency is at most this.  (E,) bool -> (E,) bool"""
        quick = mask & (self.latency <= most)
        if not quick.any():
            known = ", ".join(
                f"{name} {'has no latency_s in the log' if np.isnan(time) else f'{time:.3g} s'}"
                for name, time, may in zip(self.experts, self.latency, mask, strict=True)
                if may
            )
            raise ValueError(f"max_latency: no expert that may be asked answers within {most:g} s on average ({known})")
        return quick
