"""The small networks of the router: how they are trained, by AdamW with one cycle, and what their outputs mean."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deferral.routing.vectors import Arrays, Vectors

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["DROPOUT", "Layers", "above_mean", "layers", "trained", "two_layers"]

DROPOUT = 0.25, 0.5  # of the inputs and of the hidden layer
_ROWS_SEEN = 600_000
_BATCH, _LARGEST_BATCH = 512, 1024
_FEWEST_STEPS = 150
_RATE = 6e-3


def two_layers(
    inputs: int, hidden: int, outputs: int, *, dropout: tuple[float, float], rectified: bool = True
) -> "nn.Sequential":
    """Dropout, linear, ReLU (or nothing), dropout, linear."""
    from torch import nn

    between = nn.ReLU() if rectified else nn.Identity()
    first, second = dropout
    return nn.Sequential(nn.Dropout(first), nn.Linear(inputs, hidden), between, nn.Dropout(second), nn.Linear(hidden, outputs))


def trained(
    network: "Callable[[], nn.Sequential]",
    x: "Tensor",
    loss: "Callable[[Tensor, Tensor], Tensor]",
    *,
    start: "Tensor",
    seed: int,
    fewest_steps: int = _FEWEST_STEPS,
) -> Arrays:
    """The weights of a network after AdamW with one cycle; matrices are transposed, ready for x @ weight.

    `loss(outputs, rows)` is one number per row of the batch.  `start`, which the loss adds to the outputs, is part of the last
    bias that is returned.  Passes over the rows: as many as make 600,000 rows, 2 to 20, and at least `fewest_steps` batches.
    Batches of 512 rows, of up to 1,024 where there are more than 65,536 rows.
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
        batches = -(-len(x) // size)
        epochs = max(min(20, max(2, _ROWS_SEEN // len(x))), -(-fewest_steps // batches))
        rate = _RATE * (size / _BATCH) ** 0.5
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches + 1)
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator).split(size):
                optimizer.zero_grad()
                loss(model(x[rows]), rows).mean().backward()
                optimizer.step()
                schedule.step()
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    arrays = {name: np.array(value.T, order="C") for name, value in weights.items()}
    *_, bias = arrays
    arrays[bias] = arrays[bias] + start.numpy()
    return arrays


class Layers(NamedTuple):
    """A trained network as it is asked.  (1 + exp(-x))^-1 = (1 + tanh(x / 2)) / 2, which needs fewer steps over small arrays."""

    first: np.ndarray  # (D + C + 1, H), the bias in its last row
    last: np.ndarray | None  # (H, E), half of it; None where there is one layer alone
    bias: np.ndarray  # (E,), half of it
    rest: np.ndarray  # (E,)


def layers(arrays: Arrays, vectors: Vectors) -> Layers:
    """Of the arrays that `trained` returned and the experts' "means": trained on `Vectors.joined`, asked with `Vectors.whole`."""
    first = np.concatenate([vectors.sizes[:, None] * arrays["1.weight"], arrays["1.bias"][None]])
    half = np.float32(0.5)
    rest = half - arrays["means"]
    if "4.weight" in arrays:
        return Layers(first, half * arrays["4.weight"], half * arrays["4.bias"], rest)
    return Layers(half * first, None, np.zeros_like(rest), rest)


def above_mean(network: Layers, vectors: Vectors, *, rectified: bool = True) -> np.ndarray:
    """P(right) of every expert by the network, above its mean.  -> (N, E)"""
    found = vectors.whole @ network.first
    if network.last is not None:
        found = (np.maximum(found, 0, out=found) if rectified else found) @ network.last
        found += network.bias
    np.tanh(found, out=found)
    found *= np.float32(0.5)
    found += network.rest
    return found
