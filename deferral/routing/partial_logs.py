"""Logs in which not every expert answered every query: doubly robust outcomes, with which one goes on as with a full table."""

import numpy as np

from deferral.routing.policies import Linear, expert_means
from deferral.routing.table import Table
from deferral.routing.vectors import Vectors

__all__ = ["LEAST_PROPENSITY", "OutcomeModel", "asked_together", "doubly_robust", "observed"]

LEAST_PROPENSITY = 0.01
_MOST_WEIGHT = 20.0
# No outcome of an expert with n outcomes is weighted by more than n / 5.
_FEW = 5.0
_COMMON = 20.0  # queries answered by both of two experts that are worth their prior covariance, 0
_ROUNDING = 1e-6


def observed(table: Table) -> np.ndarray:
    """The weight of every cell: 1 if the table is full, else the inverse of its propensity, 0 where nothing is known.  (N, E)

    Queries that every expert answered, as often as the others, were asked of all with certainty, unless propensities say
    otherwise.  Elsewhere, once some expert was asked the same query twice, every outcome is one decision: of the k about a query,
    an expert that was asked n times has the weight n / (k * propensity), which is 1 on average however often a query comes.  A
    log whose experts are `asked_together` is no such log, and a line that stands in it twice counts once.

    Where no propensity is logged, the assumption is that who was asked did not depend on the query, and the propensity is the
    expert's share of such queries.  Weights are divided by their mean over the known cells.
    """
    mask, unlogged = table.mask, np.isnan(table.propensity)
    if table.full:
        return np.ones(mask.shape, np.float32)
    asked = None if table.asked is None or asked_together(table.asked, table.propensity, table.again) else table.asked
    counts = mask.astype(np.int32) if asked is None else asked
    every = mask.all(1) & (counts == counts[:, :1]).all(1) & (unlogged | (table.propensity >= 1)).all(1)
    logged = np.where(mask & ~unlogged, table.propensity, 0).sum(1)
    alike = counts[~every & (logged == 0)]
    single = asked is not None
    share = np.where(alike.any(0), _share(alike, single), _share(counts[~every], single))
    chance = np.where(every[:, None], 1.0, np.where(unlogged, share, table.propensity))
    weights = np.where(mask, 1 / np.maximum(chance, LEAST_PROPENSITY), 0)
    if single:
        rounds = np.where(every, counts.max(1), counts.sum(1))
        weights = weights * counts / rounds.clip(min=1)[:, None]
    return (weights / weights[mask].mean()).astype(np.float32)


def asked_together(asked: np.ndarray, propensity: np.ndarray, again: np.ndarray | None = None) -> bool:
    """Whether the experts of a query were asked at once, each with its own chance, and not one after the other.  (N, E), (N, E)

    One decision has propensities that add up to 1.  Experts of whom none was asked twice, and whose propensities add up to more,
    were asked at once; queries that come again to one expert were decided again, and, where of those with several outcomes one
    in twenty does, those that came again by their times (`again`, (N,) bool), too: the router changed between them.  What more
    queries say holds for the log, if it is one in twenty at least; those without all their propensities say nothing, nor those
    that everyone was asked with certainty.
    """
    logged = ((asked == 0) | ~np.isnan(propensity)).all(1)
    everyone = (asked > 0).all(1) & (asked == asked[:, :1]).all(1) & (propensity >= 1).all(1)
    telling = logged & ~everyone
    twice = (asked > 1).any(1)
    if again is not None and 20 * (telling & twice).sum() >= (telling & (asked.sum(1) > 1)).sum():
        # Experts that were asked one after the other, each with a chance of its own, never come twice.
        twice = twice | again
    chance = np.where(asked > 0, propensity, 0.0).sum(1)
    together = int((telling & ~twice & (chance > 1 + _ROUNDING)).sum())
    return together > max(int((telling & twice).sum()), telling.sum() / 20)


