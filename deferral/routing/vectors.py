"""What encoders make of queries, and estimators learn from: `Vectors`, up to three parts.

`dense`, unit rows for distances; `extra`, a few standardised numbers such as the length; and `wide`, the TF-IDF row itself, on
which a linear model beats one on the reduced vectors.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from math import sqrt
from typing import Any

import numpy as np

from deferral.threads import one_thread

__all__ = ["Arrays", "Vectors", "Wide", "of_length_one", "projection", "reduced"]

Arrays = dict[str, np.ndarray]
_FEW = 33
_ONE = np.ones((1, 1), np.float32)


@dataclass(frozen=True)
class Wide:
    """Sparse rows: row i has values[starts[i]:starts[i+1]] in the columns indices[starts[i]:starts[i+1]]."""

    indices: np.ndarray
    values: np.ndarray
    starts: np.ndarray
    columns: int

    def times(self, matrix: np.ndarray) -> np.ndarray:
        """The product with a dense matrix.  (columns, K) -> (N, K)"""
        # `take` fetches rows in a third of the time of an index.
        if len(self.starts) == 2:
            return self.values[None] @ matrix.take(self.indices, axis=0)
        if 1 < len(self.starts) <= _FEW:
            rows = [slice(*ends) for ends in pairwise(self.starts.tolist())]
            return np.concatenate([self.values[None, row] @ matrix.take(self.indices[row], axis=0) for row in rows])
        return self.sparse() @ matrix

    def sparse(self) -> Any:
        """As a SciPy matrix in CSR format."""
        # Whoever asks about few queries at a time needs none of it, nor its memory.
        from scipy.sparse import csr_matrix

        return csr_matrix((self.values, self.indices, self.starts), shape=(len(self.starts) - 1, self.columns))

    def rows(self, rows: np.ndarray) -> "Wide":
        taken = self.sparse()[rows]
        return Wide(taken.indices, taken.data, taken.indptr, self.columns)

    def only(self, columns: np.ndarray) -> "Wide":
        """What stands in some of the columns, each row at its length of 1 again.  (columns,) bool -> N rows"""
        kept = columns[self.indices]
        starts = np.concatenate([[0], np.cumsum(kept)])[self.starts]
        return of_length_one(self.indices[kept], self.values[kept], starts, self.columns)


@dataclass(frozen=True)
class Vectors:
    """N encoded queries."""

    dense: np.ndarray  # (N, D) float32, rows of length 1, or 0 where nothing of the query is known
    extra: np.ndarray  # (N, C) float32
    wide: Wide | None = None
    share: np.ndarray | None = None  # (N,) the length that the TF-IDF row keeps when it is reduced, low for new words

    def __len__(self) -> int:
        return len(self.dense)

    @cached_property
    def whole(self) -> np.ndarray:
        """Vectors, cheap features, and 1.  -> (N, D + C + 1)"""
        ones = _ONE if len(self) == 1 else np.ones((len(self), 1), np.float32)
        return np.concatenate([self.dense, self.extra, ones], axis=1)

    @cached_property
    def tail(self) -> np.ndarray:
        """Cheap features, and 1.  -> (N, C + 1)"""
        return self.whole[:, self.dense.shape[1] :]

    @property
    def joined(self) -> np.ndarray:
        """Vectors and cheap features, each number of about unit size: what networks learn from.  -> (N, D + C)"""
        found = np.concatenate([self.dense, self.extra], axis=1)
        found *= self.sizes
        return found

    @property
    def sizes(self) -> np.ndarray:
        """What `joined` multiplies its columns by.  -> (D + C,)"""
        return _sizes(self.dense.shape[1], self.extra.shape[1])

    def rows(self, rows: np.ndarray) -> "Vectors":
        """Some of the rows, by their indices."""
        wide = None if self.wide is None else self.wide.rows(rows)
        return Vectors(self.dense[rows], self.extra[rows], wide, None if self.share is None else self.share[rows])


@cache
def _sizes(dense: int, extra: int) -> np.ndarray:
    return np.repeat(np.array([dense**0.5, 0.5], np.float32), [dense, extra])


def of_length_one(indices: np.ndarray, values: np.ndarray, starts: np.ndarray, columns: int) -> Wide:
    """Sparse rows, each divided by its length."""
    lengths = np.sqrt(np.add.reduceat(np.append(values**2, 0), starts[:-1]) * (np.diff(starts) > 0))
    return Wide(indices, values / np.repeat(np.maximum(lengths, 1e-12), np.diff(starts)).astype(np.float32), starts, columns)


@one_thread()
def projection(matrix: Any, dimensions: int, *, seed: int) -> np.ndarray:
    """The leading right singular vectors of a sparse matrix.  (N, columns) -> (columns, D)"""
    size = min(dimensions, matrix.shape[0] - 1, matrix.shape[1] - 1)
    if size < 1:
        return np.zeros((matrix.shape[1], 1), np.float32)
    # scikit-learn takes 140 MB, which whoever only routes need not hold.
    from sklearn.utils.extmath import randomized_svd

    _, _, directions = randomized_svd(matrix, size, n_iter=2, random_state=seed)
    return np.ascontiguousarray(directions.T, np.float32)


def reduced(wide: Wide, directions: np.ndarray, extra: np.ndarray) -> Vectors:
    """The vectors of TF-IDF rows.  (N rows), (columns, D), (N, C) -> Vectors"""
    kept = wide.times(directions)
    if len(kept) == 1:
        row = kept[0]
        size = sqrt(row @ row)
        row /= max(size, 1e-12)
        return Vectors(kept, extra, wide, np.array([size], np.float32))
    length = np.sqrt(np.einsum("nd,nd->n", kept, kept))
    return Vectors(kept / np.maximum(length, np.float32(1e-12))[:, None], extra, wide, length)
