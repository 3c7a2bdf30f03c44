"""The comp-sum family l_mu, the weighted softmax losses: the one kernel under every surrogate with a softmax.

With p = softmax(s):   mu = 0: 1/p_k - 1 (sum-exponential)     mu = 1: -log p_k (logistic, cross-entropy)
                       1 < mu < 2: (1 - p_k^(mu-1)) / (mu-1) (generalised cross-entropy)     mu = 2: 1 - p_k (MAE)

Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications" (ICML 2023).
"""

import math
from functools import partial

import torch
from torch import Tensor

from deferral.losses.closed_form import closed_form, has_closed_form, readable
from deferral.losses.probabilities import ABSENT
from deferral.numerics import KNEE, expm1_linear, lift
from deferral.validation import action_mask, require_actions, require_floating

__all__ = [
    "comp_sum",
    "comp_sum_at",
    "comp_sum_losses",
    "comp_sum_of_costs",
    "counted",
    "targeted_comp_sum",
    "without_ignored",
]

# A probability of float32 has all its digits down to here.
PRECISE = 1e-35
# Where 1/p meets its tangent.
LEAST_BEFORE_KNEE = math.exp(-KNEE)


def comp_sum(scores: Tensor, weights: Tensor, *, mu: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """sum_a weights_a * l_mu(scores, a).  (..., A), (..., A) -> (...,)

    Its minimiser puts the highest score on the action of largest expected weight, for every mu in [0, 2] (Bayes-consistent
    where the weights are non-negative).  A masked action leaves the row, softmax included.  In eager mode the gradient is a
    closed form, and gradients of gradients are an error; under `torch.func` they exist.
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
    if readable(targets) and counts.all():
        return targets, None
    return targets.where(counts, 0), counts


def counted(losses: Tensor, counts: Tensor | None) -> Tensor:
    """The losses of the rows that count, 0 elsewhere.  (...,), (...,) -> (...,)"""
    return losses if counts is None else losses.where(counts, 0.0)


def _kernel(
    scores: Tensor,
    weights: Tensor,
    targets: Tensor | None,
    mu: float,
    mask: Tensor | None,
    ceiling: float | Tensor | None = None,
) -> Tensor:
    """The weights belong to the last columns, the target to those before; with a ceiling, costs stand for their weights."""
    if not 0.0 <= mu <= 2.0:
        raise ValueError(f"mu: expected a number in [0, 2] (0 sum-exponential, 1 logistic, 2 MAE), got {mu}")
    scores, weights = lift(scores), lift(weights)
    # Close to the logistic, 1 - p^(mu-1) is a difference of sums that cancel; the formula takes it by expm1.
    # A compiler takes each exponential of the formula twice, which is dear on a CPU; elsewhere a table more to move is.
    direct = has_closed_form(weights, ceiling, compiled=scores.device.type == "cpu") and (mu == 1 or abs(mu - 1) >= 0.05)
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
        ceiling = ceiling.to(scores.dtype) if isinstance(ceiling, Tensor) else scores.new_full((1,), ceiling)
        ceiling = ceiling.expand(*batch, 1)
    # Past the knee there is a tangent to take as well.
    temporary = columns * (1 + (ceiling is not None and mu not in (1, 2)) + 2 * (mu < 1))
    return closed_form(partial(_block, mu=mu), scores, weights, targets, ceiling, columns=temporary)


def _formula(scores: Tensor, weights: Tensor, targets: Tensor | None, mu: float) -> Tensor:
    log_p = scores.log_softmax(dim=-1).clamp(min=ABSENT)
    own = scores.shape[-1] - weights.shape[-1]
    losses = (weights * comp_sum_losses(log_p[..., own:], mu)).sum(dim=-1)
    return losses if targets is None else losses + comp_sum_at(log_p[..., :own], targets.squeeze(-1), mu)


def _block(
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
    if torch.compiler.is_compiling():
        _fill_compiled(scores, weights, targets, ceiling, descent, losses, mu)
        return None
    if not (readable(scores) and losses.numel()):
        _fill(scores, weights, targets, ceiling, descent, losses, mu)
        return None
    if targets is None:
        if not _fill_by_softmax(scores, weights, ceiling, descent, losses, mu):
            _fill(scores, weights, None, ceiling, descent, losses, mu)
        return None
    scale = _fill_targets_by_softmax(scores, weights, targets, descent, losses, mu)
    if scale is None:
        _fill(scores, weights, targets, None, descent, losses, mu)
        return torch.ones_like(losses)
    return scale


def _fill_by_softmax(scores: Tensor, weights: Tensor, ceiling: Tensor | None, descent: Tensor, losses: Tensor, mu: float) -> bool:
    """What `_block` fills by torch's own softmax, on a CPU faster than its parts; False where its numbers do not suffice.

    log p_a = s_a - s_0 + log p_0, exact unless action 0 is very unlikely.
    """
    first = scores[:, :1]
    spare = None
    if ceiling is not None:
        weights = spare = ceiling - weights
    if mu == 1:
        # In the table that the softmax is about to fill, so that one more is enough.
        relative = _row_sums(torch.sub(scores, first, out=descent).mul_(weights))
    torch.softmax(scores, dim=-1, out=descent)
    p_first = descent[:, :1]
    if not p_first.amin().item() >= PRECISE:
        return False
    log_p_first = p_first.log()
    if mu == 1:
        pull, total = weights, _row_sums(weights)
        torch.addcmul(relative, log_p_first, total, out=losses).neg_()
    else:
        found, pull = _losses_and_pull_of(descent, scores, first, log_p_first, weights, mu, spare)
        losses.copy_(found)
        total = _row_sums(pull)
    # 0 * inf is NaN where an impossible action counts nothing.
    if not math.isfinite(losses.sum().item()):
        return False
    torch.addcmul(pull, descent, total, value=-1, out=descent)
    return True


def _fill_targets_by_softmax(
    scores: Tensor, weights: Tensor, targets: Tensor, descent: Tensor, losses: Tensor, mu: float
) -> Tensor | None:
    """`_fill_by_softmax` with the target in place of action 0; None where its numbers do not suffice.

    Minus the sum of v is the scale, so that columns without a weight keep what the softmax wrote.
    """
    columns = weights.shape[-1]
    own = scores.shape[-1] - columns
    torch.softmax(scores, dim=-1, out=descent)
    p_target = descent.narrow(1, 0, own).gather(-1, targets)
    if not p_target.amin().item() >= PRECISE:
        return None
    log_p_target = p_target.log()
    p, weighed, target_score = descent.narrow(1, own, columns), scores.narrow(1, own, columns), scores.gather(-1, targets)
    if mu == 1:
        pull, total = weights, _row_sums(weights).add_(1)
        torch.addcmul(_row_sums((weighed - target_score).mul_(weights)), log_p_target, total, out=losses).neg_()
    else:
        found, pull = _losses_and_pull_of(p, weighed, target_score, log_p_target, weights, mu, None)
        torch.add(found, comp_sum_losses(log_p_target, mu), out=losses)
        target_pull = _slope(log_p_target, mu)
        total = _row_sums(pull).add_(target_pull)
    # Negative weights may cancel.
    if not (math.isfinite(losses.sum().item()) and total.amin().item() >= PRECISE):
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
    if mu == 2 or (mu == 0 and p.amin().item() > LEAST_BEFORE_KNEE):
        total = _row_sums(weights)
        pull = torch.mul(weights, p, out=spare) if mu == 2 else torch.div(weights, p, out=spare)
        return total.sub_(_row_sums(pull)).div_(mu - 1), pull
    return _losses_and_pull((scores - anchor).add_(log_p_anchor).mul_(mu - 1), weights, mu)


def _row_sums(table: Tensor) -> Tensor:
    """(rows, A) -> (rows, 1).  A product with ones takes half the time of `sum` where rows are short."""
    return torch.mv(table, table.new_ones(table.shape[-1])).unsqueeze(-1)


def _fill(
    scores: Tensor,
    weights: Tensor,
    targets: Tensor | None,
    ceiling: Tensor | None,
    descent: Tensor,
    losses: Tensor,
    mu: float,
) -> None:
    """What `_block` fills, whatever the numbers are."""
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
    target_pull = _slope(log_p, mu)
    descent.mul_((total + target_pull).div_(norm).neg_())
    descent[:, own:].add_(pull)
    descent[:, :own].scatter_add_(-1, targets, target_pull)


def _fill_compiled(
    scores: Tensor,
    weights: Tensor,
    targets: Tensor | None,
    ceiling: Tensor | None,
    descent: Tensor,
    losses: Tensor,
    mu: float,
) -> None:
    """What `_block` fills, in words of which a compiler makes few loops, each with one exponential where one is enough."""
    own = scores.shape[-1] - weights.shape[-1]
    if ceiling is not None:
        weights = ceiling - weights
    shifted = scores - scores.amax(dim=-1, keepdim=True)
    exponentials = shifted.exp()
    norm = exponentials.sum(dim=-1, keepdim=True)
    log_norm = norm.log()
    if mu == 1:
        pull = weights
        found = pull.sum(dim=-1, keepdim=True) * log_norm - _compiled_sum_of_numbers(pull * shifted[:, own:])
    else:
        exponent = (mu - 1) * (shifted[:, own:] - log_norm)
        if mu in (0, 2):
            p = exponentials[:, own:] / norm
            power = p if mu == 2 else p.clamp(min=LEAST_BEFORE_KNEE).reciprocal()
        else:
            power = exponent.clamp(max=KNEE).exp()
        pull = weights * power
        found = (weights - pull).sum(dim=-1, keepdim=True)
        if mu < 1:
            found = found - _compiled_sum_of_numbers(pull * (exponent - KNEE).relu())
        found = found / (mu - 1)
    total = pull.sum(dim=-1, keepdim=True)
    if targets is None:
        losses.copy_(found)
        torch.addcmul(pull, exponentials, total / norm, value=-1, out=descent)
        return
    log_p = scores[:, :own].gather(-1, targets) - scores.amax(dim=-1, keepdim=True) - log_norm
    torch.add(found, comp_sum_losses(log_p, mu), out=losses)
    target_pull = _slope(log_p, mu)
    scale = (total + target_pull) / norm
    # One loop over the row, of which a scatter would make three.
    hits = torch.where(torch.arange(own, device=scores.device) == targets, target_pull, 0.0)
    classes = torch.addcmul(hits, exponentials[:, :own], scale, value=-1)
    torch.cat([classes, torch.addcmul(pull, exponentials[:, own:], scale, value=-1)], dim=-1, out=descent)


def _compiled_sum_of_numbers(products: Tensor) -> Tensor:
    """`_sum_of_numbers`; the compiler's isnan takes one number at a time."""
    return products.where(products <= torch.inf, 0.0).sum(dim=-1, keepdim=True)


def _losses_and_pull(exponent: Tensor, weights: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """sum_a weights_a * l_mu, and  weights * p^(mu-1);  `exponent`, (mu-1) * log p, is lost.  (..., W) -> (..., 1), (..., W)"""
    pull = exponent.clamp(max=KNEE) if mu < 1 else exponent
    beyond = exponent.sub_(pull) if mu < 1 else None
    pull.exp_().mul_(weights)
    losses = weights.sum(dim=-1, keepdim=True).sub_(pull.sum(dim=-1, keepdim=True))
    if beyond is not None:
        losses.sub_(_sum_of_numbers(beyond.mul_(pull)))
    return losses.div_(mu - 1), pull


def _sum_of_numbers(products: Tensor) -> Tensor:
    """Sums of rows without NaN: at -inf a weight of zero counts nothing.  (..., A) -> (..., 1)"""
    return products.nansum(dim=-1, keepdim=True)


def _slope(log_p: Tensor, mu: float) -> Tensor:
    """p^(mu-1), constant past the knee: minus the derivative of l_mu by log p."""
    exponent = (mu - 1) * log_p
    return (exponent.clamp_(max=KNEE) if mu < 1 else exponent).exp_()
