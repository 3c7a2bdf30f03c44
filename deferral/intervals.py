"""Bootstrap intervals of any metric, paired differences, figures over seeds: seeded, vectorised, the same on every machine."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch
from deferral.errors import installing
from deferral.metrics import average
from deferral.threads import one_torch_thread
from deferral.validation import require_level

__all__ = [
    "Interval",
    "SeedFigures",
    "bootstrap",
    "bootstrap_means",
    "interval",
    "mean_interval",
    "metric_interval",
    "on_rows",
    "over_seeds",
    "paired_difference",
]

# Rows times resamples that are drawn at once: some tables of 2^17 counts of 8 bytes stay in a core's cache.
_CHUNK = 1 << 17


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


@dataclass(frozen=True)
class SeedFigures:
    """A figure over several seeds: mean, sample deviation (NaN for one seed), and Student's interval of the mean."""

    mean: float
    deviation: float
    count: int
    low: float
    high: float


@numpy_or_torch
def bootstrap(metric: Callable[[Tensor], Tensor], rows: int, *, resamples: int = 10_000, seed: int = 0) -> Tensor:
    """metric(weights) on `resamples` samples of the rows, with replacement.  -> (resamples, ...), float64, CPU

    `metric` maps weights (R, N), how often each row was drawn in R samples at once, to figures (R, ...): every function of
    `deferral.metrics`, `deferral.curves` and `deferral.reliability` that takes weights does.  The same seed draws the same
    rows, so that differences of two metrics are paired:

        bootstrap(lambda weights: aurc(one, loss, weights) - aurc(other, loss, weights), rows=len(loss))

    Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 6.
    """
    _require_rows(rows)
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    if seed < 0:
        raise ValueError(f"seed: expected a whole number >= 0, got {seed}")
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // rows)
    figures = []
    with one_torch_thread():
        for start in range(0, resamples, step):
            size = min(step, resamples - start)
            drawn = generator.integers(0, rows, (size, rows), dtype=np.int32)
            drawn += (np.arange(size, dtype=np.int32) * rows)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows)
            figures.append(_figures(metric, torch.from_numpy(counts).double()))
    return torch.cat(figures)


def _require_rows(rows: int) -> None:
    if rows < 1:
        raise ValueError(f"rows: expected at least one row, got {rows}")


def _figures(metric: Callable[[Tensor], Tensor], weights: Tensor) -> Tensor:
    """metric(weights), whether it gives NumPy or torch.  (R, N) -> (R, ...), float64, CPU"""
    found = metric(weights)
    figures = found if isinstance(found, Tensor) else np.asarray(found)
    if isinstance(figures, np.ndarray):
        if figures.dtype.kind not in "biuf":
            raise TypeError(f"metric: expected one figure per sample, got {type(found).__name__}; of a curve take .at(coverage)")
        figures = torch.from_numpy(figures)
    if figures.shape[:1] != weights.shape[:1]:
        raise ValueError(
            f"metric: expected one figure per sample, weights (R, N) to (R, ...), got shape {tuple(figures.shape)} from weights "
            f"{tuple(weights.shape)}; a metric of plain rows, without weights, is wrapped by on_rows"
        )
    return figures.detach().double().cpu()


def on_rows(metric: Callable[..., Any], *columns: Any) -> Callable[[Tensor], Tensor]:
    """A metric of plain rows, scikit-learn's `roc_auc_score` say, as the metric of weights that `bootstrap` takes.

    It is called once per sample, on the columns (arrays or tensors; whatever else becomes an array) with the rows of that sample.
    """
    tables = [column if isinstance(column, Tensor) else np.asanyarray(column) for column in columns]

    def weighted(weights: Tensor) -> Tensor:
        every = torch.arange(weights.shape[-1], device=weights.device)
        samples = [every.repeat_interleave(counts.long()) for counts in weights]
        figures = [metric(*(table[rows if isinstance(table, Tensor) else rows.numpy()] for table in tables)) for rows in samples]
        return torch.tensor([float(figure) for figure in figures], dtype=torch.float64)

    return weighted


@numpy_or_torch
def bootstrap_means(values: Tensor, *, resamples: int = 10_000, seed: int = 0) -> Tensor:
    """Column means of `resamples` samples of the rows, with replacement.  (N, ...) -> (resamples, ...), float64, CPU

    All columns of one call share each sample of rows, so a function of several means (a ratio, a difference) may be taken
    resample by resample.
    """
    if values.dim() == 0 or len(values) == 0:
        raise ValueError(f"values: expected at least one row, got shape {tuple(values.shape)}")
    table = values.detach().double().cpu()
    if not bool(table.isfinite().all()):
        raise ValueError("values: expected finite numbers, got NaN or infinity; leave rows without a value out first")
    rows, flat = len(table), table.reshape(len(table), -1)
    means = bootstrap(lambda weights: weights @ flat / rows, rows, resamples=resamples, seed=seed)
    return means.reshape(resamples, *table.shape[1:])


