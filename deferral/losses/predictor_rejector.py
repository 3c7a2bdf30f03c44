"""Abstention with a pair: a predictor h (K class scores) and a rejector r (one number); r > 0 answers.  Both stages.

Mao, Mohri, Zhong, "Predictor-Rejector Multi-Class Abstention: Theoretical Analysis and Algorithms" (ALT 2024,
arXiv 2310.14772).
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from deferral.losses.closed_form import in_blocks
from deferral.losses.comp_sum import targeted_comp_sum
from deferral.losses.entries import entry
from deferral.losses.ignored_rows import costs_that_count, counted, without_ignored
from deferral.losses.margin import (
    Margin,
    constrained_losses,
    exponential,
    logistic,
    max_losses,
    rho_hinge,
    rho_margin,
    sigmoid,
)
from deferral.numerics import cast_like, lift
from deferral.validation import require_cost, require_floating, require_number, require_rejector, require_targets, require_tensor

__all__ = [
    "constrained_rho_hinge",
    "double_mae",
    "mae",
    "max_rho_margin",
    "predictor_rejector_abstention",
    "predictor_rejector_formula",
    "two_stage_abstention",
]

PredictorLoss = Callable[[Tensor, Tensor], Tensor]


def mae(scores: Tensor, targets: Tensor) -> Tensor:
    """1 - softmax_y(h), comp-sum at mu = 2.  (..., K), (...,) or (..., K) -> (...,)"""
    return targeted_comp_sum(scores, targets, scores.new_zeros(0), mu=2.0)


def double_mae(scores: Tensor, targets: Tensor) -> Tensor:
    """2 (1 - softmax_y(h)), which bounds the error from above.  (..., K), (...,) or (..., K) -> (...,)"""
    return 2 * mae(scores, targets)


def max_rho_margin(scores: Tensor, targets: Tensor, *, rho: float = 1.0) -> Tensor:
    """Phi_rho(h_y - max_{k != y} h_k).  (..., K), (...,) or (..., K) -> (...,)"""
    return _at_targets(max_losses, scores, targets, phi=partial(rho_margin, rho=rho))


def constrained_rho_hinge(scores: Tensor, targets: Tensor, *, rho: float = 1.0) -> Tensor:
    """sum_{k != y} max(0, 1 + h_k / rho), scores centred.  (..., K), (...,) or (..., K) -> (...,)"""
    return _at_targets(constrained_losses, scores, targets, phi=partial(rho_hinge, rho=rho))


def predictor_rejector_abstention(
    scores: Tensor,
    rejector: Tensor,
    targets: Tensor,
    cost: Tensor | float,
    *,
    base: PredictorLoss = mae,
    psi: float | None = None,
    phi: Margin = exponential,
    alpha: float = 1.0,
    beta: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """l(h, y) Phi(-alpha r) + psi * cost * Phi(beta r): single stage.  (..., K), (...,), (...,), cost -> (...,)

    Answer iff r > 0 (`decide_pair`).  `base` is the l of the predictor: `mae` (the default), `double_mae`, `max_rho_margin` or
    `constrained_rho_hinge`.  Bayes-consistent iff psi = alpha / beta * m, where the base's optimal conditional loss is
    m * (1 - max p): m = 1, 2, 1 and K in that order (ALT 2024, Theorem 1 and Corollary 3).  `psi=None` takes the right one.
    Raises ValueError for another psi, and for a base of which no such m exists, cross-entropy among them.  That holds for a
    convex `phi`; the sigmoid and the rho-margin need alpha = beta.

    `double_mae` is realizable consistent too (Corollary 10).  The gradient of mae carries a factor p_y: start the predictor
    with some epochs of cross-entropy.  Rows whose target is `ignore_index` give 0.
    """
    require_floating("scores", scores)
    require_targets(scores, targets, scores.shape[-1])
    require_rejector(rejector, scores.shape[:-1])
    require_cost("rejector", rejector.shape, cost)
    psi = _consistent_psi(base, psi, scores.shape[-1], alpha, beta)
    if alpha != beta and getattr(phi, "func", phi) in (sigmoid, rho_margin):
        raise ValueError(
            f"phi: with alpha={alpha:g} and beta={beta:g} the psi of a convex phi, {psi:g}, is inconsistent for a bounded one, "
            "whose r grows without end; take alpha = beta, or a convex phi such as exponential or logistic"
        )
    targets, counts = without_ignored(targets, ignore_index)
    if isinstance(cost, Tensor):
        cost = costs_that_count(cost, counts, per_expert=False)
    loss = predictor_rejector_formula(base(scores, targets), rejector, psi * cost, phi=phi, alpha=alpha, beta=beta)
    return counted(loss, counts)


def predictor_rejector_formula(
    predictor_loss: Tensor,
    rejector: Tensor,
    transformed_cost: Tensor | float,
    *,
    phi: Margin = exponential,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """l Phi(-alpha r) + Psi Phi(beta r), with no opinion on whether l and Psi belong together.  (...,) each -> (...,)

    ALT 2024, eq. 3.
    """
    require_floating("rejector", rejector)
    rejector = lift(rejector)
    if isinstance(transformed_cost, Tensor):
        transformed_cost = cast_like(transformed_cost, rejector)
    return predictor_loss * phi(-alpha * rejector) + transformed_cost * phi(beta * rejector)


def two_stage_abstention(rejector: Tensor, wrong: Tensor, cost: Tensor | float, *, phi: Margin = logistic) -> Tensor:
    """wrong * Phi(-r) + cost * Phi(r): the predictor is fixed, r > 0 answers.  (...,), (...,), cost -> (...,)

    `wrong` is 1[argmax h != y], on rows the predictor was not trained on; a surrogate in its place is not consistent.
    Bayes-consistent for Phi exponential, logistic, hinge, squared hinge and sigmoid, whatever the predictor.

    ALT 2024, eq. 5; with `rejector_of_scores` the second stage of AISTATS 2024.
    """
    require_tensor("wrong", wrong)
    require_rejector(rejector, wrong.shape)
    require_cost("rejector", rejector.shape, cost)
    rejector = lift(rejector)
    if isinstance(cost, Tensor):
        cost = cast_like(cost, rejector)
    return cast_like(wrong, rejector) * phi(-rejector) + cost * phi(rejector)


def _at_targets(losses: Callable[..., Tensor], scores: Tensor, targets: Tensor, phi: Margin) -> Tensor:
    def formula(scores: Tensor, targets: Tensor) -> Tensor:
        table = losses(scores, phi=phi)
        return (targets * table if targets.is_floating_point() else entry(table, targets)).sum(dim=-1)

    targets = targets if targets.is_floating_point() else targets.unsqueeze(-1)
    return in_blocks(formula, lift(scores), targets, columns=10 * scores.shape[-1])


def _consistent_psi(base: PredictorLoss, psi: float | None, num_classes: int, alpha: float, beta: float) -> float:
    require_number("alpha", alpha)
    require_number("beta", beta)
    if alpha <= 0 or beta <= 0:
        raise ValueError(f"alpha, beta: expected positive numbers, got {alpha} and {beta}")
    multiples: dict[object, float] = {mae: 1, double_mae: 2, max_rho_margin: 1, constrained_rho_hinge: num_classes}
    function = getattr(base, "func", base)  # a functools.partial that fixes rho
    name = getattr(function, "__name__", repr(function))
    if function not in multiples:
        raise ValueError(
            f"base: {name} is inconsistent with every cost transform here: its optimal conditional loss is not a multiple of "
            f"1 - max p (for cross-entropy it is the entropy), so r would not abstain where it should; use "
            f"{', '.join(getattr(f, '__name__', '') for f in multiples)}, or two_stage_abstention with any predictor"
        )
    right = multiples[function] * alpha / beta
    if psi is not None and abs(psi - right) > 1e-9 * right:
        raise ValueError(
            f"psi: {name} with alpha={alpha:g}, beta={beta:g} is consistent with psi={right:g} only, got {psi:g}; leave psi out"
        )
    return right
