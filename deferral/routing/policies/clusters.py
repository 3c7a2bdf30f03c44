"""The mean of every expert in the query's cluster, over several clusterings."""

import numpy as np

from deferral.routing.policies.centres import nearest_centre, spherical_centres
from deferral.routing.policies.policy import Folded, centred
from deferral.routing.vectors import Arrays, Vectors

__all__ = ["Clusters"]

_FEW = 64
_CLUSTERINGS = 4


class Clusters:
    """sum over the cluster of (quality - mean) / (its size + prior), averaged over four clusterings from other starts."""

    kind = "clusters"

    def __init__(self, *, count: int = 64, prior: float = 5.0) -> None:
        self.count, self.prior = count, prior
        self.arrays: Arrays = {}
        self._tables = Folded(_tables)

    def fit(self, vectors: Vectors, quality: np.ndarray, weights: np.ndarray, means: np.ndarray, *, seed: int = 0) -> "Clusters":
        gain = centred(quality, weights, means)
        count = max(1, min(self.count, len(gain) // 10))
        centres, values = [], []
        for number in range(_CLUSTERINGS):
            found = spherical_centres(vectors.dense, count, seed=seed * _CLUSTERINGS + number)
            member = nearest_centre(vectors.dense, found)
            sums, sizes = np.zeros((2, len(found), gain.shape[1]))
            np.add.at(sums, member, gain)
            np.add.at(sizes, member, weights)
            centres.append(found)
            values.append(sums / (sizes + self.prior))
        self.arrays = {"centres": np.stack(centres), "gain": np.stack(values).astype(np.float32)}
        return self

    def deviations(self, vectors: Vectors) -> np.ndarray:
        """Expected quality above the expert's mean.  -> (N, E)"""
        centres, gain = self.arrays["centres"], self.arrays["gain"]
        if len(vectors) > _FEW:
            each = [values[nearest_centre(vectors.dense, found)] for found, values in zip(centres, gain, strict=True)]
            return np.sum(each, axis=0) / np.float32(len(gain))
        # One product for all clusterings, whose table would be large for many queries.
        directions, shares, starts = self._tables(self.arrays, vectors)
        nearest = (vectors.dense @ directions).reshape(len(vectors), *centres.shape[:2]).argmax(2)
        nearest += starts
        return np.add.reduce(shares.take(nearest, axis=0), axis=1)


def _tables(arrays: Arrays, _: Vectors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All centres as columns, what each adds to the mean of the clusterings, and where each clustering begins."""
    repeats, count, size = arrays["centres"].shape
    gain = arrays["gain"].reshape(repeats * count, -1) / np.float32(repeats)
    return np.ascontiguousarray(arrays["centres"].reshape(repeats * count, size).T), gain, count * np.arange(repeats)
