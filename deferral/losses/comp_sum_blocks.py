"""Values and gradients of comp-sum losses at once, some rows at a time, in two ways to the same numbers.

By torch's own softmax, which is the fastest on a CPU; and by its parts, whatever the numbers are and without a look at them.
"""

import math

import torch
from torch import Tensor

from deferral.numerics import KNEE, LEAST_BEFORE_KNEE, PRECISE, expm1_linear, readable

__all__ = ["comp_sum_block", "comp_sum_losses", "slope"]

_LOG_PRECISE = math.log(PRECISE)


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


def comp_sum_block(
    scores: Tensor,
    weights: Tensor,
    targets: Tensor | None,
    ceiling: Tensor | None,
    descent: Tensor,
    losses: Tensor,
    *,
    mu: float,
) -> Tensor | None:
    """Fills the losses of some rows, and `descent` with minus their gradient over the scale that is returned (None is 1).

    With v_a = weight_a * p_a^(mu-1) the gradient is p * sum(v) - v.
    """
    if not (readable(scores) and losses.numel()):
        _fill(scores, weights, targets, ceiling, descent, losses, mu)
        return None
    if targets is None:
        filled = (
            _fill_logistic(scores, weights, ceiling, descent, losses)
            if mu == 1
            else _fill_by_softmax(scores, weights, ceiling, descent, losses, mu)
        )
        if not filled:
            _fill(scores, weights, None, ceiling, descent, losses, mu)
        return None
    scale = _fill_targets_by_softmax(scores, weights, targets, descent, losses, mu)
    if scale is None:
        _fill(scores, weights, targets, None, descent, losses, mu)
        return torch.ones_like(losses)
    return scale


def _fill_logistic(scores: Tensor, weights: Tensor, ceiling: Tensor | None, descent: Tensor, losses: Tensor) -> bool:
    """`_fill_by_softmax` for mu = 1, without a table beside `descent`: that of ceiling - weights is never made."""
    relative = torch.sub(scores, scores[:, :1], out=descent)
    total = weights.sum(dim=-1, keepdim=True)
    if ceiling is None:
        pulled = relative.mul_(weights).sum(dim=-1, keepdim=True)
    else:
        total = torch.sub(weights.shape[-1] * ceiling, total)
        pulled = relative.sum(dim=-1, keepdim=True).mul_(ceiling).sub_(relative.mul_(weights).sum(dim=-1, keepdim=True))
    torch.softmax(scores, dim=-1, out=descent)
    log_p_first = descent[:, :1].log()
    torch.addcmul(pulled, log_p_first, total, out=losses).neg_()
    if not (_precise(log_p_first) and _all_finite(losses)):
        return False
    if ceiling is None:
        torch.addcmul(weights, descent, total, value=-1, out=descent)
    else:
        torch.sub(ceiling, torch.addcmul(weights, descent, total, out=descent), out=descent)
    return True


def _fill_by_softmax(scores: Tensor, weights: Tensor, ceiling: Tensor | None, descent: Tensor, losses: Tensor, mu: float) -> bool:
    """What `comp_sum_block` fills for mu != 1 by torch's own softmax; False where its numbers do not suffice.

    log p_a = s_a - s_0 + log p_0, exact unless action 0 is very unlikely.
    """
    spare = None
    if ceiling is not None:
        weights = spare = ceiling - weights
    first = scores[:, :1]
    torch.softmax(scores, dim=-1, out=descent)
    log_p_first = descent[:, :1].log()
    if not _precise(log_p_first):
        return False
    found, pull = _losses_and_pull_of(descent, scores, first, log_p_first, weights, mu, spare)
    losses.copy_(found)
    if not _all_finite(losses):
        return False
    torch.addcmul(pull, descent, pull.sum(dim=-1, keepdim=True), value=-1, out=descent)
    return True


def _fill_targets_by_softmax(
    scores: Tensor, weights: Tensor, targets: Tensor, descent: Tensor, losses: Tensor, mu: float
) -> Tensor | None:
    """`_fill_by_softmax`, for any mu, with the target in place of action 0; None where its numbers do not suffice.

    Minus the sum of v is the scale, so that columns without a weight keep what the softmax wrote.
    """
    columns = weights.shape[-1]
    own = scores.shape[-1] - columns
    torch.softmax(scores, dim=-1, out=descent)
    log_p_target = descent.narrow(1, 0, own).gather(-1, targets).log_()
    if not _precise(log_p_target):
        return None
    p, weighed, target_score = descent.narrow(1, own, columns), scores.narrow(1, own, columns), scores.gather(-1, targets)
    if mu == 1:
        pull, total = weights, weights.sum(dim=-1, keepdim=True).add_(1)
        torch.addcmul((weighed - target_score).mul_(weights).sum(dim=-1, keepdim=True), log_p_target, total, out=losses).neg_()
    else:
        found, pull = _losses_and_pull_of(p, weighed, target_score, log_p_target, weights, mu, None)
        torch.add(found, comp_sum_losses(log_p_target, mu), out=losses)
        target_pull = slope(log_p_target, mu)
        total = pull.sum(dim=-1, keepdim=True).add_(target_pull)
    # Negative weights may cancel.
    if not (_all_finite(losses) and total.amin().item() >= PRECISE):
        return None
    scale = total.neg_()
    share = scale.reciprocal()
    p.addcmul_(pull, share)
    descent.scatter_add_(-1, targets, share if mu == 1 else share.mul_(target_pull))
    return scale


