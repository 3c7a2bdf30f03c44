"""Every loss once, with what it claims.  Adding a loss is adding a line."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deferral import decide, losses
from deferral.losses.margin import exponential, hinge, logistic, rho_margin, sigmoid, squared_hinge
from deferral.losses.predictor_rejector import (
    constrained_rho_hinge,
    double_mae,
    mae,
    max_rho_margin,
    predictor_rejector_formula,
)
from deferral.testing import (
    ABSTENTION,
    ACCEPT,
    CEILING,
    ONE_EXPERT,
    PAIR,
    REGRESSION,
    REGRESSION_ABSTENTION,
    SINGLE_STAGE,
    SINGLE_STAGE_BINARY,
    TWO_STAGE,
    E,
    K,
    Rows,
    Setting,
)


@dataclass(frozen=True)
class Case:
    """A loss in a setting, and what it claims: True, False (to be seen failing) or None (open).

    bayes: the minimiser decides the cheapest action; with deterministic experts: where their answer is a function of x.
    realizable: reaches zero where a linear hypothesis does.  bound: loss / bound is at least the deferral loss, up to a
    constant of the row.  starts: of the search for the minimiser, where the usual ones do not find it.
    """

    name: str
    setting: Setting
    loss: Callable[[Tensor, Rows], Tensor]
    bayes: bool | None = True
    bayes_with_deterministic_experts: bool = False
    function: str = ""  # of deferral.losses
    realizable: bool | None = None
    bound: float | None = None
    starts: int | None = None

    def __repr__(self) -> str:
        return self.name


def case(
    function: Callable,
    setting: Setting,
    *arguments: str,
    bayes: bool | None = True,
    deterministic: bool = False,
    realizable: bool | None = None,
    bound: float | None = None,
    **options,
) -> Case:
    """A loss of scores and named entries of the rows; in the PAIR setting the scores are split into predictor and rejector."""

    def loss(scores: Tensor, rows: Rows) -> Tensor:
        packed = (scores[..., :K], scores[..., K]) if setting is PAIR else (scores,)
        return function(*packed, *(rows[name] for name in arguments), **options)

    shown = ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in options.items())
    return Case(f"{function.__name__}[{shown}]", setting, loss, bayes, deterministic, function.__name__, realizable, bound)


def at_half(mu: float) -> float:
    """l_mu at p = 1/2: no action but the decided one has a greater probability."""
    return math.log(2) if mu == 1 else (1 - 0.5 ** (mu - 1)) / (mu - 1)


def two_stage_by_row_sum(scores: Tensor, costs: Tensor) -> Tensor:
    return losses.two_stage_deferral(scores, costs, ceiling=costs.sum(-1, keepdim=True))


def two_stage_by_row_maximum(scores: Tensor, costs: Tensor) -> Tensor:
    return losses.two_stage_deferral(scores, costs, ceiling=costs.amax(-1, keepdim=True))


def two_stage_over(surrogate: Callable[..., Tensor], phi: Callable, *, bayes: bool = True, starts: int | None = None) -> Case:
    def loss(scores: Tensor, rows: Rows) -> Tensor:
        return surrogate(scores, CEILING - rows["costs"], phi=phi)

    return Case(f"{surrogate.__name__}[{phi.__name__}]", TWO_STAGE, loss, bayes, function=surrogate.__name__, starts=starts)


def accept(scores: Tensor, wrong: Tensor, cost: Tensor, **options) -> Tensor:
    return losses.two_stage_abstention(scores[..., 0], wrong, cost, **options)


def second_stage_of_scores(scores: Tensor, wrong: Tensor, cost: Tensor) -> Tensor:
    fixed = scores.new_full((*scores.shape[:-1], K), 0.25)
    return losses.two_stage_abstention(losses.rejector_of_scores(torch.cat([fixed, scores], -1)), wrong, cost)


def one_expert(
    function: Callable, *, bayes: bool | None = True, deterministic: bool = False, realizable: bool | None = None, **options
) -> Case:
    def loss(scores: Tensor, rows: Rows) -> Tensor:
        return function(scores, rows["targets"], rows["expert_correct"][..., 0], **options)

    shown = ", ".join(f"{name}={value}" for name, value in options.items())
    return Case(f"{function.__name__}[{shown}]", ONE_EXPERT, loss, bayes, deterministic, function.__name__, realizable)


def realizable_family(scores: Tensor, targets: Tensor, expert_correct: Tensor, *, q: float) -> Tensor:
    return losses.realizable_deferral(scores, targets, 1 - expert_correct, q=q)


def realizable_router(scores: Tensor, targets: Tensor, expert_correct: Tensor) -> Tensor:
    right = torch.cat([F.one_hot(targets, K).to(expert_correct.dtype), expert_correct], dim=-1)
    return losses.realizable_router(scores, 1 - right)


def regression(scores: Tensor, value: Tensor, expert_costs: Tensor, **options) -> Tensor:
    error = scores[..., 0] - value
    return losses.regression_deferral(error.square(), scores[..., 1:], expert_costs, **options)


def regression_abstention(scores: Tensor, value: Tensor, cost: Tensor, **options) -> Tensor:
    return losses.regression_abstention((scores[..., 0] - value).square(), scores[..., 1], cost, **options)


def cross_entropy_pair(scores: Tensor, rejector: Tensor, targets: Tensor, cost: Tensor) -> Tensor:
    return predictor_rejector_formula(losses.comp_sum(scores, F.one_hot(targets, K).to(scores.dtype)), rejector, cost)


def double_mae_with_psi_one(scores: Tensor, rejector: Tensor, targets: Tensor, cost: Tensor) -> Tensor:
    return predictor_rejector_formula(double_mae(scores, targets), rejector, cost)


def two_slopes_of_a_bounded_phi(scores: Tensor, rejector: Tensor, targets: Tensor, cost: Tensor) -> Tensor:
    return predictor_rejector_formula(mae(scores, targets), rejector, 2 * cost, phi=sigmoid, alpha=2.0)


def single_stage_of_one(scores: Tensor, targets: Tensor, expert_correct: Tensor, *, mu: float) -> Tensor:
    return losses.single_stage_deferral(scores, targets, 1 - expert_correct[..., :1], mu=mu)


def one_vs_all_of_one(scores: Tensor, targets: Tensor, expert_correct: Tensor) -> Tensor:
    return losses.one_vs_all(scores, targets, expert_correct[..., :1])


def madras(scores: Tensor, rejector: Tensor, targets: Tensor, expert_correct: Tensor) -> Tensor:
    return losses.madras(scores, rejector, targets, 1 - expert_correct[..., 0])


def mixture_of_experts(scores: Tensor, targets: Tensor, expert_correct: Tensor) -> Tensor:
    return losses.mixture_of_experts(scores[..., :K], scores[..., K:], targets, expert_correct)


def binary_hinges_below_half(scores: Tensor, targets: Tensor, cost: Tensor) -> Tensor:
    return losses.cost_sensitive_abstention(scores, targets, cost / 2, phi=hinge)


def _rejector_defers(scores: Tensor) -> Tensor:
    return scores[..., :K].argmax(-1).where(scores[..., K] <= 0, K)


def _gate_decides(scores: Tensor) -> Tensor:
    gate = scores[..., K:].argmax(-1)
    return (K + gate - 1).where(gate > 0, scores[..., :K].argmax(-1))


def _all_negative_abstains(scores: Tensor) -> Tensor:
    return scores.argmax(-1).where(scores.amax(-1) > 0, K)


def _kept_in_hand_abstains(scores: Tensor) -> Tensor:
    return scores[..., :K].argmax(-1).where(scores.softmax(-1)[..., K] < 0.96, K)


REWARD = 1.6
MADRAS = replace(ONE_EXPERT, decide=_rejector_defers)
MIXTURE = replace(SINGLE_STAGE_BINARY, width=K + 1 + E, experts=range(K + 1, K + 1 + E), decide=_gate_decides)
BINARY_PROBLEMS = replace(ABSTENTION, width=K, decide=_all_negative_abstains)
CHEAP = replace(
    BINARY_PROBLEMS,
    expected_costs=lambda law, rows: ABSTENTION.expected_costs(law, rows | {"cost": rows["cost"] / 2}),
)
GAMBLE = replace(
    ABSTENTION,
    decide=_kept_in_hand_abstains,
    expected_costs=lambda law, rows: ABSTENTION.expected_costs(
        law, rows | {"cost": torch.full_like(rows["cost"], 1 - 1 / REWARD)}
    ),
)


def split_rejector(function: Callable, setting: Setting, *arguments: str, bayes: bool) -> Case:
    def loss(scores: Tensor, rows: Rows) -> Tensor:
        return function(scores[..., :K], scores[..., K], *(rows[name] for name in arguments))

    return Case(f"{function.__name__}[]", setting, loss, bayes, function=function.__name__)


CASES = [
    # The thesis: abstention.
    *(
        case(losses.score_based_abstention, ABSTENTION, "targets", "cost", mu=mu, bound=at_half(mu))
        for mu in (0.0, 0.5, 1.0, 1.7, 2.0)
    ),
    case(losses.predictor_rejector_abstention, PAIR, "targets", "cost", bound=0.5),
    case(losses.predictor_rejector_abstention, PAIR, "targets", "cost", phi=logistic),
    case(losses.predictor_rejector_abstention, PAIR, "targets", "cost", alpha=2.0),
    case(losses.predictor_rejector_abstention, PAIR, "targets", "cost", base=double_mae, bound=1.0),
    case(losses.predictor_rejector_abstention, PAIR, "targets", "cost", base=max_rho_margin, bound=1.0),
    case(losses.predictor_rejector_abstention, PAIR, "targets", "cost", base=constrained_rho_hinge, bound=1.0),
    case(accept, ACCEPT, "wrong", "cost", phi=logistic, bound=math.log(2)),
    *(case(accept, ACCEPT, "wrong", "cost", phi=phi, bound=1.0) for phi in (exponential, squared_hinge, hinge, sigmoid)),
    case(second_stage_of_scores, replace(ACCEPT, decide=lambda s: (s[..., 0] >= 0.25).long()), "wrong", "cost"),
    # The thesis: deferral.
    *(
        case(losses.single_stage_deferral, SINGLE_STAGE, "targets", "expert_costs", mu=mu, bound=at_half(mu))
        for mu in (0.0, 1.0, 1.7, 2.0)
    ),
    case(single_stage_of_one, ONE_EXPERT, "targets", "expert_correct", mu=2.0, realizable=True),
    case(single_stage_of_one, ONE_EXPERT, "targets", "expert_correct", mu=1.3, realizable=False),
    case(losses.single_stage_deferral, SINGLE_STAGE, "targets", "expert_costs", ceiling=1.2),
    *(
        case(losses.two_stage_deferral, TWO_STAGE, "costs", mu=mu, ceiling=CEILING, bound=at_half(mu))
        for mu in (0.0, 1.0, 1.7, 2.0)
    ),
    case(two_stage_by_row_sum, TWO_STAGE, "costs"),
    case(two_stage_by_row_maximum, TWO_STAGE, "costs"),
    *(two_stage_over(losses.sum_margin, phi) for phi in (exponential, logistic, squared_hinge)),
    two_stage_over(losses.sum_margin, rho_margin, starts=48),
    *(two_stage_over(losses.constrained_margin, phi) for phi in (exponential, squared_hinge, hinge)),
    two_stage_over(losses.constrained_margin, rho_margin, starts=48),
    two_stage_over(losses.max_margin, rho_margin),
    # The thesis: regression.
    *(case(regression, REGRESSION, "value", "expert_costs", mu=mu) for mu in (0.0, 1.0, 2.0)),
    *(
        case(regression_abstention, REGRESSION_ABSTENTION, "value", "cost", phi=phi)
        for phi in (logistic, exponential, hinge, squared_hinge)
    ),
    # The realizable families.
    one_expert(realizable_family, realizable=True, q=1.0),
    # Fails on certificates, too rarely for random problems.
    one_expert(realizable_family, realizable=True, q=0.7, bayes=None),
    one_expert(realizable_family, realizable=True, q=0.0, bayes=False),
    case(losses.realizable_experts, SINGLE_STAGE_BINARY, "targets", "expert_correct", q=1.0),
    case(losses.realizable_experts, SINGLE_STAGE_BINARY, "targets", "expert_correct", q=0.0, bayes=False),
    case(realizable_router, SINGLE_STAGE_BINARY, "targets", "expert_correct", bayes=False),
    # Published by others.
    one_expert(losses.mozannar_sontag, realizable=False),
    one_expert(losses.mozannar_sontag, alpha=0.5, bayes=False),
    one_expert(losses.mozannar_sontag, alpha=0.0, bayes=False),
    case(losses.one_vs_all, SINGLE_STAGE_BINARY, "targets", "expert_correct"),
    case(losses.one_vs_all, SINGLE_STAGE_BINARY, "targets", "expert_correct", phi=exponential),
    case(losses.one_vs_all, SINGLE_STAGE_BINARY, "targets", "expert_correct", phi=hinge, bayes=False),
    one_expert(losses.asymmetric_softmax, realizable=False),
    case(one_vs_all_of_one, ONE_EXPERT, "targets", "expert_correct", realizable=False),
    one_expert(losses.realizable_surrogate, realizable=True, bayes=False),
    one_expert(losses.realizable_surrogate, alpha=0.5, deterministic=True, bayes=False),
    case(losses.cost_sensitive_abstention, BINARY_PROBLEMS, "targets", "cost"),
    case(binary_hinges_below_half, CHEAP, "targets", "cost"),
    split_rejector(madras, MADRAS, "targets", "expert_correct", bayes=False),
    case(mixture_of_experts, MIXTURE, "targets", "expert_correct", bayes=False),
    case(losses.deep_gamblers, GAMBLE, "targets", reward=REWARD),
    # The argmax over all scores is another rule.
    case(losses.deep_gamblers, replace(GAMBLE, decide=decide), "targets", reward=REWARD, bayes=False),
    # There are two experts here, with three it is not.
    case(losses.picce, SINGLE_STAGE_BINARY, "targets", "expert_correct"),
    # Pairings that are known to be inconsistent: the test that passes the others must be seen to fail them.
    case(cross_entropy_pair, PAIR, "targets", "cost", bayes=False),
    case(double_mae_with_psi_one, PAIR, "targets", "cost", bayes=False),
    case(two_slopes_of_a_bounded_phi, PAIR, "targets", "cost", bayes=False),
    two_stage_over(losses.sum_margin, hinge, bayes=False),
    two_stage_over(losses.max_margin, hinge, bayes=False),
    two_stage_over(losses.max_margin, exponential, bayes=False),
]
