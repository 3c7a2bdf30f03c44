"""Small networks on fixed inputs: S problems of one size trained at once, along a leading dimension.

Every loss of the package takes any leading dimensions, so 20 splits of a data set cost little more than one.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.harness.training import Diverged

__all__ = ["Head", "at", "fit"]


class Head(nn.Module):
    """Standardised inputs, one hidden layer (none: linear), one network per problem.  (S, N, D) -> (S, N, outputs)"""

    def __init__(self, x: Tensor, outputs: int, *, hidden: int, seed: int) -> None:
        super().__init__()
        self.mean = x.mean(dim=1, keepdim=True)
        self.deviation = x.std(dim=1, keepdim=True).clamp(min=1e-3)
        generator = torch.Generator().manual_seed(seed)
        widths = [x.shape[-1], *([hidden] if hidden else []), outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outs in pairwise(widths):
            bound = 1 / math.sqrt(inputs)
            for parameters, shape in ((self.weights, (len(x), inputs, outs)), (self.biases, (len(x), 1, outs))):
                start = torch.empty(shape).uniform_(-bound, bound, generator=generator)
                parameters.append(nn.Parameter(start.to(x.device, x.dtype)))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.deviation
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, torch.relu(x) if number else x, weight)
        return x


def at(table: Tensor, rows: Tensor) -> Tensor:
    """The chosen rows of every problem.  (S, N, ...), (S, B) -> (S, B, ...)"""
    return table[torch.arange(len(table), device=table.device).unsqueeze(-1), rows]


def fit(
    heads: Sequence[nn.Module],
    batch_loss: Callable[[Tensor], Tensor],
    problems: int,
    rows: int,
    *,
    only: Tensor | None = None,
    steps: int,
    seed: int,
    batch: int = 256,
    learning_rate: float = 3e-3,
    weight_decay: float | Sequence[float] = 0.0,
) -> None:
    """Minimise the mean of `batch_loss` ((S, B) row numbers -> (S, B)) of each problem by AdamW with a cosine schedule.

    With `batch` at least `rows` every step sees all rows.  `only` (S, M) names the rows of each problem that are drawn from.
    `weight_decay` may be one number for each head.
    """
    decays = [weight_decay] * len(heads) if isinstance(weight_decay, float) else weight_decay
    groups = [{"params": list(head.parameters()), "weight_decay": decay} for head, decay in zip(heads, decays, strict=True)]
    device = next(heads[0].parameters()).device
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    every = torch.arange(rows, device=device).expand(problems, rows) if only is None else only.to(device)
    count = every.shape[1]
    for step in range(steps):
        chosen = every
        if batch < count:
            chosen = every.gather(1, torch.randint(count, (problems, batch), generator=generator).to(device))
        # The sum over problems: each gets the gradient of its own mean.
        loss = batch_loss(chosen).mean(dim=-1).sum()
        optimizer.zero_grad()
        loss.backward()
        size = torch.nn.utils.get_total_norm([p.grad for group in groups for p in group["params"] if p.grad is not None])
        if not bool(torch.isfinite(loss.detach() + size)):
            raise Diverged(
                f"a head, step {step + 1} of {steps}: the loss is {float(loss.detach()):g}, the size of its gradient "
                f"{float(size):g}; lower the learning rate"
            )
        optimizer.step()
        schedule.step()
    for head in heads:
        head.requires_grad_(False)
