"""P(expert j is right | x), read off the scores of the losses that define it."""

from collections.abc import Callable

import torch
from torch import Tensor

from deferral.losses.margin import Margin, exponential, logistic, squared_hinge
from deferral.losses.multi_expert import single_stage_deferral
from deferral.losses.probabilities import asymmetric_logit, log_probabilities
from deferral.losses.published import asymmetric_softmax, mozannar_sontag, one_vs_all
from deferral.numerics import lift
from deferral.validation import require_floating, require_number, require_whole

__all__ = ["expert_correctness"]

# P(yes) at the minimiser s of P(yes) phi(s) + P(no) phi(-s).
_PROBABILITY: dict[Margin, Callable[[Tensor], Tensor]] = {
    logistic: torch.sigmoid,
    exponential: lambda s: torch.sigmoid(2 * s),
    squared_hinge: lambda s: ((1 + s) / 2).clamp(0, 1),
}


def expert_correctness(
    scores: Tensor,
    num_classes: int,
    *,
    loss: Callable[..., Tensor] = single_stage_deferral,
    mu: float = 1.0,
    ceiling: float = 1.0,
    phi: Margin = logistic,
) -> Tensor:
    """The expert's probability of being right that the minimiser of `loss` carries.  (..., K+E) -> (..., E)

    `single_stage_deferral` and `mozannar_sontag` (alpha = 1): p_{K+j}^(2-mu) / sum_k p_k^(2-mu), mu < 2; an odds against the
    classes, so that it may exceed 1 (mu = 1: Verma et al. 2023, eq. 12).  `one_vs_all`: sigmoid(s_{K+j}) with the logistic phi
    (eq. 13), sigmoid(2 s_{K+j}) with the exponential, (1 + s_{K+j}) / 2 in [0, 1] with the squared hinge.  `asymmetric_softmax`:
    sigmoid(z), one expert.  Other losses, and other phi, define none: ValueError.

    `mu` and `ceiling` are those that `single_stage_deferral` was trained with, `phi` that of `one_vs_all`.  With prices the
    result is 1 - E[cost_j | x]: at a ceiling above 1 the odds are (ceiling - E[cost_j | x]) / (1 + K (ceiling - 1)), which is
    solved for the cost.
    """
    require_floating("scores", scores)
    require_whole("num_classes", num_classes)
    if not 0 < num_classes < scores.shape[-1]:
        raise ValueError(f"num_classes: expected 1..{scores.shape[-1] - 1} for scores {tuple(scores.shape)}, got {num_classes}")
    require_number("mu", mu)
    require_number("ceiling", ceiling)
    if loss is not single_stage_deferral and (mu, ceiling) != (1.0, 1.0):
        raise ValueError(f"mu, ceiling: expected none but with single_stage_deferral, got mu={mu} and ceiling={ceiling}")
    if loss is not one_vs_all and phi is not logistic:
        raise ValueError(f"phi: expected none but with one_vs_all, got {getattr(phi, '__name__', phi)}")
    if loss in (single_stage_deferral, mozannar_sontag):
        if not 0 <= mu < 2:
            raise ValueError(f"mu: expected a number in [0, 2), got {mu}; at mu = 2 the scores only rank the actions")
        log_odds = (2 - mu) * log_probabilities(scores)
        odds = (log_odds[..., num_classes:] - log_odds[..., :num_classes].logsumexp(dim=-1, keepdim=True)).exp()
        return odds * (1 + num_classes * (ceiling - 1)) - (ceiling - 1)
    if loss is one_vs_all:
        if phi not in _PROBABILITY:
            raise ValueError(
                f"phi: {getattr(phi, '__name__', phi)} defines no probability; expected logistic, exponential or squared_hinge"
            )
        return _PROBABILITY[phi](lift(scores)[..., num_classes:])
    if loss is asymmetric_softmax:
        if scores.shape[-1] != num_classes + 1:
            raise ValueError(f"scores: asymmetric_softmax has one expert, {num_classes} + 1 columns, got {tuple(scores.shape)}")
        return torch.sigmoid(asymmetric_logit(scores)).unsqueeze(-1)
    raise ValueError(
        f"loss: {getattr(loss, '__name__', loss)} defines no probability that the expert is right; expected "
        "single_stage_deferral, mozannar_sontag, one_vs_all or asymmetric_softmax"
    )
