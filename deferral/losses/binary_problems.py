"""One binary problem per action, the logistic loss of each: the kernel under one-vs-all, value and gradient at once.

sum_a log(1 + e^s_a) = sum_a max(s_a, 0) - log prod_a max(p_a, 1 - p_a),  p = sigmoid(s): one logarithm a row instead of one an
action, as every factor is at least 1/2.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deferral.losses.closed_form import closed_form, refuse_second_derivatives
from deferral.losses.entries import entry, hits_of, with_target
from deferral.losses.probabilities import ABSENT
from deferral.numerics import readable

__all__ = ["binary_problems"]

# Each factor is at least a half, and a product of this many halves is still a normal number of float32.
_FACTORS = 120
# Each factor is off by half of the last digit: a row of this many of them has a value right to 1 in 2,000 at the worst.
_LEAST_DIGITS = 1000


def binary_problems(scores: Tensor, correct: Tensor, targets: Tensor) -> Tensor:
    """sum_k log(1 + e^s_k) - s_y - sum_j m_j s_j.  (..., K+E), (..., E), (...,) -> (...,)"""
    targets = targets.unsqueeze(-1)
    if torch.compiler.is_compiling() and scores.device.type != "cpu":
        return _Recomputed.apply(scores, correct, targets).squeeze(-1)
    return closed_form(_fill, scores, correct, targets, columns=scores.shape[-1])


def _fill(scores: Tensor, correct: Tensor, targets: Tensor, descent: Tensor, losses: Tensor) -> None:
    """The losses, and minus their gradient, hit - p."""
    if torch.compiler.is_compiling():
        _fill_compiled(scores, correct, targets, descent, losses)
        return
    torch.sigmoid(scores, out=descent)
    if readable(scores) and losses.numel():
        _fill_losses(scores, correct, targets, descent, losses)
    else:
        # Each pass over the table is a kernel here, and this way takes the fewest.
        losses.copy_(_without_hits(F.softplus(scores, threshold=40), scores, correct, targets).sum(dim=-1, keepdim=True))
    descent.neg_()
    own = scores.shape[-1] - correct.shape[-1]
    descent[:, :own].scatter_add_(-1, targets, torch.ones_like(losses))
    descent[:, own:].add_(correct)


def _fill_losses(scores: Tensor, correct: Tensor, targets: Tensor, p: Tensor, losses: Tensor) -> None:
    """The losses, given p: by products, or by a logarithm each where a loss is so small that a product leaves it few digits."""
    factors = 1 - p
    torch.maximum(factors, p, out=factors)
    logs = [part.prod(dim=-1, keepdim=True).log_() for part in factors.split(_FACTORS, dim=-1)]
    del factors
    linear = _without_hits(scores.clamp(min=0), scores, correct, targets).sum(dim=-1, keepdim=True)
    torch.sub(linear, sum(logs), out=losses)
    if not losses.amin().item() >= _LEAST_DIGITS * scores.shape[-1] * torch.finfo(scores.dtype).eps:
        torch.sub(linear, F.logsigmoid(scores.abs()).sum(dim=-1, keepdim=True), out=losses)


def _without_hits(losses: Tensor, scores: Tensor, correct: Tensor, targets: Tensor) -> Tensor:
    """`losses`, which is written to, less s_y at the target and m_j s_j at expert j.

    Taken off each problem by itself: off their sum, a large score would leave the others few digits.
    """
    own = scores.shape[-1] - correct.shape[-1]
    losses[:, :own].scatter_add_(-1, targets, scores[:, :own].gather(-1, targets).neg_())
    losses[:, own:].addcmul_(correct, scores[:, own:].clamp(min=ABSENT), value=-1)
    return losses


def _fill_compiled(scores: Tensor, correct: Tensor, targets: Tensor, descent: Tensor, losses: Tensor) -> None:
    """`_fill`, written so that the compiler fuses it into one loop over the row, with one exponential."""
    own = scores.shape[-1] - correct.shape[-1]
    decay = scores.abs().neg().exp()
    losses.copy_(_summed(scores.clamp(min=0) + decay.log1p(), scores, correct, targets))
    p = torch.where(scores >= 0, 1.0, decay) / (1 + decay)
    # Compiled, this is one loop; a scatter would split it into three.
    hits = hits_of(targets, own).to(scores.dtype)
    torch.cat([hits - p[:, :own], correct - p[:, own:]], dim=-1, out=descent)


class _Recomputed(torch.autograd.Function):
    """For a compiler for a GPU: nothing is kept but the scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, correct: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(scores, correct, targets)
        return _summed(F.softplus(scores, threshold=40), scores, correct, targets)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivatives()
        scores, correct, targets = ctx.saved_tensors
        return (scores.sigmoid() - with_target(targets, 1.0, correct, scores.shape[-1])) * gradient, None, None


def _summed(losses: Tensor, scores: Tensor, correct: Tensor, targets: Tensor) -> Tensor:
    """Sums of `_without_hits`, written to nothing.  (..., K+E), (..., K+E), (..., E), (..., 1) -> (..., 1)"""
    own = scores.shape[-1] - correct.shape[-1]
    at_target, experts = entry(scores[..., :own], targets), scores[..., own:].clamp(min=ABSENT)
    return (losses - with_target(targets, at_target, correct * experts, scores.shape[-1])).sum(dim=-1, keepdim=True)
