"""Centres of unit vectors: k-means on the sphere, for cells of neighbours and for clusters."""

import numpy as np

__all__ = ["nearest_centre", "spherical_centres"]

_ROWS = 20_000
_ROUNDS = 15
_BLOCK = 1 << 15


def spherical_centres(rows: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """Unit centres that rows are nearest to by cosine; from at most 20,000 of the rows.  (N, D) -> (count, D)

    Dhillon and Modha, "Concept Decompositions for Large Sparse Text Data Using Clustering" (2001).
    """
    generator = np.random.default_rng(seed)
    if len(rows) > _ROWS:
        rows = rows[np.sort(generator.choice(len(rows), _ROWS, replace=False))]
    count = min(count, len(rows))
    centres = rows[_spread(rows, count, generator)].copy()
    for _ in range(_ROUNDS):
        member = nearest_centre(rows, centres)
        order = np.argsort(member, kind="stable")
        sizes = np.bincount(member, minlength=count)
        filled = sizes > 0
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])[filled]
        moved = np.add.reduceat(rows[order], starts, axis=0)
        moved /= np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
        if np.abs(moved - centres[filled]).max() < 1e-4:
            break
        centres[filled] = moved
    return centres


def nearest_centre(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(N, D), (C, D) -> (N,)"""
    blocks = [(rows[start : start + _BLOCK] @ centres.T).argmax(1) for start in range(0, len(rows), _BLOCK)]
    return np.concatenate(blocks) if blocks else np.empty(0, np.int64)


def _spread(rows: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """k-means++: each start is drawn in proportion to its squared distance from those before it."""
    chosen = [int(generator.integers(len(rows)))]
    distance = np.full(len(rows), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, np.maximum(1 - rows @ rows[chosen[-1]], 0).astype(float))
        total = distance.sum()
        chances = distance / total if total > 0 else np.full(len(rows), 1 / len(rows))
        chosen.append(int(np.searchsorted(np.cumsum(chances), generator.random())))
        chosen[-1] = min(chosen[-1], len(rows) - 1)
    return np.array(chosen)
