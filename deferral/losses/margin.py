"""Margin functions Phi, and the surrogates built from them over a row of scores: sum, constrained and max.

Every Phi is non-increasing, and Phi(t) / Phi(0) bounds 1[t <= 0] from above.  Everything is in nats: the logistic Phi is
log(1 + e^-t), so that it meets cross-entropy; the papers divide it by log 2.

Awasthi, Mao, Mohri, Zhong, "Multi-Class H-Consistency Bounds" (NeurIPS 2022).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from deferral.losses.closed_form import in_blocks
from deferral.losses.comp_sum import comp_sum
from deferral.losses.entries import two_highest
from deferral.numerics import KNEE, exp_linear, lift
from deferral.validation import action_mask, require_actions, require_floating

__all__ = [
    "Margin",
    "constrained_losses",
    "constrained_margin",
    "exponential",
    "hinge",
    "is_fixed",
    "logistic",
    "max_losses",
    "max_margin",
    "rho_hinge",
    "rho_margin",
    "sigmoid",
    "squared_hinge",
    "sum_losses",
    "sum_margin",
]

# The functions below are computed block after block of rows.  A function of your own may hold parameters: for them autograd
# keeps the tables of all rows.
Margin = Callable[[Tensor], Tensor]


def exponential(t: Tensor) -> Tensor:
    """e^-t, continued linearly for t < -10."""
    return exp_linear(-lift(t))


def logistic(t: Tensor) -> Tensor:
    """log(1 + e^-t), in nats."""
    return F.softplus(-lift(t))


def hinge(t: Tensor) -> Tensor:
    """max(0, 1 - t)."""
    return torch.relu(1 - lift(t))


def squared_hinge(t: Tensor) -> Tensor:
    """max(0, 1 - t)^2, continued linearly for t < -9, so that its slope fits half precision."""
    violation = torch.relu(1 - lift(t))
    return violation.clamp(max=KNEE).square() + 2 * KNEE * torch.relu(violation - KNEE)


def rho_margin(t: Tensor, *, rho: float = 1.0) -> Tensor:
    """min(max(0, 1 - t / rho), 1), rho > 0."""
    _require_rho(rho)
    return (1 - lift(t) / rho).clamp(0.0, 1.0)


def rho_hinge(t: Tensor, *, rho: float = 1.0) -> Tensor:
    """max(0, 1 - t / rho), rho > 0."""
    _require_rho(rho)
    return torch.relu(1 - lift(t) / rho)


def sigmoid(t: Tensor) -> Tensor:
    """2 / (1 + e^t)."""
    return 2 * torch.sigmoid(-lift(t))


_FIXED = (exponential, logistic, hinge, squared_hinge, rho_margin, rho_hinge, sigmoid)


def is_fixed(phi: Margin) -> bool:
    """Whether it is one of these functions, with numbers for its settings, so that nothing but the scores has a gradient."""
    if isinstance(phi, partial):
        return phi.func in _FIXED and not any(isinstance(value, Tensor) for value in (*phi.args, *phi.keywords.values()))
    return phi in _FIXED


def sum_losses(scores: Tensor, *, phi: Margin, mask: Tensor | None = None) -> Tensor:
    """l(s, k) = sum_{i != k} Phi(s_k - s_i), for every k.  (..., A) -> (..., A), through a table (..., A, A)

    Masked actions leave the sums; their own column is 0.
    """
    scores = lift(scores)
    others = ~torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    if mask is not None:
        mask = action_mask(scores, mask, 0)
        others = others & mask.unsqueeze(-1) & mask.unsqueeze(-2)
    differences = scores.unsqueeze(-1) - scores.unsqueeze(-2)
    # Left-out pairs become Phi(0) before Phi, not after it: a masked score may be anything, infinities included.
    return phi(differences.where(others, 0.0)).where(others, 0.0).sum(dim=-1)


def constrained_losses(scores: Tensor, *, phi: Margin, mask: Tensor | None = None) -> Tensor:
    """l(s, k) = sum_{i != k} Phi(-s_i) for scores centred to sum_i s_i = 0 within the loss.  (..., A) -> (..., A)"""
    scores = lift(scores)
    if mask is None:
        parts = phi(scores.mean(dim=-1, keepdim=True) - scores)
    else:
        mask = action_mask(scores, mask, 0)
        known = scores.where(mask, 0.0)
        centre = known.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp(min=1)
        parts = phi((centre - known).where(mask, 0.0)).where(mask, 0.0)
    losses = parts.sum(dim=-1, keepdim=True) - parts
    return losses if mask is None else losses.where(mask, 0.0)


def max_losses(scores: Tensor, *, phi: Margin, mask: Tensor | None = None) -> Tensor:
    """l(s, k) = Phi(s_k - max_{i != k} s_i), for every k.  (..., A) -> (..., A), at least two actions known in each row"""
    if scores.shape[-1] < 2:
        raise ValueError(f"scores: expected at least two actions, each one's rival is the best other, got {tuple(scores.shape)}")
    scores = lift(scores)
    known = scores if mask is None else scores.masked_fill(~action_mask(scores, mask, 0), -torch.inf)
    best, second, is_best = two_highest(known)
    rival = second.where(is_best, best)
    margins = scores - rival
    if mask is None:
        return phi(margins)
    mask = action_mask(scores, mask, 0) & ~rival.isneginf()
    return phi(margins.where(mask, 0.0)).where(mask, 0.0)


def sum_margin(scores: Tensor, weights: Tensor, *, phi: Margin = exponential, mask: Tensor | None = None) -> Tensor:
    """sum_k weights_k * sum_{i != k} Phi(s_k - s_i).  (..., A), (..., A) -> (...,)

    Bayes-consistent for Phi exponential, logistic, squared hinge and rho-margin; not for the hinge.  Visits A^2 pairs, some rows
    at a time; with the exponential it is `comp_sum` at mu = 0, which visits A.  Awasthi et al. 2022.
    """
    if phi is exponential:
        # Separable: one row of the softmax instead of a table of pairs, continued linearly as a whole.
        return comp_sum(scores, weights, mu=0.0, mask=mask)
    return _weighted(sum_losses, scores, weights, phi, mask)


def constrained_margin(scores: Tensor, weights: Tensor, *, phi: Margin = exponential, mask: Tensor | None = None) -> Tensor:
    """sum_k weights_k * sum_{i != k} Phi(-s_i), scores centred.  (..., A), (..., A) -> (...,)

    Bayes-consistent for Phi exponential, hinge, squared hinge and rho-margin (Lee, Lin, Wahba 2004).  With weights
    `costs.sum(-1, keepdim=True) / (A - 1) - costs` it is the cost-sensitive sum_k costs_k Phi(-s_k).
    """
    return _weighted(constrained_losses, scores, weights, phi, mask)


def max_margin(scores: Tensor, weights: Tensor, *, phi: Margin = rho_margin, mask: Tensor | None = None) -> Tensor:
    """sum_k weights_k * Phi(s_k - max_{i != k} s_i).  (..., A), (..., A) -> (...,)

    Bayes-consistent for the rho-margin; not for the hinge nor the exponential.  Awasthi et al. 2022.
    """
    return _weighted(max_losses, scores, weights, phi, mask)


def _require_rho(rho: float) -> None:
    if not rho > 0:
        raise ValueError(f"rho: expected a margin above 0, got {rho}")


def _weighted(losses: Callable[..., Tensor], scores: Tensor, weights: Tensor, phi: Margin, mask: Tensor | None) -> Tensor:
    require_floating("scores", scores)
    require_actions(scores, weights, name="weights")
    scores = lift(scores)
    if mask is not None:
        mask = action_mask(scores, mask, 0)
        scores, weights = scores.masked_fill(~mask, -torch.inf), weights.where(mask, 0.0)
    weights = weights.to(scores.dtype)
    # How many numbers the temporary tables take for each row; autograd keeps several tables.
    actions = scores.shape[-1]
    columns = 8 * actions**2 if losses is sum_losses else 16 * actions
    return in_blocks(partial(_formula, losses=losses, phi=phi), scores, weights, columns=columns, fixed=is_fixed(phi))


def _formula(scores: Tensor, weights: Tensor, *, losses: Callable[..., Tensor], phi: Margin) -> Tensor:
    # An action at -inf without weight has left the row as a masked one has.
    known = ~(scores.isneginf() & (weights == 0))
    return (weights.where(known, 0.0) * losses(scores, phi=phi, mask=known)).sum(dim=-1)
