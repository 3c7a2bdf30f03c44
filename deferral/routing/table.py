"""A log as a table: a row for each query, a column for each expert."""

from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Table",
    "array_of",
    "check_amount",
    "check_certifying",
    "check_price_of_error",
    "check_share",
    "check_values",
    "cost_table",
    "decided_again",
]

_LEAST_ERROR = 1e-100
_AT_ONCE_S = 60.0


@dataclass(frozen=True)
class Table:
    """A log with one row per query and one column per expert.  What was not observed is False in the mask, and 0.

    `propensity` is NaN where it is not known.
    """

    queries: list[str]
    experts: list[str]
    quality: np.ndarray  # (N, E) float32
    price: np.ndarray  # (N, E) float64, dollars
    mask: np.ndarray  # (N, E) bool, True = observed
    latency: np.ndarray  # (N, E) float32, seconds, NaN where not known
    propensity: np.ndarray  # (N, E) float32
    asked: np.ndarray | None = None  # (N, E) how often, where some expert was asked the same more than once
    again: np.ndarray | None = None  # (N,) bool, beside `asked`: which by their times were decided again, see `decided_again`

    @property
    def full(self) -> bool:
        """True if every expert answered every query."""
        return bool(self.mask.all())

    @property
    def gap(self) -> str:
        """The first outcome that is missing, in words; "" where the table is full."""
        if self.full:
            return ""
        row, column = np.argwhere(~self.mask)[0]
        return f"{self.experts[column]} has none on query {row + 1}, {self.queries[row][:60]!r}"

    def rows(self, rows: np.ndarray) -> "Table":
        """The same table for some of the queries, by their indices."""
        names = ("quality", "price", "mask", "latency", "propensity", "asked", "again")
        arrays = {name: array[rows] for name in names if (array := getattr(self, name)) is not None}
        return Table([self.queries[row] for row in rows], self.experts, **arrays)


def decided_again(query: np.ndarray, time: np.ndarray, propensity: np.ndarray, count: int) -> np.ndarray:
    """Which queries were decided again: all their outcomes were drawn, and more than a minute apart.  (n,) thrice -> (count,)

    `query` are numbers below `count`.  Where a router changes in between, propensities of its decisions add up to more than 1.
    """
    first, last, drawn = np.full(count, np.inf), np.full(count, -np.inf), np.zeros(count, bool)
    known = ~np.isnan(time)
    np.minimum.at(first, query[known], time[known])
    np.maximum.at(last, query[known], time[known])
    drawn[query] = True
    drawn[query[~(propensity < 1)]] = False
    return drawn & (last - first > _AT_ONCE_S)


def cost_table(table: Table, price_of_error: float) -> "tuple[Tensor, Tensor]":
    """(1 - quality) + price / price_of_error, in units of one error, and what of it is known.  -> (N, E), (N, E) bool

    `price_of_error` is what one wrong answer is worth, in dollars.  An unknown cost is 0 and False in the mask, as the losses
    of `deferral.losses` take it.
    """
    import torch

    if not isinstance(table, Table):
        raise TypeError(f"table: expected a Table, got {type(table).__name__}; log.table() makes one")
    check_price_of_error(price_of_error)
    costs = np.where(table.mask, 1 - table.quality + table.price / price_of_error, 0.0)
    return torch.from_numpy(costs), torch.from_numpy(table.mask)


def check_price_of_error(price_of_error: float) -> None:
    # Prices are divided by the price of an error, which must not overflow.
    if not _is_number(price_of_error) or not _LEAST_ERROR <= price_of_error < np.inf:
        raise ValueError(f"price_of_error: expected what a wrong answer is worth, in dollars, above 0, got {price_of_error!r}")


def array_of(name: str, values: Any, dimensions: int) -> np.ndarray:
    """The numbers of an array or of lists, whole ones as floats; TypeError where NumPy finds none, ValueError for NaN."""
    try:
        array = np.asanyarray(values)
    except ValueError:
        raise ValueError(f"{name}: expected rows of one length") from None
    # Columns of different kinds, or that could hold gaps, pandas gives as objects.
    if array.dtype.kind == "O" and all(isinstance(value, Real | np.bool_) for value in array.flat):
        array = array.astype(float)
    if array.dtype.kind not in "biuf":
        came = f"an array of {array.dtype}" if isinstance(values, np.ndarray) else type(values).__name__
        raise TypeError(f"{name}: expected an array of numbers, got {came}")
    # Negated, whole numbers without a sign would be others; what is masked is not known.
    array = np.asarray(np.ma.filled(array if array.dtype.kind == "f" else array.astype(float), np.nan))
    if array.ndim != dimensions or array.size == 0:
        raise ValueError(f"{name}: expected {dimensions} dimensions, none of them empty, got shape {array.shape}")
    if np.isnan(array).any():
        raise ValueError(f"{name}: expected numbers, got NaN in {int(np.isnan(array).sum())} of {array.size} places")
    return array


def check_share(name: str, share: float) -> None:
    """ValueError unless it is a share of the queries that leaves some."""
    if not _is_number(share) or not 0 <= share < 1:
        raise ValueError(f"{name}: expected a share of the queries in [0, 1), got {share!r}")


def check_amount(name: str, value: Any) -> None:
    """TypeError for what is no number."""
    if not _is_number(value):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, float | int | np.floating | np.integer) and not isinstance(value, bool)


def check_values(table: Table) -> None:
    """ValueError for a quality outside [0, 1], or for what is no price."""
    with np.errstate(invalid="ignore"):
        good = ~table.mask | ((table.quality >= 0) & (table.quality <= 1) & (table.price >= 0) & np.isfinite(table.price))
    if not good.all():
        row, column = np.argwhere(~good)[0]
        raise ValueError(
            f"query {row + 1}, {table.experts[column]}: expected a quality in [0, 1] and a price that is not negative, got "
            f"{table.quality[row, column]:g} and {table.price[row, column]:g}"
        )


def check_certifying(table: Table) -> None:
    """ValueError where an outcome is missing: such rows prove nothing."""
    if gap := table.gap:
        raise ValueError(f"certify: expected every expert's outcome on every query; {gap}")
