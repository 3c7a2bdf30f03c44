"""The comp-sum family l_mu, the weighted softmax losses: the one kernel under every surrogate with a softmax.

With p = softmax(s):   mu = 0: 1/p_k - 1 (sum-exponential)     mu = 1: -log p_k (logistic, cross-entropy)
                       1 < mu < 2: (1 - p_k^(mu-1)) / (mu-1) (generalised cross-entropy)     mu = 2: 1 - p_k (MAE)

Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications" (ICML 2023).
"""

from functools import partial

import torch
from torch import Tensor

from deferral.losses.closed_form import closed_form, has_closed_form
from deferral.losses.comp_sum_blocks import comp_sum_block, comp_sum_losses
from deferral.losses.comp_sum_compiled import compiled_block, recomputed_comp_sum
from deferral.losses.entries import entry
from deferral.losses.probabilities import ABSENT
from deferral.numerics import cast_like, lift
from deferral.validation import action_mask, require_actions, require_floating, require_number

__all__ = [
    "comp_sum",
    "comp_sum_of_costs",
    "targeted_comp_sum",
]


def comp_sum(scores: Tensor, weights: Tensor, *, mu: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """sum_a weights_a * l_mu(scores, a).  (..., A), (..., A) -> (...,)

    Its minimiser puts the highest score on the action of largest expected weight, for every mu in [0, 2] (Bayes-consistent
    where the weights are non-negative).  A masked action leaves the row, softmax included.  In eager mode the gradient is a
    closed form, and gradients of gradients are an error; under `torch.func` they exist.

    Mao, Mohri, Zhong (ICML 2023).
    """
    require_floating("scores", scores)
    require_actions(scores, weights, name="weights")
    return _kernel(scores, weights, None, mu, mask)


def comp_sum_of_costs(
    scores: Tensor, costs: Tensor, ceiling: float | Tensor, *, mu: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """sum_a (ceiling - costs_a) * l_mu(scores, a), without a table of weights.  (..., A), (..., A), (..., 1) -> (...,)"""
    return _kernel(scores, costs, None, mu, mask, ceiling)


def targeted_comp_sum(scores: Tensor, targets: Tensor, weights: Tensor, *, mu: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """l_mu(scores, target) + sum_j weights_j * l_mu(scores, K+j).  (..., K+W), (...,) or (..., K), (..., W) -> (...,)

    The target is looked up among the first K columns only: a label K is an index error and never reads the column of an
    expert.  Targets that are probabilities give the expectation.
    """
    if mask is not None:
        mask = action_mask(scores, mask, scores.shape[-1] - weights.shape[-1])
    if targets.is_floating_point():
        batch = scores.shape[:-1]
        every = torch.cat([targets, weights.expand(*batch, weights.shape[-1])], dim=-1)
        return _kernel(scores, every, None, mu, mask)
    return _kernel(scores, weights, targets, mu, mask)


def _kernel(
    scores: Tensor,
    weights: Tensor,
    targets: Tensor | None,
    mu: float,
    mask: Tensor | None,
    ceiling: float | Tensor | None = None,
) -> Tensor:
    """The weights belong to the last columns, the target to those before; with a ceiling, costs stand for their weights."""
    require_number("mu", mu)
    if not 0.0 <= mu <= 2.0:
        raise ValueError(f"mu: expected a number in [0, 2] (0 sum-exponential, 1 logistic, 2 MAE), got {mu}")
    scores, weights = lift(scores), lift(weights)
    # Close to the logistic, 1 - p^(mu-1) is a difference of sums that cancel; the formula takes it by expm1.
    direct = has_closed_form(weights, ceiling, compiled=True) and (mu == 1 or abs(mu - 1) >= 0.05)
    if ceiling is not None and (mask is not None or not direct):
        weights, ceiling = ceiling - weights, None
    if mask is not None:
        known = action_mask(scores, mask, 0)
        # Finite, so that a row of which nothing is known gives 0.
        scores = scores.masked_fill(~known, ABSENT)
        weights = weights.where(known[..., known.shape[-1] - weights.shape[-1] :], 0.0)
    batch, columns = scores.shape[:-1], weights.shape[-1]
    weights = weights.to(scores.dtype).expand(*batch, columns)
    if targets is not None:
        targets = targets.unsqueeze(-1)
    if not direct:
        return _formula(scores, weights, targets, mu)
    if ceiling is not None:
        ceiling = cast_like(ceiling, scores).expand(*batch, 1)
    compiled = torch.compiler.is_compiling()
    if compiled and scores.device.type != "cpu":
        return recomputed_comp_sum(scores, weights, targets, ceiling, mu)
    # Past the knee there is a tangent to take as well; the softmax of a CPU leaves mu = 2 a table to write over.
    in_place = mu == 1 or (mu == 2 and scores.device.type == "cpu")
    temporary = columns * (1 + (ceiling is not None and not in_place) + 2 * (mu < 1))
    block = partial(compiled_block if compiled else comp_sum_block, mu=mu)
    return closed_form(block, scores, weights, targets, ceiling, columns=temporary)


def _formula(scores: Tensor, weights: Tensor, targets: Tensor | None, mu: float) -> Tensor:
    log_p = scores.log_softmax(dim=-1).clamp(min=ABSENT)
    own = scores.shape[-1] - weights.shape[-1]
    losses = (weights * comp_sum_losses(log_p[..., own:], mu)).sum(dim=-1)
    if targets is None:
        return losses
    return losses + comp_sum_losses(entry(log_p[..., :own], targets).squeeze(-1), mu)
