"""How a router learns from a table: hold out, blend, judge, then fit the winner on all rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from deferral.routing.evaluation import routability
from deferral.routing.fitted import Fitted
from deferral.routing.held_out import (
    FOLDS,
    HeldOut,
    blend,
    full_price,
    grid,
    held_out,
    judged,
    mean_and_half,
    mixed,
    neighbours,
    random_folds,
    taught,
)
from deferral.routing.held_rows import HeldRows
from deferral.routing.partial_logs import doubly_robust, observed
from deferral.routing.policies import Beside, Heads, Neighbours, Policy, Rejector, expert_means
from deferral.routing.policies.centres import nearest_centre, spherical_centres
from deferral.routing.prices import PriceModel, characters_of, dearness, fit_prices, paid_on_average, shortest
from deferral.routing.shift import familiarity, refitted, shifted_folds, shrinkage
from deferral.routing.static import fingerprints
from deferral.routing.table import Table
from deferral.routing.vectors import Vectors
from deferral.threads import one_thread

__all__ = ["fitted"]

# Cross-fitting more rows would not narrow the intervals enough to be waited for.
_MOST_HELD_OUT = 6_000
_FEWEST_ROWS = 40
_TEXT = 200
_KINDS = 8


@one_thread()
def fitted(
    table: Table,
    vectors: Vectors,
    policies: Sequence[Callable[[], Policy]],
    *,
    prices: PriceModel | None = None,
    seed: int = 0,
) -> Fitted:
    """Learn from a table: hold out, blend, judge, then fit the winner on all rows."""
    prices = None if prices is None else prices.of(table.experts)
    weights = observed(table)
    quality = np.where(table.mask, table.quality, 0).astype(np.float32)
    outcomes = doubly_robust(vectors, quality, weights, seed=seed)
    ones = np.ones_like(outcomes)
    means = expert_means(outcomes, ones)
    model = fit_prices(table, weights) if prices is None else prices
    length = characters_of(table.queries)
    price = full_price(table, model) if prices is None else model(length)
    rows, experts = quality.shape
    above = dearness(table, weights)
    memory = neighbours(policies).fit(vectors, outcomes, ones, means, seed=seed, beside=above)
    state = Fitted(
        experts=tuple(table.experts),
        means=means,
        prices=model,
        mean_price=(paid_on_average(price, model(length), weights) if prices is None else price).mean(0),
        latency=_mean_latency(table, weights),
        extension=np.eye(experts, dtype=np.float32),
        policies=(),
        weights=(),
        abroad=(),
        memory=memory.without_beside(),
        texts=tuple(text[:_TEXT] for text in table.queries),
        familiar=(np.array([0.0]), np.array([1.0])),
        kinds=(np.empty((0, vectors.dense.shape[1]), np.float32), np.empty(0)),
        reliance=0.0,
        judged=None,
        winner="static mix",
        held_costs={},
        held=HeldRows.none(experts),
        floor=np.zeros(experts),
        places=np.arange(experts),
        room="",
        mean_length=float(length.mean()),
    )
    if rows < _FEWEST_ROWS or experts < 2:
        return state
    state = replace(state, memory=memory)
    data = _Rows(table.queries, vectors, quality, weights, outcomes, price, length, above)
    return _learned(state, data, policies, logged=prices is None, seed=seed)


@dataclass(frozen=True)
class _Rows:
    """What is learned from.  N queries, E experts."""

    queries: Sequence[str]
    vectors: Vectors
    quality: np.ndarray  # (N, E), 0 where nothing is known
    weights: np.ndarray  # (N, E)
    outcomes: np.ndarray  # (N, E), doubly robust where the log is partial
    price: np.ndarray  # (N, E) dollars
    length: np.ndarray  # (N,) characters
    above: Beside | None  # what answers cost above what lengths say, and which of that is known

    def part(self, rows: np.ndarray) -> "_Rows":
        above = None if self.above is None else (self.above[0][rows], self.above[1][rows])
        queries = [self.queries[row] for row in rows.tolist()]
        quality, weights, outcomes = self.quality[rows], self.weights[rows], self.outcomes[rows]
        return _Rows(queries, self.vectors.rows(rows), quality, weights, outcomes, self.price[rows], self.length[rows], above)


def _learned(state: Fitted, data: _Rows, policies: Sequence[Callable[[], Policy]], *, logged: bool, seed: int) -> Fitted:
    """The state with what held-out rows say of it, and the estimators that they leave, fitted on all rows."""
    some = np.arange(len(data.quality))
    if len(some) > _MOST_HELD_OUT:
        some = np.sort(np.random.default_rng(seed).choice(len(some), _MOST_HELD_OUT, replace=False))
    part, fold = data.part(some), random_folds(len(some), seed=seed)
    held = held_out(policies, part.vectors, part.quality, part.weights, part.price, fold, seed=seed, beside=part.above)
    state, foreseen, expected, paid = _priced(state, held, part, data.length, logged=logged)
    estimates, costs, winner = _compared(held, expected, paid)
    here = blend(_only(held, list(held.deviations) if winner == "blend" else [winner]))
    likeness = _likeness(part.vectors, held, seed)
    abroad, reliance, familiar = _elsewhere(policies, part.vectors, part.quality, part.weights, part.price, likeness, seed)
    used = [make for make in policies if here.get(make().kind, 0) > 0 or abroad.get(make().kind, 0) > 0]
    learned = tuple(
        state.memory
        if isinstance(make(), Neighbours)
        else taught(make(), data.vectors, data.outcomes, state.means, data.price, seed=seed)
        for make in used
    )
    near = np.interp(likeness, *familiar)[:, None].astype(np.float32)
    judged_as = held.means + near * (estimates[winner] - held.means) + (1 - near) * mixed(held.deviations, abroad)
    verdict = judged(judged_as, expected, held.means, paid, held.truth, grid(paid))
    room = routability(judged_as.astype(np.float64), paid, held.truth, expected)
    if (data.weights != 1).any():
        # Of doubly robust outcomes, the best one of a query is mostly the one that chance raised most.
        verdict, room = replace(verdict, oracle=np.full_like(verdict.oracle, np.nan)), replace(room, oracle=np.nan)
    return replace(
        state,
        policies=learned,
        weights=tuple(here.get(policy.kind, 0.0) for policy in learned),
        abroad=tuple(abroad.get(policy.kind, 0.0) for policy in learned),
        familiar=familiar,
        kinds=_kinds(data.vectors, seed),
        reliance=reliance,
        judged=verdict,
        winner=winner,
        held_costs=costs,
        held=HeldRows(
            quality=held.truth.astype(np.float32),
            estimate=judged_as.astype(np.float32),
            price=paid,
            length=part.length,
            dearness=foreseen,
            deviation=(judged_as - state.means).astype(np.float32),
            fold=fold,
            keys=fingerprints(part.queries),
            means=np.stack([held.means[fold == number][0] for number in range(fold.max() + 1)]),
        ),
        room=str(room),
    )


def _priced(
    state: Fitted, held: HeldOut, part: _Rows, lengths: np.ndarray, *, logged: bool
) -> tuple[Fitted, np.ndarray, np.ndarray, np.ndarray]:
    """Of whose prices neighbours are asked; what they say of the held-out rows, what is expected of these, and what was paid.

    -> state, (N, E), (N, E), (N, E)
    """
    if part.above is None:
        foreseen = np.zeros(part.price.shape, np.float32)
        return state, foreseen, state.priced(part.length, foreseen), part.price
    above, known = part.above
    told = _told(held.beside, above, known)
    every = np.full(len(told), shortest(lengths))
    foreseen, dear = held.beside * told, replace(state, floor=every)
    state = replace(state, memory=state.memory.keeping_beside(told), floor=every * told)
    expected = state.priced(part.length, foreseen)
    if not told.any():
        return state, foreseen, expected, part.price
    # What was not logged costs what it is expected to, and what was, as much more than its length says at other prices.
    paid = part.price if logged else dear.priced(part.length, above)
    return state, foreseen, expected, paid_on_average(paid, expected, part.weights)


def _compared(held: HeldOut, expected: np.ndarray, paid: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float], str]:
    """Cross-fitted estimates of each estimator and of their blend, their mean cost over all trade-offs, and who wins."""
    names = list(held.deviations)
    estimates = {name: held.means + _without_own_fold(held, [name]) for name in names}
    if len(names) > 1:
        estimates["blend"] = held.means + _without_own_fold(held, names)
    errors = grid(paid)
    verdicts = {name: judged(estimate, expected, held.means, paid, held.truth, errors) for name, estimate in estimates.items()}
    costs = {name: float(verdict.learned.mean()) for name, verdict in verdicts.items()}
    winner = min(costs, key=lambda name: costs[name])
    if "blend" in verdicts and winner != "blend":
        # Among estimators this much alike, the cheapest on a few thousand rows is often not the best: it must win clearly.
        gain, half = mean_and_half(verdicts["blend"].rows - verdicts[winner].rows)
        winner = winner if gain > half else "blend"
    return estimates, costs, winner


def _told(foreseen: np.ndarray, above: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Of which experts' prices neighbours say more than the query's length, on rows held out.  (N, E) thrice -> (E,) bool"""
    missed, missed_by_length = ((known * (above - guess)) ** 2 for guess in (foreseen, 0))
    gains = [mean_and_half(gain) for gain in (missed_by_length - missed).T]
    return np.array([gain > half for gain, half in gains])


