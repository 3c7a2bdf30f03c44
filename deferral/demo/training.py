"""Plain training for the demos: a small network, a loop over shuffled rows, nothing that a loss could depend on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Standardise", "fit", "mlp"]

_HIDDEN = 64


class Standardise(nn.Module):
    """(x - mean) / deviation, with the statistics of the rows it is made from."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", rows.mean(dim=0))
        self.register_buffer("deviation", rows.std(dim=0).clamp(min=0.1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


def mlp(rows: Tensor, outputs: int) -> nn.Sequential:
    """Standardised inputs, one hidden layer, `outputs` scores."""
    network = nn.Sequential(Standardise(rows), nn.Linear(rows.shape[-1], _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, outputs))
    return network.to(rows.device)


def fit(
    model: nn.Module,
    batch_loss: Callable[[Tensor], Tensor],
    num_rows: int,
    *,
    steps: int,
    seed: int,
    batch_size: int = 100,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Minimise the mean of `batch_loss(rows)`, one value per row index, by AdamW with a cosine schedule."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    batches: list[Tensor] = []
    for _ in range(steps):
        if not batches:
            batches = list(torch.randperm(num_rows, generator=generator).to(device).split(batch_size))
        loss = batch_loss(batches.pop()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
