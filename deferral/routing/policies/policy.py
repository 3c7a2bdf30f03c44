"""What every estimator of quality has in common: fitted on a weighted table, it says how far from the mean a query is."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np

from deferral.routing.vectors import Arrays, Vectors

__all__ = ["Folded", "Policy", "centred", "expert_means"]

_PRIOR = 5.0
T = TypeVar("T")


class Policy(Protocol):
    """An estimator of every expert's quality.  `arrays` is all that it has learned."""

    kind: str
    arrays: Arrays

    def fit(self, vectors: Vectors, quality: np.ndarray, weights: np.ndarray, means: np.ndarray, *, seed: int = 0) -> "Policy":
        """Learn from N queries.  Vectors, (N, E), (N, E), (E,) -> self

        A cell of weight 0 is not known; known cells weigh 1, or the inverse of their propensity.
        """
        ...

    def deviations(self, vectors: Vectors) -> np.ndarray:
        """Expected quality above the expert's mean.  -> (N, E)"""
        ...


class Folded(Generic[T]):
    """What follows from the arrays of a policy: worked out when it is first asked for, and again for other arrays.

    A decision about one query is some hundred small calls, and each that is spared shows.  Of the vectors that are passed only
    the shapes may count.
    """

    def __init__(self, fold: Callable[[Arrays, Vectors], T]) -> None:
        self._fold = fold
        self._kept: tuple[Arrays, T] | None = None

    def __call__(self, arrays: Arrays, vectors: Vectors) -> T:
        kept = self._kept
        if kept is None or kept[0] is not arrays:
            kept = self._kept = arrays, self._fold(arrays, vectors)
        return kept[1]


def expert_means(quality: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean quality of each expert, shrunk to that of all by five outcomes' worth.  (N, E), (N, E) -> (E,) float32

    Outcomes of different weights count for as many equal ones as say as much, (sum w)^2 / sum w^2: one that stands for
    thousands is one.
    """
    mass, squares = weights.sum(0, dtype=np.float64), (weights.astype(np.float64) ** 2).sum(0)
    sums = np.where(weights > 0, quality * weights, 0).sum(0, dtype=np.float64)
    mean, count = sums / np.maximum(mass, 1e-12), mass**2 / np.maximum(squares, 1e-12)
    # A table without gaps needs no borrowing.
    prior = 0.0 if (weights > 0).all() else _PRIOR
    of_all = count @ mean / max(count.sum(), 1e-12)
    return ((count * mean + prior * of_all) / np.maximum(count + prior, 1e-12)).astype(np.float32)


def centred(quality: np.ndarray, weights: np.ndarray, means: np.ndarray) -> np.ndarray:
    """weight * (quality - mean), 0 where nothing is known.  (N, E), (N, E), (E,) -> (N, E) float32"""
    return np.where(weights > 0, weights * (quality - means), 0).astype(np.float32)
