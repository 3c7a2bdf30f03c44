"""Rows that a fit held out, and the price of an error that meets a budget or a floor on them."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from deferral.routing.evaluation import Routability, routability
from deferral.routing.held_out import Judged, grid, judged
from deferral.routing.prices import error_range

__all__ = ["HeldRows", "Search", "beside"]


@dataclass(frozen=True)
class HeldRows:
    """What was expected of M rows by estimators that had not seen them, and what happened.  None where too little was logged."""

    quality: np.ndarray  # (M, E) outcomes; of an expert that came later, what is expected
    estimate: np.ndarray  # (M, E)
    price: np.ndarray  # (M, E) dollars, as they were paid
    length: np.ndarray  # (M,) characters
    dearness: np.ndarray  # (M, E), as it was foreseen
    deviation: np.ndarray  # (M, E0) estimates less means of the experts that were learned, also of those that left
    fold: np.ndarray  # (M,)
    keys: np.ndarray  # (M,) uint64, fingerprints of the queries
    means: np.ndarray  # (F, E) of the experts on the rows outside each fold

    @classmethod
    def none(cls, experts: int) -> "HeldRows":
        """No rows."""
        figures = np.empty((0, experts), np.float32)
        prices = np.empty((0, experts))
        no_keys = np.empty(0, np.uint64)
        return cls(figures, figures, prices, np.empty(0), figures, figures, np.empty(0, int), no_keys, figures)

    def __len__(self) -> int:
        return len(self.price)

    def columns(self, kept: np.ndarray) -> "HeldRows":
        """The same rows, some of the experts of today."""
        return replace(
            self,
            quality=self.quality[:, kept],
            estimate=self.estimate[:, kept],
            price=self.price[:, kept],
            dearness=self.dearness[:, kept],
            means=self.means[:, kept],
        )

    def widened(self, mean: float, combination: np.ndarray, price: np.ndarray) -> "HeldRows":
        """With one expert more, of this mean and combination (E0,) of the others' deviations, at these prices (M, 1)."""
        # No row was answered by a newcomer: what is expected of it stands in for its outcomes.
        expected = (mean + self.deviation @ combination)[:, None]
        return replace(
            self,
            quality=beside(self.quality, expected),
            estimate=beside(self.estimate, expected),
            price=beside(self.price, price),
            dearness=beside(self.dearness, np.zeros((len(self), 1))),
            means=beside(self.means, np.full((len(self.means), 1), mean)),
        )

    def deviations_of(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of these queries are among the rows, and their deviations.  (N,) -> (K,) places, (K, E0)

        Less the mean of the fold: it holds how far the experts' means on the other folds are from those on all.
        """
        if len(self.keys) == 0:
            return np.empty(0, int), self.deviation[:0]
        _, places, rows = np.intersect1d(keys, self.keys, return_indices=True)
        means = np.stack([self.deviation[self.fold == number].mean(0) for number in range(self.fold.max() + 1)])
        return places, self.deviation[rows] - means[self.fold[rows]]


@dataclass(frozen=True)
class Search:
    """What deciding the held-out rows at any price of an error costs and gives."""

    rows: HeldRows
    expected: np.ndarray  # (M, E) the prices by which they are decided
    means: np.ndarray  # (E,)
    mean_price: np.ndarray  # (E,)

    def error_at_price(self, mask: np.ndarray, most: float, explore: float = 0.0) -> tuple[float, float]:
        """The largest price of an error at which the held-out rows cost at most this on average, and their mean quality there.

        `explore` is the share of queries that go to an expert of the mask at random.
        """
        errors, prices, qualities = self._along(mask, explore)
        met = prices <= most
        # The first that breaks it ends the search: price rises with the price of an error.
        place = max(int(np.argmin(met)) - 1, 0) if not met.all() else -1
        return float(errors[place]), float(qualities[place])

    def error_at_quality(self, mask: np.ndarray, least: float, explore: float = 0.0) -> tuple[float, float, float]:
        """The smallest price of an error at which the held-out rows have at least this mean quality, and their mean price there.

        The third is the highest quality they have: the price of an error is that of it, if only the best single expert is as
        good as asked for.  ValueError if none is.
        """
        errors, prices, qualities = self._along(mask, explore)
        best, single = float(qualities.max()), _explored(float(self.means[mask].max()), self.means[mask].mean(), explore)
        if max(best, single) < least:
            at_random = f", {100 * explore:g}% of them asked at random" if explore > 0 else ""
            raise ValueError(
                f"min_quality: at most {max(best, single):.3f} was reached on held-out queries{at_random}, got {least}"
            )
        place = int(np.argmax(qualities >= min(least, best)))
        return float(errors[place]), float(prices[place]), best

    def errors_from_best(self, mask: np.ndarray, count: int = 60) -> np.ndarray:
        """Falling prices of an error, from the one at which the held-out rows have the highest quality.  (E,) bool -> (G,)"""
        errors = np.geomspace(*self._ends(), count)[::-1]
        if len(self.rows) == 0:
            return errors
        return errors[int(np.argmax([self._means_at(mask, error)[1] for error in errors])) :]

    def judged(self, mask: np.ndarray, errors: np.ndarray | None = None) -> Judged:
        """What deciding the held-out rows among these experts is worth, against the best single one of them.

        (E,) bool; at these prices of an error (G,), by default those between which decisions change.
        """
        rows, price = self.rows, self.rows.price[:, mask]
        errors = grid(price) if errors is None else errors
        means = rows.means[rows.fold][:, mask]
        return judged(rows.estimate[:, mask], self.expected[:, mask], means, price, rows.quality[:, mask], errors)

    def room(self, mask: np.ndarray) -> Routability:
        """How much there is to gain among these experts.  (E,) bool"""
        rows = self.rows
        estimate = rows.estimate[:, mask].astype(np.float64)
        return routability(estimate, rows.price[:, mask], rows.quality[:, mask], self.expected[:, mask])

    def of_mix(self, mix: np.ndarray, mask: np.ndarray, explore: float) -> tuple[float, float]:
        """Mean price and quality of the held-out rows by a static mix.  (E,), (E,) bool -> number, number"""
        price, quality = (
            (values.mean(0, dtype=float) for values in (self.rows.price, self.rows.quality))
            if len(self.rows)
            else (self.mean_price, self.means)
        )
        return (
            _explored(float(mix @ price), self.mean_price[mask].mean(), explore),
            _explored(float(mix @ quality), self.means[mask].mean(), explore),
        )

    @cached_property
    def _cheapest_first(self) -> np.ndarray:
        return np.argsort(self.mean_price, kind="stable")

    def _ends(self) -> tuple[float, float]:
        low, high = error_range(self.rows.price) if len(self.rows) else (1e-6, 1e6)
        return low / 1e3, high * 1e3

    def _means_at(self, mask: np.ndarray, error: float) -> tuple[float, float]:
        """Mean price and quality of the held-out rows at a price of an error; of the best on the mean where there are none."""
        if len(self.rows) == 0:
            best = np.where(mask, self.means - self.mean_price / error, -np.inf).argmax()
            return float(self.mean_price[best]), float(self.means[best])
        order = self._cheapest_first
        order = order[mask[order]]
        chosen = order[(self.rows.estimate[:, order] - self.expected[:, order] / error).argmax(1)]
        rows = np.arange(len(chosen))
        return float(self.rows.price[rows, chosen].mean()), float(self.rows.quality[rows, chosen].mean())

    def _along(self, mask: np.ndarray, explore: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rising prices of an error, and mean price and quality of the held-out rows at each.  -> (G,), (G,), (G,)"""
        errors = np.geomspace(*self._ends(), 400)
        price, quality = np.array([self._means_at(mask, error) for error in errors]).T
        return (
            errors,
            _explored(price, self.mean_price[mask].mean(), explore),
            _explored(quality, self.means[mask].mean(), explore),
        )


def _explored(usual: Any, at_random: float, explore: float) -> Any:
    """A mean of the decisions, where a share of them is drawn at random."""
    return (1 - explore) * usual + explore * at_random


def beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The columns of both, in the type of the left ones.  (..., E), (..., F) -> (..., E + F)"""
    return np.concatenate([left, right], axis=-1).astype(left.dtype)
