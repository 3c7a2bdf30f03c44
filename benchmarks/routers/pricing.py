"""The curve of a method over all prices of an error, and the figures of it where experts have prices."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.routers.data import Data
from deferral.intervals import interval
from deferral.routing.evaluation import PriceQualityCurve, aiq, hull, saving, trade_offs
from deferral.routing.judging import SHARES

__all__ = ["MIX", "RESAMPLES", "figure", "priced_figures", "settings"]

MIX = "static mix of the training folds"
RESAMPLES = 500


def figure(name: str, estimate: float, resampled: Tensor) -> dict[str, Any]:
    """A figure and its 95% interval, as results have them."""
    found = interval(estimate, resampled)
    return {name: found.estimate, f"{name}_interval": [found.low, found.high]}


def settings(price: np.ndarray) -> np.ndarray:
    """Prices of an error from which the curves are drawn, the first of them finite.  (N, E) -> (S,)"""
    errors = trade_offs(price)
    errors[0] = 1e6 * errors[1]
    return errors


def priced_figures(one: PriceQualityCurve, data: Data, best: int) -> Callable[[Tensor], Tensor]:
    """AIQ and the savings of a curve, as a function of the rows' weights.  (B, N) -> (B, 1 + shares)"""

    def of_weights(weights: Tensor) -> Tensor:
        total = weights.sum(-1, keepdim=True)
        prices, qualities = (weights @ data.price / total).numpy(), (weights @ data.quality / total).numpy()
        found = []
        for points, price, quality in zip(one.points(weights.numpy()), prices, qualities, strict=True):
            corners = hull(points)
            savings = [saving(corners, quality[best], price[best], share) for share in SHARES]
            found.append([aiq(corners, price.min(), price.max()), *savings])
        return torch.tensor(found, dtype=torch.float64)

    return of_weights
