"""The comp-sum family l_mu, the weighted softmax losses: the one kernel under every surrogate with a softmax.

With p = softmax(s):   mu = 0: 1/p_k - 1 (sum-exponential)     mu = 1: -log p_k (logistic, cross-entropy)
                       1 < mu < 2: (1 - p_k^(mu-1)) / (mu-1) (generalised cross-entropy)     mu = 2: 1 - p_k (MAE)

Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications" (ICML 2023).
"""

import torch
from torch import Tensor

from deferral.numerics import expm1_linear, lift
from deferral.validation import action_mask, require_actions, require_floating

__all__ = ["comp_sum", "comp_sum_at", "comp_sum_losses", "log_probabilities"]


def comp_sum(scores: Tensor, weights: Tensor, *, mu: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """sum_a weights_a * l_mu(scores, a).  (..., A), (..., A) -> (...,)

    Its minimiser puts the highest score on the action of largest expected weight, for every mu in [0, 2] (Bayes-consistent
    where the weights are non-negative).  A masked action leaves the row, softmax included.
    """
    require_floating("scores", scores)
    require_actions(scores, weights, name="weights")
    log_p = log_probabilities(scores, mask)
    # An action at -inf that carries no weight would be 0 * inf.
    absent = log_p.isneginf() & (weights == 0)
    if mask is not None:
        absent = absent | ~action_mask(scores, mask)
    losses = comp_sum_losses(log_p.masked_fill(absent, 0.0), mu)
    return (weights.masked_fill(absent, 0.0) * losses).sum(dim=-1)


def log_probabilities(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """log softmax over the known actions, in float32 or better; -inf where an action is masked.  (..., A) -> (..., A)"""
    scores = lift(scores)
    if mask is not None:
        scores = scores.masked_fill(~action_mask(scores, mask), -torch.inf)
    return scores.log_softmax(dim=-1)


def comp_sum_losses(log_p: Tensor, mu: float) -> Tensor:
    """l_mu as a function of log p_k, elementwise:  -log p  for mu = 1, else  (1 - p^(mu-1)) / (mu-1).

    For mu < 1 it continues linearly past the knee of `deferral.numerics`.  Its slope, -p^(mu-1), is at most 1 in size for
    mu >= 1 and small where p is: with 100 classes mu = 2 starts a hundred times slower than mu = 1.
    """
    if not 0.0 <= mu <= 2.0:
        raise ValueError(f"mu: expected a number in [0, 2] (0 sum-exponential, 1 logistic, 2 MAE), got {mu}")
    if mu == 1.0:
        return -log_p
    exponent = (mu - 1) * log_p
    # For mu > 1 the exponent is never positive, so the tangent would be dead code.
    return -torch.expm1(exponent) / (mu - 1) if mu > 1 else expm1_linear(exponent) / (1 - mu)


def comp_sum_at(log_p: Tensor, targets: Tensor, mu: float) -> Tensor:
    """l_mu at the target, or its expectation under probabilities.  (..., K), (...,) or (..., K) -> (...,)

    `log_p` holds the class columns only, so that a label K is an index error and never reads an expert's column.
    """
    if targets.is_floating_point():
        return torch.where(targets == 0, 0.0, targets * comp_sum_losses(log_p, mu)).sum(dim=-1)
    return comp_sum_losses(log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), mu)
