"""A small network with one head per expert: the probability that its answer is right."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from deferral.routing.encoders import Arrays, Vectors

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Factors", "Heads", "trained"]

_ROWS_SEEN = 600_000
_BATCH, _LARGEST_BATCH = 512, 1024
_FEWEST_STEPS = 150


class Heads:
    """P(right) of every expert from a shared hidden layer, by the logistic loss of the known outcomes."""

    kind = "heads"
    _activation = "ReLU"

    def __init__(self, *, hidden: int = 64, dropout: float = 0.5) -> None:
        self.hidden, self.dropout = hidden, dropout
        self.arrays: Arrays = {}

    def fit(self, vectors: Vectors, quality: np.ndarray, weights: np.ndarray, means: np.ndarray, *, seed: int = 0) -> "Heads":
        # Whoever only routes need not hold torch in memory: it is imported where something is trained.
        import torch
        import torch.nn.functional as F
        from torch import Tensor, nn

        x = torch.from_numpy(vectors.joined)
        # Where nothing is known of an input, the answer is the expert's mean.
        start = torch.logit(torch.from_numpy(means).float(), eps=1e-3)
        targets, known = torch.from_numpy(quality).float(), torch.from_numpy(weights).float()

        def loss(logits: Tensor, rows: Tensor) -> Tensor:
            each = F.binary_cross_entropy_with_logits(logits + start, targets[rows], reduction="none")
            return (each * known[rows]).sum(-1)

        def network() -> nn.Sequential:
            return nn.Sequential(
                nn.Dropout(self.dropout / 2), nn.Linear(x.shape[1], self.hidden), getattr(nn, self._activation)(),
                nn.Dropout(self.dropout), nn.Linear(self.hidden, len(means)),
            )  # fmt: skip

        self.arrays = {**trained(network, x, loss, start=start, seed=seed), "means": means}
        return self

    def deviations(self, vectors: Vectors) -> np.ndarray:
        """Expected quality above the expert's mean.  -> (N, E)"""
        arrays = self.arrays
        logits = self._hidden(vectors.joined @ arrays["1.weight"] + arrays["1.bias"]) @ arrays["4.weight"] + arrays["4.bias"]
        return 1 / (1 + np.exp(-logits)) - arrays["means"]

    def _hidden(self, values: np.ndarray) -> np.ndarray:
        return np.maximum(values, 0)


class Factors(Heads):
    """Matrix factorisation: P(right) = sigmoid(u(query) . v_expert + b_expert) with u linear in the query's vector.

    Ong et al., "RouteLLM: Learning to Route LLMs with Preference Data" (2024), section 4.2, here trained on outcomes.
    """

    kind = "factors"
    _activation = "Identity"

    def __init__(self, *, hidden: int = 16, dropout: float = 0.5) -> None:
        super().__init__(hidden=hidden, dropout=dropout)

    def _hidden(self, values: np.ndarray) -> np.ndarray:
        return values


def trained(
    network: "Callable[[], nn.Sequential]",
    x: "Tensor",
    loss: "Callable[[Tensor, Tensor], Tensor]",
    *,
    start: "Tensor",
    seed: int,
    batch: "Callable[[Tensor], Tensor] | None" = None,
    fewest_steps: int = _FEWEST_STEPS,
) -> Arrays:
    """The weights of a network after AdamW with one cycle; matrices are transposed, ready for x @ weight.

    `loss(outputs, rows)` is one number per row of the batch, `batch(rows)` its inputs if they are not x[rows].  `start`, which
    the loss adds to the outputs, is part of the last bias that is returned.
    Passes over the rows: as many as make 600,000 rows, 2 to 20, and at least `fewest_steps` batches.  Batches of 512 rows, of
    up to 1,024 where there are more than 65,536 rows.
    """
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    # Initial weights and dropout draw from the global generator; it is put back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network().train()
        # Without a signal, what is learned is the means.
        for values in model[-1].parameters():
            nn.init.zeros_(values)
        size = min(max(_BATCH, len(x) // 128), _LARGEST_BATCH)
        rate = 6e-3 * (size / _BATCH) ** 0.5
        batches = -(-len(x) // size)
        epochs = max(min(20, max(2, _ROWS_SEEN // len(x))), -(-fewest_steps // batches))
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches + 1)
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator).split(size):
                optimizer.zero_grad()
                loss(model(x[rows] if batch is None else batch(rows)), rows).mean().backward()
                optimizer.step()
                schedule.step()
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    arrays = {name: np.ascontiguousarray(value.T) for name, value in weights.items()}
    *_, bias = arrays
    arrays[bias] = arrays[bias] + start.numpy()
    return arrays