@numpy_or_torch
def interval(estimate: Tensor | float, resampled: Tensor, *, level: float = 0.95, centred: bool = False) -> Interval:
    """The percentile interval of a figure, from its value in every resample.  (resamples,) -> Interval

    Resamples in which the figure is not defined (NaN: no row was kept, say) are left out; if all are, the ends are NaN.  So they
    are where the estimate itself is not defined: an interval of the lucky resamples would read as if it were.

    `centred` moves the resamples to have the estimate as their mean.  It is for a figure that has the noise of sampling taken
    off, such as `debiased_calibration_error`: resampling adds that noise a second time, and all resamples lie too high.  They
    also vary more than the figure where noise is most of it, so that the interval is too long there; see that function.
    """
    require_level(level)
    if resampled.dim() != 1 or len(resampled) == 0:
        raise ValueError(f"resampled: expected one figure per resample, shape (resamples,), got {tuple(resampled.shape)}")
    if isinstance(estimate, Tensor) and estimate.numel() != 1:
        raise ValueError(f"estimate: expected one number, got shape {tuple(estimate.shape)}")
    figures, tail = resampled.double(), (1 - level) / 2
    if centred:
        figures = figures - figures.nanmean() + float(estimate)
    if math.isnan(float(estimate)):
        return Interval(math.nan, math.nan, math.nan)
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64, device=figures.device)
    low, high = torch.nanquantile(figures, ends).tolist()
    if bool(figures.isinf().any()):
        # Between a number and infinity there is nothing to interpolate.
        low = float(torch.nanquantile(figures, ends[0], interpolation="lower"))
        high = float(torch.nanquantile(figures, ends[1], interpolation="higher"))
    return Interval(estimate=float(estimate), low=low, high=high)


@numpy_or_torch
def metric_interval(
    metric: Callable[[Tensor], Tensor],
    rows: int,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    centred: bool = False,
) -> Interval:
    """Any metric of weights (see `bootstrap`), on the rows as they are, with its `interval`.  -> Interval"""
    _require_rows(rows)
    estimate = _figures(metric, torch.ones(1, rows, dtype=torch.float64)).reshape(-1)
    if len(estimate) != 1:
        raise ValueError(f"metric: expected one figure per sample, got {len(estimate)}; use bootstrap and interval for several")
    resampled = bootstrap(metric, rows, resamples=resamples, seed=seed).reshape(-1)
    return interval(float(estimate), resampled, level=level, centred=centred)


@numpy_or_torch
def mean_interval(values: Tensor, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of one value per row with its bootstrap interval.  (N,) -> Interval

    Too short on few rows and for rare events: resamples of 30 rows without an error hold none, and the interval of the error
    is the point 0.  For a share that must not be missed see `deferral.certified`.

    Rows without a value (NaN) stay in the samples and out of the mean, as in `deferral.metrics.average`.
    """
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(f"values: expected at least one row and one number per row, got shape {tuple(values.shape)}")
    if bool(values.isnan().all()):
        raise ValueError("values: expected a number in some row, got NaN in all")
    figures = values.detach().cpu()
    return metric_interval(lambda weights: average(figures, weights), len(figures), level=level, resamples=resamples, seed=seed)


@numpy_or_torch
def paired_difference(values: Tensor, others: Tensor, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """mean(values - others) for two methods on the same rows, each resample taking the same rows of both.  (N,), (N,)

    Rows in which one of them has no value (NaN) stay out of the mean.
    """
    if values.shape != others.shape:
        raise ValueError(f"a paired difference needs the same rows: {tuple(values.shape)} and {tuple(others.shape)}")
    return mean_interval(values.double() - others.double(), level=level, resamples=resamples, seed=seed)


@numpy_or_torch
def over_seeds(values: Tensor, *, level: float = 0.95) -> SeedFigures:
    """One figure per seed: mean, deviation and the interval that Student's t gives the mean.  (S,) -> SeedFigures

    The interval is about what another set of seeds would give on the same rows, `mean_interval` about other rows; for the
    difference of two methods pass the differences per seed.  Needs SciPy (extra calibration).  With one seed the deviation
    and the interval are NaN.
    """
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(f"values: expected one figure per seed, got shape {tuple(values.shape)}")
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"values: expected a finite figure of every seed, got {values.tolist()}; leave out the seeds that failed"
        )
    require_level(level)
    figures, count = values.double(), len(values)
    mean = float(figures.mean())
    if count == 1:
        return SeedFigures(mean=mean, deviation=float("nan"), count=1, low=float("nan"), high=float("nan"))
    try:
        from scipy.stats import t
    except ModuleNotFoundError as error:
        raise ImportError(f"Student's interval needs SciPy: {installing('calibration')}") from error
    deviation = float(figures.std())
    half = float(t.ppf((1 + level) / 2, count - 1)) * deviation / count**0.5
    return SeedFigures(mean=mean, deviation=deviation, count=count, low=mean - half, high=mean + half)
