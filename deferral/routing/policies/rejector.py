"""The rejector trained by the two-stage deferral loss: it decides at any trade-off and prices, and says what it expects."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from deferral.routing.policies.networks import DROPOUT, above_mean, layers, trained, two_layers
from deferral.routing.policies.policy import Folded
from deferral.routing.prices import error_range
from deferral.routing.vectors import Arrays, Vectors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Rejector", "priced_loss"]

_TINY = 1e-6


class Rejector:
    """sum_e (ceiling - cost_e) l(scores, e) is least, where cost_e = 1 - quality_e + price_e / price_of_error.

    The loss is least where softmax(scores) is in proportion to ceiling - cost, so the scores are written as
    log(sigmoid(network(query)_e) + (largest price - price_e) / price_of_error), and the network as if it stood for a quality:
    prices and the price of an error are inputs whose effect need not be learned.  The price of an error is drawn anew for every
    row of every batch, log-uniformly from the smallest to the largest at which a decision can change, so that one network serves
    all of them.  Mao, Mohri, Mohri, Zhong, "Two-Stage Learning to Defer with Multiple Experts" (2023).
    """

    kind = "rejector"

    def __init__(self, *, hidden: int = 64) -> None:
        self.hidden = hidden
        self.arrays: Arrays = {}
        self._layers = Folded(layers)

    def fit(
        self,
        vectors: Vectors,
        quality: np.ndarray,
        weights: np.ndarray,
        means: np.ndarray,
        *,
        price: np.ndarray | None = None,
        seed: int = 0,
    ) -> "Rejector":
        """Learn from N queries.  Vectors, (N, E), (N, E), (E,), price (N, E) in dollars -> self

        A cell of weight 0 is not known.  Doubly robust qualities outside [0, 1] are cut off: a negative weight would make the
        loss unbounded.
        """
        import torch
        from torch import Tensor, nn

        if price is None:
            raise ValueError("price: a rejector learns decisions, which depend on prices; expected an array of shape (N, E)")
        x = torch.from_numpy(vectors.joined)
        start = torch.logit(torch.from_numpy(means).float(), eps=1e-3)
        wrong = torch.from_numpy(1 - np.clip(quality, 0, 1)).float()
        dollars, known = torch.from_numpy(np.asarray(price)).float(), torch.from_numpy(weights > 0)
        importance = torch.from_numpy(weights.sum(1) / np.maximum((weights > 0).sum(1), 1)).float()
        at_any_price = priced_loss(error_range(price), seed=seed)

        def loss(outputs: Tensor, rows: Tensor) -> Tensor:
            return importance[rows] * at_any_price(outputs + start, wrong[rows], dollars[rows], known[rows])

        def network() -> nn.Sequential:
            if self.hidden == 0:
                return nn.Sequential(nn.Dropout(DROPOUT[0]), nn.Linear(x.shape[1], len(means)))
            return two_layers(x.shape[1], self.hidden, len(means), dropout=DROPOUT)

        self.arrays = {**trained(network, x, loss, start=start, seed=seed), "means": means}
        return self

    def deviations(self, vectors: Vectors) -> np.ndarray:
        """Expected quality above the expert's mean, as the decisions imply it.  -> (N, E)"""
        return above_mean(self._layers(self.arrays, vectors), vectors)

    def scores(self, vectors: Vectors, price: np.ndarray, price_of_error: float) -> np.ndarray:
        """Higher is preferred, at these prices and this price of an error in dollars.  (N, E), number -> (N, E)"""
        relative = np.asarray(price) / price_of_error
        quality = self.arrays["means"] + self.deviations(vectors)
        return np.log(quality + relative.max(1, keepdims=True) - relative + _TINY)


def priced_loss(errors: tuple[float, float], *, seed: int) -> "Callable[..., Tensor]":
    """The two-stage deferral loss of B rows, the price of an error drawn anew for each, log-uniformly between these two.

    f(log_odds (B, E) of a right answer, wrong (B, E), price (B, E) in dollars, mask (B, E) = None) -> (B,)
    sum_e (ceiling - cost_e) l(scores, e) / (1 + largest price / price_of_error), the scores as `Rejector` says.
    """
    import torch

    from deferral.losses import two_stage_deferral

    low, high = np.log(errors)
    generator = torch.Generator().manual_seed(seed)

    def loss(log_odds: "Tensor", wrong: "Tensor", price: "Tensor", mask: "Tensor | None" = None) -> "Tensor":
        drawn = torch.exp(low + (high - low) * torch.rand(len(price), 1, generator=generator))
        relative = price / drawn
        largest = relative.amax(-1, keepdim=True)
        scores = torch.log(torch.sigmoid(log_odds) + largest - relative + _TINY)
        each = two_stage_deferral(scores, wrong + relative, ceiling=1 + largest, mask=mask)
        # A row whose prices exceed an error by far would drown the others.
        return each / (1 + largest.squeeze(-1))

    return loss
