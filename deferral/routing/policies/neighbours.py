"""What the experts did on the logged queries that are nearest."""

from collections.abc import Iterator
from math import sqrt

import numpy as np

from deferral.routing.policies.centres import nearest_centre, spherical_centres
from deferral.routing.policies.policy import centred
from deferral.routing.vectors import Arrays, Vectors

__all__ = ["Beside", "Neighbours"]

# Columns (N, C) to be remembered beside qualities, and which of their cells are known.
Beside = tuple[np.ndarray, np.ndarray]
# Neighbours are looked for among this many rows per centre: with more, a query takes longer; with fewer, neighbours are missed.
_REACH = 512
# Candidates are compared by the leading numbers of vectors that an SVD has reduced, which hold nearly all of a cosine: the time
# of a query goes into fetching rows.
_LEADING = 64
_BLOCK = 1024
_ALIKE = 10
_MOST_ROWS = 100_000


class Neighbours:
    """sum_i w_i (quality_i - mean) / (sum_i w_i + prior) over the nearest logged rows, w = similarity^3.

    Neighbours are looked for among the 512 rows nearest to the query's centre, so that a query costs the same however long
    the log is; of a log of more than 100,000 queries that many are remembered.  `prior` shrinks towards the expert's mean.
    Other columns than qualities may be remembered beside them, for `look_up`.
    """

    kind = "neighbours"

    def __init__(self, *, count: int = 100, prior: float = 0.3, beside: int = 0) -> None:
        if not (isinstance(count, int) and count >= 1 and prior > 0):
            raise ValueError(f"neighbours: expected a count of at least 1 and a prior above 0, got {count!r} and {prior!r}")
        self.count, self.prior, self.beside = count, prior, beside
        self.arrays: Arrays = {}
        self._pools: dict[int, np.ndarray] = {}

    def fit(
        self,
        vectors: Vectors,
        quality: np.ndarray,
        weights: np.ndarray,
        means: np.ndarray,
        *,
        seed: int = 0,
        beside: Beside | None = None,
    ) -> "Neighbours":
        self.beside = 0
        if beside is not None:
            values, known = beside
            self.beside = values.shape[1]
            quality, weights = np.concatenate([quality, values], axis=1), np.concatenate([weights, known], axis=1)
            means = np.concatenate([means, np.zeros(self.beside, means.dtype)])
        kept = np.arange(len(vectors))
        if len(kept) > _MOST_ROWS:
            kept = np.sort(np.random.default_rng(seed).choice(len(kept), _MOST_ROWS, replace=False))
        rows, quality, weights = _leading(vectors)[0][kept], quality[kept], weights[kept]
        cells = 1 if len(rows) <= 2 * _REACH else int(np.sqrt(len(rows)))
        centres = spherical_centres(rows, cells, seed=seed)
        # Rows of one cell stand side by side, which makes them quick to fetch.
        order = np.argsort(nearest_centre(rows, centres), kind="stable")
        reach = min(len(rows), _REACH if cells > 1 else 2 * _REACH)
        rows = rows[order]
        near = np.empty((cells, reach), np.int32)
        for cell, centre in enumerate(centres):
            near[cell] = np.sort(np.argpartition(-(rows @ centre), reach - 1)[:reach])
        self._pools = {}
        self.arrays = {
            "rows": rows,
            "order": kept[order].astype(np.int32),
            "centres": centres,
            "near": near,
            "gain": centred(quality, weights, means)[order],
            "known": weights[order].astype(np.float32) if (weights != 1).any() else np.empty((0, quality.shape[1]), np.float32),
        }
        return self

    def keeping_beside(self, kept: np.ndarray) -> "Neighbours":
        """The same memory; of the columns beside the qualities that are not kept it says 0.  (C,) bool"""
        if kept.all():
            return self
        if not kept.any():
            return self.without_beside()
        same = Neighbours(count=self.count, prior=self.prior, beside=self.beside)
        experts = self.arrays["gain"].shape[1] - self.beside
        same.arrays = {**self.arrays, "gain": self.arrays["gain"] * np.append(np.ones(experts, bool), kept)}
        return same

    def without_beside(self) -> "Neighbours":
        """The same memory of the qualities alone."""
        if not self.beside:
            return self
        same, experts = Neighbours(count=self.count, prior=self.prior), self.arrays["gain"].shape[1] - self.beside
        known = self.arrays["known"][:, :experts]
        same.arrays = {
            **self.arrays,
            "gain": np.ascontiguousarray(self.arrays["gain"][:, :experts]),
            "known": np.ascontiguousarray(known if (known != 1).any() else known[:0]),
        }
        return same

    def deviations(self, vectors: Vectors) -> np.ndarray:
        """Expected quality above the expert's mean.  -> (N, E)"""
        found = self.look_up(vectors)[0]
        return found[:, : found.shape[1] - self.beside]

    def look_up(self, vectors: Vectors) -> tuple[np.ndarray, np.ndarray]:
        """The deviations and what is remembered beside them, and how like the log the query is.  -> (N, E + C), (N,)

        Likeness is the mean cosine with the ten nearest, of the TF-IDF row where there is one, before its reduction.
        """
        if len(vectors) == 1:
            one, likeness = self.look_up_one(vectors)
            return one, np.array([likeness], np.float32)
        rows, length = _leading(vectors)
        found, alike = self._look_up_many(rows)
        return found, alike * length

    def likeness(self, vectors: Vectors) -> np.ndarray:
        """How like the log the query is, without the deviations.  -> (N,)"""
        if len(vectors) == 1:
            return np.array([self.likeness_of_one(vectors)], np.float32)
        rows, length = _leading(vectors)
        alike = np.zeros(len(rows), np.float32)
        for block, _, similarity in self._similar(rows):
            alike[block] = _alike(similarity)
        return alike * length

    def _look_up_many(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        result = np.zeros((len(vectors), self.arrays["gain"].shape[1]), np.float32)
        alike = np.zeros(len(vectors), np.float32)
        for block, rows, similarity in self._nearest(vectors, self.count):
            closeness = _closeness(similarity)
            gain = self.arrays["gain"][rows]
            if len(self.arrays["known"]) == 0:
                mass = closeness.sum(1, keepdims=True)
            else:
                mass = np.einsum("nk,nke->ne", closeness, self.arrays["known"][rows])
            result[block] = np.matmul(closeness[:, None], gain)[:, 0] / (mass + self.prior)
            alike[block] = _alike(similarity)
        return result, alike

    # One query needs no grouping by cells, which takes longer than the search itself.

    def look_up_one(self, vectors: Vectors) -> tuple[np.ndarray, float]:
        """`look_up` of one query.  -> (1, E), number"""
        product, candidates, size, share = self._products_one(vectors)
        arrays, first = self.arrays, max(len(product) - self.count, 0)
        best = product.argpartition(first)[first:]
        nearest = product.take(best)
        closeness, rows = _closeness(nearest), candidates.take(best)
        mass = np.add.reduce(closeness) if len(arrays["known"]) == 0 else closeness @ arrays["known"].take(rows, axis=0)
        # (product / size)^3 over (its sum and the prior), without dividing every product.
        mass += np.float32(self.prior * size**3)
        return closeness[None] @ arrays["gain"].take(rows, axis=0) / mass, _alike_one(nearest, share)

    def likeness_of_one(self, vectors: Vectors) -> float:
        """`likeness` of one query."""
        product, _, _, share = self._products_one(vectors)
        return _alike_one(product, share)

    def _products_one(self, vectors: Vectors) -> tuple[np.ndarray, np.ndarray, float, float]:
        """The similarity of every candidate times a size, the candidates, that size, and likeness over the former.

        -> (K,), (K,), number, number
        """
        vector, size, share = _leading_one(vectors)
        centres = self.arrays["centres"]
        cell = int((centres @ vector).argmax()) if len(centres) > 1 else 0
        return vector @ self._pool(cell), self.arrays["near"][cell], size, share

    def nearest(self, vectors: Vectors, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest logged rows and their similarity (the cosine), nearest first.  -> (N, count), (N, count)"""
        count = min(count, self.arrays["near"].shape[1])
        found = np.zeros((len(vectors), count), np.int64)
        cosines = np.zeros((len(vectors), count), np.float32)
        for block, rows, similarity in self._nearest(_leading(vectors)[0], count):
            order = np.argsort(-similarity, axis=1, kind="stable")
            found[block] = self.arrays["order"][np.take_along_axis(rows, order, 1)]
            cosines[block] = np.take_along_axis(similarity, order, 1)
        return found, cosines

    def _nearest(self, vectors: np.ndarray, count: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(rows of the batch, (n, count) logged rows, (n, count) similarity), cell by cell."""
        near = self.arrays["near"]
        count = min(count, near.shape[1])
        for block, cell, similarity in self._similar(vectors):
            best = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
            yield block, near[cell][best], np.take_along_axis(similarity, best, 1)

    def _similar(self, vectors: np.ndarray) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
        """(rows of the batch, their cell, similarity of every candidate of the cell (n, K)), cell by cell."""
        cell = nearest_centre(vectors, self.arrays["centres"])
        for number in np.unique(cell):
            pool = self._pool(number)
            members = np.flatnonzero(cell == number)
            for start in range(0, len(members), _BLOCK):
                block = members[start : start + _BLOCK]
                yield block, number, vectors[block] @ pool

    def _pool(self, cell: int) -> np.ndarray:
        """The rows near a centre, as columns: to fetch them takes several times as long as their products.  -> (D, K)"""
        if (pool := self._pools.get(cell)) is None:
            pool = np.ascontiguousarray(self.arrays["rows"].take(self.arrays["near"][cell], axis=0).T)
            self._pools[cell] = pool
        return pool


def _closeness(similarity: np.ndarray) -> np.ndarray:
    positive = np.maximum(similarity, 0)
    return positive * positive * positive


def _alike(similarity: np.ndarray) -> np.ndarray:
    """The mean of the ten largest of each row.  (n, K) -> (n,)"""
    some = min(_ALIKE, similarity.shape[1])
    return np.partition(similarity, -some, axis=1)[:, -some:].mean(1)


def _alike_one(product: np.ndarray, share: float) -> float:
    """The mean of the ten largest, times a share; their order is lost.  (K,) -> number"""
    least = max(len(product) - _ALIKE, 0)
    product.partition(least)
    return float(np.add.reduce(product[least:]) / (len(product) - least) * share)


def _leading(vectors: Vectors) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors by which neighbours are looked for, and the length that they keep of the query.  -> (N, D), (N,)"""
    if vectors.wide is None or vectors.share is None:
        return vectors.dense, np.ones(len(vectors), np.float32)
    kept = vectors.dense[:, :_LEADING]
    length = np.sqrt(np.einsum("nd,nd->n", kept, kept))
    return kept / np.maximum(length, 1e-12)[:, None], length * vectors.share


def _leading_one(vectors: Vectors) -> tuple[np.ndarray, float, float]:
    """The same for one query, but for its size; that, and the length that the whole vector keeps.  -> (D,), number, number"""
    if vectors.wide is None or vectors.share is None:
        return vectors.dense[0], 1.0, 1.0
    kept = vectors.dense[0, :_LEADING]
    return kept, max(sqrt(kept @ kept), 1e-12), float(vectors.share[0])
