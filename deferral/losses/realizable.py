"""Realizable H-consistent families: where some hypothesis decides without loss, their minimiser finds it.

What holds beyond that was checked numerically and differs from member to member; each docstring says it.

Mao, Mohri, Zhong, "Realizable H-Consistent and Bayes-Consistent Loss Functions for Learning to Defer" (NeurIPS 2024,
arXiv 2407.13732) and "Mastering Multiple-Expert Routing" (ICML 2025, arXiv 2506.20650).
"""

from functools import partial

import torch
from torch import Tensor

from deferral.losses.closed_form import closed_form, has_closed_form
from deferral.losses.entries import hits_of
from deferral.losses.ignored_rows import costs_that_count, counted, without_ignored
from deferral.losses.probabilities import (
    ABSENT,
    expected_loss,
    known_scores,
    log_mass,
    log_probabilities,
    log_probabilities_at,
)
from deferral.numerics import PRECISE, cast_like, log_add_exp, readable
from deferral.validation import (
    action_mask,
    one_expert_mask,
    require_actions,
    require_batch,
    require_experts,
    require_floating,
    require_number,
    require_targets,
)

__all__ = ["realizable_deferral", "realizable_experts", "realizable_router"]


def realizable_deferral(
    scores: Tensor,
    targets: Tensor,
    expert_cost: Tensor,
    *,
    q: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """c Psi_q(p_y) + (1 - c) Psi_q(p_y + p_K), one expert.  (..., K+1), (...,) or (..., K), (...,) -> (...,)

    p = softmax(s), Psi_q(t) = (1 - t^q) / q, and -log t for q = 0; c in [0, 1] is the expert's cost, 1[expert wrong] or with a
    price.  Realizable H-consistent for q in [0, 1].  Bayes-consistent at q = 1 alone, for every cost; there it equals
    single-stage deferral at mu = 2 minus (1 - c).  When q < 1, fit the threshold (`fit_offsets`): with an expert that is right
    at random, p = (.5062, .4938) and accuracy .6174, q = 0 predicts where Bayes defers.  With one whose answer is a function of
    x and likeliest, nothing tells how its class and asking share their mass: at p = (.65, .33, .02) the risk at q = 0 is least
    also where either has .325, and then the second class is answered.  q = 0 times 2 is Mozannar et al. 2023's
    RealizableSurrogate at binary cost.

    `mask` (...,), True = known: a missing answer leaves the row.  Rows whose target is `ignore_index` give 0.

    NeurIPS 2024, section 4 (L_RL2D).
    """
    require_floating("scores", scores)
    require_floating("expert_cost", expert_cost)
    require_targets(scores, targets, scores.shape[-1] - 1)
    require_batch("scores", scores.shape[:-1], "expert_cost", expert_cost.shape)
    targets, counts = without_ignored(targets, ignore_index)
    expert_cost = costs_that_count(expert_cost, counts, per_expert=False)
    if mask is not None:
        mask = one_expert_mask(scores, mask)
        expert_cost = expert_cost.where(mask[..., -1], 1.0)
    classes, expert = log_probabilities_at(scores, targets, scores.shape[-1] - 1, mask)
    together = _psi(log_add_exp(classes, expert), q)
    cost = cast_like(expert_cost, scores).unsqueeze(-1)
    # A class at -inf is all lost alone, at q = 0 without bound; where the expert costs nothing that counts for nothing.
    alone = _psi(classes.where((cost != 0) | (classes > -torch.inf), 0.0), q)
    return counted(expected_loss(cost * alone + (1 - cost) * together, targets), counts)


def realizable_experts(
    scores: Tensor,
    targets: Tensor,
    expert_correct: Tensor,
    *,
    q: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Psi_q(p_y + sum_{j right} p_{K+j}): several experts without price.  (..., K+E), (...,), (..., E) -> (...,)

    `expert_correct` is 1 where the expert's answer is right, 0 where it is wrong.  Realizable H-consistent; at q = 1 it is linear
    in the probabilities and so Bayes-consistent as well, at q = 0 it is not.  `mask` (..., E), True = known: an expert whose
    answer is missing leaves the row.  Rows whose target is `ignore_index` give 0.

    Derived here; compare Mao, Mohri, Zhong (ICML 2025).
    """
    num_classes = require_experts(scores, targets, "expert_correct", expert_correct)
    targets, counts = without_ignored(targets, ignore_index)
    if mask is not None:
        mask = action_mask(scores, mask, num_classes)
        expert_correct = expert_correct.where(mask[..., num_classes:], 0)

    scores = known_scores(scores, mask)
    right = (expert_correct != 0).expand(*scores.shape[:-1], expert_correct.shape[-1])
    if not targets.is_floating_point() and has_closed_form(compiled=scores.device.type == "cpu"):
        block = partial(_fill, q=q)
        return counted(closed_form(block, scores, right, targets.unsqueeze(-1), columns=3 * right.shape[-1]), counts)
    classes, experts = log_probabilities_at(scores, targets, num_classes)
    return counted(expected_loss(_psi(log_add_exp(classes, log_mass(experts, right)), q), targets), counts)


def _fill(scores: Tensor, right: Tensor, targets: Tensor, descent: Tensor, losses: Tensor, *, q: float) -> None:
    """Psi_q(t), t the mass of the target and of all who are right, and minus its gradient, t^q (p given that mass - p)."""
    own = scores.shape[-1] - right.shape[-1]
    torch.softmax(scores, dim=-1, out=descent)
    if readable(scores) and losses.numel():
        p_target, p_right = descent[:, :own].gather(-1, targets), descent[:, own:] * right
        t = p_target + p_right.sum(dim=-1, keepdim=True)
        if t.amin().item() >= PRECISE:
            log_t = t.log_()
            losses.copy_(_psi(log_t, q))
            scale, share = (q * log_t).exp_(), ((q - 1) * log_t).exp_()
            descent.mul_(scale.neg_())
            descent[:, own:].addcmul_(p_right, share)
            descent[:, :own].scatter_add_(-1, targets, p_target.mul_(share))
            return
    # log p_a = s_a - s_top + log p_top, exact however unlikely the actions are, and however large the scores.
    top = scores.amax(dim=-1, keepdim=True)
    target, experts = scores[:, :own].gather(-1, targets) - top, (scores[:, own:] - top).masked_fill(~right, -torch.inf)
    mass = torch.cat([target, experts], dim=-1).logsumexp(dim=-1, keepdim=True).clamp(min=ABSENT)
    log_t = mass + descent.amax(dim=-1, keepdim=True).log()
    losses.copy_(_psi(log_t, q))
    scale = (q * log_t).exp()
    pull, target_pull = (experts - mass).exp() * scale, (target - mass).exp() * scale
    if torch.compiler.is_compiling():
        # Compiled, this is one loop over the row; a scatter would split it into three.
        pulls = torch.cat([torch.where(hits_of(targets, own), target_pull, 0.0), pull], dim=-1)
        torch.addcmul(pulls, descent, scale, value=-1, out=descent)
        return
    descent.mul_(-scale)
    descent[:, own:].add_(pull)
    descent[:, :own].scatter_add_(-1, targets, target_pull)


def realizable_router(scores: Tensor, costs: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """-log sum_{a: cost_a = 0} softmax_a(s), for binary costs: any free action will do.  (..., A), (..., A) -> (...,)

    Realizable and easy to optimise; not Bayes-consistent.  Rows whose actions all cost 1 say nothing and give 0.  For both
    guarantees use `two_stage_deferral` at mu = 2, started from a solution of this loss or of mu = 1.  `mask` (..., A) or
    (..., A-1), True = known: a missing action leaves the row.

    Derived here; compare Mao, Mohri, Zhong (ICML 2025).
    """
    require_floating("scores", scores)
    require_actions(scores, costs)
    if mask is not None:
        mask = action_mask(scores, mask, 1)
        costs = costs.where(mask, 1.0)
    log_p = log_probabilities(scores, mask)
    free = costs == 0
    # A row without a free action would be log 0; it keeps every column instead, which is log 1.
    kept = free | ~free.any(dim=-1, keepdim=True)
    return -log_p.masked_fill(~kept, -torch.inf).logsumexp(dim=-1)


def _psi(log_t: Tensor, q: float) -> Tensor:
    require_number("q", q)
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"q: expected a number in [0, 1] (0 logarithmic, 1 linear), got {q}")
    return -log_t if q == 0 else -torch.expm1(q * log_t) / q
