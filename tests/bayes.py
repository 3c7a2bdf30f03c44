"""Minimise a surrogate's conditional risk over free scores, and compare the decision with the cheapest action."""

from collections.abc import Callable

import torch
from torch import Tensor


def minimiser(risk: Callable[[Tensor], Tensor], problems: int, width: int, *, starts: int = 12, steps: int = 1200) -> Tensor:
    """Scores (problems, width) of lowest risk among several starts.  risk: (starts, problems, width) -> (starts, problems)

    Adam with a falling step: many members of the family are neither convex nor smooth.
    """
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(starts, problems, width, generator=generator, dtype=torch.float64)
    scores[0] = 0
    scores.requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-5)
    for _ in range(steps):
        optimizer.zero_grad()
        risk(scores).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        best = risk(scores).argmin(dim=0)
    return scores.detach()[best, torch.arange(problems)]


def wrong_decisions(actions: Tensor, expected_costs: Tensor, *, margin: float = 0.02) -> tuple[int, int]:
    """(wrong, judged): among the problems whose cheapest action is cheaper by `margin`, those decided otherwise."""
    cheapest = expected_costs.sort(dim=-1)
    clear = cheapest.values[:, 1] - cheapest.values[:, 0] > margin
    return int((actions != cheapest.indices[:, 0])[clear].sum()), int(clear.sum())
