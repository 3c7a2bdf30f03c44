"""Judge routers: cost-quality curves and their hulls, and the figures that others report.

A curve is made of decisions: one point of mean price and mean quality per setting of the trade-off.  Weights (..., N) count
rows, so that `deferral.intervals.bootstrap` gives any figure its interval: see `intervals_of`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from deferral.routing.prices import price_gaps
from deferral.routing.table import array_of, check_amount

if TYPE_CHECKING:
    from deferral.intervals import Interval

__all__ = [
    "PriceQualityCurve",
    "Routability",
    "aiq",
    "apgr",
    "best_expert",
    "cpt",
    "curve",
    "hull",
    "intervals_of",
    "routability",
    "saving",
    "static_curve",
    "trade_offs",
]


_TAIL = 0.025


@dataclass(frozen=True)
class PriceQualityCurve:
    """Which price and quality every row got at each setting.  A static mix has one setting per expert."""

    price: np.ndarray  # (S, N) dollars
    quality: np.ndarray  # (S, N)

    def __post_init__(self) -> None:
        for name, values in _tables(price=self.price, quality=self.quality).items():
            object.__setattr__(self, name, values)

    def points(self, weights: np.ndarray | None = None) -> np.ndarray:
        """(mean price, mean quality) of each setting.  (..., N) -> (..., S, 2)"""
        if weights is None:
            return np.stack([self.price.mean(1), self.quality.mean(1)], -1)
        weights = _weights_of(weights, self.price.shape[1])
        total = _above_0(weights.sum(-1, keepdims=True))
        return np.stack([weights @ self.price.T / total, weights @ self.quality.T / total], -1)


def trade_offs(price: np.ndarray, count: int = 60) -> np.ndarray:
    """Prices of an error that take every decision from cheapest to best: inf, log-spaced, all but 0.  (N, E) -> (count + 2,)"""
    means, gaps = price_gaps(array_of("price", price, 2))
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise ValueError(f"count: expected a whole number >= 1, got {count!r}")
    smallest = gaps.min() if len(gaps) else max(float(means[-1]), 1e-12)
    largest = float(means[-1] - means[0]) if len(gaps) else smallest
    return np.concatenate([[np.inf], np.geomspace(1000 * largest, smallest / 2, count), [1e-6 * smallest]])


def curve(
    estimate: np.ndarray,
    price: np.ndarray,
    quality: np.ndarray,
    errors: np.ndarray | None = None,
    expected: np.ndarray | None = None,
) -> PriceQualityCurve:
    """Decisions argmax(estimate - expected / price_of_error) for each price of an error.  Tables (N, E) -> PriceQualityCurve

    `expected` (N, E) are the prices as they are known before the answers, by default those paid: right where they are fixed, and
    hindsight where they hang on what an expert writes.  Ties go to the cheaper expert (the first of equal price).
    """
    expected = price if expected is None else expected
    tables = _tables(estimate=estimate, price=price, quality=quality, expected=expected)
    errors = trade_offs(price) if errors is None else array_of("errors", errors, 1)
    if not (errors > 0).all():
        raise ValueError(f"errors: expected prices of an error above 0, in dollars, got {errors.min():g}")
    order = np.argsort(tables["price"].mean(0), kind="stable")
    estimate, price, quality, expected = (values[:, order] for values in tables.values())
    rows = np.arange(len(price))
    chosen = [(estimate - expected / error).argmax(1) for error in errors]
    return PriceQualityCurve(np.stack([price[rows, one] for one in chosen]), np.stack([quality[rows, one] for one in chosen]))


def static_curve(price: np.ndarray, quality: np.ndarray) -> PriceQualityCurve:
    """Always one expert: the hull of these points are the static mixes, the "zero router" of RouterBench.  (N, E), (N, E)"""
    return PriceQualityCurve(*(table.T for table in _tables(price=price, quality=quality).values()))


def hull(points: np.ndarray) -> np.ndarray:
    """The corners of the highest concave, rising line over the points, cheapest first.  (S, 2) -> (H, 2)

    Mixing two settings at random reaches every point between them.  Hu et al., "RouterBench" (2024), section 3.
    """
    points = array_of("points", points, 2)
    if points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError(f"points: expected a finite price and quality in each row, (S, 2), got shape {points.shape}")
    corners: list[np.ndarray] = []
    for point in points[np.lexsort((-points[:, 1], points[:, 0]))]:
        if corners and point[1] <= corners[-1][1]:
            continue
        while len(corners) > 1 and _falls(corners[-2], corners[-1], point):
            corners.pop()
        corners.append(point)
    return np.array(corners)


def aiq(points: np.ndarray, low: float, high: float) -> float:
    """Average quality of the hull over the prices from `low` to `high`, those of the cheapest and the dearest expert.

    Left of its first corner the hull is continued at that corner's quality, to the right of the last one too.
    RouterBench, section 3.2.
    """
    corners = hull(points)
    for name, value in (("low", low), ("high", high)):
        check_amount(name, value)
    if not low <= high:
        raise ValueError(f"low, high: expected rising prices, got {low} and {high}")
    if low == high:
        return float(corners[-1, 1])
    inside = corners[(corners[:, 0] > low) & (corners[:, 0] < high), 0]
    prices = np.concatenate([[low], inside, [high]])
    return float(_area(np.interp(prices, corners[:, 0], corners[:, 1]), prices) / (high - low))


def _area(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """By trapezoids, as numpy has it from 2.0 on.  (..., N), (..., N) -> (...)"""
    return ((y[..., 1:] + y[..., :-1]) / 2 * np.diff(x)).sum(axis=-1)


def saving(points: np.ndarray, quality: float, price: float, share: float = 1.0) -> float:
    """1 - (price on the hull of share * quality) / price: what is saved at that share of an expert's quality.

    NaN where the hull does not reach the quality, and where there is nothing to save.
    """
    corners = hull(points)
    _check_part("share", share)
    for name, value in (("quality", quality), ("price", price)):
        check_amount(name, value)
        if not np.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")
    wanted = share * quality
    # Two sums of the same numbers may differ in the last digit.
    if corners[-1, 1] < wanted - 1e-9 or price <= 0:
        return float("nan")
    return float(1 - np.interp(wanted, corners[:, 1], corners[:, 0]) / price)


def apgr(score: np.ndarray, gain: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The average performance gap recovered of two experts, over all shares of calls to the strong one.  (N,), (N,) -> (...)

    `score` is higher where the strong expert should be asked, `gain` its quality less that of the other.  0.5 is random, rows
    of equal score are called together, in equal parts.  NaN where the strong expert is not better.
    Ong et al., "RouteLLM" (2024), section 3.
    """
    called, recovered = _recovered(score, gain, weights)
    return _area(recovered, called)


