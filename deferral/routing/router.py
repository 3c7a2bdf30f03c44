"""The router: learned from a log, asked about a query.  The trade-off is turned when it is asked, not when it is fitted."""

import copy
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from deferral.routing import changes, persistence, verdicts
from deferral.routing.cascade import Cascade
from deferral.routing.constraints import Abilities, Needs, able, check_abilities
from deferral.routing.decisions import Decision, Decisions
from deferral.routing.encoders import FunctionEncoder, NgramEncoder
from deferral.routing.fitted import Estimates, Fitted, estimates_of_one
from deferral.routing.held_out import POLICIES
from deferral.routing.learning import fitted
from deferral.routing.many_queries import LEAST_TRUST, decided, probabilities, weighed
from deferral.routing.one_query import decision_of_one
from deferral.routing.outcomes import Log
from deferral.routing.planning import Plan, Planning, Setting, check_amounts
from deferral.routing.policies import Policy
from deferral.routing.prices import PriceModel, characters_of
from deferral.routing.promises import Witnesses
from deferral.routing.sentences import sentence_encoder
from deferral.routing.static import fingerprints
from deferral.routing.table import Table, check_amount, check_certifying, check_price_of_error, check_share, check_values
from deferral.routing.vectors import Vectors

__all__ = ["Router"]

_PLANS = 256