def _likeness(vectors: Vectors, held: HeldOut, seed: int) -> np.ndarray:
    """How like the rest of the log each row is, to an encoder that has not seen its fold: as queries to come will be.  -> (N,)

    By an encoder that has seen them, rows of a small log are less alike: each has words that are its own.
    """
    found = np.empty(len(held.fold), np.float32)
    for number in np.unique(held.fold):
        rest, rows = np.flatnonzero(held.fold != number), np.flatnonzero(held.fold == number)
        around = refitted(vectors, rest, seed=seed)
        none = np.zeros((len(rest), 1), np.float32)
        memory = Neighbours().fit(around.rows(rest), none, none, np.zeros(1, np.float32), seed=seed)
        found[rows] = memory.likeness(around.rows(rows))
    return found


def _elsewhere(
    policies: Sequence[Callable[[], Policy]],
    vectors: Vectors,
    quality: np.ndarray,
    weights: np.ndarray,
    price: np.ndarray,
    likeness: np.ndarray,
    seed: int,
) -> tuple[dict[str, float], float, tuple[np.ndarray, np.ndarray]]:
    """For queries of new subjects: the estimators' weights, the share of them that is relied on, and how to know such queries."""
    cluster, fold = shifted_folds(vectors, FOLDS, seed=seed)
    if len(np.unique(fold)) < 2:
        return {}, 0.0, (np.array([0.0]), np.array([1.0]))
    # Networks are not asked about subjects that they have not seen.
    plain = [make for make in policies if not isinstance(make(), Heads | Rejector)] or policies
    shifted = held_out(plain, vectors, quality, weights, price, fold, seed=seed, new=True)
    mass = 1 / np.bincount(cluster)[cluster]
    found = blend(shifted, mass)
    reliance = shrinkage(mixed(shifted.deviations, found), shifted.truth - shifted.means, cluster)
    familiar = familiarity(likeness, shifted.similarity, cluster)
    return {name: reliance * weight for name, weight in found.items()}, reliance, familiar


