"""Judge: per-example figures of actions, and curves over the threshold that do not depend on the order of tied rows.

Every figure here is one number per row, so that its mean, its bootstrap interval and its paired difference with another method
all come from the same values (`deferral.intervals`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deferral.costs import pick

__all__ = ["CostCurve", "correct", "cost_coverage_curve", "deferral_cost", "kept", "load"]


def deferral_cost(costs: Tensor, actions: Tensor) -> Tensor:
    """The cost of the action taken: the deferral loss itself.  (..., A), (...,) -> (...,)"""
    return pick(costs, actions)


def correct(answers: Tensor, targets: Tensor, actions: Tensor) -> Tensor:
    """1 where the answer of whoever was asked is right; its mean is the system accuracy.  (..., A), (...,), (...,) -> (...,)

    `answers` (..., A) has one column per action.
    """
    if targets.shape != actions.shape:
        raise ValueError(f"one target per row: actions {tuple(actions.shape)}, targets {tuple(targets.shape)}")
    return (pick(answers, actions) == targets).to(torch.get_default_dtype())


def kept(actions: Tensor, num_own: int = 1) -> Tensor:
    """1 where an own action is taken; its mean is the coverage.  (...,) -> (...,)"""
    return (actions < num_own).to(torch.get_default_dtype())


def load(actions: Tensor, num_own: int, num_experts: int) -> Tensor:
    """1 in the column of the expert who is asked; the mean is each expert's share of the rows.  (...,) -> (..., E)"""
    experts = torch.arange(num_own, num_own + num_experts, device=actions.device)
    return (actions.unsqueeze(-1) == experts).to(torch.get_default_dtype())


@dataclass(frozen=True)
class CostCurve:
    """Points of a curve over the threshold, by rising coverage: the share of rows kept and the mean cost there."""

    coverage: Tensor
    cost: Tensor


def cost_coverage_curve(margin: Tensor, own_cost: Tensor, deferred_cost: Tensor) -> CostCurve:
    """Mean cost when the rows of smallest deferral margin are kept, at every number of rows kept.  (N,) x 3 -> (N+1,) each

    Rows of equal margin cannot be told apart by a threshold: within such a group the curve is the straight line of picking
    from it at random, so that it does not depend on the order of the rows.  O(N log N).
    """
    if margin.dim() != 1 or margin.shape != own_cost.shape or margin.shape != deferred_cost.shape or len(margin) == 0:
        raise ValueError(
            "margin, own_cost, deferred_cost: expected three non-empty vectors of one length, got "
            f"{tuple(margin.shape)}, {tuple(own_cost.shape)}, {tuple(deferred_cost.shape)}"
        )
    _, group, sizes = torch.unique(margin, return_inverse=True, return_counts=True)
    gain = own_cost.double() - deferred_cost.double()
    group_mean = torch.zeros(len(sizes), dtype=torch.float64, device=margin.device).index_add(0, group, gain) / sizes
    steps = group_mean.repeat_interleave(sizes)
    total = torch.cat([steps.new_zeros(1), steps.cumsum(0)]) + deferred_cost.double().sum()
    rows = len(margin)
    coverage = torch.arange(rows + 1, dtype=torch.float64, device=margin.device) / rows
    return CostCurve(coverage=coverage, cost=total / rows)
