"""Log-probabilities of the softmax: of every action, or of the few that a loss of targets looks at."""

from typing import Any

import torch
from torch import Tensor

from deferral.losses.closed_form import has_closed_form, refuse_second_derivatives
from deferral.losses.entries import entry, hits_of
from deferral.numerics import lift

__all__ = [
    "ABSENT",
    "asymmetric_logit",
    "expected_loss",
    "known_scores",
    "log_mass",
    "log_probabilities",
    "log_probabilities_at",
]

# The log-probability of an action that has left the row.  exp(-1e30) is 0, and 0 * 1e30 is 0 where 0 * inf would be NaN.
ABSENT = -1e30


def log_probabilities(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """log softmax over the known actions, in float32 or better; hugely negative where masked.  (..., A) -> (..., A)

    `mask` has one column per action.
    """
    return known_scores(scores, mask).log_softmax(dim=-1)


def log_probabilities_at(scores: Tensor, targets: Tensor, num_classes: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`log_probabilities` of the target, and of the actions after the K classes.  (..., K+W), (...,) -> (..., 1), (..., W)

    Under targets that are probabilities every class may be right: (..., K), (..., W).  A label outside 0..K-1 is an index error.
    In eager mode the gradient is a closed form that keeps one table, and gradients of gradients are an error.
    """
    scores = known_scores(scores, mask)
    if targets.is_floating_point():
        log_p = scores.log_softmax(dim=-1)
        return log_p[..., :num_classes], log_p[..., num_classes:]
    targets = targets.unsqueeze(-1)
    if has_closed_form():
        return _AtTarget.apply(scores, targets, num_classes)
    log_p = scores.log_softmax(dim=-1)
    return entry(log_p[..., :num_classes], targets), log_p[..., num_classes:]


def known_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The scores in float32 or better, hugely negative where masked: such actions have left the row."""
    scores = lift(scores)
    return scores if mask is None else scores.masked_fill(~mask, ABSENT)


def log_mass(log_p: Tensor, right: Tensor) -> Tensor:
    """log sum of p over the columns that are right; hugely negative where none is, with all derivatives.  (..., E) -> (..., 1)"""
    some = right.any(dim=-1, keepdim=True)
    return log_p.masked_fill(~right & some, -torch.inf).logsumexp(dim=-1, keepdim=True).masked_fill(~some, ABSENT)


def expected_loss(losses: Tensor, targets: Tensor) -> Tensor:
    """The loss at the target, or those of the classes weighed by their probabilities.  (..., 1) or (..., K) -> (...,)"""
    return (targets * losses.where(targets != 0, 0.0)).sum(dim=-1) if targets.is_floating_point() else losses.squeeze(-1)


def asymmetric_logit(scores: Tensor) -> Tensor:
    """The logit of the expert's accuracy under the asymmetric softmax.  (..., K+1) -> (...,)"""
    scores = lift(scores)
    classes = scores[..., :-1]
    best = classes.detach().argmax(dim=-1, keepdim=True)
    return scores[..., -1] - classes.masked_fill(hits_of(best, classes.shape[-1]), -torch.inf).logsumexp(dim=-1)


class _AtTarget(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        p = scores.softmax(dim=-1)
        ctx.save_for_backward(p, targets)
        ctx.num_classes = num_classes
        # log p_a = s_a - s_top + log p_top, exact however unlikely the action is.
        top, log_p_top = scores.amax(dim=-1, keepdim=True), p.amax(dim=-1, keepdim=True).log_()
        at_target = scores[..., :num_classes].gather(-1, targets).sub_(top).add_(log_p_top)
        return at_target, (scores[..., num_classes:] - top).add_(log_p_top)

    @staticmethod
    def backward(ctx: Any, at_target: Tensor, after_classes: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivatives()
        p, targets = ctx.saved_tensors
        gradient = p * (after_classes.sum(dim=-1, keepdim=True) + at_target).neg_()
        gradient[..., ctx.num_classes :].add_(after_classes)
        return gradient.scatter_add_(-1, targets, at_target), None, None
