"""The comp-sum family l_mu, the weighted softmax losses: the one kernel under every surrogate with a softmax.

With p = softmax(s):   mu = 0: 1/p_k - 1 (sum-exponential)     mu = 1: -log p_k (logistic, cross-entropy)
                       1 < mu < 2: (1 - p_k^(mu-1)) / (mu-1) (generalised cross-entropy)     mu = 2: 1 - p_k (MAE)

Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications" (ICML 2023).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deferral.numerics import KNEE, expm1_linear, lift
from deferral.validation import action_mask, require_actions, require_floating

__all__ = ["comp_sum", "comp_sum_at", "comp_sum_losses", "log_probabilities", "targeted_comp_sum", "without_ignored"]

# The log-probability of an action that has left the row.  exp(-1e30) is 0, and 0 * 1e30 is 0 where 0 * inf would be NaN.
ABSENT = -1e30


def comp_sum(scores: Tensor, weights: Tensor, *, mu: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """sum_a weights_a * l_mu(scores, a).  (..., A), (..., A) -> (...,)

    Its minimiser puts the highest score on the action of largest expected weight, for every mu in [0, 2] (Bayes-consistent
    where the weights are non-negative).  A masked action leaves the row, softmax included.  The gradient is a closed form:
    gradients of gradients and forward mode are not defined, and torch says so.
    """
    require_floating("scores", scores)
    require_actions(scores, weights, name="weights")
    return _kernel(scores, weights, None, mu, mask)


def targeted_comp_sum(scores: Tensor, targets: Tensor, weights: Tensor, *, mu: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """l_mu(scores, target) + sum_j weights_j * l_mu(scores, K+j).  (..., K+W), (...,) or (..., K), (..., W) -> (...,)

    The target is looked up among the first K columns only: a label K is an index error and never reads the column of an
    expert.  Targets that are probabilities give the expectation.
    """
    if mask is not None:
        mask = action_mask(scores, mask, scores.shape[-1] - weights.shape[-1])
    if targets.is_floating_point():
        batch = scores.shape[:-1]
        every = torch.cat([targets.to(weights.dtype), weights.expand(*batch, weights.shape[-1])], dim=-1)
        return _kernel(scores, every, None, mu, mask)
    return _kernel(scores, weights, targets, mu, mask)


def log_probabilities(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """log softmax over the known actions, in float32 or better; hugely negative where masked.  (..., A) -> (..., A)

    `mask` has one column per action.
    """
    scores = lift(scores)
    return (scores if mask is None else scores.masked_fill(~mask, ABSENT)).log_softmax(dim=-1)


def comp_sum_losses(log_p: Tensor, mu: float) -> Tensor:
    """l_mu as a function of log p_k, elementwise:  -log p  for mu = 1, else  (1 - p^(mu-1)) / (mu-1).

    For mu < 1 it continues linearly past the knee of `deferral.numerics`.  Its slope, -p^(mu-1), is at most 1 in size for
    mu >= 1 and small where p is: with 100 classes mu = 2 starts a hundred times slower than mu = 1.
    """
    if mu == 1.0:
        return -log_p
    exponent = (mu - 1) * log_p
    # For mu > 1 the exponent is never positive, so the tangent would be dead code.
    return -torch.expm1(exponent) / (mu - 1) if mu > 1 else expm1_linear(exponent) / (1 - mu)


def comp_sum_at(log_p: Tensor, targets: Tensor, mu: float) -> Tensor:
    """l_mu at the target, or its expectation under probabilities.  (..., K), (...,) or (..., K) -> (...,)"""
    if targets.is_floating_point():
        return torch.where(targets == 0, 0.0, targets * comp_sum_losses(log_p, mu)).sum(dim=-1)
    return comp_sum_losses(log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), mu)


def without_ignored(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Targets that may be looked up, and which rows count; probabilities all count (None)."""
    if targets.is_floating_point():
        return targets, None
    counts = targets != ignore_index
    return targets.where(counts, 0), counts


