"""Losses by other authors that ours are compared with: each agrees with its paper's formula, in nats and in log space.

`expert_correct` is 1 or True where the expert's answer is right, 0 or False where it is wrong: (..., E) for losses of several
experts, (...,) for those of one; a chance of being right gives the expectation, but for `mixture_of_experts` and `picce`, which
ask who is right.  `mask`, of the same shape, True = known: an expert whose answer is missing leaves the row.  Rows whose target
is `ignore_index` give 0.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from deferral.losses.binary_problems import binary_problems
from deferral.losses.closed_form import has_closed_form, in_blocks
from deferral.losses.comp_sum import targeted_comp_sum
from deferral.losses.entries import entry, hits_of, one_hot
from deferral.losses.ignored_rows import costs_that_count, counted, without_ignored
from deferral.losses.margin import Margin, is_fixed, logistic
from deferral.losses.probabilities import (
    ABSENT,
    asymmetric_logit,
    expected_loss,
    log_mass,
    log_probabilities,
    log_probabilities_at,
)
from deferral.losses.realizable import realizable_deferral
from deferral.numerics import cast_like, lift, log_add_exp
from deferral.validation import (
    action_mask,
    one_expert_mask,
    require_batch,
    require_columns,
    require_cost,
    require_experts,
    require_floating,
    require_mask,
    require_number,
    require_rejector,
    require_share,
    require_targets,
    require_tensor,
)

__all__ = [
    "asymmetric_softmax",
    "cost_sensitive_abstention",
    "deep_gamblers",
    "learned_loss",
    "madras",
    "mixture_of_experts",
    "mozannar_sontag",
    "one_vs_all",
    "picce",
    "realizable_surrogate",
    "selective_net",
]


def mozannar_sontag(
    scores: Tensor,
    targets: Tensor,
    expert_correct: Tensor,
    *,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """-(alpha m + 1 - m) log p_y - m log p_K, m = 1[expert right].  (..., K+1), (...,) or (..., K), (...,) -> (...,)

    Bayes-consistent at alpha = 1 only, where it is `single_stage_deferral` with cost 1 - m.
    Mozannar, Sontag, "Consistent Estimators for Learning to Defer to an Expert" (ICML 2020), eq. 4; natural logarithm.
    """
    require_share("alpha", alpha)
    expert_correct = _of_one(scores, targets, expert_correct)
    targets, counts = without_ignored(targets, ignore_index)
    expert_correct = costs_that_count(expert_correct, counts, per_expert=False)
    if mask is not None:
        mask = one_expert_mask(scores, mask)
        expert_correct = expert_correct.where(mask[..., -1], 0.0)
    classes, expert = log_probabilities_at(scores, targets, scores.shape[-1] - 1, mask)
    weight = alpha * expert_correct + 1 - expert_correct
    pulled = expert.squeeze(-1).where(expert_correct != 0, 0.0)
    return counted(weight * expected_loss(-classes, targets) - expert_correct * pulled, counts)


def one_vs_all(
    scores: Tensor,
    targets: Tensor,
    expert_correct: Tensor,
    *,
    phi: Margin = logistic,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """phi(s_y) + sum_{k != y} phi(-s_k) + sum_j [m_j phi(s_j) + (1 - m_j) phi(-s_j)].  (..., K+E), (...,), (..., E) -> (...,)

    K + E binary problems.  Bayes-consistent for a strictly proper phi (logistic, exponential), not for the hinge; defer iff an
    expert's score is the highest.  An expert's accuracy is sigmoid(s_j) for the logistic phi, sigmoid(2 s_j) for the exponential.
    Verma, Nalisnick, "Calibrated Learning to Defer with One-vs-All Classifiers" (ICML 2022), eq. 5; Verma, Barrejón, Nalisnick,
    "Learning to Defer to Multiple Experts" (AISTATS 2023), eq. 9.
    """
    num_classes = require_experts(scores, targets, "expert_correct", expert_correct)
    targets, counts = without_ignored(targets, ignore_index)
    expert_correct = costs_that_count(expert_correct, counts)
    scores = lift(scores)
    closed = has_closed_form(expert_correct, compiled=True)
    if closed and phi is logistic and mask is None and not targets.is_floating_point():
        correct = expert_correct.to(scores.dtype).expand(*targets.shape, expert_correct.shape[-1])
        return counted(binary_problems(scores, correct, targets), counts)
    # At -inf a binary problem whose answer is no costs nothing, and 0 * inf would be NaN.
    scores = scores.clamp(min=ABSENT)
    hit = targets if targets.is_floating_point() else one_hot(targets, num_classes)
    hits = torch.cat([hit.to(scores.dtype), expert_correct.to(scores.dtype).expand(*hit.shape[:-1], -1)], dim=-1)
    if mask is not None:
        mask = action_mask(scores, mask, num_classes)
        scores, hits = scores.where(mask, 0.0), hits.where(mask, 0.0)
    if phi is logistic:
        losses = F.binary_cross_entropy_with_logits(scores, hits, reduction="none")
    else:
        losses = hits * phi(scores) + (1 - hits) * phi(-scores)
    return counted((losses if mask is None else losses.where(mask, 0.0)).sum(dim=-1), counts)


def asymmetric_softmax(
    scores: Tensor, targets: Tensor, expert_correct: Tensor, *, mask: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """CE over the K classes + BCE(z, m), z = s_K - logsumexp of the class scores but the highest.  (..., K+1) -> (...,)

    Bayes-consistent; the expert's accuracy is sigmoid(z), a probability.  At least two classes.
    Cao, Mozannar, Feng, Wei, An, "In Defense of Softmax Parametrization for Calibrated and Consistent Learning to Defer"
    (NeurIPS 2023), eq. 7 in closed form.
    """
    expert_correct = _of_one(scores, targets, expert_correct)
    if scores.shape[-1] < 3:
        raise ValueError(
            f"scores: expected at least two classes and one expert, got shape {tuple(scores.shape)}; the expert's score is set "
            "against all classes but the best"
        )
    targets, counts = without_ignored(targets, ignore_index)
    expert_correct = costs_that_count(expert_correct, counts, per_expert=False)
    known = torch.ones_like(expert_correct, dtype=torch.bool) if mask is None else one_expert_mask(scores, mask)[..., -1]
    tables = targets if targets.is_floating_point() else targets.unsqueeze(-1), expert_correct.unsqueeze(-1), known.unsqueeze(-1)
    return counted(in_blocks(_asymmetric, lift(scores), *tables, columns=10 * scores.shape[-1]), counts)


def _asymmetric(scores: Tensor, targets: Tensor, expert_correct: Tensor, known: Tensor) -> Tensor:
    classification = _cross_entropy(scores[..., :-1], targets if targets.is_floating_point() else targets.squeeze(-1))
    known = known.squeeze(-1)
    z, expert_correct = asymmetric_logit(scores).where(known, 0.0), expert_correct.squeeze(-1).where(known, 0.0)
    skill = expert_correct * logistic(z.where(expert_correct != 0, 0.0)) + (1 - expert_correct) * logistic(-z)
    return classification + skill.where(known, 0.0)


def realizable_surrogate(
    scores: Tensor,
    targets: Tensor,
    expert_correct: Tensor,
    *,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """-2 alpha log(p_y + m p_K) + (1 - alpha) CE over the K classes.  (..., K+1), (...,) or (..., K), (...,) -> (...,)

    Realizable H-consistent at alpha = 1; Bayes-consistent at no alpha: fit the threshold, as its authors do.  Where the expert's
    answer is a function of x, 0 < alpha < 1 answers the likeliest class, as Bayes does; at alpha = 1 that class and asking may
    share their mass, and another class be answered (`realizable_deferral`).

    Mozannar, Lang, Wei, Sattigeri, Das, Sontag, "Who Should Predict? Exact Algorithms for Learning to Defer to Humans"
    (AISTATS 2023), section 6, eq. 14.
    """
    require_share("alpha", alpha)
    expert_correct = _of_one(scores, targets, expert_correct)
    targets, counts = without_ignored(targets, ignore_index)
    expert_correct = costs_that_count(expert_correct, counts, per_expert=False)
    loss = 2 * alpha * realizable_deferral(scores, targets, 1 - expert_correct, q=0.0, mask=mask)
    if alpha != 1.0:
        loss = loss + (1 - alpha) * _cross_entropy(scores[..., :-1], targets)
    return counted(loss, counts)


def cost_sensitive_abstention(
    scores: Tensor, targets: Tensor, cost: Tensor | float, *, phi: Margin = logistic, ignore_index: int = -100
) -> Tensor:
    """c phi(g_y) + (1 - c) sum_{k != y} phi(-g_k); abstain iff every g_k <= 0.  (..., K), (...,) or (..., K) -> (...,)

    K binary problems at cost c.  Bayes-consistent for the logistic phi, and for the hinge where c < 1/2.
    Charoenphakdee, Cui, Zhang, Sugiyama, "Classification with Rejection Based on Cost-sensitive Classification" (ICML 2021).
    """
    require_floating("scores", scores)
    require_targets(scores, targets, scores.shape[-1])
    require_cost("scores", scores.shape[:-1], cost)
    targets, counts = without_ignored(targets, ignore_index)
    scores = lift(scores)
    cost = costs_that_count(cast_like(cost, scores), counts, per_expert=False).unsqueeze(-1)
    hits = targets if targets.is_floating_point() else targets.unsqueeze(-1)
    formula = partial(_binary_problems_at_cost, phi=phi)
    columns = 14 * scores.shape[-1]
    return counted(in_blocks(formula, scores, hits, cost, columns=columns, fixed=is_fixed(phi)), counts)


def _binary_problems_at_cost(scores: Tensor, targets: Tensor, cost: Tensor, *, phi: Margin) -> Tensor:
    if targets.is_floating_point():
        # 0 * inf is NaN where an impossible class counts nothing.
        scores = scores.clamp(min=ABSENT)
        return (cost * targets * phi(scores) + (1 - cost) * (1 - targets) * phi(-scores)).sum(dim=-1)
    hit = hits_of(targets, scores.shape[-1])
    # Looked up, so that a label K is an index error.
    return (torch.where(hit, cost, 1 - cost) * phi(torch.where(hit, entry(scores, targets), -scores))).sum(dim=-1)


def madras(
    scores: Tensor,
    rejector: Tensor,
    targets: Tensor,
    expert_cost: Tensor,
    *,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """(1 - sigma(r)) CE + sigma(r) c; r > 0 defers.  (..., K), (...,), (...,) or (..., K), (...,) -> (...,)

    Not Bayes-consistent: it compares the entropy, not the error, with the expert's.
    Madras, Pitassi, Zemel, "Predict Responsibly" (NeurIPS 2018), eq. 5.
    """
    require_floating("scores", scores)
    require_targets(scores, targets, scores.shape[-1])
    require_rejector(rejector, scores.shape[:-1])
    require_floating("expert_cost", expert_cost)
    require_batch("scores", scores.shape[:-1], "expert_cost", expert_cost.shape)
    targets, counts = without_ignored(targets, ignore_index)
    expert_cost = cast_like(costs_that_count(expert_cost, counts, per_expert=False), scores)
    gate = torch.sigmoid(lift(rejector))
    if mask is not None:
        require_mask(mask)
        require_batch("scores", scores.shape[:-1], "mask", mask.shape)
        gate, expert_cost = gate.where(mask, 0.0), expert_cost.where(mask, 0.0)
    return counted((1 - gate) * _cross_entropy(scores, targets) + gate * expert_cost, counts)


def mixture_of_experts(
    scores: Tensor,
    gate: Tensor,
    targets: Tensor,
    expert_correct: Tensor,
    *,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """-log(w_0 p_y + sum_j w_j m_j), w = softmax(gate).  (..., K), (..., 1+E), (...,), (..., E) -> (...,)

    Not Bayes-consistent.  Hemmer, Schellhammer, Vössing, Jakubik, Satzger, "Forming Effective Human-AI Teams" (IJCAI 2022).
    """
    require_floating("scores", scores)
    require_floating("gate", gate)
    require_columns("gate", gate)
    require_tensor("expert_correct", expert_correct)
    require_columns("expert_correct", expert_correct)
    require_targets(scores, targets, scores.shape[-1])
    if expert_correct.shape[-1] != gate.shape[-1] - 1:
        raise ValueError(
            f"gate: expected one column for the classifier and one per expert, got {tuple(gate.shape)} for expert_correct "
            f"{tuple(expert_correct.shape)}"
        )
    require_batch("scores", scores.shape[:-1], "gate", gate.shape[:-1])
    require_batch("scores", scores.shape[:-1], "expert_correct", expert_correct.shape[:-1])
    targets, counts = without_ignored(targets, ignore_index)
    expert_correct = costs_that_count(expert_correct, counts)
    if mask is not None:
        mask = action_mask(gate, mask, 1)
        expert_correct = expert_correct.where(mask[..., 1:], 0)
    log_w = log_probabilities(gate, mask)
    classes, _ = log_probabilities_at(scores, targets, scores.shape[-1])
    right = log_mass(log_w[..., 1:], expert_correct != 0)
    return counted(-expected_loss(log_add_exp(log_w[..., :1] + classes, right), targets), counts)


def deep_gamblers(scores: Tensor, targets: Tensor, *, reward: float, ignore_index: int = -100) -> Tensor:
    """-log(o p_y + p_K), 1 < o <= K.  (..., K+1), (...,) or (..., K) -> (...,)

    Rank the rows by p_K, the share kept in hand: at the optimum p_K = 1 iff max p <= 1/o, which is Chow's rule at cost
    c = 1 - 1/o.  The argmax over K + 1 scores is not.
    Liu, Wang, Liang, Salakhutdinov, Morency, Ueda, "Deep Gamblers" (NeurIPS 2019), eq. 7.
    """
    require_floating("scores", scores)
    num_classes = scores.shape[-1] - 1
    require_targets(scores, targets, num_classes)
    require_number("reward", reward)
    if not 1 < reward <= num_classes:
        raise ValueError(f"reward: expected a number above 1 and at most the {num_classes} classes, got {reward}")
    targets, counts = without_ignored(targets, ignore_index)
    classes, in_hand = log_probabilities_at(scores, targets, num_classes)
    gains = log_add_exp(cast_like(reward, scores).log() + classes, in_hand)
    return counted(-expected_loss(gains, targets), counts)


def picce(
    scores: Tensor, targets: Tensor, expert_correct: Tensor, *, mask: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """-log p_y - 1[an expert is right] max_{j right} log p_{K+j}.  (..., K+E), (...,) or (..., K), (..., E) -> (...,)

    Only the most likely of the right experts is pulled up, so that many experts do not drown the classes.  Bayes-consistent for
    one or two experts: of two the better one gets all that both are right on, as the more unequal weights have the lower risk.
    Not from three on: where two others are right wherever the best one is, each on a part of that, the best one gets nothing.

    "PiCCE" (arXiv 2602.17144, 2026).
    """
    num_classes = require_experts(scores, targets, "expert_correct", expert_correct)
    targets, counts = without_ignored(targets, ignore_index)
    expert_correct = costs_that_count(expert_correct, counts)
    if mask is not None:
        mask = action_mask(scores, mask, num_classes)
        expert_correct = expert_correct.where(mask[..., num_classes:], 0)
    weights = _likeliest(lift(scores[..., num_classes:].detach()), expert_correct != 0)
    return counted(targeted_comp_sum(scores, targets, weights, mask=mask), counts)


def _likeliest(experts: Tensor, right: Tensor) -> Tensor:
    """1 at the highest score among the right experts, shared where several have it; 0 where none is right.  (..., E) twice"""
    if not experts.shape[-1]:
        return experts
    experts = experts.masked_fill(~right, -torch.inf)
    found = (experts == experts.amax(dim=-1, keepdim=True)) & right
    return found.to(experts.dtype) / found.sum(dim=-1, keepdim=True).clamp(min=1)


def learned_loss(estimate: Tensor, predictor_loss: Tensor) -> Tensor:
    """(v(x) - L)^2, L detached: a regression of the predictor's own loss; reject iff v(x) > cost.  (...,), (...,) -> (...,)

    The baseline of regression with rejection: fit the predictor on all rows, then its conditional loss (its variance, for
    squared loss), then threshold.  Li, Liu, Sun, Wang, "When No-Rejection Learning is Consistent for Regression with
    Rejection" (2023); Zaoui, Denis, Hebiri, "Regression with Reject Option and Application to kNN" (NeurIPS 2020).
    """
    require_floating("estimate", estimate)
    require_tensor("predictor_loss", predictor_loss)
    if estimate.shape != predictor_loss.shape:
        raise ValueError(
            f"one estimate per row: estimate {tuple(estimate.shape)}, predictor_loss {tuple(predictor_loss.shape)}; "
            "a model with one output needs .squeeze(-1)"
        )
    return (lift(estimate) - predictor_loss.detach()).square()


def selective_net(
    losses: Tensor, selection: Tensor, auxiliary_losses: Tensor, *, coverage: float, penalty: float = 32.0, alpha: float = 0.5
) -> Tensor:
    """alpha (mean(l g) / mean(g) + penalty max(0, coverage - mean g)^2) + (1 - alpha) mean(l_aux).  (B,), (B,), (B,) -> ()

    g = sigmoid(selection).  A loss of the whole batch: it couples its rows, unlike all others here.  At the optimum it keeps
    the inputs of lowest entropy, not of lowest error.
    Geifman, El-Yaniv, "SelectiveNet" (ICML 2019), eq. 2 and 3, with the division by mean(g) that the released code omits.
    """
    require_tensor("losses", losses)
    require_floating("selection", selection)
    require_floating("auxiliary_losses", auxiliary_losses)
    if not losses.shape == selection.shape == auxiliary_losses.shape or selection.dim() != 1 or len(selection) == 0:
        raise ValueError(
            "losses, selection, auxiliary_losses: expected one value per row of a non-empty batch each, got "
            f"{tuple(losses.shape)}, {tuple(selection.shape)} and {tuple(auxiliary_losses.shape)}"
        )
    require_number("coverage", coverage)
    require_number("penalty", penalty)
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage: expected a number above 0 and at most 1, got {coverage}")
    require_share("alpha", alpha)
    if not penalty >= 0:
        raise ValueError(f"penalty: expected a number >= 0, got {penalty}")
    log_g = F.logsigmoid(lift(selection))
    # mean(l g) / mean(g) as a softmax of log g: right where every g underflows.
    selective_risk = (log_g.softmax(dim=0) * losses).sum()
    shortfall = torch.relu(coverage - log_g.exp().mean())
    return alpha * (selective_risk + penalty * shortfall.square()) + (1 - alpha) * lift(auxiliary_losses).mean()


def _cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """-log p_y over K classes.  (..., K), (...,) or (..., K) -> (...,)"""
    return expected_loss(-log_probabilities_at(scores, targets, scores.shape[-1])[0], targets)


def _of_one(scores: Tensor, targets: Tensor, expert_correct: Tensor) -> Tensor:
    """Whether one expert is right, as numbers; ValueError unless there is one for every row.  (...,)"""
    require_floating("scores", scores)
    require_targets(scores, targets, scores.shape[-1] - 1)
    require_tensor("expert_correct", expert_correct)
    require_batch("scores", scores.shape[:-1], "expert_correct", expert_correct.shape)
    return cast_like(expert_correct, scores)