def cpt(score: np.ndarray, gain: np.ndarray, share: float, weights: np.ndarray | None = None) -> np.ndarray:
    """The least share of calls to the strong expert that recovers `share` of the gap.  (N,), (N,) -> (...)

    RouteLLM (2024), section 3.
    """
    called, recovered = _recovered(score, gain, weights)
    _check_part("share", share)
    # The first segment that ends above the wanted share: every one before it lies below.
    flat_called, flat = called.reshape(-1, called.shape[-1]), recovered.reshape(-1, recovered.shape[-1])
    results = []
    for shares, line in zip(flat_called, flat, strict=True):
        above = int(np.argmax(line >= share - 1e-12))
        if above == 0:
            results.append(shares[0] if line[0] >= share else np.nan)
            continue
        rise = line[above] - line[above - 1]
        results.append(shares[above - 1] + (share - line[above - 1]) / rise * (shares[above] - shares[above - 1]))
    return np.array(results).reshape(called.shape[:-1])


def best_expert(quality: np.ndarray, price: np.ndarray) -> int:
    """The expert of the highest mean quality, the cheaper of two equals.  (N, E), (N, E) -> index"""
    prices, means = (table.mean(0) for table in _tables(price=price, quality=quality).values())
    return int(np.lexsort((prices, -means))[0])


