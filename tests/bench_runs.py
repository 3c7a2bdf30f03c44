"""A run of a script, started for tests; images and losses for it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.harness.abstention import Loss as CostLoss
from benchmarks.harness.running import Run, running
from benchmarks.harness.training import Recipe
from deferral.datasets import Images

RECIPE = Recipe(epochs=4, batch=50, learning_rate=0.02)


def synthetic(rows: int = 150) -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images(
        torch.randint(0, 256, (rows, 3, 32, 32), generator=generator, dtype=torch.uint8),
        torch.randint(10, (rows,), generator=generator),
    )


def started(folder: Path, *, device: str = "cpu", budget_minutes: float | None = None) -> AbstractContextManager[Run]:
    return running(
        out=folder,
        seeds=1,
        device=device,
        threads=1,
        root=None,
        budget_minutes=budget_minutes,
        most_cells=None,
        quiet=True,
    )


def partial_cost(loss: CostLoss) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda scores, labels: loss(scores, labels, 0.05)


def cross_entropy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores, labels, reduction="none")