def _kernel(scores: Tensor, weights: Tensor, targets: Tensor | None, mu: float, mask: Tensor | None) -> Tensor:
    if not 0.0 <= mu <= 2.0:
        raise ValueError(f"mu: expected a number in [0, 2] (0 sum-exponential, 1 logistic, 2 MAE), got {mu}")
    scores = lift(scores)
    if mask is not None:
        known = action_mask(scores, mask, 0)
        # Finite, so that a row of which nothing is known gives 0.
        scores = scores.masked_fill(~known, ABSENT)
        weights = weights.where(known[..., known.shape[-1] - weights.shape[-1] :], 0.0)
    weights = weights.to(scores.dtype).expand(*scores.shape[:-1], weights.shape[-1])
    return _CompSum.apply(scores, weights, targets, mu)[0]


class _CompSum(torch.autograd.Function):
    """The weights belong to the last columns of the scores; the target, if there is one, to the columns before them.

    With v_a = weight_a * p_a^(mu-1) the gradient is p * sum(v) - v.  Autograd would keep and visit several more tables of the
    size of the scores.
    """

    @staticmethod
    def forward(scores: Tensor, weights: Tensor, targets: Tensor | None, mu: float) -> tuple[Tensor, Tensor]:
        log_p = scores.log_softmax(dim=-1).clamp_(min=ABSENT)
        own = scores.shape[-1] - weights.shape[-1]
        weighted = log_p[..., own:]
        # For mu = 1 the sign is cheaper to turn on the result than on the table.
        losses = -_dot(weights, weighted) if mu == 1 else _dot(weights, comp_sum_losses(weighted, mu))
        if targets is not None:
            losses = losses + comp_sum_at(log_p[..., :own], targets, mu)
        return losses, log_p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, float], output: tuple[Tensor, Tensor]) -> None:
        _, weights, targets, ctx.mu = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], weights, targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        log_p, weights, targets = ctx.saved_tensors
        if gradients[0] is None:
            return None, None, None, None
        gradient = gradients[0].unsqueeze(-1)
        own = log_p.shape[-1] - weights.shape[-1]
        weighted = log_p[..., own:]
        to_weights = comp_sum_losses(weighted, ctx.mu) * gradient if ctx.needs_input_grad[1] else None
        # In place, so that p * sum(v) - v takes one table.
        pull = weights if ctx.mu == 1 else _slope(weighted, ctx.mu).mul_(weights)
        total = pull.sum(dim=-1, keepdim=True)
        to_scores = log_p.exp()
        if targets is None:
            to_scores.mul_(total)
        else:
            at_target = targets.unsqueeze(-1)
            target_pull = _slope(log_p.gather(-1, at_target), ctx.mu)
            to_scores.mul_(total + target_pull).scatter_add_(-1, at_target, -target_pull)
        to_scores[..., own:].sub_(pull)
        return to_scores.mul_(gradient), to_weights, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, scores: Tensor, weights: Tensor, targets: Tensor | None, mu: float) -> tuple:
        def batched(tensor: Tensor, dim: int | None) -> Tensor:
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        rows = None if targets is None else batched(targets, in_dims[2])
        return _CompSum.apply(batched(scores, in_dims[0]), batched(weights, in_dims[1]), rows, mu), (0, 0)


def _slope(log_p: Tensor, mu: float) -> Tensor:
    """p^(mu-1), constant past the knee: minus the derivative of l_mu by log p."""
    exponent = (mu - 1) * log_p
    return (exponent.clamp_(max=KNEE) if mu < 1 else exponent).exp_()


def _dot(weights: Tensor, losses: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not losses.is_contiguous():
        # The compiler fuses this; and a few columns of a table are multiplied faster than they are copied.
        return (weights * losses).sum(dim=-1)
    # Without autocast, which would take a matrix product down to half precision.
    with torch.autocast(losses.device.type, enabled=False):
        return torch.matmul(weights.unsqueeze(-2), losses.unsqueeze(-1)).squeeze(-1).squeeze(-1)