def intervals_of(
    figure: Callable[[np.ndarray], np.ndarray],
    rows: int,
    *,
    group: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> "list[Interval]":
    """Figures with their 95% intervals over the rows.  `figure` maps weights (N,) to several numbers (F,) -> F intervals

    Rows of one `group` (N,), queries of one subject say, are drawn together.  A figure that is not defined (NaN) in more of the
    resamples than lie beyond one end of an interval has none: its ends are NaN.
    """
    import torch

    from deferral.intervals import bootstrap, interval

    member = np.arange(rows) if group is None else np.unique(group, return_inverse=True)[1]
    if member.shape != (rows,):
        raise ValueError(f"group: expected one for each of {rows} rows, got shape {member.shape}")

    def many(weights: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack([_figures_of(figure(one[member])) for one in weights.numpy()]))

    resampled = bootstrap(many, len(np.unique(member)), resamples=resamples, seed=seed)
    estimates = _figures_of(figure(np.ones(rows)))
    undefined = resampled.isnan().double().mean(0)
    found = [interval(float(estimate), resampled[:, place]) for place, estimate in enumerate(estimates)]
    return [
        one if share <= _TAIL else replace(one, low=float("nan"), high=float("nan"))
        for one, share in zip(found, undefined.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Routability:
    """Whether a pool of experts can gain from routing at all, in average quality over prices (AIQ)."""

    static_mix: float
    predicted: float
    oracle: float  # NaN where not every expert answered every query

    @property
    def room(self) -> float:
        """Oracle less static mix: what a router that knows the future would gain."""
        return self.oracle - self.static_mix

    @property
    def predictable(self) -> float:
        """The share of that room that the held-out estimates recover; 0 if there is no room."""
        return (self.predicted - self.static_mix) / self.room if self.room > 0 else 0.0

    def __str__(self) -> str:
        if np.isnan(self.oracle):
            return (
                f"static mix {self.static_mix:.3f}, routed {self.predicted:.3f}; how much more there is to gain cannot be known, "
                "since not every expert answered every query"
            )
        line = (
            f"static mix {self.static_mix:.3f}, routed {self.predicted:.3f}, oracle {self.oracle:.3f}: "
            f"{100 * self.predictable:.0f}% of the room of {self.room:.3f} is predictable"
        )
        little = "over the dollars between the cheapest and the dearest of them, routing gains next to nothing on the mean"
        return line if self.room > 0.01 else f"{line}; {little}"


def routability(estimate: np.ndarray, price: np.ndarray, quality: np.ndarray, expected: np.ndarray | None = None) -> Routability:
    """The room between static mix and oracle, and how much of it held-out estimates recover.  (N, E), (N, E), (N, E)

    `expected` (N, E) are the prices by which the estimates decide: see `curve`.
    """
    means = array_of("price", price, 2).mean(0)
    low, high = float(means.min()), float(means.max())
    static, routed = static_curve(price, quality).points(), curve(estimate, price, quality, expected=expected).points()
    perfect = curve(quality, price, quality).points()
    return Routability(aiq(static, low, high), aiq(routed, low, high), aiq(np.concatenate([perfect, static]), low, high))


def _tables(**tables: np.ndarray) -> dict[str, np.ndarray]:
    arrays = {name: array_of(name, values, 2) for name, values in tables.items()}
    shapes = [array.shape for array in arrays.values()]
    if len(set(shapes)) > 1:
        raise ValueError(f"{', '.join(tables)}: expected tables of one shape, got {', '.join(map(str, shapes))}")
    return arrays


def _check_part(name: str, share: float) -> None:
    check_amount(name, share)
    if not 0 < share <= 1:
        raise ValueError(f"{name}: expected a share in (0, 1], got {share}")


def _weights_of(weights: np.ndarray, rows: int) -> np.ndarray:
    weights = array_of("weights", weights, np.ndim(weights))
    if weights.shape[-1:] != (rows,):
        raise ValueError(f"weights: expected one per row, shape (..., {rows}), got {weights.shape}")
    # All may be 0, where a resample leaves out every row of a part: its figures are not defined.
    if not ((weights >= 0) & (weights < np.inf)).all():
        raise ValueError("weights: expected finite numbers >= 0")
    return weights


def _above_0(total: np.ndarray) -> np.ndarray:
    """What can be divided by; NaN elsewhere."""
    return np.where(total > 0, total, np.nan)


def _figures_of(found: object) -> np.ndarray:
    """One figure, or several, of which some may not be defined."""
    figures = np.atleast_1d(np.asarray(found))
    if figures.dtype.kind not in "biuf" or figures.ndim != 1:
        raise TypeError(f"figure: expected a vector of numbers for the weights of the rows, got {found!r}"[:200])
    return figures.astype(float)


def _falls(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> bool:
    """True if the second point lies on or below the line from the first to the third."""
    return (second[1] - first[1]) * (third[0] - first[0]) <= (third[1] - first[1]) * (second[0] - first[0])


def _recovered(score: np.ndarray, gain: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(share of calls, share of the gap recovered) at the ends of every group of equal scores, from 0.  -> (..., G + 1) twice"""
    score, gain = array_of("score", score, 1), array_of("gain", gain, 1)
    if score.shape != gain.shape:
        raise ValueError(f"score, gain: expected two vectors of one length, got {score.shape} and {gain.shape}")
    for name, values in (("score", score), ("gain", gain)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: expected finite numbers, got infinity")
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    weights = (np.ones(len(score)) if weights is None else _weights_of(weights, len(score)))[..., order]
    mass, gained = weights.cumsum(-1)[..., ends], (weights * gain[order]).cumsum(-1)[..., ends]
    nothing = np.zeros((*mass.shape[:-1], 1))
    called, recovered = mass / _above_0(mass[..., -1:]), gained / _above_0(gained[..., -1:])
    return np.concatenate([nothing, called], -1), np.concatenate([nothing, recovered], -1)
