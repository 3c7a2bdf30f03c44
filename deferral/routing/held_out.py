"""What is learned from held-out rows: how to blend the estimators, and what they are worth.

Every figure is cross-fitted: a row is judged by estimators and blending weights that did not see it.  The encoder, which sees no
outcome, is fitted once on all queries; so are the few weights for queries of new subjects.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deferral.routing.partial_logs import OutcomeModel, doubly_robust
from deferral.routing.policies import Beside, Clusters, Features, Heads, Linear, Neighbours, Policy, Rejector, expert_means
from deferral.routing.prices import PriceModel, characters_of, error_range
from deferral.routing.shift import refitted
from deferral.routing.table import Table
from deferral.routing.vectors import Vectors

__all__ = [
    "FOLDS",
    "POLICIES",
    "HeldOut",
    "Judged",
    "blend",
    "full_price",
    "grid",
    "held_out",
    "judged",
    "mean_and_half",
    "mixed",
    "neighbours",
    "random_folds",
    "taught",
]

POLICIES: tuple[Callable[[], Policy], ...] = (Linear, Neighbours, Clusters, Heads, Features, Rejector)
FOLDS = 4
_GRID = 25
_DEVIATION_OF_WEIGHTS = 0.1
# An estimator is left out where that adds less than this many standard errors to the errors of the blend.
_PATIENCE = 0.5
_MANY_ROWS = 3_000
# At a given price of an error, experts with a smaller share of the queries are left out of the verdict.
_ASKED = 0.05
_Z = 1.96


@dataclass(frozen=True)
class HeldOut:
    """Cross-fitted estimates of N rows."""

    deviations: dict[str, np.ndarray]  # estimator: (N, E)
    means: np.ndarray  # (N, E), the experts' means on the rows outside the row's fold
    truth: np.ndarray  # (N, E), the outcomes; doubly robust ones where the log is partial
    similarity: np.ndarray  # (N,), to those rows
    fold: np.ndarray  # (N,)
    beside: np.ndarray  # (N, C), what those rows say of other columns

    def rows(self, rows: np.ndarray) -> "HeldOut":
        """Some of the rows."""
        deviations = {name: values[rows] for name, values in self.deviations.items()}
        arrays = (self.means, self.truth, self.similarity, self.fold, self.beside)
        return HeldOut(deviations, *(array[rows] for array in arrays))


@dataclass(frozen=True)
class Judged:
    """Held-out cost, in errors, of what was learned and of the best single expert, at some prices of an error."""

    errors: np.ndarray  # (G,) dollars, rising
    learned: np.ndarray  # (G,)
    static: np.ndarray  # (G,)
    random: np.ndarray  # (G,)
    oracle: np.ndarray  # (G,) NaN where not every expert answered every query
    gain: np.ndarray  # (G,) static - learned, paired
    half_width: np.ndarray  # (G,) of its 95% interval
    overall: np.ndarray  # (3, G) mean agreement of estimated and true deviations, half of its 95% interval, mean skill
    rows: np.ndarray  # (N,) learned cost of every row over all of them

    @property
    def better(self) -> np.ndarray:
        """Where the learned policy is cheaper than the best single expert with confidence.  (G,) bool

        Either the 95% interval of the gain there lies above 0.  Or the estimates agree with the outcomes with confidence, so that
        deciding by some multiple of them is cheaper over all trade-offs, they have skill at their own scale, and the gain there
        is not below 0 with confidence: at the ends, where all queries go to one expert anyway, no gain can be seen.  Agreement
        is that on the experts who are asked there, or would be on the mean: one who never pays proves nothing of the others.
        """
        agreement, half_width, skilled = self.overall
        return (self.gain > self.half_width) | ((agreement > half_width) & (skilled > 0) & (self.gain >= -self.half_width))


def held_out(
    policies: Sequence[Callable[[], Policy]],
    vectors: Vectors,
    quality: np.ndarray,
    weights: np.ndarray,
    price: np.ndarray,
    fold: np.ndarray,
    *,
    seed: int = 0,
    new: bool = False,
    beside: Beside | None = None,
) -> HeldOut:
    """Estimates of every row by estimators fitted on the other folds.  Vectors, (N, E), (N, E), (N, E), (N,) -> HeldOut

    `new`: to the encoder too, a fold is new.  `beside`: columns that neighbours say something of, too.
    """
    experts = quality.shape[1]
    others = np.empty((len(quality), 0 if beside is None else beside[0].shape[1]), np.float32)
    deviations: dict[str, np.ndarray] = {}
    means, truth = np.empty((2, *quality.shape), np.float32)
    similarity = np.empty(len(quality), np.float32)
    for number in np.unique(fold):
        rest, rows = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        around = refitted(vectors, rest, seed=seed) if new else vectors
        seen, unseen = around.rows(rest), around.rows(rows)
        outcomes = doubly_robust(seen, quality[rest], weights[rest], seed=seed)
        truth[rows] = quality[rows]
        if (weights != 1).any():
            model = OutcomeModel().fit(seen, quality[rest], weights[rest])
            truth[rows] = model.outcomes(unseen, quality[rows], weights[rows], judging=True)
        ones = np.ones_like(outcomes)
        means[rows] = expert_means(outcomes, ones)
        rest_beside = None if beside is None else (beside[0][rest], beside[1][rest])
        memory = neighbours(policies).fit(seen, outcomes, ones, means[rows[0]], seed=seed, beside=rest_beside)
        found, similarity[rows] = memory.look_up(unseen)
        nearby, others[rows] = found[:, :experts], found[:, experts:]
        for make in policies:
            policy = make()
            found = nearby
            if not isinstance(policy, Neighbours):
                found = taught(policy, seen, outcomes, means[rows[0]], price[rest], seed=seed).deviations(unseen)
            deviations.setdefault(policy.kind, np.empty(quality.shape, np.float32))[rows] = found
    return HeldOut(deviations, means, truth, similarity, fold, others)


def neighbours(policies: Sequence[Callable[[], Policy]]) -> Neighbours:
    """Those among the policies, not fitted yet, or the usual ones: likeness to the log is told by them in either case."""
    return next((policy for policy in (make() for make in policies) if isinstance(policy, Neighbours)), Neighbours())


def taught(
    policy: Policy, vectors: Vectors, quality: np.ndarray, means: np.ndarray, price: np.ndarray, *, seed: int = 0
) -> Policy:
    """The policy, fitted on a full table; a rejector learns from prices too.  Vectors, (N, E), (E,), (N, E) -> policy"""
    ones = np.ones_like(quality)
    if isinstance(policy, Rejector):
        return policy.fit(vectors, quality, ones, means, price=price, seed=seed)
    return policy.fit(vectors, quality, ones, means, seed=seed)


def random_folds(rows: int, folds: int = FOLDS, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(rows) % folds


def blend(held: HeldOut, mass: np.ndarray | None = None) -> dict[str, float]:
    """Non-negative weights of the estimators by least squares on held-out rows of mass (N,), one for all experts.

    Only differences among the experts of a row matter to a decision, so the row's mean is left out.  Few rows cannot tell
    estimators apart that agree: the weights are shrunk towards equal ones, as if those were known up to a deviation of 0.1.
    Breiman, "Stacked Regressions" (1996).

    Of many rows, one after the other the estimator that is missed least is left out, unless the others err more without it by
    half a standard error, with weights that a row's fold had no part in: what so many rows cannot tell to be of use takes time,
    and harms where other queries come.  Compare the rule of one standard error, Breiman, Friedman, Olshen, Stone, "Classification
    and Regression Trees" (1984), section 3.4.3.  Few rows can tell of none, and all together are then steadier than some.
    """
    names, blends = list(held.deviations), _Blends(held, mass)
    kept = list(range(len(names)))
    errors = blends.errors(kept)
    while len(kept) > 1 and len(errors) >= _MANY_ROWS:
        others = {place: blends.errors([one for one in kept if one != place]) for place in kept}
        least = min(others, key=lambda place: others[place].mean())
        more, half = mean_and_half(others[least] - errors)
        if more > _PATIENCE * half / _Z:
            break
        kept.remove(least)
        errors = others[least]
    weights = dict.fromkeys(names, 0.0)
    weights.update((names[place], float(weight)) for place, weight in zip(kept, blends.weights(kept), strict=True))
    return weights


class _Blends:
    """Least squares on any of the estimators, from the products of their columns and of the target in each row."""

    def __init__(self, held: HeldOut, mass: np.ndarray | None) -> None:
        columns = np.stack([*held.deviations.values(), held.truth - held.means], -1).astype(np.float64)
        columns -= columns.mean(1, keepdims=True)
        self.products = np.matmul(columns.transpose(0, 2, 1), columns)  # (N, M + 1, M + 1), the target is the last
        if mass is not None:
            self.products *= (mass / mass.mean())[:, None, None]
        self.fold = held.fold
        self.sums = {number: (self.products[held.fold == number].sum(0)) for number in np.unique(held.fold).tolist()}
        self.cells = held.truth.size

    def weights(self, kept: Sequence[int], without: float | None = None) -> np.ndarray:
        """Of the estimators in these places; `without` the rows of one fold, if there are others.  -> (K,)"""
        from scipy.optimize import nnls

        sums = sum([of for number, of in self.sums.items() if number != without] or self.sums.values())
        gram, toward, size = sums[np.ix_(kept, kept)], sums[kept, -1], sums[-1, -1]
        average = gram.sum() / len(kept) ** 2
        equal = max(toward.sum() / len(kept), 0) / max(average, 1e-12) / len(kept)
        pull = size / self.cells / _DEVIATION_OF_WEIGHTS**2
        root = np.linalg.cholesky(gram + (pull + 1e-12 * np.trace(gram) + 1e-30) * np.eye(len(kept)))
        found, _ = nnls(root.T, np.linalg.solve(root, toward + pull * equal))
        return found

    def errors(self, kept: Sequence[int]) -> np.ndarray:
        """The squared error of every row, by weights that its fold had no part in.  -> (N,)"""
        found = np.empty(len(self.fold))
        for number in self.sums:
            rows, off = self.fold == number, np.zeros(self.products.shape[-1])
            off[kept], off[-1] = self.weights(kept, number), -1
            found[rows] = self.products[rows] @ off @ off
        return found


def mixed(deviations: dict[str, np.ndarray], weights: dict[str, float]) -> np.ndarray:
    """sum_m weight_m deviation_m.  -> (N, E)"""
    total = np.zeros_like(next(iter(deviations.values())))
    for name, weight in weights.items():
        total += np.float32(weight) * deviations[name]
    return total


def _cost_rows(actions: np.ndarray, quality: np.ndarray, price: np.ndarray, error: float) -> np.ndarray:
    """1 - quality + price / price_of_error of the expert asked.  (N,), (N, E), (N, E) -> (N,)"""
    rows = np.arange(len(actions))
    return 1 - quality[rows, actions] + price[rows, actions] / error


def skill(estimate: np.ndarray, means: np.ndarray, quality: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Agreement and skill of every row.  (N, E) thrice -> (N,), (N,)

    With d the estimated and t the true deviation, both around the row's mean: agreement is sum_e d t, skill is
    sum_e t^2 - (t - d)^2, by how much the estimates are nearer than the means.  Between two experts skill is what deciding by the
    estimates instead of the means gains if the trade-off is drawn uniformly: the integral of t - x over x from 0 to d.
    """
    d, t = estimate - means, quality - means
    d, t = d - d.mean(1, keepdims=True), t - t.mean(1, keepdims=True)
    agreement = (d * t).sum(1)
    return agreement, 2 * agreement - (d * d).sum(1)


