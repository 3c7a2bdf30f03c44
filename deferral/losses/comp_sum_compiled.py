"""Comp-sum losses written so that the compiler fuses them into few loops, with one exponential where one is enough.

On a CPU value and gradient at once: an exponential costs more than a table that is moved.  On a GPU it is the other way round:
scores and weights are kept, and the gradient is one more loop over them, without sums.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deferral.losses.closed_form import refuse_second_derivatives
from deferral.losses.comp_sum_blocks import comp_sum_losses, slope
from deferral.losses.entries import hits_of, with_target
from deferral.numerics import KNEE, LEAST_BEFORE_KNEE

__all__ = ["compiled_block", "recomputed_comp_sum"]


class _Row(NamedTuple):
    """What is known of each row after its losses.  v_a = weight_a * p_a^(mu-1), and the gradient is p * total - v."""

    losses: Tensor  # (..., 1)
    exponentials: Tensor  # (..., A), e^(s - top)
    pull: Tensor  # (..., W), v of the columns with weights
    target_pull: Tensor | None  # (..., 1)
    total: Tensor  # (..., 1), sum of v
    top: Tensor  # (..., 1)
    norm: Tensor  # (..., 1)
    log_norm: Tensor  # (..., 1)


def compiled_block(
    scores: Tensor, weights: Tensor, targets: Tensor | None, ceiling: Tensor | None, descent: Tensor, losses: Tensor, *, mu: float
) -> None:
    """What `comp_sum_block` fills."""
    row = _row(scores, weights if ceiling is None else ceiling - weights, targets, mu, divides=True)
    losses.copy_(row.losses)
    scale = row.total / row.norm
    if targets is None:
        torch.addcmul(row.pull, row.exponentials, scale, value=-1, out=descent)
        return
    own = scores.shape[-1] - weights.shape[-1]
    assert row.target_pull is not None
    # Compiled, this is one loop over the row; a scatter would split it into three.
    hits = torch.where(hits_of(targets, own), row.target_pull, 0.0)
    classes = torch.addcmul(hits, row.exponentials[:, :own], scale, value=-1)
    torch.cat([classes, torch.addcmul(row.pull, row.exponentials[:, own:], scale, value=-1)], dim=-1, out=descent)


def recomputed_comp_sum(scores: Tensor, weights: Tensor, targets: Tensor | None, ceiling: Tensor | None, mu: float) -> Tensor:
    """The losses, whose backward pass goes over the scores once more.

    (..., A), (..., W), (..., 1) or None, (..., 1) or None -> (...,)
    """
    return _Recomputed.apply(scores, weights, targets, ceiling, mu).squeeze(-1)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        weights: Tensor,
        targets: Tensor | None,
        ceiling: Tensor | None,
        mu: float,
    ) -> Tensor:
        row = _row(scores, weights if ceiling is None else ceiling - weights, targets, mu, divides=False)
        kept = weights if targets is None else row.pull
        ctx.save_for_backward(scores, kept, ceiling, targets, row.target_pull, row.total, row.top, row.log_norm)
        ctx.mu = mu
        return row.losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        scores, kept, ceiling, targets, target_pull, total, top, log_norm = ctx.saved_tensors
        log_p = scores - top - log_norm
        p = log_p.exp()
        if targets is None:
            pull = kept if ceiling is None else ceiling - kept
            if ctx.mu != 1:
                pull = pull * _power(p, (ctx.mu - 1) * log_p, ctx.mu, divides=False)
        else:
            # Few columns have weights: their pull is kept, rather than taken from all columns once more.
            pull = with_target(targets, target_pull, kept, scores.shape[-1])
        return (p * total - pull) * gradient, None, None, None, None


def _row(scores: Tensor, weights: Tensor, targets: Tensor | None, mu: float, *, divides: bool) -> _Row:
    own = scores.shape[-1] - weights.shape[-1]
    top = scores.amax(dim=-1, keepdim=True)
    shifted = scores - top
    exponentials = shifted.exp()
    norm = exponentials.sum(dim=-1, keepdim=True)
    log_norm = norm.log()
    weighted = shifted[..., own:]
    if mu == 1:
        pull = weights
        losses = pull.sum(dim=-1, keepdim=True) * log_norm - _sum_of_numbers(pull * weighted)
    else:
        exponent = (mu - 1) * (weighted - log_norm)
        pull = weights * _power(exponentials[..., own:] * norm.reciprocal(), exponent, mu, divides=divides)
        losses = (weights - pull).sum(dim=-1, keepdim=True)
        if mu < 1:
            losses = losses - _sum_of_numbers(pull * (exponent - KNEE).relu())
        losses = losses / (mu - 1)
    total = pull.sum(dim=-1, keepdim=True)
    target_pull = None
    if targets is not None:
        log_p = scores[..., :own].gather(-1, targets) - top - log_norm
        losses, target_pull = losses + comp_sum_losses(log_p, mu), slope(log_p, mu)
        total = total + target_pull
    return _Row(losses, exponentials, pull, target_pull, total, top, norm, log_norm)


def _power(p: Tensor, exponent: Tensor, mu: float, *, divides: bool) -> Tensor:
    """p^(mu-1), constant past the knee, given p and (mu-1) * log p; `divides` where that is quicker than an exponential."""
    if mu == 2:
        return p
    if mu == 0 and divides:
        return p.clamp(min=LEAST_BEFORE_KNEE).reciprocal()
    return (exponent.clamp(max=KNEE) if mu < 1 else exponent).exp()


def _sum_of_numbers(products: Tensor) -> Tensor:
    """Sums of rows without NaN, which is 0 * inf where an impossible action counts nothing; a compiler's isnan is slow."""
    return products.where(products <= torch.inf, 0.0).sum(dim=-1, keepdim=True)
