"""The router: learned from a log, asked about a query.  The trade-off is turned when it is asked, not when it is fitted."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deferral.routing.constraints import Abilities, Needs, able
from deferral.routing.decisions import Decision, Decisions
from deferral.routing.encoders import FunctionEncoder, NgramEncoder, Vectors
from deferral.routing.fitting import Fitted, fitted
from deferral.routing.outcomes import Log, Table, check_price_of_error
from deferral.routing.policies import Policy
from deferral.routing.prices import PriceModel
from deferral.routing.static import draws, mix_at_error, mix_at_price, mix_at_quality
from deferral.routing.training import POLICIES

__all__ = ["Plan", "Router"]

_LEAST_TRUST = 0.1
_PLANS = 256


@dataclass(frozen=True)
class Plan:
    """How queries of one setting are decided: the price of an error, who may be asked, and the mix to fall back to."""

    price_of_error: float
    mask: np.ndarray  # (E,) bool
    mix: np.ndarray  # (E,) probabilities of the static mix
    why_fallback: str  # "" where the learned policy decides


class Router:
    """Learns from a log which expert should answer a query, at any price of an error.

    `price_of_error` is what one wrong answer is worth, in dollars; `encoder` a function from N texts to an (N, D) array, by
    default n-grams without weights; `abilities` what each expert can do; `explore` the share of queries that go to an expert
    drawn at random.  `Router(price_of_error=0.02).fit(read_log("outcomes.jsonl")).route("prove that ...").expert`
    """

    def __init__(
        self,
        price_of_error: float,
        *,
        encoder: Callable[[list[str]], Any] | None = None,
        policies: Sequence[Callable[[], Policy]] = POLICIES,
        abilities: Mapping[str, Abilities] | None = None,
        explore: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_price_of_error(price_of_error)
        if not 0 <= explore < 1:
            raise ValueError(f"explore: expected a share of the queries in [0, 1), got {explore}")
        self.price_of_error, self.explore, self.seed = float(price_of_error), float(explore), seed
        self.encoder = NgramEncoder(seed=seed) if encoder is None else FunctionEncoder(encoder)
        self.policies = tuple(policies)
        self.abilities = dict(abilities or {})
        self.salt = secrets.token_hex(8)
        self._fitted: Fitted | None = None
        self._plans: dict[Any, Plan] = {}

    def fit(self, log: Log | Table, *, prices: PriceModel | None = None) -> "Router":
        """Learn from outcomes, and hold rows out to say what that is worth (`report`).

        `prices` are the prices to come, by default a line through the logged ones.  Learning from partial logs assumes what
        `deferral.routing.training.observed` says.
        """
        table = log.table() if isinstance(log, Log) else log
        if unknown := sorted(set(self.abilities) - set(table.experts)):
            raise ValueError(f"abilities: {unknown[0]!r} has no outcome; the log holds {', '.join(table.experts)}")
        vectors = self.encoder.fit(table.queries)
        self._fitted = fitted(table, vectors, self.policies, prices=prices, seed=self.seed)
        self._plans.clear()
        return self

    @property
    def fitted(self) -> Fitted:
        """What was learned; ValueError before `fit`."""
        if self._fitted is None:
            raise ValueError("the router is not fitted; call fit with a log, or Router.load a folder")
        return self._fitted

    @property
    def experts(self) -> list[str]:
        """The experts that can be asked."""
        return list(self.fitted.experts)

    @property
    def report(self) -> str:
        """What was held out, what won, and where the static mix is used instead."""
        return self.fitted.report(self.price_of_error)

    def route(self, query: str, **setting: Any) -> Decision:
        """Whom to ask.  Takes the settings of `plan`: price_of_error, budget, min_quality, max_latency, needs."""
        return self.route_batch([query], **setting)[0]

    def route_batch(self, queries: Sequence[str], **setting: Any) -> Decisions:
        """Whom to ask for each of N queries.  Takes the settings of `plan`."""
        if isinstance(queries, str):
            raise TypeError("queries: expected a list of texts, got one text; use route for one query")
        for row, query in enumerate(queries):
            if not isinstance(query, str):
                raise TypeError(f"queries: expected texts, got {type(query).__name__} in row {row + 1}")
        plan = self.plan(**setting)
        return self.decide(plan, self.encoder(queries), queries)

    def decide(self, plan: Plan, vectors: Vectors, queries: Sequence[str]) -> Decisions:
        """Decisions for queries that are encoded already."""
        state = self.fitted
        quality, similarity, trust = state.estimate(vectors)
        price = state.prices(np.array([len(query) for query in queries], float))
        cost = 1 - quality + price / plan.price_of_error
        if not plan.mask.all():
            cost[:, ~plan.mask] = np.inf
        # Ties go to the cheaper expert.
        order = state.cheapest_first
        best = order[cost[:, order].argmin(1)]
        fallback = np.full(len(queries), True) if plan.why_fallback else trust < _LEAST_TRUST
        actions, propensity = best, np.ones(len(queries))
        if fallback.any():
            actions = np.where(fallback, self._drawn_from(plan.mix, queries), best)
            propensity = np.where(fallback, plan.mix[actions], 1.0)
        if self.explore > 0:
            allowed = np.flatnonzero(plan.mask)
            curious = draws(queries, self.salt + "explore")
            picked = allowed[np.minimum((curious / self.explore * len(allowed)).astype(int), len(allowed) - 1)]
            actions = np.where(curious < self.explore, picked, actions)
            usual = np.where(fallback, plan.mix[actions], actions == best)
            propensity = (1 - self.explore) * usual + self.explore / len(allowed)
        return Decisions(
            list(state.experts), actions, quality, price, cost, propensity, fallback, similarity, plan.price_of_error,
            plan.why_fallback,
        )  # fmt: skip

    def _drawn_from(self, mix: np.ndarray, queries: Sequence[str]) -> np.ndarray:
        """The expert of each query that its draw picks from the mix.  (E,), N -> (N,)"""
        members = np.flatnonzero(mix)
        if len(members) == 1:
            return np.full(len(queries), members[0])
        return np.minimum(np.searchsorted(np.cumsum(mix), draws(queries, self.salt), side="right"), members[-1])

    def plan(
        self,
        *,
        price_of_error: float | None = None,
        budget: float | None = None,
        min_quality: float | None = None,
        max_latency: float | None = None,
        needs: Needs | None = None,
        learned: bool | None = None,
    ) -> Plan:
        """One setting of the trade-off; no refitting.

        `price_of_error` in dollars, or `budget` in dollars per 1,000 queries, or `min_quality`, a floor for the mean quality:
        the last two are met on the held-out rows.  `max_latency` in seconds is a cap on an expert's mean.  `needs` are hard
        constraints.  `learned` overrules the held-out verdict on whether to use the learned policy.
        """
        key = (price_of_error, budget, min_quality, max_latency, needs, learned)
        if key not in self._plans:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            self._plans[key] = self._planned(*key)
        return self._plans[key]

    def _planned(
        self,
        price_of_error: float | None,
        budget: float | None,
        min_quality: float | None,
        max_latency: float | None,
        needs: Needs | None,
        learned: bool | None,
    ) -> Plan:
        state = self.fitted
        if sum(value is not None for value in (price_of_error, budget, min_quality)) > 1:
            raise ValueError("expected one of price_of_error, budget and min_quality; each of them sets the same trade-off")
        mask = able(state.experts, self.abilities, needs or Needs())
        if max_latency is not None:
            mask = state.quick_enough(mask, max_latency)
        means, prices = state.means, state.mean_price
        if budget is not None:
            if not 0 < budget < np.inf:
                raise ValueError(f"budget: expected dollars per 1,000 queries, above 0, got {budget}")
            mix = mix_at_price(means, prices, mask, budget / 1000)
            error = state.error_at_price(mask, budget / 1000)
        elif min_quality is not None:
            if not 0 <= min_quality <= 1:
                raise ValueError(f"min_quality: expected a quality in [0, 1], got {min_quality}")
            error = state.error_at_quality(mask, min_quality)
            mix = mix_at_quality(means, prices, mask, min_quality)
        else:
            error = self.price_of_error if price_of_error is None else price_of_error
            check_price_of_error(error)
            mix = mix_at_error(means, prices, mask, error)
        why = state.why_not(error) if learned is None else "" if learned else "asked for"
        return Plan(float(error), mask, mix, why)

    def explain(self, query: str, *, count: int = 5, **setting: Any) -> tuple[Decision, list[tuple[str, float]]]:
        """The decision, and the logged queries nearest to this one with their similarity, nearest first."""
        rows, similarity = self.fitted.memory.nearest(self.encoder([query]), count)
        texts = self.fitted.texts
        return self.route(query, **setting), [
            (texts[row], float(cosine)) for row, cosine in zip(rows[0], similarity[0], strict=True)
        ]

    def add_expert(self, log: Log, *, abilities: Abilities | None = None) -> "Router":
        """Add a model from some of its outcomes, a hundred say, without refitting the others."""
        if len(log.experts) != 1:
            raise ValueError(f"expected outcomes of one new expert, got those of {len(log.experts)}: {', '.join(log.experts)}")
        table = log.table()
        self._fitted = self.fitted.with_outcomes(table, self.encoder(table.queries))
        return self._described(table.experts[0], abilities)

    def describe_expert(
        self, name: str, *, quality: float, price: float, per_character: float = 0.0, abilities: Abilities | None = None
    ) -> "Router":
        """Add a model of which only its mean quality and price (dollars a query) are known.

        It is taken to be good at what the experts on the whole are good at.
        """
        self._fitted = self.fitted.with_description(name, quality, price, per_character)
        return self._described(name, abilities)

    def remove_expert(self, name: str) -> "Router":
        """Never ask this expert again."""
        self._fitted = self.fitted.without(name)
        self.abilities.pop(name, None)
        self._plans.clear()
        return self

    def with_prices(self, prices: PriceModel) -> "Router":
        """From now on these prices, one per expert, without refitting."""
        if prices.base.shape != (len(self.experts),):
            raise ValueError(f"prices: expected one per expert, {len(self.experts)}, got {prices.base.shape}")
        self._fitted = replace(self.fitted, prices=prices)
        self._plans.clear()
        return self

    def save(self, folder: str | Path) -> None:
        """Write the router to a folder (safetensors and JSON); one that is there is replaced when all is written."""
        from deferral.routing.persistence import save

        save(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, *, encoder: Callable[[list[str]], Any] | None = None) -> "Router":
        """The router of a folder; nothing in it is executed.  A router with an encoder of your own needs it again."""
        from deferral.routing.persistence import load

        return load(Path(folder), encoder)

    def _described(self, name: str, abilities: Abilities | None) -> "Router":
        if abilities is not None:
            self.abilities[name] = abilities
        self._plans.clear()
        return self