def _agreement(estimate: np.ndarray, means: np.ndarray, quality: np.ndarray, among: np.ndarray) -> tuple[float, float, float]:
    """Mean agreement, half its interval and mean skill among some experts; among all where fewer than two are left."""
    if among.sum() > 1:
        estimate, means, quality = estimate[:, among], means[:, among], quality[:, among]
    agreement, skilled = skill(estimate, means, quality)
    return *mean_and_half(agreement), float(skilled.mean())


def judged(
    estimate: np.ndarray, expected: np.ndarray, means: np.ndarray, price: np.ndarray, quality: np.ndarray, errors: np.ndarray
) -> Judged:
    """Held-out cost of deciding by the estimates at every price of an error, and of what it must beat.

    estimate, expected, means, price, quality (N, E).  Decisions go by the expected price, since what an answer costs is known
    after it only, and pay `price`.  The single expert is chosen on the rows outside the fold, as the estimates are made.  Ties
    go to the cheaper expert.
    """
    order = np.argsort(price.mean(0), kind="stable")
    sorted_estimate, sorted_price = estimate[:, order], expected[:, order]
    columns, overall = [], []
    total = np.zeros(len(quality))
    for error in errors:
        costs = 1 - quality + price / error
        asked, alone = order[(sorted_estimate - sorted_price / error).argmax(1)], (means - price.mean(0) / error).argmax(1)
        learned, static = (_cost_rows(actions, quality, price, error) for actions in (asked, alone))
        gain = static - learned
        total += learned / len(errors)
        columns.append((learned.mean(), static.mean(), costs.mean(), costs.min(1).mean(), *mean_and_half(gain)))
        shares = np.bincount(np.concatenate([asked, alone]), minlength=means.shape[1]) / len(asked)
        overall.append((shares > _ASKED).tobytes())
    agreed = {among: _agreement(estimate, means, quality, np.frombuffer(among, bool)) for among in set(overall)}
    learned_mean, static_mean, random, perfect, gain_mean, half = np.array(columns).T
    return Judged(
        errors=np.asarray(errors, float),
        learned=learned_mean,
        static=static_mean,
        random=random,
        oracle=perfect,
        gain=gain_mean,
        half_width=half,
        overall=np.array([agreed[among] for among in overall]).T,
        rows=total,
    )


def mean_and_half(values: np.ndarray, z: float = _Z) -> tuple[float, float]:
    """The mean and half the length of its interval, z standard errors (of 95%), by the normal law.  (N,) -> number, number"""
    return float(values.mean()), float(z * values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.inf


def grid(price: np.ndarray) -> np.ndarray:
    """Prices of an error at which a policy is judged, in dollars.  (N, E) -> (G,)"""
    return np.geomspace(*error_range(price), _GRID)


def full_price(table: Table, prices: PriceModel) -> np.ndarray:
    """The logged price, or the model's where none was logged.  -> (N, E)"""
    if table.full:
        return table.price
    return np.where(table.mask, table.price, prices(characters_of(table.queries)))
