"""Ridge regression on cheap features and their products: little, but it carries over to subjects that the log has not seen."""

from functools import cache

import numpy as np

from deferral.routing.policies.policy import Folded, centred
from deferral.routing.vectors import Arrays, Vectors

__all__ = ["Features"]


class Features:
    """min_w sum over known (mean + x.w_e - quality)^2 + penalty N |w_e|^2, x the features (length, kinds of characters), their
    products of two, and 1.

    The penalty grows with the log: what it guards against is not chance but that other subjects differ.
    """

    kind = "features"

    def __init__(self, *, penalty: float = 0.3) -> None:
        self.penalty = penalty
        self.arrays: Arrays = {}
        self._scaled = Folded(_scaled)

    def fit(self, vectors: Vectors, quality: np.ndarray, weights: np.ndarray, means: np.ndarray, *, seed: int = 0) -> "Features":
        x = (_products(vectors) * _sizes(vectors.extra.shape[1])).astype(np.float64)
        gain = centred(quality, weights, means)
        ridge = self.penalty * len(x) * np.eye(x.shape[1])
        ridge[0, 0] = 1e-6 * len(x)
        if (weights == 1).all():
            solution = np.linalg.solve(x.T @ x + ridge, x.T @ gain)
        else:
            each = [np.linalg.solve((x * weights[:, [e]]).T @ x + ridge, x.T @ gain[:, e]) for e in range(gain.shape[1])]
            solution = np.stack(each, -1)
        self.arrays = {"weights": solution.astype(np.float32)}
        return self

    def deviations(self, vectors: Vectors) -> np.ndarray:
        """Expected quality above the expert's mean.  -> (N, E)"""
        return _products(vectors) @ self._scaled(self.arrays, vectors)


def _products(vectors: Vectors) -> np.ndarray:
    """Every product of two of 1 and the features, as they stand in `Vectors.tail`.  -> (N, 1 + C + C (C + 1) / 2)"""
    left, right = _pairs(vectors.extra.shape[1])
    tail = vectors.tail
    found = tail.take(left, axis=1)
    found *= tail.take(right, axis=1)
    return found


def _scaled(arrays: Arrays, vectors: Vectors) -> np.ndarray:
    """What `_products` are multiplied by.  -> (1 + C + C (C + 1) / 2, E)"""
    return _sizes(vectors.extra.shape[1])[:, None] * arrays["weights"]


@cache
def _pairs(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each product of 1 and the features, the places of the two in `Vectors.tail`, where 1 is the last."""
    left, right = np.triu_indices(1 + columns)
    return (left - 1) % (1 + columns), (right - 1) % (1 + columns)


@cache
def _sizes(columns: int) -> np.ndarray:
    """Products enter as 1, the features and a third of every product of two of them: features reach from -3 to 3."""
    left, _ = np.triu_indices(1 + columns)
    return np.where(left == 0, 1, 1 / 3).astype(np.float32)