def _losses_and_pull_of(
    p: Tensor, scores: Tensor, anchor: Tensor, log_p_anchor: Tensor, weights: Tensor, mu: float, spare: Tensor | None
) -> tuple[Tensor, Tensor]:
    """sum_a weights_a * l_mu, and  weights * p^(mu-1), for mu != 1, given one action whose log p is known.

    `spare`, a table that nobody reads again, the weights perhaps, is written to.  (..., W) -> (..., 1), (..., W)
    """
    if mu == 2 or (mu == 0 and p.numel() and p.amin().item() > LEAST_BEFORE_KNEE):
        total = weights.sum(dim=-1, keepdim=True)
        pull = torch.mul(weights, p, out=spare) if mu == 2 else torch.div(weights, p, out=spare)
        return total.sub_(pull.sum(dim=-1, keepdim=True)).div_(mu - 1), pull
    return _losses_and_pull((scores - anchor).add_(log_p_anchor).mul_(mu - 1), weights, mu)


def _fill(
    scores: Tensor,
    weights: Tensor,
    targets: Tensor | None,
    ceiling: Tensor | None,
    descent: Tensor,
    losses: Tensor,
    mu: float,
) -> None:
    """What `comp_sum_block` fills, whatever the numbers are."""
    own = scores.shape[-1] - weights.shape[-1]
    top = scores.amax(dim=-1, keepdim=True)
    torch.sub(scores, top, out=descent)
    weighted = descent[:, own:] if own else descent
    if mu == 1:
        pull = weights if ceiling is None else ceiling - weights
        total = pull.sum(dim=-1, keepdim=True)
        # Before the exponential overwrites what it is taken from.
        product = torch.mul(pull, weighted, out=None if ceiling is None else pull)
        pulled = _sum_of_numbers(product)
        norm = descent.exp_().sum(dim=-1, keepdim=True)
        log_norm = norm.log()
        torch.sub(total * log_norm, pulled, out=losses)
        # Once more, rather than a third table kept.
        pull = weights if ceiling is None else torch.sub(ceiling, weights, out=product)
    else:
        exponent = weighted * (mu - 1)
        norm = descent.exp_().sum(dim=-1, keepdim=True)
        log_norm = norm.log()
        exponent.sub_((mu - 1) * log_norm)
        if ceiling is not None:
            weights = ceiling - weights
        found, pull = _losses_and_pull(exponent, weights, mu)
        losses.copy_(found)
        total = pull.sum(dim=-1, keepdim=True)
    if targets is None:
        torch.addcmul(pull, descent, total / norm, value=-1, out=descent)
        return
    log_p = scores[:, :own].gather(-1, targets).sub_(top).sub_(log_norm)
    losses.add_(comp_sum_losses(log_p, mu))
    target_pull = slope(log_p, mu)
    descent.mul_((total + target_pull).div_(norm).neg_())
    descent[:, own:].add_(pull)
    descent[:, :own].scatter_add_(-1, targets, target_pull)


def _losses_and_pull(exponent: Tensor, weights: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """sum_a weights_a * l_mu, and  weights * p^(mu-1);  `exponent`, (mu-1) * log p, is lost.  (..., W) -> (..., 1), (..., W)"""
    pull = exponent.clamp(max=KNEE) if mu < 1 else exponent
    beyond = exponent.sub_(pull) if mu < 1 else None
    pull.exp_().mul_(weights)
    losses = weights.sum(dim=-1, keepdim=True).sub_(pull.sum(dim=-1, keepdim=True))
    if beyond is not None:
        losses.sub_(_sum_of_numbers(beyond.mul_(pull)))
    return losses.div_(mu - 1), pull


def _precise(log_p: Tensor) -> bool:
    """Whether all these probabilities have their digits; not where one is NaN."""
    return bool(log_p.amin().item() >= _LOG_PRECISE)


def _all_finite(losses: Tensor) -> bool:
    """False for NaN, which 0 * inf is where an impossible action counts nothing."""
    return math.isfinite(losses.sum().item())


def _sum_of_numbers(products: Tensor) -> Tensor:
    """Sums of rows without NaN: at -inf a weight of zero counts nothing.  (..., A) -> (..., 1)"""
    return products.nansum(dim=-1, keepdim=True)


def slope(log_p: Tensor, mu: float) -> Tensor:
    """p^(mu-1), constant past the knee: minus the derivative of l_mu by log p."""
    exponent = (mu - 1) * log_p
    return (exponent.clamp_(max=KNEE) if mu < 1 else exponent).exp_()
