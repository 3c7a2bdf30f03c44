"""Queries become vectors.  The embedded encoder needs no weights; any function from texts to an array is welcome."""

from collections.abc import Callable, Sequence
from math import log1p, sqrt
from typing import Any

import numpy as np

from deferral.routing.ngrams import BITS, hashed_ngrams, hashed_ngrams_of, shortened
from deferral.routing.vectors import Arrays, Vectors, Wide, of_length_one, projection, reduced

__all__ = ["FunctionEncoder", "NgramEncoder"]

_MOST_ROWS_OF_SVD = 20_000
_COLUMNS, _UNKNOWN = 60_000, np.uint16(65_535)


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
        self.arrays = {
            "buckets": usable.astype(np.int32),
            "weights": weights.astype(np.float32),
            **_centre_and_scale(features),
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
        # Of _UNKNOWN, it is a table of uint16: half the size of int32, so that fewer reads miss the processor's caches.
        self._column = np.full(1 << BITS, _UNKNOWN)
        self._column[self.arrays["buckets"]] = np.arange(len(self.arrays["buckets"]))

    def _wide(self, buckets: np.ndarray, starts: np.ndarray) -> Wide:
        column = self._column.take(buckets)
        known = column != _UNKNOWN
        indices = column.compress(known).astype(np.int32)
        values = self.arrays["weights"].take(indices)
        return of_length_one(indices, values, np.concatenate([[0], np.cumsum(known)])[starts], len(self.arrays["weights"]))

    def _wide_one(self, buckets: np.ndarray) -> Wide:
        columns, weights = self._column.take(buckets).astype(np.int64), self.arrays["weights"]
        columns.sort()
        # _UNKNOWN is larger than every column; with one at the end, comparing neighbours drops it together with what repeats.
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
        if rows > _MOST_ROWS_OF_SVD:
            matrix = matrix[np.sort(np.random.default_rng(self.seed).choice(rows, _MOST_ROWS_OF_SVD, replace=False))]
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
        self.arrays = {
            "mean": vectors.mean(0),
            **_centre_and_scale(features),
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


def _centre_and_scale(features: np.ndarray) -> Arrays:
    """What features are standardised by, under its names on disk.  (N, F) -> (F,), (F,)"""
    spread = features.std(0)
    return {"center": features.mean(0), "scale": (1 / np.where(spread > 1e-6, spread, 1.0)).astype(np.float32)}


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
