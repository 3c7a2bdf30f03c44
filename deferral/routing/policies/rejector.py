"""The rejector trained by the two-stage deferral loss: it takes the trade-off and the prices as inputs."""

import numpy as np

from deferral.routing.encoders import Arrays, Vectors
from deferral.routing.policies.heads import inputs, trained

__all__ = ["Rejector"]


class Rejector:
    """sum_e (ceiling - cost_e) l(scores, e) is least, where cost_e = 1 - quality_e + price_e / price_of_error.

    The price of an error is drawn anew for every row of every batch, log-uniformly from the smallest to the largest at which a
    decision can change, so that one network serves all of them.  The ceiling is the row's largest cost that can occur.
    Mao, Mohri, Mohri, Zhong, "Two-Stage Learning to Defer with Multiple Experts" (2023).
    """

    kind = "rejector"

    def __init__(self, *, hidden: int = 64, dropout: float = 0.3) -> None:
        self.hidden, self.dropout = hidden, dropout
        self.arrays: Arrays = {}

    def fit(
        self, vectors: Vectors, quality: np.ndarray, weights: np.ndarray, price: np.ndarray, errors: np.ndarray, *, seed: int = 0
    ) -> "Rejector":
        """Learn from N queries, for prices of an error between the ends of `errors`.  (N, E), (N, E), (N, E), (2,) -> self"""
        import torch
        from torch import Tensor, nn

        from deferral.losses import two_stage_deferral

        x = torch.from_numpy(inputs(vectors))
        wrong = torch.from_numpy(1 - quality).float()
        dollars, known = torch.from_numpy(price).float(), torch.from_numpy(weights > 0)
        importance = torch.from_numpy(weights.sum(1) / np.maximum((weights > 0).sum(1), 1)).float()
        low, high = np.log(errors)
        generator = torch.Generator().manual_seed(seed)
        size, experts = x.shape[1], quality.shape[1]
        drawn = {"errors": torch.empty(0)}

        def widened(rows: Tensor) -> Tensor:
            errors = torch.exp(low + (high - low) * torch.rand(len(rows), 1, generator=generator))
            drawn["errors"] = errors
            setting = _setting(dollars[rows].numpy(), errors.numpy())
            return torch.cat([x[rows], torch.from_numpy(setting)], dim=-1)

        def loss(scores: Tensor, rows: Tensor) -> Tensor:
            costs = wrong[rows] + dollars[rows] / drawn["errors"]
            ceiling = 1 + (dollars[rows] / drawn["errors"]).amax(-1, keepdim=True)
            # A row whose prices exceed an error by far would drown the others.
            each = two_stage_deferral(scores, costs, ceiling=ceiling, mask=known[rows])
            return importance[rows] * each / ceiling.squeeze(-1)

        def network() -> nn.Sequential:
            wide = size + experts + 1
            if self.hidden == 0:
                return nn.Sequential(nn.Dropout(self.dropout / 2), nn.Linear(wide, experts))
            return nn.Sequential(
                nn.Dropout(self.dropout / 2), nn.Linear(wide, self.hidden), nn.ReLU(),
                nn.Dropout(self.dropout), nn.Linear(self.hidden, experts),
            )  # fmt: skip

        self.arrays = trained(network, x, loss, seed=seed, batch=widened)
        return self

    def scores(self, vectors: Vectors, price: np.ndarray, price_of_error: float) -> np.ndarray:
        """Higher is preferred.  -> (N, E)"""
        setting = _setting(np.asarray(price, np.float32), np.full((len(vectors), 1), price_of_error, np.float32))
        values = np.concatenate([inputs(vectors), setting], axis=1) @ self.arrays["1.weight"] + self.arrays["1.bias"]
        if "4.weight" not in self.arrays:
            return values
        return np.maximum(values, 0) @ self.arrays["4.weight"] + self.arrays["4.bias"]


def _setting(price: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """What the trade-off looks like: prices in units of one error, and their size in decades.  (N, E), (N, 1) -> (N, E + 1)"""
    relative = price / errors
    return np.concatenate([relative.clip(max=2.0), np.log10(relative.mean(-1, keepdims=True) + np.float32(1e-4))], axis=-1)
