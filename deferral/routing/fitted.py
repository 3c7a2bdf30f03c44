"""What a router has learned: expected qualities, the verdict on them, and experts that come and go."""

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from deferral.routing.encoders import Vectors
from deferral.routing.held_out import Judged
from deferral.routing.held_rows import HeldRows, Search
from deferral.routing.outcomes import Table, check_text
from deferral.routing.partial_logs import LEAST_PROPENSITY
from deferral.routing.policies import Neighbours, Policy
from deferral.routing.policies.centres import nearest_centre
from deferral.routing.prices import PriceModel, fit_prices, repriced
from deferral.routing.static import fingerprints

__all__ = ["Estimates", "Fitted"]

_PRIOR = 5.0
_VERDICTS = 256
# Of the price that its length says, a query costs this share at least.
_LEAST_SHARE = 0.1


class Estimates(NamedTuple):
    """What is expected of N queries, whatever experts charge today."""

    quality: np.ndarray  # (N, E)
    similarity: np.ndarray  # (N,) to the log
    trust: np.ndarray  # (N,) how far the learned policy is trusted
    dearness: np.ndarray  # (N, E) what an answer costs above what the query's length says, in mean prices of the expert


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

    @cached_property
    def cheapest_places(self) -> list[int]:
        """The same as a list."""
        return self.cheapest_first.tolist()

    def priced(self, characters: np.ndarray, dearness: np.ndarray) -> np.ndarray:
        """What queries will cost at each expert, in dollars: by their length, and by what queries like them cost above that.

        (N,), (N, E) -> (N, E)
        """
        by_length = self.by_length(characters)
        return np.maximum(by_length + dearness * self.mean_price, _LEAST_SHARE * by_length)

    def by_length(self, characters: np.ndarray) -> np.ndarray:
        """What the lengths of queries alone say.  (N,) -> (N, E)"""
        return self.prices.base + np.maximum(characters[:, None], self.floor) * self.prices.per_character

    def prices_of_one(self, query: str, dearness: np.ndarray | None = None) -> list[float]:
        """The same of one query; by its length alone where no more is known of it.  (E,) -> E"""
        characters = len(query)
        if dearness is None:
            return [base + characters * rate for base, rate, _ in self._rates]
        by_length = [base + max(characters, floor) * rate for base, rate, floor in self._rates]
        means, above = self._mean_prices, dearness.tolist()
        return [max(price + more * mean, _LEAST_SHARE * price) for price, more, mean in zip(by_length, above, means, strict=True)]

    @cached_property
    def _mean_prices(self) -> list[float]:
        return self.mean_price.tolist()

    @cached_property
    def _rates(self) -> list[tuple[float, float, float]]:
        return list(zip(self.prices.base.tolist(), self.prices.per_character.tolist(), self.floor.tolist(), strict=True))

    @cached_property
    def search(self) -> Search:
        """Which price of an error meets what is asked for, on the rows held out."""
        return Search(self.held, self.priced(self.held.length, self.held.dearness), self.means, self.mean_price)

    def estimate(self, vectors: Vectors) -> Estimates:
        """What is expected of N queries.  Vectors -> Estimates"""
        if len(vectors) == 1:
            quality, likeness, trusted, above = self.estimate_one(vectors)
            above = np.zeros(len(quality), np.float32) if above is None else above
            return Estimates(quality[None], np.array([likeness], np.float32), np.array([trusted]), above[None])
        deviations, similarity, familiar, above = self._deviations(vectors)
        trust = familiar + (1 - familiar) * self.reliance
        quality = self.means + self._extended(deviations)
        return Estimates(quality, similarity, trust, np.zeros_like(quality) if above is None else self._of_today(above))

    def estimate_one(self, vectors: Vectors) -> tuple[np.ndarray, float, float, np.ndarray | None]:
        """The same for one query; None where a query's length says what it costs.  -> (E,), number, number, (E,) or None"""
        deviations, similarity, familiar, above = self._deviations_of_one(vectors)
        trust = familiar + (1 - familiar) * self.reliance
        return self.means + self._extended(deviations), similarity, trust, None if above is None else self._of_today(above)[0]

    def _of_today(self, dearness: np.ndarray) -> np.ndarray:
        """Of the experts that were learned, those of the experts of today; of newcomers nothing is known.  (N, E0) -> (N, E)"""
        if self._as_learned:
            return dearness
        return np.concatenate([dearness, np.zeros((len(dearness), 1), dearness.dtype)], axis=1)[:, self.places]

    def _extended(self, deviations: np.ndarray) -> np.ndarray:
        """Of the experts that were learned, those of the experts of today.  (N, E0) -> (N, E)"""
        return deviations if self._as_learned else deviations @ self.extension

    @cached_property
    def _as_learned(self) -> bool:
        return np.array_equal(self.extension, np.eye(len(self.extension)))

    def _deviations(self, vectors: Vectors) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Expected quality above the mean, likeness, chance to be like the log, dearness.  -> (N, E0), (N,), (N,), (N, E0)"""
        if len(vectors) == 1:
            total, likeness, chance, above = self._deviations_of_one(vectors)
            return total[None], np.array([likeness], np.float32), np.array([chance]), above
        nearby, above = np.zeros((len(vectors), len(self.extension)), np.float32), None
        if self.memory in self.policies or self.memory.beside:
            nearby, similarity = self.memory.look_up(vectors)
            nearby, above = self._parted(nearby)
        else:
            similarity = self.memory.likeness(vectors)
        familiar = np.interp(similarity, *self.familiar)
        if not self.policies:
            return np.zeros_like(nearby), similarity, familiar, above
        found = np.stack([nearby if policy is self.memory else policy.deviations(vectors) for policy in self.policies])
        near = familiar[:, None]
        weights = (near * self.weights + (1 - near) * self.abroad).astype(np.float32)
        return np.einsum("np,pne->ne", weights, found), similarity, familiar, above

    def _parted(self, found: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """What the memory says of qualities, and of prices where it does.  (N, E0) or (N, 2 E0) -> (N, E0), (N, E0) or None"""
        if not self.memory.beside:
            return found, None
        learned = len(self.extension)
        return found[:, :learned], found[:, learned:]

    def _deviations_of_one(self, vectors: Vectors) -> tuple[np.ndarray, float, float, np.ndarray | None]:
        """The same for one query, which is spared the estimators that have no weight for it.

        -> (E0,), number, number, (1, E0) or None
        """
        above = None
        if self.memory in self.policies or self.memory.beside:
            nearby, similarity = self.memory.look_up_one(vectors)
            nearby, above = self._parted(nearby)
        else:
            similarity = self.memory.likeness_of_one(vectors)
        near = self._chance_of_one(similarity)
        shares, found = [], []
        for policy, weight, abroad in zip(self.policies, self.weights, self.abroad, strict=True):
            share = near * weight + (1 - near) * abroad
            if share > 0:
                shares.append(share)
                found.append(nearby if policy is self.memory else policy.deviations(vectors))
        if not found:
            return np.zeros(len(self.extension), np.float32), similarity, near, above
        return np.array(shares, np.float32) @ np.concatenate(found), similarity, near, above

    def _chance_of_one(self, similarity: float) -> float:
        """np.interp(similarity, *familiar), which takes several times as long on one number."""
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
    def kind_names(self) -> list[str]:
        """Of each kind: a mark of this fit, and a number, since those of another fit are others."""
        mark = blake2b(np.ascontiguousarray(self.kinds[0]).tobytes(), digest_size=4).hexdigest()
        return [f"{mark}-{number}" for number in range(len(self.kinds[0]))]

    def kinds_of(self, vectors: Vectors) -> list[str]:
        """The kind that each query is of, "" where no kinds are known."""
        if not self.kind_names:
            return [""] * len(vectors)
        return [self.kind_names[number] for number in nearest_centre(vectors.dense, self.kinds[0]).tolist()]

    def kind_of_one(self, vectors: Vectors) -> str:
        """The same for one query."""
        return self.kind_names[(self.kinds[0] @ vectors.dense[0]).argmax()] if self.kind_names else ""

    def verdict(self, mask: np.ndarray | None = None) -> Judged | None:
        """What deciding among some of the experts was worth on the rows held out.  (E,) bool -> Judged, or None

        Newcomers have no outcomes there, and are not judged; nor is anybody where fewer than two others are left, of whom what
        was found among all has to do.
        """
        known = self._known(mask)
        return self.judged if known is None or known.sum() == (self.places >= 0).sum() else self._judged(known)

    def _known(self, mask: np.ndarray | None) -> np.ndarray | None:
        """Of whom there are outcomes among those who may be asked, if they can be judged."""
        known = self.places >= 0
        known = known if mask is None else known & mask
        return known if self.judged is not None and known.sum() > 1 else None

    def _judged(self, known: np.ndarray, errors: tuple[float, ...] = ()) -> Judged:
        assert self.judged is not None
        key = (known.tobytes(), errors)
        found = self._verdicts.get(key)
        if found is None:
            found = self.search.judged(known, np.array(errors) if errors else None)
            if np.isnan(self.judged.oracle).any():
                # Of doubly robust outcomes nobody knows the best.
                found = replace(found, oracle=np.full_like(found.oracle, np.nan))
            if len(self._verdicts) >= _VERDICTS:
                self._verdicts.clear()
            self._verdicts[key] = found
        return found

    @cached_property
    def _verdicts(self) -> dict[tuple[bytes, tuple[float, ...]], Judged]:
        return {}

    def _judged_again(self) -> "Fitted":
        """With the verdict on the experts and prices of today."""
        known = self._known(None)
        if known is None:
            return replace(self, held_costs={}, room="")
        room = self.search.room(known)
        verdict = self._judged(known)
        if np.isnan(verdict.oracle).any():
            room = replace(room, oracle=np.nan)
        return replace(self, judged=verdict, held_costs={}, room=str(room))

    def why_not(self, error: float, mask: np.ndarray | None = None) -> str:
        """Why the learned policy is not used among these experts at this price of an error; "" if it is."""
        verdict, known = self.verdict(mask), self._known(mask)
        if verdict is None:
            return "there is too little to learn from"
        if mask is not None and mask.sum() == 1:
            return ""
        if known is not None and not verdict.errors[0] <= error <= verdict.errors[-1]:
            # Prices whose means are close may differ much from query to query: decisions change there, too.
            verdict = self._judged(known, (float(error),))
        errors, better = verdict.errors, verdict.better
        place = int(np.searchsorted(errors, error))
        around = np.array([max(place - 1, 0), min(place, len(errors) - 1)])
        if better[around].all():
            return ""
        worst = int(around[(verdict.gain - verdict.half_width)[around].argmin()])
        gain, half = verdict.gain[worst], verdict.half_width[worst]
        among = "" if known is None or mask is None or mask.all() else " among those who may be asked"
        return (
            f"on held-out queries routing{among} saved {gain:.4f} ± {half:.4f} errors a query at ${errors[worst]:.3g} an error: "
            "maybe nothing"
        )

    def quick_enough(self, mask: np.ndarray, most: float) -> np.ndarray:
        """The experts whose mean latency is at most this.  (E,) bool -> (E,) bool"""
        quick = mask & (self.latency <= most)
        if not quick.any():
            known = ", ".join(
                f"{name} {'has no latency_s in the log' if np.isnan(time) else f'{time:.3g} s'}"
                for name, time in zip(self.experts, self.latency, strict=True)
            )
            raise ValueError(f"max_latency: no expert that may be asked answers within {most:g} s on average ({known})")
        return quick

    def report(self, error: float) -> str:
        """What was held out, what won, and what it is worth at this price of an error."""
        if self.judged is None:
            return "Too little to learn from: the static mix is used."
        if len(self.experts) == 1:
            return f"{self.experts[0]} is the only expert left."
        known = self._known(None)
        at = self.judged if known is None else self._judged(known, (float(error),))
        place = int(np.abs(np.log(at.errors / error)).argmin())
        oracle = "" if np.isnan(at.oracle[place]) else f", oracle {at.oracle[place]:.4f}"
        apart = "" if abs(at.errors[place] / error - 1) < 0.01 else f" (of those tried the nearest to ${error:.3g})"
        if self.held_costs:
            costs = ", ".join(f"{name} {cost:.4f}" for name, cost in self.held_costs.items())
            why_used = ", since none alone is cheaper with confidence" if self.winner == "blend" else ""
            first = f"Held-out cost over all trade-offs: {costs}; used: {self.winner}{why_used}."
        elif self.room:
            first = "Judged anew: experts or prices are others than at the fit."
        else:
            first = "The verdict is that of the fit: too little is left of it to judge anew."
        lines = [
            first,
            f"At ${at.errors[place]:.3g} an error{apart}: routed {at.learned[place]:.4f}, "
            f"best single expert {at.static[place]:.4f}, random {at.random[place]:.4f}"
            f"{oracle} errors a query; saved {at.gain[place]:.4f} ± {at.half_width[place]:.4f} (95%).",
        ]
        if at.half_width[place] == 0:
            lines.append("At this price of an error, which is in dollars, every query goes to one expert.")
        if self.room:
            lines.append(f"Routability: {self.room}.")
        if why := self.why_not(error):
            used = f"The static mix is used: {why}."
        elif at.gain[place] > at.half_width[place]:
            used = "The router is used: it saves with confidence."
        else:
            used = "The router is used: nothing speaks against it here, and over all trade-offs it agrees with the outcomes."
        return "\n".join([*lines, used])

    def with_outcomes(self, table: Table, vectors: Vectors) -> "Fitted":
        """One expert more, from its outcomes on some queries: its deviation is a ridge combination of the others'.

        Its mean is found together with that: these queries may be easier than others.  They weigh by the inverse of their
        propensities where all are logged, and together as much as equal ones that say as much.
        """
        self._check_new(table.experts[0])
        basis, _, _, _ = self._deviations(vectors)
        # Queries of the fit are known too well: of them, what was expected before they were.
        held, before = self.held.deviations_of(fingerprints(table.queries))
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
        off = quality - basis @ common - self.means.mean()
        mean, *slope = np.linalg.solve(columns.T @ (weights * columns) + penalty, (weights * columns).T @ off)
        mean = float(np.clip(mean + self.means.mean(), 0, 1))
        prices = fit_prices(table, weights)
        timed = ~np.isnan(table.latency)
        latency = float(np.average(table.latency[timed], weights=weights[timed])) if timed.any() else np.nan
        return self._with(table.experts[0], mean, prices, latency, common + np.array(slope))

    def with_description(self, name: str, quality: float, price: float, per_character: float) -> "Fitted":
        """One expert more, of which its mean quality and price are known."""
        self._check_new(name)
        if not 0 <= quality <= 1 or not (0 <= price < np.inf and 0 <= per_character < np.inf):
            raise ValueError(
                f"expected a quality in [0, 1] and prices that are not negative, got {quality}, {price}, {per_character}"
            )
        size = len(self.extension)
        prices = PriceModel(np.array([price]), np.array([per_character]))
        return self._with(name, quality, prices, np.nan, np.full(size, 1 / size))

    def without(self, name: str) -> "Fitted":
        """One expert less."""
        if name not in self.experts:
            raise ValueError(f"{name!r} is no expert of this router; it has {', '.join(self.experts)}")
        if len(self.experts) == 1:
            raise ValueError(f"{name!r} is the only expert left; add another first")
        kept = np.array([place for place, expert in enumerate(self.experts) if expert != name])
        left = self._columns(kept)
        newcomer = self.places[self.experts.index(name)] < 0
        return left if newcomer else left._judged_again()

    def _columns(self, kept: np.ndarray) -> "Fitted":
        return replace(
            self,
            experts=tuple(self.experts[place] for place in kept),
            means=self.means[kept],
            prices=PriceModel(self.prices.base[kept], self.prices.per_character[kept]),
            mean_price=self.mean_price[kept],
            latency=self.latency[kept],
            extension=self.extension[:, kept],
            held=self.held.columns(kept),
            floor=self.floor[kept],
            places=self.places[kept],
        )

    def _with(self, name: str, mean: float, prices: PriceModel, latency: float, combination: np.ndarray) -> "Fitted":
        mean_price = prices.base + prices.per_character * self.mean_length

        def widened(left: np.ndarray, right: np.ndarray) -> np.ndarray:
            return np.concatenate([left, right], axis=-1).astype(left.dtype)

        return replace(
            self,
            experts=(*self.experts, name),
            means=widened(self.means, np.array([mean])),
            prices=PriceModel(widened(self.prices.base, prices.base), widened(self.prices.per_character, prices.per_character)),
            mean_price=widened(self.mean_price, mean_price),
            latency=widened(self.latency, np.array([latency])),
            extension=widened(self.extension, combination[:, None]),
            held=self.held.widened(mean, combination, prices(self.held.length)),
            floor=widened(self.floor, np.zeros(1)),
            places=widened(self.places, np.array([-1])),
        )

    def with_prices(self, prices: PriceModel) -> "Fitted":
        """The same experts at other prices, and the verdict at those."""
        mean_price = prices.base + prices.per_character * self.mean_length
        changed = replace(self, prices=prices, mean_price=mean_price)
        paid = repriced(self.held.price, self.by_length(self.held.length), changed.by_length(self.held.length))
        if self.judged is not None and not np.isnan(self.judged.oracle).any():
            # Every row was paid: none can have been paid less than nothing.
            means, paid = paid.mean(0), np.maximum(paid, 0)
            paid = paid * (np.maximum(means, 0) / np.maximum(paid.mean(0), 1e-300))
        return replace(changed, held=replace(self.held, price=paid))._judged_again()

    def _check_new(self, name: str) -> None:
        check_text("of the new expert", "expert", name)
        if name in self.experts:
            raise ValueError(f"{name!r} is an expert already; remove it first, or fit the router on all outcomes")
