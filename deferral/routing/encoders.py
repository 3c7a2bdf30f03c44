"""Queries become vectors.  The embedded encoder needs no weights; any function from texts to an array is welcome.

`Vectors` has up to three parts: `dense`, unit rows for distances; `extra`, a few standardised numbers such as the length; and
`wide`, the TF-IDF row itself, on which a linear model beats one on the reduced vectors.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice, pairwise
from math import log1p, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from deferral.routing.ngrams import BITS, hashed_ngrams, hashed_ngrams_of, shortened
from deferral.threads import one_thread
from deferral.whole_files import written_whole

__all__ = ["Arrays", "CachedEncoder", "FunctionEncoder", "NgramEncoder", "Vectors", "Wide", "projection", "reduced"]

Arrays = dict[str, np.ndarray]
MOST_ROWS_OF_SVD = 20_000
_COLUMNS, _UNKNOWN = 60_000, np.uint16(65_535)
_FEW = 33
_BLOCK = 512
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
        return _of_length_one(self.indices[kept], self.values[kept], starts, self.columns)


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


class NgramEncoder:
    """TF-IDF of hashed n-grams (present or not), reduced by a truncated SVD fitted on the log, and cheap features.

    Deerwester et al., "Indexing by Latent Semantic Analysis" (1990).  An n-gram counts if at least two queries of the log have
    it; the 60,000 most frequent are kept.  A query of which nothing is known has the vector 0.
    """

    kind = "ngrams"
    fingerprint: str | None = None

    def __init__(self, *, dimensions: int = 128, seed: int = 0) -> None:
        self.dimensions, self.seed = dimensions, seed
        self.arrays: Arrays = {}
        self._column = np.empty(0, np.uint16)

    def fit(self, queries: Sequence[str]) -> Vectors:
        """Learn the columns, their weights and the reduction; the vectors of these queries."""
        buckets, starts = hashed_ngrams_of(queries)
        frequency = np.bincount(buckets, minlength=1 << BITS)
        # In more than half of the queries, an n-gram tells nothing.
        usable = np.flatnonzero((frequency >= 2) & (frequency <= len(queries) / 2 + 1))
        if len(usable) > _COLUMNS:
            usable = np.sort(usable[np.argsort(-frequency[usable], kind="stable")[:_COLUMNS]])
        weights = np.log((1 + len(queries)) / (1 + frequency[usable])) + 1
        features = _features(queries)
        spread = features.std(0)
        self.arrays = {
            "buckets": usable.astype(np.int32),
            "weights": weights.astype(np.float32),
            "center": features.mean(0),
            "scale": (1 / np.where(spread > 1e-6, spread, 1.0)).astype(np.float32),
        }
        self._index()
        wide = self._wide(buckets, starts)
        self.arrays["projection"] = self._reduction(wide)
        return self._vectors(wide, features)

    def __call__(self, queries: Sequence[str]) -> Vectors:
        """The vectors of queries.  N -> Vectors"""
        if not self.arrays:
            raise ValueError("the encoder is not fitted; call fit first")
        if len(queries) == 1:
            return self._vectors(self._wide_one(hashed_ngrams(queries[0])), _features(queries))
        return self._vectors(self._wide(*hashed_ngrams_of(queries)), _features(queries))

    def restore(self, arrays: Arrays) -> "NgramEncoder":
        """The encoder that had these arrays."""
        self.arrays = arrays
        self._index()
        return self

    def _index(self) -> None:
        # Half the size of a table of int32, and so are the reads that miss the processor's caches.
        self._column = np.full(1 << BITS, _UNKNOWN)
        self._column[self.arrays["buckets"]] = np.arange(len(self.arrays["buckets"]))

    def _wide(self, buckets: np.ndarray, starts: np.ndarray) -> Wide:
        column = self._column.take(buckets)
        known = column != _UNKNOWN
        indices = column.compress(known).astype(np.int32)
        values = self.arrays["weights"].take(indices)
        return _of_length_one(indices, values, np.concatenate([[0], np.cumsum(known)])[starts], len(self.arrays["weights"]))

    def _wide_one(self, buckets: np.ndarray) -> Wide:
        columns, weights = self._column.take(buckets).astype(np.int64), self.arrays["weights"]
        columns.sort()
        # The largest is none of the columns, and all that equals it is left out.
        if len(columns) == 0 or columns[-1] != _UNKNOWN:
            columns = np.append(columns, np.int64(_UNKNOWN))
        before = columns[:-1]
        indices = before.compress(columns[1:] != before)
        values = weights.take(indices)
        values /= sqrt(values @ values) or 1.0
        return Wide(indices, values, np.array([0, len(indices)]), len(weights))

    def _reduction(self, wide: Wide) -> np.ndarray:
        rows = len(wide.starts) - 1
        matrix = wide.sparse()
        if rows > MOST_ROWS_OF_SVD:
            matrix = matrix[np.sort(np.random.default_rng(self.seed).choice(rows, MOST_ROWS_OF_SVD, replace=False))]
        return projection(matrix, self.dimensions, seed=self.seed)

    def _vectors(self, wide: Wide, features: np.ndarray) -> Vectors:
        extra = _standardised(features, self.arrays)
        return reduced(wide, self.arrays["projection"], extra)


class FunctionEncoder:
    """Any function from texts to an array: `encode(list of N texts) -> (N, D)`, a sentence encoder say.

    The function itself is not saved with the router: pass it again when the router is loaded.
    """

    kind = "function"

    def __init__(self, encode: Callable[[list[str]], Any]) -> None:
        self.encode = encode
        self.fingerprint: str | None = getattr(encode, "fingerprint", None)
        self.arrays: Arrays = {}

    def fit(self, queries: Sequence[str]) -> Vectors:
        """The vectors of the queries, from now on around their mean."""
        vectors = self._encoded(queries)
        features = _features(queries)
        spread = features.std(0)
        self.arrays = {
            "mean": vectors.mean(0),
            "center": features.mean(0),
            "scale": (1 / np.where(spread > 1e-6, spread, 1.0)).astype(np.float32),
        }
        return self._vectors(vectors, features)

    def __call__(self, queries: Sequence[str]) -> Vectors:
        """The vectors of queries.  N -> Vectors"""
        if not self.arrays:
            raise ValueError("the encoder is not fitted; call fit first")
        if len(queries) == 0:
            return Vectors(
                np.empty((0, len(self.arrays["mean"])), np.float32), np.empty((0, len(self.arrays["center"])), np.float32)
            )
        return self._vectors(self._encoded(queries), _features(queries))

    def restore(self, arrays: Arrays) -> "FunctionEncoder":
        """The encoder that had these arrays."""
        self.arrays = arrays
        return self

    def _vectors(self, vectors: np.ndarray, features: np.ndarray) -> Vectors:
        return Vectors(_unit(vectors - self.arrays["mean"]), _standardised(features, self.arrays))

    def _encoded(self, queries: Sequence[str]) -> np.ndarray:
        vectors = np.asarray(self.encode([shortened(query) for query in queries]), np.float32)
        if vectors.ndim != 2 or len(vectors) != len(queries) or vectors.shape[1] == 0:
            raise ValueError(f"encoder: expected an array of shape ({len(queries)}, D), got {vectors.shape}")
        if not np.isfinite(vectors).all():
            row = int((~np.isfinite(vectors)).any(1).argmax())
            raise ValueError(f"encoder: expected finite numbers, got NaN or infinity for query {row + 1}: {queries[row][:60]!r}")
        return vectors


class CachedEncoder:
    """A slow function from texts to vectors whose results are kept on disk, by the content of the text.

    `name` is the encoder's: vectors of different encoders must not meet in one folder.  A file that cannot be read is written
    again.  `Router(0.02, encoder=CachedEncoder(encode, "vectors/", "my encoder"))`
    """

    def __init__(self, encode: Callable[[list[str]], Any], folder: str | Path, name: str) -> None:
        self.encode = encode
        self.fingerprint: str | None = getattr(encode, "fingerprint", None)
        self.folder = Path(folder) / hashlib.sha256(name.encode()).hexdigest()[:16]

    def __call__(self, queries: list[str]) -> np.ndarray:
        """One row per text; only texts that are not on disk are encoded.  N -> (N, D)"""
        paths = [self.folder / f"{hashlib.sha256(query.encode('utf-8', 'replace')).hexdigest()}.npy" for query in queries]
        known = {path: _stored(path) for path in dict.fromkeys(paths)}
        missing = {path: query for path, query in zip(paths, queries, strict=True) if known[path] is None}
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
        # Block after block, so that whoever is stopped finds on disk what was done.
        for start in range(0, len(missing), _BLOCK):
            block = dict(islice(missing.items(), start, start + _BLOCK))
            vectors = np.asarray(self.encode(list(block.values())))
            if len(vectors) != len(block):
                raise ValueError(f"encoder: expected {len(block)} vectors, one per text, got {len(vectors)}")
            for path, vector in zip(block, vectors, strict=True):
                # To a path `save` would add a suffix.
                with written_whole(path) as partial, partial.open("wb") as file:
                    np.save(file, vector)
                known[path] = vector
        return np.array([known[path] for path in paths])


def _stored(path: Path) -> np.ndarray | None:
    try:
        return np.load(path, allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None


def _of_length_one(indices: np.ndarray, values: np.ndarray, starts: np.ndarray, columns: int) -> Wide:
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


def _standardised(features: np.ndarray, arrays: Arrays) -> np.ndarray:
    # np.clip takes several times as long on one row.
    scaled = features - arrays["center"]
    scaled *= arrays["scale"]
    return np.minimum(np.maximum(scaled, -3, out=scaled), 3, out=scaled)


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]
    return (vectors / np.maximum(length, 1e-12)).astype(np.float32)


_UPPER, _SIGNS, _OTHERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "+-*/=^<>{}[]()\\$_|&%;", "".join(map(chr, range(128, 256)))
_KINDS = ("0123456789", _UPPER, _SIGNS, ",", "?", "\n", _OTHERS, " ")
_LINE = _KINDS.index("\n")
_CLASS = bytes(next((place for place, kind in enumerate(_KINDS) if chr(byte) in kind), len(_KINDS)) for byte in range(256))
_CLASSES = [bytes([place]) for place in range(len(_KINDS))]
_MARKS = (" not ", "return", "Statement", "___", "__", "how many", "```")
_FEATURES = 2 + len(_KINDS) + len(_MARKS)


def _features(queries: Sequence[str]) -> np.ndarray:
    """Length, kinds of characters, and marks of code, logic and counting.  N -> (N, 17) float32"""
    return np.array([_cheap(query) for query in queries] or np.empty((0, _FEATURES)), np.float32)


def _cheap(query: str) -> list[float]:
    read = shortened(query)
    text = read.encode("utf-8", "replace").translate(_CLASS)
    counts = [text.count(kind) for kind in _CLASSES]
    whole = len(text) + 1
    shares = [count / whole for count in counts]
    return [log1p(len(query)), log1p(counts[_LINE]), *shares, *[mark in read for mark in _MARKS]]
