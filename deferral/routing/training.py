"""What `fit` learns from held-out rows: how to blend the estimators, whether to trust them, and what they are worth.

Every figure is cross-fitted: a row is judged by estimators that did not see it.  The encoder alone, which sees no outcome, is
fitted once on all queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deferral.routing.encoders import Vectors
from deferral.routing.outcomes import Table
from deferral.routing.policies import Clusters, Heads, Linear, Neighbours, Policy, expert_means
from deferral.routing.policies.centres import nearest_centre, spherical_centres
from deferral.routing.prices import PriceModel

__all__ = ["POLICIES", "HeldOut", "Judged", "blend", "cost_rows", "held_out", "judged", "observed", "trust_of"]

POLICIES: tuple[Callable[[], Policy], ...] = (Linear, Neighbours, Clusters, Heads)
FOLDS = 4
_SHIFT_ROWS = 8000
_SHIFT_CLUSTERS = 10
_GRID = 25
_LEAST_PROPENSITY = 0.01
_DEVIATION_OF_WEIGHTS = 0.1
_Z = 1.96


@dataclass(frozen=True)
class HeldOut:
    """Cross-fitted estimates of N rows."""

    deviations: dict[str, np.ndarray]  # estimator: (N, E)
    means: np.ndarray  # (N, E), the experts' means on the rows outside the row's fold
    similarity: np.ndarray  # (N,), to those rows
    fold: np.ndarray  # (N,)


@dataclass(frozen=True)
class Judged:
    """Held-out cost, in errors, of what was learned and of the best single expert, at some prices of an error."""

    errors: np.ndarray  # (G,) dollars, rising
    learned: np.ndarray  # (G,)
    static: np.ndarray  # (G,)
    random: np.ndarray  # (G,)
    oracle: np.ndarray  # (G,)
    gain: np.ndarray  # (G,) static - learned, paired
    half_width: np.ndarray  # (G,) of its 95% interval
    overall: np.ndarray  # (2,) the gain over all these prices of an error, and half of its 95% interval
    rows: np.ndarray  # (N,) learned cost of every row over all of them

    @property
    def better(self) -> np.ndarray:
        """Where the learned policy is cheaper than the best single expert with confidence.  (G,) bool

        Either the 95% interval there lies above 0, or the one over all prices of an error does and the gain there is positive.
        """
        return (self.gain > self.half_width) | ((self.overall[0] > self.overall[1]) & (self.gain > 0))


def observed(table: Table) -> np.ndarray:
    """The weight of every cell: 1 if the table is full, else the inverse of its propensity, 0 where nothing is known.  (N, E)

    Where no propensity is logged, the assumption is that who was asked did not depend on the query, and the propensity is the
    expert's share of the queries.  Weights are divided by their mean over the known cells.
    """
    if table.full:
        return np.ones(table.mask.shape, np.float32)
    share = np.broadcast_to(np.maximum(table.mask.mean(0), 1e-12), table.mask.shape)
    chance = np.where(np.isnan(table.propensity), share, table.propensity)
    weights = np.where(table.mask, 1 / np.maximum(chance, _LEAST_PROPENSITY), 0)
    return (weights / weights[table.mask].mean()).astype(np.float32)


def held_out(
    policies: Sequence[Callable[[], Policy]],
    vectors: Vectors,
    quality: np.ndarray,
    weights: np.ndarray,
    fold: np.ndarray,
    *,
    seed: int = 0,
) -> HeldOut:
    """Estimates of every row by estimators fitted on the other folds.  Vectors, (N, E), (N, E), (N,) -> HeldOut"""
    deviations: dict[str, np.ndarray] = {}
    means, similarity = np.empty(quality.shape, np.float32), np.empty(len(quality), np.float32)
    for number in np.unique(fold):
        rest, rows = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        seen, unseen = vectors.rows(rest), vectors.rows(rows)
        means[rows] = expert_means(quality[rest], weights[rest])
        learn = (seen, quality[rest], weights[rest], means[rows[0]])
        memory = Neighbours()
        memory.fit(*learn, seed=seed)
        nearby, similarity[rows] = memory.look_up(unseen)
        for make in policies:
            policy = make()
            found = nearby if isinstance(policy, Neighbours) else policy.fit(*learn, seed=seed).deviations(unseen)
            deviations.setdefault(policy.kind, np.empty(quality.shape, np.float32))[rows] = found
    return HeldOut(deviations, means, similarity, fold)


def random_folds(rows: int, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(rows) % FOLDS


def shifted_folds(vectors: Vectors, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """At most 8,000 rows, and folds of them that are whole clusters: what a new subject looks like.  -> (M,), (M,)"""
    rows = np.random.default_rng(seed).permutation(len(vectors))[:_SHIFT_ROWS]
    dense = vectors.dense[rows]
    cluster = nearest_centre(dense, spherical_centres(dense, min(_SHIFT_CLUSTERS, max(2, len(rows) // 25)), seed=seed))
    # The largest clusters first, each to the emptiest fold.
    sizes, fold = np.bincount(cluster), np.zeros(cluster.max() + 1, int)
    filled = np.zeros(FOLDS)
    for number in np.argsort(-sizes, kind="stable"):
        fold[number] = filled.argmin()
        filled[fold[number]] += sizes[number]
    return rows, fold[cluster]


def blend(held: HeldOut, quality: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Non-negative weights of the estimators by least squares on held-out rows, one for all experts.

    Only differences among the experts of a row matter to a decision; where every expert is known the row's mean is left out.
    Few rows cannot tell estimators apart that agree: the weights are shrunk towards equal ones, as if those were known up to a
    deviation of 0.1.  Breiman, "Stacked Regressions" (1996).
    """
    from scipy.optimize import nnls

    names = list(held.deviations)
    columns = np.stack([held.deviations[name] for name in names], -1).astype(np.float64)
    target = (quality - held.means).astype(np.float64)
    if (weights > 0).all():
        columns, target = columns - columns.mean(1, keepdims=True), target - target.mean(1, keepdims=True)
    flat, mass = columns.reshape(-1, len(names)), np.sqrt(weights.reshape(-1, 1))
    known = mass[:, 0] > 0
    flat, wanted = flat[known] * mass[known], target.reshape(-1)[known] * mass[known, 0]
    average = flat.mean(1)
    equal = max(average @ wanted, 0) / max(average @ average, 1e-12) / len(names)
    pull = wanted.std() / _DEVIATION_OF_WEIGHTS
    rows = np.concatenate([flat, pull * np.eye(len(names))])
    found, _ = nnls(*_square(rows, np.append(wanted, np.full(len(names), pull * equal))))
    return {name: float(weight) for name, weight in zip(names, found, strict=True)}