class Router:
    """Learns from a log which expert should answer a query, at any price of an error.

    `price_of_error` is what one wrong answer is worth, in dollars; `encoder` a function from N texts to an (N, D) array or the
    folder of a sentence encoder, by default n-grams without weights; `policies` make the estimators that `fit` blends, one of a
    kind; `abilities` what each expert can do; `explore` the share of queries that go to an expert drawn at random; `seed` that
    of the folds, the fits and the rows that certify.
    `Router(price_of_error=0.02).fit(read_log("outcomes.jsonl")).route("prove that ...").expert`
    """

    def __init__(
        self,
        price_of_error: float,
        *,
        encoder: Callable[[list[str]], Any] | str | Path | None = None,
        policies: Sequence[Callable[[], Policy]] = POLICIES,
        abilities: Mapping[str, Abilities] | None = None,
        explore: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_price_of_error(price_of_error)
        check_share("explore", explore)
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
            raise ValueError(f"seed: expected a whole number >= 0, got {seed!r}")
        self.price_of_error, self.explore, self.seed = float(price_of_error), float(explore), int(seed)
        self.encoder: NgramEncoder | FunctionEncoder
        if encoder is None:
            self.encoder = NgramEncoder(seed=seed)
        else:
            self.encoder = FunctionEncoder(sentence_encoder(encoder) if isinstance(encoder, str | Path) else encoder)
        if not isinstance(policies, Iterable):
            raise TypeError(f"policies: expected a list of classes such as deferral.routing.policies.Linear, got {policies!r}")
        self.policies = tuple(policies)
        if strange := [make for make in self.policies if not callable(make)]:
            raise TypeError(f"policies: expected classes such as deferral.routing.policies.Linear, got {strange[0]!r}")
        kinds = [make().kind for make in self.policies]
        if not kinds or len(set(kinds)) < len(kinds):
            raise ValueError(f"policies: expected different ones, at least one, got {', '.join(kinds) or 'none'}")
        if not isinstance(abilities, Mapping | None):
            raise TypeError(f"abilities: expected those of experts by name, got {abilities!r}")
        self.abilities = dict(abilities or {})
        for name, can in self.abilities.items():
            check_abilities(name, can)
        self.salt = secrets.token_hex(8)
        self._fitted: Fitted | None = None
        self._seen = np.empty(0, np.uint64)
        self._witnesses: Witnesses | None = None
        self._plans: dict[Any, Plan] = {}
        # When to keep the answer of an expert that is asked first; learned for these experts and prices, and dropped with them.
        self.cascade: Cascade | None = None

    def fit(self, log: Log | Table, *, prices: PriceModel | None = None, certify: float = 0.0) -> "Router":
        """Learn from outcomes, and hold rows out to say what that is worth (`report`).

        `prices` are the prices to come, by default a line through the logged ones.  `certify` is a share of the queries, drawn
        at random, that nothing is learned from: `certified_quality` is proved by them (see `certify`).  Learning from partial
        logs assumes what `deferral.routing.partial_logs.observed` says.
        """
        table = _table_of(log)
        if prices is not None:
            _check_model(prices)
        check_values(table)
        if unknown := sorted(set(self.abilities) - set(table.experts)):
            raise ValueError(f"abilities: {unknown[0]!r} has no outcome; the log holds {', '.join(table.experts)}")
        check_share("certify", certify)
        apart = np.random.default_rng(self.seed).random(len(table.queries)) < certify
        if apart.all():
            raise ValueError(f"certify: of {len(apart)} queries it leaves none to learn from; ask for less than {certify:g}")
        if certify > 0:
            check_certifying(table)
            if not apart.any():
                raise ValueError(f"certify: of {len(apart)} queries it keeps none apart; ask for more than {certify:g}")
        everything, table = table, table.rows(np.flatnonzero(~apart)) if apart.any() else table
        # A fit that fails or is stopped leaves the router as it was.
        encoder = copy.copy(self.encoder)
        learned = fitted(table, encoder.fit(table.queries), self.policies, prices=prices, seed=self.seed)
        self.encoder, self._fitted = encoder, learned
        self._seen, self._witnesses, self.cascade = np.sort(fingerprints(table.queries)), None, None
        self._plans = {}
        return self.certify(everything.rows(np.flatnonzero(apart))) if apart.any() else self

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
        return verdicts.report(self.fitted, self.price_of_error)

    def route(self, query: str, **setting: Unpack[Setting]) -> Decision:
        """Whom to ask.  Takes the settings of `plan`: price_of_error, budget, min_quality, certified_quality ..."""
        if not isinstance(query, str):
            raise TypeError(f"query: expected a text, got {type(query).__name__}")
        return self.decide_one(self.plan(**setting), self.encoder([query]), query)

    def route_batch(self, queries: Sequence[str], **setting: Unpack[Setting]) -> Decisions:
        """Whom to ask for each of N queries.  Takes the settings of `plan`."""
        _check_texts(queries)
        plan = self.plan(**setting)
        return self.decide(plan, self.encoder(queries), queries)

    def decide(self, plan: Plan, vectors: Vectors, queries: Sequence[str]) -> Decisions:
        """Decisions for queries that are encoded already."""
        decisions = self.decide_estimated(plan, self.fitted.estimate(vectors), queries)
        return replace(decisions, kinds=self.fitted.kinds_of(vectors))

    def decide_one(self, plan: Plan, vectors: Vectors, query: str) -> Decision:
        """`decide(plan, vectors, [query])[0]`, but quicker: see `one_query`."""
        state = self.fitted
        known = state.estimate_one(vectors)
        if self.explore > 0 or plan.why_fallback or known[2] < LEAST_TRUST:
            decisions = self.decide_estimated(plan, estimates_of_one(*known), [query])
            return replace(decisions, kinds=state.kinds_of(vectors))[0]
        return decision_of_one(state, query, vectors, known, price_of_error=plan.price_of_error, closed=plan.closed_places)

    def decide_estimated(self, plan: Plan, estimated: Estimates, queries: Sequence[str]) -> Decisions:
        """Decisions from what `Fitted.estimate` says of the queries: many settings of the trade-off at once, say."""
        return decided(self.fitted, plan, estimated, queries, explore=self.explore, salt=self.salt)

    def cheapest(self, plan: Plan, estimated: Estimates, queries: Sequence[str]) -> np.ndarray:
        """Whom the estimates alone would have asked: no fallback, no exploration.  -> (N,)"""
        return weighed(self.fitted, plan, estimated, characters_of(queries))[2]

    def chances(self, queries: Sequence[str], **setting: Unpack[Setting]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The probability that each expert is asked, and its expected quality and price, by the settings of `plan`.

        N -> (N, E), (N, E), (N, E)
        """
        _check_texts(queries)
        plan = self.plan(**setting)
        estimated = self.fitted.estimate(self.encoder(queries))
        price, _, best, fallback = weighed(self.fitted, plan, estimated, characters_of(queries))
        return probabilities(plan, best, fallback, self.explore), np.clip(estimated.quality, 0, 1), price

    def plan(
        self,
        *,
        price_of_error: float | None = None,
        budget: float | None = None,
        min_quality: float | None = None,
        max_latency: float | None = None,
        needs: Needs | None = None,
        learned: bool | None = None,
        certified_quality: float | None = None,
        confidence: float = 0.95,
    ) -> Plan:
        """One setting of the trade-off; no refitting.

        `price_of_error` in dollars, or `budget` in dollars per 1,000 queries, or `min_quality`, a floor for the mean quality:
        the last two are met on the held-out rows, exploration included.  `certified_quality`, a share of the best expert's
        quality, is reached with probability `confidence` over the draw of the rows that `certify` was given, as cheaply as can
        be proved; ValueError if it cannot.  `max_latency` in seconds is a cap on an expert's mean.  `needs` are hard
        constraints.  `learned` overrules the held-out verdict on whether to use the learned policy.
        """
        if needs is not None and not isinstance(needs, Needs):
            raise TypeError(f"needs: expected Needs.of(...), got {type(needs).__name__}")
        mask = b""
        if needs is not None or max_latency is not None:
            # A plan is kept by who may be asked, which many queries share, and not by their needs, which hold a query's own
            # tokens.
            mask = self._mask(needs, max_latency).tobytes()
        setting = (price_of_error, budget, min_quality, learned, certified_quality, confidence)
        # These attributes may be set to other values between two calls, and a plan depends on them.
        key = (*setting, mask, self.price_of_error, self.explore)
        # Another thread may clear the plans between any two lines.  One that changes the experts replaces the dictionary, so that
        # what is planned here for the experts of before is lost with it.
        plans = self._plans
        try:
            plan = plans.get(key)
        except TypeError:
            # A setting of a wrong type, such as a list, cannot be a key: `_planned` says what is wrong with it.
            plan = None
        if plan is None:
            if len(plans) >= _PLANS:
                plans.clear()
            plan = plans[key] = self._planned(np.frombuffer(mask, bool) if mask else np.ones(len(self.experts), bool), *setting)
        return plan

    def _mask(self, needs: Needs | None, max_latency: float | None) -> np.ndarray:
        if max_latency is not None:
            check_amount("max_latency", max_latency)
        mask = able(self.experts, self.abilities, needs or Needs())
        return mask if max_latency is None else self.fitted.quick_enough(mask, max_latency)

    def _planned(
        self,
        mask: np.ndarray,
        price_of_error: float | None,
        budget: float | None,
        min_quality: float | None,
        learned: bool | None,
        certified_quality: float | None,
        confidence: float,
    ) -> Plan:
        check_amounts(
            confidence,
            price_of_error=price_of_error,
            budget=budget,
            min_quality=min_quality,
            certified_quality=certified_quality,
        )
        if not isinstance(learned, bool | np.bool_ | None):
            raise TypeError(f"learned: expected True, False or None, got {learned!r}")
        planning = Planning(self.fitted, mask, self.explore, learned)
        if budget is not None:
            return planning.within_budget(budget)
        if min_quality is not None:
            return planning.at_quality(min_quality)
        if certified_quality is not None:
            return planning.promised(certified_quality, confidence, self._witnesses, self._qualities)
        return planning.at_error(self.price_of_error if price_of_error is None else price_of_error)

    def _qualities(self, plan: Plan) -> np.ndarray:
        """The quality that each row which certifies gets under a plan.  -> (N,)"""
        rows = self._witnesses
        assert rows is not None
        _, _, best, fallback = weighed(self.fitted, plan, rows.estimated, rows.characters)
        return (probabilities(plan, best, fallback, self.explore) * rows.quality).sum(1)

    def certify(self, log: Log | Table) -> "Router":
        """Take these rows as the proof of `certified_quality`: every expert's outcome on queries that were not in the fit.

        They are to be drawn like the queries to come, and to have had no part in any choice.  ValueError names what is wrong.
        """
        table = _table_of(log)
        if sorted(table.experts) != sorted(self.experts):
            raise ValueError(f"certify: expected outcomes of {', '.join(self.experts)}, got those of {', '.join(table.experts)}")
        order = [table.experts.index(name) for name in self.experts]
        check_certifying(table)
        check_values(table)
        if (known := self.knows(table.queries)).any():
            raise ValueError(
                f"certify: {int(known.sum())} of {len(known)} queries were in the log of the fit, the first is query "
                f"{int(known.argmax()) + 1}; what was learned from proves nothing"
            )
        # The order of a log may mean something; a p-value by betting needs one that does not.
        rows = np.random.default_rng(self.seed).permutation(len(table.queries))
        quality, similarity, trust, dearness = self.fitted.estimate(self.encoder(table.queries))
        estimated = Estimates(quality[rows], similarity[rows], trust[rows], dearness[rows])
        self._witnesses = Witnesses(table.quality[rows][:, order], estimated, characters_of(table.queries)[rows])
        self._plans = {}
        return self

    def knows(self, queries: Sequence[str]) -> np.ndarray:
        """Which of the queries were in the log of the fit.  N -> (N,) bool"""
        return np.isin(fingerprints(queries), self._seen)

    def explain(self, query: str, *, count: int = 5, **setting: Unpack[Setting]) -> tuple[Decision, list[tuple[str, float]]]:
        """The decision, and the logged queries nearest to this one with their similarity, nearest first."""
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
            raise ValueError(f"count: expected a whole number >= 0, got {count!r}")
        decision = self.route(query, **setting)
        rows, similarity = self.fitted.memory.nearest(self.encoder([query]), count)
        texts = self.fitted.texts
        return decision, [(texts[row], float(cosine)) for row, cosine in zip(rows[0], similarity[0], strict=True)]

    def add_expert(self, log: Log | Table, *, abilities: Abilities | None = None) -> "Router":
        """Add a model from some of its outcomes, a hundred say, without refitting the others."""
        if abilities is not None:
            check_abilities("the new expert", abilities)
        table = _table_of(log)
        if len(table.experts) != 1:
            names = ", ".join(table.experts)
            raise ValueError(f"expected outcomes of one new expert, got those of {len(table.experts)}: {names}")
        check_values(table)
        self._fitted = changes.with_outcomes(self.fitted, table, self.encoder(table.queries))
        # A router that has learned from these queries must not be certified on them.
        self._seen = np.union1d(self._seen, fingerprints(table.queries))
        return self._described(table.experts[0], abilities)

    def describe_expert(
        self, name: str, *, quality: float, price: float, per_character: float = 0.0, abilities: Abilities | None = None
    ) -> "Router":
        """Add a model of which only its mean quality and price (dollars a query) are known.

        It is taken to be good at what the experts on the whole are good at.
        """
        if abilities is not None:
            check_abilities(name, abilities)
        for field, value in (("quality", quality), ("price", price), ("per_character", per_character)):
            check_amount(field, value)
        self._fitted = changes.with_description(self.fitted, name, quality, price, per_character)
        return self._described(name, abilities)

    def remove_expert(self, name: str) -> "Router":
        """Never ask this expert again."""
        kept = np.array([expert != name for expert in self.experts])
        self._fitted = changes.without(self.fitted, name)
        if self._witnesses is not None:
            self._witnesses = self._witnesses.columns(kept)
        self.abilities = {other: can for other, can in self.abilities.items() if other != name}
        self.cascade = None
        self._plans = {}
        return self

    def with_prices(self, prices: PriceModel) -> "Router":
        """From now on these prices, one per expert, without refitting.

        Prices that name their experts may have any order, others that of `experts`.
        """
        _check_model(prices)
        self._fitted, self.cascade = changes.with_prices(self.fitted, prices.of(self.experts)), None
        self._plans = {}
        return self

    def without_texts(self, queries: Sequence[str], kept: Collection[str]) -> "Router":
        """Forget the words of the logged queries, in the order of the table, but of those in `kept`: of others lengths stay."""
        shown, texts = set(kept), self.fitted.texts
        hidden = (text if query in shown else " " * len(text) for text, query in zip(texts, queries, strict=True))
        self._fitted = replace(self.fitted, texts=tuple(hidden))
        return self

    def save(self, folder: str | Path) -> None:
        """Write the router to a folder (safetensors and JSON); one that is there is replaced when all is written."""
        saved = persistence.Saved(
            price_of_error=self.price_of_error,
            explore=self.explore,
            seed=self.seed,
            salt=self.salt,
            abilities=self.abilities,
            encoder=self.encoder.kind,
            encoder_arrays=self.encoder.arrays,
            fingerprint=self.encoder.fingerprint,
            policies=self.policies,
            fitted=self.fitted,
            seen=self._seen,
            witnesses=self._witnesses,
            cascade=self.cascade,
        )
        persistence.save(saved, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, *, encoder: Callable[[list[str]], Any] | str | Path | None = None) -> "Router":
        """The router of a folder; nothing in it is executed.

        A router with an encoder of your own needs it again, or the folder of the same sentence encoder.  DataError where the
        folder is missing, corrupted or of another version, ValueError for another encoder.
        """
        saved = persistence.load(Path(folder))
        if (saved.encoder == NgramEncoder.kind) != (encoder is None):
            own = "the sentence encoder's folder, or the function from texts to vectors, that it was fitted with"
            wanted = own if encoder is None else "no encoder of yours"
            raise ValueError(f"encoder: this router needs {wanted}; pass it to Router.load as encoder=")
        router = cls(
            saved.price_of_error,
            encoder=encoder,
            policies=saved.policies or POLICIES,
            abilities=saved.abilities,
            explore=saved.explore,
            seed=saved.seed,
        )
        if saved.fingerprint is not None and router.encoder.fingerprint not in (None, saved.fingerprint):
            raise ValueError(
                f"encoder: this router was fitted with encoder {saved.fingerprint}, got {router.encoder.fingerprint}; its "
                "vectors would mean nothing here"
            )
        router.encoder.restore(saved.encoder_arrays)
        router.salt, router.cascade = saved.salt, saved.cascade
        router._fitted, router._seen, router._witnesses = saved.fitted, saved.seen, saved.witnesses
        return router

    def _described(self, name: str, abilities: Abilities | None) -> "Router":
        if abilities is not None:
            self.abilities = {**self.abilities, name: abilities}
        # The rows kept for certificates, and the cascade, know nothing of the new expert.
        self._witnesses = self.cascade = None
        self._plans = {}
        return self


def _table_of(log: Any) -> Table:
    if not isinstance(log, Log | Table):
        raise TypeError(
            f"log: expected a Log, got {type(log).__name__}; read_log(path) reads a file, Log(...) takes outcomes one by one"
        )
    return log.table() if isinstance(log, Log) else log


def _check_texts(queries: Any) -> None:
    if isinstance(queries, str):
        raise TypeError("queries: expected a list of texts, got one text; use route for one query")
    if not isinstance(queries, Collection):
        raise TypeError(f"queries: expected a list of texts, got {type(queries).__name__}")
    for row, query in enumerate(queries):
        if not isinstance(query, str):
            raise TypeError(f"queries: expected texts, got {type(query).__name__} in row {row + 1}")


def _check_model(prices: Any) -> None:
    if not isinstance(prices, PriceModel):
        raise TypeError(f"prices: expected a PriceModel, as token_prices and list_prices make it, got {type(prices).__name__}")