def _share(counts: np.ndarray, single: bool) -> np.ndarray:
    """Each expert's share of the queries, or of the decisions where each outcome is a single one.  (n, E) -> (E,)"""
    return counts.sum(0) / max(counts.sum() if single else len(counts), 1)


class OutcomeModel:
    """What a cell holds, from the query and from what the other experts did on it.

    A ridge on the query, and of its residuals the conditional mean of a normal law with the covariance of the experts, where
    two of them answered the same queries.
    """

    def fit(self, vectors: Vectors, quality: np.ndarray, weights: np.ndarray) -> "OutcomeModel":
        """Vectors, (N, E), (N, E) -> self"""
        self.means = expert_means(quality, weights)
        self.linear = Linear().fit(vectors, quality, weights, self.means)
        known = (weights > 0).astype(np.float64)
        left = known * (quality - self._from_query(vectors))
        both = known.T @ known
        covariance = left.T @ left / (both + _COMMON)
        variance = (left**2).sum(0) / np.maximum(both.diagonal(), 1)
        self.covariance = np.where(np.eye(len(variance)) > 0, np.maximum(variance, 1e-3) * 1.05, covariance)
        return self

    def outcomes(self, vectors: Vectors, quality: np.ndarray, weights: np.ndarray, *, judging: bool = False) -> np.ndarray:
        """Doubly robust outcomes: guess + (quality - guess) / propensity, the guess where nothing is known.  -> (N, E)

        Right on average if either the propensities or the guesses are: a guess never looks at its own cell.  Propensities are
        scaled so that every expert's weights add up to the number of queries.  To be learned from, they are bounded where few
        outcomes are known; for `judging` they are not, since what a guess takes from the rows that the policies have learned
        from would agree with them.  Dudík, Langford, Li, "Doubly Robust Policy Evaluation and Learning" (2011), eq. 2.
        """
        known = weights > 0
        base = self._from_query(vectors)
        guess = base + self._from_others(np.where(known, quality - base, 0), known)
        factor = weights * (len(weights) / np.maximum(weights.sum(0), 1e-12))
        if not judging:
            factor = np.minimum(factor, np.minimum(_MOST_WEIGHT, known.sum(0) / _FEW))
        return (guess + np.where(known, factor * (quality - guess), 0)).astype(np.float32)

    def _from_query(self, vectors: Vectors) -> np.ndarray:
        return self.means + self.linear.deviations(vectors)

    def _from_others(self, left: np.ndarray, known: np.ndarray) -> np.ndarray:
        """E[residual of a cell | residuals of the row's other known cells].  (N, E), (N, E) bool -> (N, E)"""
        guess = np.empty(left.shape)
        # Rows of the same known cells share an inverse, of those cells alone.
        patterns, member = np.unique(known, axis=0, return_inverse=True)
        groups = np.split(np.argsort(member.ravel(), kind="stable"), np.bincount(member.ravel()).cumsum()[:-1])
        for there, rows in zip(patterns, groups, strict=True):
            inverse = np.linalg.inv(self.covariance[np.ix_(there, there)])
            some = left[rows][:, there]
            solved = some @ inverse
            guess[rows] = solved @ self.covariance[there]
            # Of a known cell, its own residual is left out of its prediction.
            guess[np.ix_(rows, there)] = some - solved / inverse.diagonal()
        return guess


def doubly_robust(vectors: Vectors, quality: np.ndarray, weights: np.ndarray, *, seed: int) -> np.ndarray:
    """Doubly robust outcomes of all rows, each half guessed by a model of the other; the outcomes themselves of a full table."""
    if (weights == 1).all():
        return quality
    half = np.random.default_rng(seed).permutation(len(quality)) % 2
    result = np.empty(quality.shape, np.float32)
    for number in range(2):
        rest, rows = np.flatnonzero(half != number), np.flatnonzero(half == number)
        model = OutcomeModel().fit(vectors.rows(rest), quality[rest], weights[rest])
        result[rows] = model.outcomes(vectors.rows(rows), quality[rows], weights[rows])
    return result
