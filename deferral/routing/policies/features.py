"""Ridge regression on cheap features and their products: little, but it carries over to subjects that the log has not seen."""

from functools import cache

import numpy as np

from deferral.routing.encoders import Arrays, Vectors
from deferral.routing.policies.policy import centred

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

    def fit(self, vectors: Vectors, quality: np.ndarray, weights: np.ndarray, means: np.ndarray, *, seed: int = 0) -> "Features":
        x = _products(vectors.extra).astype(np.float64)
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
        return _products(vectors.extra) @ self.arrays["weights"]


def _products(extra: np.ndarray) -> np.ndarray:
    """1, the features and a third of every product of two: features reach from -3 to 3.  (N, C) -> (N, 1 + C + C (C + 1) / 2)"""
    left, right, divisor = _pairs(extra.shape[1])
    x = np.concatenate([np.ones((len(extra), 1), np.float32), extra], axis=1)
    found = x.take(left, axis=1)
    found *= x.take(right, axis=1)
    found /= divisor
    return found


@cache
def _pairs(columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each product of 1 and the features, the two that are multiplied (1 is the first), and what it is divided by."""
    left, right = np.triu_indices(1 + columns)
    return left, right, np.where(left == 0, 1, 3).astype(np.float32)
