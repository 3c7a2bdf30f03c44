"""How far what was learned is trusted, by how like the log a query is: learned from queries unlike the rest of the log."""

import numpy as np

from deferral.routing.policies.centres import nearest_centre, spherical_centres
from deferral.routing.vectors import Vectors, projection, reduced

__all__ = ["familiarity", "folds_of_groups", "refitted", "shifted_folds", "shrinkage"]

_CLUSTERS = 10
_BINS = 16


def shifted_folds(vectors: Vectors, folds: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows' clusters, and folds of whole clusters: what a new subject looks like.  -> (N,), (N,)"""
    dense = vectors.dense
    cluster = nearest_centre(dense, spherical_centres(dense, min(_CLUSTERS, max(2, len(dense) // 25)), seed=seed))
    return cluster, folds_of_groups(cluster, folds)


def folds_of_groups(member: np.ndarray, folds: int) -> np.ndarray:
    """Folds of whole groups: the largest first, each to the emptiest fold.  (N,) -> (N,)"""
    sizes, fold, filled = np.bincount(member), np.zeros(member.max() + 1, int), np.zeros(folds)
    for number in np.argsort(-sizes, kind="stable"):
        fold[number] = filled.argmin()
        filled[fold[number]] += sizes[number]
    return fold[member]


def refitted(vectors: Vectors, rest: np.ndarray, *, seed: int) -> Vectors:
    """All the vectors, as if the encoder had been fitted on the rows of `rest` alone: what others say it has never heard.

    An encoder that has seen a subject places its queries better than it will place those of a new one.  Vectors of a function
    need no refitting.
    """
    if vectors.wide is None:
        return vectors
    heard = np.bincount(vectors.wide.rows(rest).indices, minlength=vectors.wide.columns) >= 2
    wide = vectors.wide.only(heard)
    directions = projection(wide.rows(rest).sparse(), vectors.dense.shape[1], seed=seed)
    return reduced(wide, directions, vectors.extra)


def familiarity(alike: np.ndarray, unlike: np.ndarray, cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chance that a query is drawn like the log and not of a new subject, by its likeness: rising knots.  -> (B,), (B,)

    From the likeness (N,) of held-out rows and that (M,) of rows whose cluster (M,) was left out, as if either were as common.
    Clusters count alike, whatever their size.  Rising by isotonic regression over bins.
    """
    from scipy.optimize import isotonic_regression

    likeness = np.concatenate([alike, unlike])
    sizes = np.bincount(cluster)
    mass = np.concatenate([np.full(len(alike), 1 / len(alike)), 1 / sizes[cluster] / (sizes > 0).sum()])
    edges = np.unique(np.quantile(likeness, np.linspace(0, 1, _BINS + 1)[1:-1]))
    member = np.searchsorted(edges, likeness)
    count, total = np.bincount(member, minlength=len(edges) + 1), np.bincount(member, mass, len(edges) + 1)
    filled = count > 0
    centre = (np.bincount(member, likeness, len(edges) + 1)[filled] / count[filled]).astype(np.float64)
    own = np.bincount(member[: len(alike)], mass[: len(alike)], len(edges) + 1)[filled]
    rising = isotonic_regression(own / total[filled], weights=total[filled]).x
    return centre, np.clip(rising, 0, 1)


def shrinkage(estimate: np.ndarray, truth: np.ndarray, cluster: np.ndarray) -> float:
    """What share of an estimated deviation can be relied on in a subject to come.  (M, E), (M, E), (M,) -> number in [0, 1]

    The slopes of the true on the estimated deviation in every cluster are draws among subjects, and the next subject is one more:
    the lower end of its one-sided 95% prediction interval, by Student's law with two degrees of freedom less than there are
    clusters (0 with fewer than three), over the mean slope.  Deviations are taken around the row's mean; what chance adds to the
    spread of the slopes is taken off.  Higgins, Thompson, Spiegelhalter, "A re-evaluation of random-effects meta-analysis"
    (2009), section 4.
    """
    from scipy.special import stdtrit

    estimate, truth = estimate - estimate.mean(1, keepdims=True), truth - truth.mean(1, keepdims=True)
    above, below = (estimate * truth).sum(1), (estimate**2).sum(1)
    size = np.bincount(cluster, below)
    slope = np.bincount(cluster, above) / np.maximum(size, 1e-12)
    chance = np.bincount(cluster, (above - slope[cluster] * below) ** 2)[size > 0] / size[size > 0] ** 2
    slopes = slope[size > 0]
    if len(slopes) < 3 or slopes.mean() <= 0:
        return 0.0
    between = max(slopes.var(ddof=1) - chance.mean(), 0)
    spread = np.sqrt(between + (between + chance.mean()) / len(slopes))
    return float(np.clip(1 - stdtrit(len(slopes) - 2, 0.95) * spread / slopes.mean(), 0, 1))