def _kinds(vectors: Vectors, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What queries the log is made of: centres, and the share of the log that is nearest to each.  -> (C, D), (C,)"""
    centres = spherical_centres(vectors.dense, _KINDS, seed=seed)
    return centres, np.bincount(nearest_centre(vectors.dense, centres), minlength=len(centres)) / len(vectors)


def _only(held: HeldOut, names: Sequence[str]) -> HeldOut:
    return replace(held, deviations={name: held.deviations[name] for name in names})


def _without_own_fold(held: HeldOut, names: Sequence[str]) -> np.ndarray:
    """The blend of these estimators, with weights that a row's fold had no part in.  -> (N, E)"""
    result = np.zeros_like(held.means)
    for number in np.unique(held.fold):
        rows = np.flatnonzero(held.fold == number)
        weights = blend(_only(held.rows(np.flatnonzero(held.fold != number)), names))
        result[rows] = mixed({name: held.deviations[name][rows] for name in names}, weights)
    return result


def _mean_latency(table: Table, weights: np.ndarray) -> np.ndarray:
    known = ~np.isnan(table.latency) * weights.astype(float)
    mass = known.sum(0)
    sums = (np.nan_to_num(table.latency) * known).sum(0)
    return np.where(mass > 0, sums / np.where(mass > 0, mass, 1), np.nan)
