"""Bootstrap intervals of means over rows, and of paired differences: seeded, vectorised, the same on every machine."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Interval", "bootstrap_means", "interval", "mean_interval", "paired_difference"]

# Rows times resamples that are drawn at once: 2^23 counts of 8 bytes stay within 64 MiB.
_CHUNK = 1 << 23


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile bootstrap interval."""

    estimate: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the length of the interval, the number behind the sign +-."""
        return (self.high - self.low) / 2

    def excludes_zero(self) -> bool:
        """True if the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def bootstrap_means(values: Tensor, *, resamples: int = 10_000, seed: int = 0) -> Tensor:
    """Column means of `resamples` samples of the rows, with replacement.  (N, ...) -> (resamples, ...), float64, CPU

    All columns of one call share each sample of rows, so a function of several means (a ratio, a difference) may be taken
    resample by resample.
    """
    if values.dim() == 0 or len(values) == 0:
        raise ValueError(f"values: expected at least one row, got shape {tuple(values.shape)}")
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    table = values.detach().double().cpu().numpy()
    if not np.isfinite(table).all():
        raise ValueError("values: expected finite numbers, got NaN or infinity; leave rows without a value out first")
    rows = len(table)
    flat = table.reshape(rows, -1)
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, flat.shape[1]))
    step = max(1, _CHUNK // rows)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = generator.integers(0, rows, (size, rows), dtype=np.int32)
        drawn += (np.arange(size, dtype=np.int32) * rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows)
        means[start : start + size] = counts @ flat / rows
    return torch.from_numpy(means.reshape(resamples, *table.shape[1:]))


def interval(estimate: Tensor | float, resampled: Tensor, *, level: float = 0.95) -> Interval:
    """The percentile interval of a figure, from its value in every resample.  (resamples,) -> Interval"""
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    tail = (1 - level) / 2
    low, high = torch.quantile(resampled, torch.tensor([tail, 1 - tail], dtype=resampled.dtype)).tolist()
    return Interval(estimate=float(estimate), low=low, high=high)


def mean_interval(values: Tensor, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of one value per row with its bootstrap interval.  (N,) -> Interval"""
    if values.dim() != 1:
        raise ValueError(f"values: expected one number per row, got shape {tuple(values.shape)}")
    return interval(values.double().mean(), bootstrap_means(values, resamples=resamples, seed=seed), level=level)


def paired_difference(values: Tensor, others: Tensor, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """mean(values - others) for two methods on the same rows, each resample taking the same rows of both.  (N,), (N,)"""
    if values.shape != others.shape:
        raise ValueError(f"a paired difference needs the same rows: {tuple(values.shape)} and {tuple(others.shape)}")
    return mean_interval(values.double() - others.double(), level=level, resamples=resamples, seed=seed)
