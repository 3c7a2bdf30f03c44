"""Deferral to E experts.  Single stage: K class scores, then E expert scores.  Two stages: own predictor, then E experts.

Mao, Mohri, Zhong, "Principled Approaches for Learning to Defer with Multiple Experts" (ISAIM 2024, arXiv 2310.14774);
Mao, Mohri, Mohri, Zhong, "Two-Stage Learning to Defer with Multiple Experts" (NeurIPS 2023).
"""

import torch
from torch import Tensor

from deferral.losses.comp_sum import comp_sum, comp_sum_of_costs, targeted_comp_sum
from deferral.losses.entries import one_hot
from deferral.losses.ignored_rows import costs_that_count, counted, without_ignored
from deferral.numerics import lift
from deferral.validation import (
    action_mask,
    require_actions,
    require_ceiling,
    require_experts,
    require_floating,
    require_number,
)

__all__ = ["single_stage_deferral", "two_stage_deferral"]


def single_stage_deferral(
    scores: Tensor,
    targets: Tensor,
    expert_costs: Tensor,
    *,
    mu: float = 1.0,
    ceiling: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """l_mu(s, y) + sum_j (1 - cost_j) l_mu(s, K+j).  (..., K+E), (...,) or (..., K), (..., E) -> (...,)

    Action k < K answers class k, action K + j asks expert j; experts win ties (`decide`).  Bayes-consistent for every mu in
    [0, 2] and costs in [0, ceiling].  Costs above 1 (a price on top of an error) need the ceiling that `error_costs` names:
    all weights are then ceiling - cost, so that every wrong class weighs ceiling - 1, like label smoothing.  `mask` (..., E),
    True = known: an expert whose answer is missing leaves the row.  Rows whose target is `ignore_index` give 0.

    n_e = 1, mu = 1 and cost 1[expert wrong] is Mozannar and Sontag 2020.
    """
    require_floating("expert_costs", expert_costs)
    num_classes = require_experts(scores, targets, "expert_costs", expert_costs)
    if not isinstance(ceiling, Tensor):
        require_number("ceiling", ceiling)
    if isinstance(ceiling, Tensor) or not ceiling >= 1:
        raise ValueError(
            f"ceiling: expected a number of at least 1, the cost of a wrong class, got {ceiling}; the weight ceiling - 1 of the "
            "wrong classes would be negative and the risk unbounded below"
        )
    targets, counts = without_ignored(targets, ignore_index)
    expert_costs = costs_that_count(lift(expert_costs), counts)
    if ceiling == 1.0:
        return counted(targeted_comp_sum(scores, targets, 1 - expert_costs, mu=mu, mask=mask), counts)
    hit = (targets if targets.is_floating_point() else one_hot(targets, num_classes)).to(lift(scores).dtype)
    weights = torch.cat([hit + (ceiling - 1), (ceiling - expert_costs).expand(*hit.shape[:-1], -1)], dim=-1)
    if mask is not None:
        mask = action_mask(scores, mask, num_classes)
    return counted(comp_sum(scores, weights, mu=mu, mask=mask), counts)


def two_stage_deferral(
    scores: Tensor,
    costs: Tensor,
    *,
    mu: float = 1.0,
    ceiling: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """sum_a (ceiling - cost_a) l_mu(s, a): a router among frozen actions.  (..., A), (..., A) -> (...,)

    Action 0 keeps the own predictor, action j asks expert j; the costs are `error_costs(answers, targets)`, on rows the
    predictor was not trained on (on its own rows it is never wrong, and the router learns never to defer).  `ceiling` is the
    largest cost that can occur (1 + the largest price), or the row's sum `costs.sum(-1, keepdim=True)` for the weights of
    regression.  Bayes-consistent for every mu in [0, 2] where no cost exceeds it; mu = 2 is realizable consistent as well but
    slow to start.  `mask` (..., E) or (..., A), True = known: a missing action leaves the row.

    NeurIPS 2023; the weights ceiling - cost are those of Mozannar and Sontag 2020.
    """
    require_floating("scores", scores)
    require_actions(scores, costs)
    require_ceiling(scores, ceiling)
    return comp_sum_of_costs(scores, costs, ceiling, mu=mu, mask=mask if mask is None else action_mask(scores, mask, 1))
