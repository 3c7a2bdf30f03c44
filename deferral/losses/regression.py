"""Regression that may ask an expert, or abstain: the predictor is one number, its loss L(h, y) is any bounded loss.

Mao, Mohri, Zhong, "Regression with Multi-Expert Deferral" (ICML 2024, arXiv 2403.19494).
"""

import torch
from torch import Tensor

from deferral.losses.comp_sum import comp_sum
from deferral.losses.margin import Margin, logistic
from deferral.numerics import lift
from deferral.validation import (
    action_mask,
    require_batch,
    require_columns,
    require_floating,
    require_number,
    require_rejector,
    require_tensor,
)

__all__ = ["regression_abstention", "regression_deferral"]


def regression_deferral(
    predictor_loss: Tensor, scores: Tensor, expert_costs: Tensor, *, mu: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """(sum_j c_j) l_mu(r, 0) + sum_j (L + sum_{i != j} c_i) l_mu(r, j) - (n_e - 1) L.  (...,), (..., 1+E), (..., E) -> (...,)

    `predictor_loss` is L(h, y), usually (prediction - y).square() on standardised targets, in the units of the costs
    (`squared_costs`); `scores` are r, action 0 keeps the own prediction (`decide`).  Single stage: both learn, and L's gradient
    has the weight sum_j l(r, j) - (n_e - 1) >= 0, so start the predictor with some epochs of its own loss.  Two stages: pass
    `predictor_loss.detach()`, on rows that the predictor did not see.  `mask` (..., E), True = known: a missing answer leaves
    the row, and n_e counts the known ones.

    Bayes-consistent for every mu in [0, 2]: the minimiser keeps iff Var(y|x) is at most every E[c_j|x], and h = E[y|x] there.
    ICML 2024, eq. 3 of the two-stage section, with the single-stage form of section 4.
    """
    require_floating("scores", scores)
    require_floating("predictor_loss", predictor_loss)
    require_floating("expert_costs", expert_costs)
    require_columns("expert_costs", expert_costs)
    if predictor_loss.shape != scores.shape[:-1]:
        raise ValueError(
            f"predictor_loss: expected one number per row of scores {tuple(scores.shape)}, got shape "
            f"{tuple(predictor_loss.shape)}; a loss of torch needs reduction='none', and of a prediction (..., 1) take "
            ".squeeze(-1) before the target is taken from it"
        )
    if expert_costs.shape[-1] != scores.shape[-1] - 1:
        raise ValueError(
            f"scores: expected one more column than experts (action 0 keeps the prediction), got scores {tuple(scores.shape)} "
            f"and expert_costs {tuple(expert_costs.shape)}"
        )
    require_batch("scores", scores.shape[:-1], "expert_costs", expert_costs.shape[:-1])
    predictor_loss, expert_costs = lift(predictor_loss), lift(expert_costs)
    costs = torch.cat([predictor_loss.unsqueeze(-1), expert_costs.expand(*predictor_loss.shape, -1)], dim=-1)
    num_experts: Tensor | int = expert_costs.shape[-1]
    if mask is not None:
        known = action_mask(scores, mask, 1)
        # A missing cost may be NaN.
        costs = costs.where(known, 0.0)
        num_experts = known[..., 1:].sum(dim=-1)
    every = costs.sum(dim=-1, keepdim=True)
    # every - costs, computed in place: nobody needs the costs again.
    weights = costs.neg_().add_(every)
    return comp_sum(scores, weights, mu=mu, mask=None if mask is None else known) - (num_experts - 1) * predictor_loss


def regression_abstention(predictor_loss: Tensor, rejector: Tensor, cost: Tensor | float, *, phi: Margin = logistic) -> Tensor:
    """L Phi(-r) + cost * Phi(r); r > 0 answers.  (...,), (...,), cost -> (...,)

    The case n_e = 1 of `regression_deferral` at constant cost.  Single stage: both learn; two stages: pass
    `predictor_loss.detach()`.  Bayes-consistent (answer iff Var(y|x) < cost) for Phi logistic, exponential, hinge and squared
    hinge.  `cost` is in the units of the loss and may exceed 1.

    ICML 2024.
    """
    require_floating("predictor_loss", predictor_loss)
    require_rejector(rejector, predictor_loss.shape)
    if not isinstance(cost, (int, float, Tensor)) and hasattr(cost, "__len__"):
        require_tensor("cost", cost)
    if isinstance(cost, Tensor):
        require_batch("rejector", rejector.shape, "cost", cost.shape)
    else:
        require_number("cost", cost)
        if not cost >= 0:
            raise ValueError(f"cost: expected a non-negative number in the units of the loss, got {cost}")
    return predictor_loss * phi(-rejector) + cost * phi(rejector)