def _square(columns: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A square problem of the same solutions: nnls is slow on tall ones."""
    upper = np.asarray(np.linalg.qr(np.column_stack([columns, target]), mode="r"))
    return upper[:, : columns.shape[1]], upper[:, columns.shape[1]]


def mixed(deviations: dict[str, np.ndarray], weights: dict[str, float]) -> np.ndarray:
    """sum_m weight_m deviation_m.  -> (N, E)"""
    total = np.zeros_like(next(iter(deviations.values())))
    for name, weight in weights.items():
        total += np.float32(weight) * deviations[name]
    return total


def trust_of(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """How much of a deviation is true, by the query's likeness to the log: rising knots.  -> (B,), (B,) in [0, 1]

    Each part is (similarity (N,), estimated deviation (N, E), true deviation (N, E), NaN where not known).  In every bin of
    similarity the slope of the true on the estimated deviation; then isotonic in similarity.
    """
    from sklearn.isotonic import IsotonicRegression

    bins = 12
    similarity = np.concatenate([part[0] for part in parts])
    edges = np.unique(np.quantile(similarity, np.linspace(0, 1, bins + 1)[1:-1]))
    member = np.searchsorted(edges, similarity)
    agreement, size = np.zeros(len(similarity)), np.zeros(len(similarity))
    start = 0
    for alike, estimate, truth in parts:
        known = ~np.isnan(truth)
        agreement[start : start + len(alike)] = np.where(known, estimate * np.where(known, truth, 0), 0).sum(1)
        size[start : start + len(alike)] = np.where(known, estimate**2, 0).sum(1)
        start += len(alike)
    count = np.maximum(np.bincount(member, minlength=len(edges) + 1), 1)
    above, below = np.bincount(member, agreement, len(edges) + 1), np.bincount(member, size, len(edges) + 1)
    centre = np.bincount(member, similarity, len(edges) + 1) / count
    slope = np.clip(above / np.maximum(below, 1e-12), 0, 1)
    rising = IsotonicRegression(y_min=0, y_max=1).fit_transform(centre, slope, sample_weight=below + 1e-12)
    return centre.astype(np.float64), rising.astype(np.float64)


def completed(quality: np.ndarray, estimate: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Doubly robust outcomes: estimate + weight * (quality - estimate), the outcome itself where the table is full.  (N, E)

    Right on average if either the propensities or the estimates are.  Dudík, Langford, Li, "Doubly Robust Policy Evaluation and
    Learning" (2011), eq. 2.
    """
    if (weights == 1).all():
        return quality
    known = weights > 0
    # Weights were divided by their mean over the known cells; per cell they must average to 1.
    scale = known.size / weights.sum()
    return estimate + np.where(known, scale * weights * (quality - estimate), 0)


def error_range(price: np.ndarray) -> tuple[float, float]:
    """The prices of an error between which decisions change, in dollars.  (N, E) -> low, high

    At the low end half an error's difference in quality is worth the smallest difference in price, at the high end a fiftieth
    is worth the largest.
    """
    means = np.sort(price.mean(0))
    gaps = np.diff(means)
    gaps = gaps[gaps > 1e-9 * max(means[-1], 1e-300)]
    if len(gaps) == 0:
        return 1.0, 100.0
    return float(gaps.min() / 0.5), float((means[-1] - means[0]) / 0.02)


def cost_rows(actions: np.ndarray, quality: np.ndarray, price: np.ndarray, error: float) -> np.ndarray:
    """1 - quality + price / price_of_error of the expert asked.  (N,), (N, E), (N, E) -> (N,)"""
    rows = np.arange(len(actions))
    return 1 - quality[rows, actions] + price[rows, actions] / error


def judged(
    decide: Callable[[float], np.ndarray], means: np.ndarray, price: np.ndarray, quality: np.ndarray, errors: np.ndarray
) -> Judged:
    """Held-out cost of `decide(price_of_error) -> actions (N,)` at every price of an error, and of what it must beat.

    The single expert is chosen on the rows outside the fold, as `decide` is.
    """
    columns = []
    gains, total = np.zeros(len(quality)), np.zeros(len(quality))
    for error in errors:
        costs = 1 - quality + price / error
        learned = cost_rows(decide(error), quality, price, error)
        static = cost_rows((means - price.mean(0) / error).argmax(1), quality, price, error)
        gain = static - learned
        gains += gain / len(errors)
        total += learned / len(errors)
        columns.append((learned.mean(), static.mean(), costs.mean(), costs.min(1).mean(), *mean_and_half(gain)))
    learned_mean, static_mean, random, perfect, gain_mean, half = np.array(columns).T
    return Judged(
        errors=np.asarray(errors, float),
        learned=learned_mean,
        static=static_mean,
        random=random,
        oracle=perfect,
        gain=gain_mean,
        half_width=half,
        overall=np.array(mean_and_half(gains)),
        rows=total,
    )


def mean_and_half(values: np.ndarray) -> tuple[float, float]:
    """The mean and half the length of its 95% interval, by the normal law.  (N,) -> number, number"""
    return float(values.mean()), float(_Z * values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.inf


def grid(price: np.ndarray) -> np.ndarray:
    """Prices of an error at which a policy is judged, in dollars.  (N, E) -> (G,)"""
    return np.geomspace(*error_range(price), _GRID)


def full_price(table: Table, prices: PriceModel) -> np.ndarray:
    """The logged price, or the model's where none was logged.  -> (N, E)"""
    if table.full:
        return table.price
    characters = np.array([len(query) for query in table.queries], float)
    return np.where(table.mask, table.price, prices(characters))
