"""Judge: can a probability of being right be believed?  Calibration of P(expert is right), or of any other probability.

Bins are fixed by the values of the probability, so that equal values share a bin and the order of the rows does not matter.
Weights count rows, as in `deferral.metrics`.  NumPy or torch in and out.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch
from deferral.validation import check_weights

__all__ = ["Reliability", "brier", "calibration_error", "debiased_calibration_error", "reliability"]


@dataclass(frozen=True)
class Reliability:
    """The bins that hold a row, by rising probability: (..., bins) each, NaN where the weights leave a bin empty."""

    predicted: Tensor  # mean probability
    observed: Tensor  # share of outcomes that happened
    count: Tensor  # total weight


@numpy_or_torch
def reliability(
    probability: Tensor,
    outcome: Tensor,
    weights: Tensor | None = None,
    *,
    bins: int = 15,
    equal_mass: bool = False,
    mask: Tensor | None = None,
) -> Reliability:
    """Mean predicted probability against observed frequency, bin by bin.  (N,), (N,) of 0 and 1, (..., N) -> (..., bins)

    Bins are [0, 1/bins), [1/bins, 2/bins) .. [.., 1], or, with `equal_mass`, hold about equally many rows each (fewer bins where
    values are equal), whatever their weights: bins stay where they are while a bootstrap draws weights.  Rows where the mask (N,)
    is False are left out.
    """
    predicted, happened, weights, member = _in_bins(probability, outcome, weights, bins, equal_mass, mask)
    count = weights @ member
    return Reliability(
        predicted=(weights @ (member * predicted.unsqueeze(-1))) / count,
        observed=(weights @ (member * happened.unsqueeze(-1))) / count,
        count=count,
    )


def _in_bins(
    probability: Tensor, outcome: Tensor, weights: Tensor | None, bins: int, equal_mass: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the n known rows: probability and outcome (n,), weights (..., n), and 1 where the row is in the bin (n, bins)."""
    if probability.dim() != 1 or probability.shape != outcome.shape or len(probability) == 0:
        raise ValueError(
            "probability, outcome: expected two non-empty vectors of one length, got "
            f"{tuple(probability.shape)} and {tuple(outcome.shape)}; take one expert's column at a time"
        )
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    known = torch.ones_like(probability, dtype=torch.bool) if mask is None else mask
    if known.shape != probability.shape or known.dtype != torch.bool:
        raise ValueError(f"mask: expected bool of shape {tuple(probability.shape)}, got {known.dtype} {tuple(known.shape)}")
    if not bool(known.any()):
        raise ValueError("mask: expected at least one known row, got none")
    predicted, happened = probability.double()[known], outcome.double()[known]
    # A sum of probabilities may be a rounding above 1.
    if bool((outside := ~((predicted >= 0) & (predicted <= 1.001))).any()):
        raise ValueError(
            f"probability: expected numbers in [0, 1], got {float(predicted[outside][0]):g}; turn scores into probabilities "
            "first (expert_correctness), and leave rows that have none out by a mask"
        )
    if bool((outside := ~((happened == 0) | (happened == 1))).any()):
        raise ValueError(f"outcome: expected 0 or 1 (or bool), one per row, got {float(happened[outside][0]):g}")
    inner = torch.arange(1, bins, dtype=torch.float64, device=predicted.device) / bins
    # Rounded as the probabilities are: .7 in single precision lies in the bin that begins with .7.
    edges = inner.to(probability.dtype).double() if probability.is_floating_point() else inner
    if equal_mass:
        # torch's own takes at most 16 million numbers.
        edges = torch.from_numpy(np.quantile(predicted.detach().cpu().numpy(), inner.cpu().numpy())).to(inner).unique()
    number = torch.bucketize(predicted, edges, right=True)
    used, number = number.unique(return_inverse=True)
    member = torch.nn.functional.one_hot(number, len(used)).double()
    return predicted, happened, check_weights(weights, probability)[..., known], member


@numpy_or_torch
def calibration_error(
    probability: Tensor,
    outcome: Tensor,
    weights: Tensor | None = None,
    *,
    bins: int = 15,
    equal_mass: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Expected calibration error: sum over bins of their share times |observed - predicted|.  -> (...)

    Naeini, Cooper, Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian Binning" (AAAI 2015).  It is too large
    on few rows even for perfect probabilities, and in a bootstrap sample larger still, so that percentiles of it are no
    interval; `debiased_calibration_error` is neither.
    """
    table = reliability(probability, outcome, weights, bins=bins, equal_mass=equal_mass, mask=mask)
    share = table.count / table.count.sum(-1, keepdim=True)
    return (share * (table.observed - table.predicted).abs().nan_to_num(0.0)).sum(-1)


@numpy_or_torch
def debiased_calibration_error(
    probability: Tensor,
    outcome: Tensor,
    weights: Tensor | None = None,
    *,
    bins: int = 15,
    mask: Tensor | None = None,
) -> Tensor:
    """Squared l2 calibration error with its sampling noise taken off, over bins of equal mass.  -> (...)

    sum over bins of their share times `mean(r)^2 - var(r) / (count - 1)`, r = outcome - probability: mean 0 for perfect
    probabilities, so it can be negative.  Bins with a count of at most 1 are left out.

    For its interval: `metric_interval(..., centred=True)`.  Near perfect calibration it is conservative, up to sqrt(3) = 1.7
    times too long: with the bins' mean residuals b of variance v, there nothing but noise, the figure sums b^2 of variance 2 v^2,
    its resamples (b + e)^2 of variance 2 v^2 + 4 b^2 v, on average 6 v^2.  In 150 draws with 15 bins the nominal 95% interval
    covered 100% for perfect probabilities and 300 rows, 99% for probabilities that are 0.1 off, and 95% for those and 3,000 rows.

    Kumar, Liang, Ma, "Verified Uncertainty Calibration" (NeurIPS 2019), definition 5.1, where the rows of a bin share one
    probability.
    """
    predicted, happened, weights, member = _in_bins(probability, outcome, weights, bins, True, mask)
    count = weights @ member
    usable = count > 1
    if not bool(usable.any(-1).all()):
        raise ValueError(f"rows: expected at least two in some bin, got {len(probability)} rows in {bins} bins; use fewer bins")
    residual = (happened - predicted).unsqueeze(-1)
    squared_mean = ((weights @ (member * residual)) / count).square()
    variance = (weights @ (member * residual.square())) / count - squared_mean
    terms = (squared_mean - variance / (count - 1)).where(usable, 0.0)
    return (count.where(usable, 0.0) * terms).sum(-1) / count.where(usable, 0.0).sum(-1)


@numpy_or_torch
def brier(probability: Tensor, outcome: Tensor) -> Tensor:
    """(probability - outcome)^2 per row; its average is the Brier score (Brier 1950).  (...,), (...,) -> (...,)"""
    if probability.shape != outcome.shape:
        raise ValueError(f"one outcome per probability: {tuple(probability.shape)} and {tuple(outcome.shape)}")
    for name, values in (("probability", probability), ("outcome", outcome)):
        # A sum of probabilities may be a rounding above 1.
        if bool((outside := (values < 0) | (values > 1.001)).any()):
            raise ValueError(f"{name}: expected numbers in [0, 1], or NaN for a row without, got {float(values[outside][0]):g}")
    return (probability.double() - outcome.double()).square()
