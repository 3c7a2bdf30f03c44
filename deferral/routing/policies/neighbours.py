"""What the experts did on the logged queries that are nearest."""

from collections.abc import Iterator

import numpy as np

from deferral.routing.encoders import Arrays, Vectors
from deferral.routing.policies.centres import nearest_centre, spherical_centres
from deferral.routing.policies.policy import centred

__all__ = ["Neighbours"]

# Rows per centre among which neighbours are looked for: time of a query against missed neighbours.
_REACH = 1024
_BLOCK = 1024
_ALIKE = 10
_MOST_ROWS = 100_000


class Neighbours:
    """sum_i w_i (quality_i - mean) / (sum_i w_i + prior) over the nearest logged rows, w = similarity^3.

    Neighbours are looked for among the `_REACH` rows nearest to the query's centre, so that a query costs the same however long
    the log is; of a log of more than 100,000 queries that many are remembered.  `prior` shrinks towards the expert's mean.
    """

    kind = "neighbours"

    def __init__(self, *, count: int = 100, prior: float = 0.3) -> None:
        self.count, self.prior = count, prior
        self.arrays: Arrays = {}

    def fit(
        self, vectors: Vectors, quality: np.ndarray, weights: np.ndarray, means: np.ndarray, *, seed: int = 0
    ) -> "Neighbours":
        kept = np.arange(len(vectors))
        if len(kept) > _MOST_ROWS:
            kept = np.sort(np.random.default_rng(seed).choice(len(kept), _MOST_ROWS, replace=False))
        rows, quality, weights = vectors.dense[kept], quality[kept], weights[kept]
        cells = 1 if len(rows) <= 2 * _REACH else int(np.sqrt(len(rows)))
        centres = spherical_centres(rows, cells, seed=seed)
        # Rows of one cell stand side by side, which makes them quick to fetch.
        order = np.argsort(nearest_centre(rows, centres), kind="stable")
        reach = min(len(rows), _REACH if cells > 1 else 2 * _REACH)
        rows = rows[order]
        near = np.empty((cells, reach), np.int32)
        for cell, centre in enumerate(centres):
            near[cell] = np.sort(np.argpartition(-(rows @ centre), reach - 1)[:reach])
        self.arrays = {
            "rows": rows,
            "order": kept[order].astype(np.int32),
            "centres": centres,
            "near": near,
            "gain": centred(quality, weights, means)[order],
            "known": weights[order].astype(np.float32) if (weights != 1).any() else np.empty((0, quality.shape[1]), np.float32),
        }
        return self

    def deviations(self, vectors: Vectors) -> np.ndarray:
        """Expected quality above the expert's mean.  -> (N, E)"""
        return self.look_up(vectors)[0]

    def look_up(self, vectors: Vectors) -> tuple[np.ndarray, np.ndarray]:
        """The deviations, and how like the log the query is.  -> (N, E), (N,)

        Likeness is the mean cosine with the ten nearest, of the TF-IDF row where there is one, before its reduction.
        """
        found, alike = self._look_up_one(vectors.dense[0]) if len(vectors) == 1 else self._look_up_many(vectors)
        return found, alike if vectors.share is None else alike * vectors.share

    def _look_up_many(self, vectors: Vectors) -> tuple[np.ndarray, np.ndarray]:
        result = np.zeros((len(vectors), self.arrays["gain"].shape[1]), np.float32)
        alike = np.zeros(len(vectors), np.float32)
        for block, rows, similarity in self._nearest(vectors, self.count):
            closeness = np.maximum(similarity, 0) ** 3
            gain, some = self.arrays["gain"][rows], min(_ALIKE, similarity.shape[1])
            if len(self.arrays["known"]) == 0:
                mass = closeness.sum(1, keepdims=True)
            else:
                mass = np.einsum("nk,nke->ne", closeness, self.arrays["known"][rows])
            result[block] = np.matmul(closeness[:, None], gain)[:, 0] / (mass + self.prior)
            alike[block] = np.partition(similarity, -some, axis=1)[:, -some:].mean(1)
        return result, alike

    def _look_up_one(self, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same for one query, without the grouping by cells that takes longer than the search itself."""
        arrays = self.arrays
        candidates = arrays["near"][(arrays["centres"] @ vector).argmax()]
        similarity = arrays["rows"].take(candidates, axis=0) @ vector
        size = len(similarity)
        best = similarity.argpartition(size - min(self.count, size))[size - min(self.count, size) :]
        similarity, rows = similarity[best], candidates[best]
        closeness = np.maximum(similarity, 0) ** 3
        mass = closeness.sum() if len(arrays["known"]) == 0 else closeness @ arrays["known"][rows]
        some = min(_ALIKE, len(similarity))
        alike = np.partition(similarity, len(similarity) - some)[-some:].mean()
        return (closeness @ arrays["gain"][rows] / (mass + np.float32(self.prior)))[None], np.array([alike], np.float32)

    def nearest(self, vectors: Vectors, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest logged rows and their similarity (the cosine), nearest first.  -> (N, count), (N, count)"""
        count = min(count, self.arrays["near"].shape[1])
        found = np.zeros((len(vectors), count), np.int64)
        cosines = np.zeros((len(vectors), count), np.float32)
        for block, rows, similarity in self._nearest(vectors, count):
            order = np.argsort(-similarity, axis=1, kind="stable")
            found[block] = self.arrays["order"][np.take_along_axis(rows, order, 1)]
            cosines[block] = np.take_along_axis(similarity, order, 1)
        return found, cosines

    def _nearest(self, vectors: Vectors, count: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(rows of the batch, (n, count) logged rows, (n, count) similarity), cell by cell."""
        near, rows = self.arrays["near"], self.arrays["rows"]
        count = min(count, near.shape[1])
        cell = nearest_centre(vectors.dense, self.arrays["centres"])
        for number in np.unique(cell):
            candidates = near[number]
            pool = rows.take(candidates, axis=0)
            members = np.flatnonzero(cell == number)
            for start in range(0, len(members), _BLOCK):
                block = members[start : start + _BLOCK]
                similarity = vectors.dense[block] @ pool.T
                best = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
                yield block, candidates[best], np.take_along_axis(similarity, best, 1)
