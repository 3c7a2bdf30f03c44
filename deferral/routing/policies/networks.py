"""The small networks of the router: how they are trained, by AdamW with one cycle, and what their outputs mean."""

from collections.abc import Callable, Iterator
from math import cos, pi
from typing import TYPE_CHECKING

import numpy as np

from deferral.routing.encoders import Arrays

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["chances", "trained"]

_ROWS_SEEN = 600_000
_BATCH, _LARGEST_BATCH = 512, 1024
_FEWEST_STEPS = 150
_RATE, _DECAY = 6e-3, 1e-2
_SECOND, _TINY = 0.999, 1e-8


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
        step = _AdamW(model)
        cycle = _one_cycle(_RATE * (size / _BATCH) ** 0.5, epochs * batches)
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator).split(size):
                loss(model(x[rows]), rows).mean().backward()
                step(*next(cycle))
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    arrays = {name: np.array(value.T, order="C") for name, value in weights.items()}
    *_, bias = arrays
    arrays[bias] = arrays[bias] + start.numpy()
    return arrays


def chances(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logits)), in their place."""
    found = np.exp(np.negative(logits, out=logits), out=logits)
    found += 1
    return np.divide(1, found, out=found)


class _AdamW:
    """Adam with decoupled weight decay, on all the parameters as one vector.  Loshchilov and Hutter (2019), algorithm 2.

    torch.optim imports torch's compiler, which takes longer than the training itself.
    """

    def __init__(self, model: "nn.Module") -> None:
        import torch

        parameters = list(model.parameters())
        self.values = torch.cat([values.detach().ravel() for values in parameters])
        self.gradient, self.mean, self.square = (torch.zeros_like(self.values) for _ in range(3))
        self.steps = 0
        sizes = [values.numel() for values in parameters]
        for values, own, slope in zip(parameters, self.values.split(sizes), self.gradient.split(sizes), strict=True):
            values.data, values.grad = own.view_as(values), slope.view_as(values)

    def __call__(self, rate: float, momentum: float) -> None:
        """One step down the gradient, which is 0 from then on."""
        self.steps += 1
        self.mean.lerp_(self.gradient, 1 - momentum)
        self.square.mul_(_SECOND).addcmul_(self.gradient, self.gradient, value=1 - _SECOND)
        length = (self.square / (1 - _SECOND**self.steps)).sqrt_().add_(_TINY)
        self.values.mul_(1 - rate * _DECAY).addcdiv_(self.mean, length, value=-rate / (1 - momentum**self.steps))
        self.gradient.zero_()


def _one_cycle(highest: float, steps: int) -> Iterator[tuple[float, float]]:
    """Learning rate and momentum of every step: the rate rises for three tenths of them and falls, the momentum the other way.

    Smith and Topin, "Super-Convergence" (2019).
    """
    turn = 0.3 * (steps + 1) - 1
    for step in range(steps):
        low, done = (highest / 25, 1 - step / turn) if step <= turn else (highest / 25e4, (step - turn) / (steps - turn))
        share = (1 + cos(pi * done)) / 2
        yield low + share * (highest - low), 0.95 - share * 0.1
