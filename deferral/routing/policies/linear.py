"""Ridge regression of every expert's quality on the sparse row of the query itself."""

import numpy as np

from deferral.routing.policies.policy import Folded, centred
from deferral.routing.vectors import Arrays, Vectors

__all__ = ["Linear"]

# The intercept is a column of this constant: the larger, the less the ridge penalty holds the intercept back.
_ONE = 3.0
_EXTRA = 0.1
_STEPS = 15


class Linear:
    """min_w sum over known (mean + x.w_e - quality)^2 + penalty |w_e|^2, all experts at once, by conjugate gradients.

    x is the TF-IDF row with the cheap features; without one, the dense vector.  Hoerl and Kennard, "Ridge Regression" (1970).
    """

    kind = "linear"

    def __init__(self, *, penalty: float = 10.0) -> None:
        self.penalty = penalty
        self.arrays: Arrays = {}
        self._tail = Folded(_tail)

    def fit(self, vectors: Vectors, quality: np.ndarray, weights: np.ndarray, means: np.ndarray, *, seed: int = 0) -> "Linear":
        known = weights.astype(np.float32)
        wide = None if vectors.wide is None else vectors.wide.sparse()
        transposed = None if wide is None else wide.T.tocsr()
        narrow = _narrow(vectors)

        def gradient(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return (np.empty((0, rows.shape[1]), np.float32) if transposed is None else transposed @ rows), narrow.T @ rows

        sizes = (0 if wide is None else wide.shape[1]), narrow.shape[1]
        residual = np.concatenate(gradient(centred(quality, weights, means)))
        solution, direction = np.zeros_like(residual), residual.copy()
        size = (residual**2).sum(0)
        first = size.copy()
        for _ in range(_STEPS):
            rows = narrow @ direction[sizes[0] :]
            if wide is not None:
                rows = rows + wide @ direction[: sizes[0]]
            curved = np.concatenate(gradient(rows * known)) + self.penalty * direction
            step = size / np.maximum((direction * curved).sum(0), 1e-30)
            solution += step * direction
            residual -= step * curved
            before, size = size, (residual**2).sum(0)
            if (size <= 1e-8 * first).all():
                break
            direction = residual + size / np.maximum(before, 1e-30) * direction
        self.arrays = {"wide": solution[: sizes[0]], "narrow": solution[sizes[0] :]}
        return self

    def deviations(self, vectors: Vectors) -> np.ndarray:
        """Expected quality above the expert's mean.  -> (N, E)"""
        narrow = self.arrays["narrow"]
        if vectors.wide is None:
            return _narrow(vectors) @ narrow
        off = vectors.wide.times(self.arrays["wide"])
        off += vectors.tail @ self._tail(self.arrays, vectors)
        return off


def _tail(arrays: Arrays, _: Vectors) -> np.ndarray:
    """What the cheap features and 1 are multiplied by, as they stand in `Vectors.tail`.  -> (C + 1, E)"""
    narrow = arrays["narrow"]
    return np.concatenate([np.float32(_EXTRA) * narrow[1:], np.float32(_ONE) * narrow[:1]])


def _narrow(vectors: Vectors) -> np.ndarray:
    ones = np.full((len(vectors), 1), _ONE, np.float32)
    # The scale of a dense row of length 1 that stands for a TF-IDF row.
    dense = vectors.dense if vectors.wide is None else vectors.dense[:, :0]
    return np.concatenate([ones, _EXTRA * vectors.extra, dense], axis=1)
