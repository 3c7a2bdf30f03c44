"""Every loss once, as one function of packed scores and of rows, with what it claims.

A row holds what any loss may ask for: targets, cost, expert_costs (E = 2), costs (A = 3 actions of a two-stage router), wrong.
`table` says what each action costs in that row, so that one property test serves every loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from deferral import decide, decide_pair, single_stage_costs
from deferral.losses import (
    asymmetric_softmax,
    comp_sum,
    constrained_margin,
    cost_sensitive_abstention,
    deep_gamblers,
    madras,
    max_margin,
    mixture_of_experts,
    mozannar_sontag,
    one_vs_all,
    picce,
    predictor_rejector_abstention,
    realizable_deferral,
    realizable_experts,
    realizable_router,
    realizable_surrogate,
    regression_abstention,
    regression_deferral,
    rejector_of_scores,
    score_based_abstention,
    single_stage_deferral,
    sum_margin,
    two_stage_abstention,
    two_stage_deferral,
)
from deferral.losses.margin import exponential, hinge, logistic, rho_margin, sigmoid, squared_hinge
from deferral.losses.predictor_rejector import (
    constrained_rho_hinge,
    double_mae,
    max_rho_margin,
    predictor_rejector_formula,
)

K, E, A = 3, 2, 3
CEILING = 1.3  # of the two-stage costs, so that a price stands on top of an error

Rows = dict[str, Tensor]


def draw_rows(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Rows:
    """Random rows with the given leading shape; `cost` and every cost lie in their allowed range."""

    def uniform(*size: int) -> Tensor:
        return torch.rand(*shape, *size, generator=generator, dtype=dtype)

    return {
        "targets": torch.randint(K, shape, generator=generator),
        "cost": 0.05 + 0.55 * uniform(),
        "expert_costs": uniform(E),
        "costs": CEILING * uniform(A),
        "wrong": (uniform() < 0.5).to(dtype),
    }


def abstention_table(rows: Rows) -> Tensor:
    return single_stage_costs(rows["targets"], rows["cost"].unsqueeze(-1), K)


def deferral_table(rows: Rows) -> Tensor:
    return single_stage_costs(rows["targets"], rows["expert_costs"], K)


def two_stage_table(rows: Rows) -> Tensor:
    return rows["costs"]


def accept_table(rows: Rows) -> Tensor:
    return torch.stack([rows["wrong"], rows["cost"].expand_as(rows["wrong"])], dim=-1)


@dataclass(frozen=True)
class Case:
    name: str
    width: int  # of the packed scores
    loss: Callable[[Tensor, Rows], Tensor]
    table: Callable[[Rows], Tensor]
    decide: Callable[[Tensor], Tensor] = decide
    bayes: bool = True
    differentiable: bool = True  # smooth enough for gradcheck at random points

    def __repr__(self) -> str:
        return self.name


def _pair(scores: Tensor) -> Tensor:
    return decide_pair(scores[..., :K], scores[..., K])


def _accept(scores: Tensor) -> Tensor:
    return (scores[..., 0] <= 0).long()


def _score_based(mu: float) -> Case:
    def loss(scores: Tensor, rows: Rows) -> Tensor:
        return score_based_abstention(scores, rows["targets"], rows["cost"], mu=mu)

    return Case(f"score_based_abstention[mu={mu}]", K + 1, loss, abstention_table)


def _predictor_rejector(name: str, **options: object) -> Case:
    def loss(scores: Tensor, rows: Rows) -> Tensor:
        return predictor_rejector_abstention(scores[..., :K], scores[..., K], rows["targets"], rows["cost"], **options)

    return Case(f"predictor_rejector_abstention[{name}]", K + 1, loss, abstention_table, _pair)


def _two_stage_abstention(name: str, phi: Callable[[Tensor], Tensor]) -> Case:
    def loss(scores: Tensor, rows: Rows) -> Tensor:
        return two_stage_abstention(scores[..., 0], rows["wrong"], rows["cost"], phi=phi)

    return Case(f"two_stage_abstention[{name}]", 1, loss, accept_table, _accept)


def _score_based_second_stage() -> Case:
    def loss(scores: Tensor, rows: Rows) -> Tensor:
        fixed = scores.new_tensor([0.25, 0.125, -0.25]).expand(*scores.shape[:-1], K)
        return two_stage_abstention(rejector_of_scores(torch.cat([fixed, scores], -1)), rows["wrong"], rows["cost"])

    def decision(scores: Tensor) -> Tensor:
        return (scores[..., 0] >= 0.25).long()

    return Case("two_stage_abstention[score-based]", 1, loss, accept_table, decision)


def _single_stage(mu: float, **options: float) -> Case:
    def loss(scores: Tensor, rows: Rows) -> Tensor:
        return single_stage_deferral(scores, rows["targets"], rows["expert_costs"], mu=mu, **options)

    name = "".join(f", {key}={value}" for key, value in options.items())
    return Case(f"single_stage_deferral[mu={mu}{name}]", K + E, loss, deferral_table)


def _two_stage(mu: float) -> Case:
    def loss(scores: Tensor, rows: Rows) -> Tensor:
        return two_stage_deferral(scores, rows["costs"], mu=mu, ceiling=CEILING)

    return Case(f"two_stage_deferral[mu={mu}]", A, loss, two_stage_table)


def _two_stage_row_sum() -> Case:
    def loss(scores: Tensor, rows: Rows) -> Tensor:
        return two_stage_deferral(scores, rows["costs"], ceiling=rows["costs"].sum(-1, keepdim=True))

    return Case("two_stage_deferral[ceiling=row sum]", A, loss, two_stage_table)


def _base(name: str, surrogate: Callable[..., Tensor], *, bayes: bool = True, differentiable: bool = True) -> Case:
    def loss(scores: Tensor, rows: Rows) -> Tensor:
        return surrogate(scores, CEILING - rows["costs"])

    return Case(name, A, loss, two_stage_table, bayes=bayes, differentiable=differentiable)


CASES = [
    *(_score_based(mu) for mu in (0.0, 0.5, 1.0, 1.7, 2.0)),
    _predictor_rejector("mae"),
    _predictor_rejector("mae, logistic", phi=logistic),
    _predictor_rejector("mae, alpha=2", alpha=2.0),
    _predictor_rejector("double_mae", base=double_mae),
    _predictor_rejector("max_rho_margin", base=max_rho_margin),
    _predictor_rejector("constrained_rho_hinge", base=constrained_rho_hinge),
    *(_two_stage_abstention(phi.__name__, phi) for phi in (logistic, exponential, squared_hinge, hinge, sigmoid)),
    _score_based_second_stage(),
    *(_single_stage(mu) for mu in (0.0, 1.0, 1.7, 2.0)),
    _single_stage(1.0, ceiling=1.2),
    *(_two_stage(mu) for mu in (0.0, 1.0, 1.7, 2.0)),
    _two_stage_row_sum(),
    _base("sum[exponential]", partial(sum_margin, phi=exponential)),
    _base("sum[logistic]", partial(sum_margin, phi=logistic)),
    _base("sum[squared_hinge]", partial(sum_margin, phi=squared_hinge)),
    _base("sum[rho_margin]", partial(sum_margin, phi=rho_margin), differentiable=False),
    _base("constrained[exponential]", partial(constrained_margin, phi=exponential)),
    _base("constrained[squared_hinge]", partial(constrained_margin, phi=squared_hinge)),
    _base("constrained[hinge]", partial(constrained_margin, phi=hinge), differentiable=False),
    _base("max[rho_margin]", partial(max_margin, phi=rho_margin), differentiable=False),
]


def _cross_entropy_pair() -> Case:
    def loss(scores: Tensor, rows: Rows) -> Tensor:
        cross_entropy = comp_sum(scores[..., :K], torch.nn.functional.one_hot(rows["targets"], K).to(scores.dtype))
        return predictor_rejector_formula(cross_entropy, scores[..., K], rows["cost"])

    return Case("predictor_rejector[cross-entropy]", K + 1, loss, abstention_table, _pair, bayes=False)


def _wrong_psi() -> Case:
    def loss(scores: Tensor, rows: Rows) -> Tensor:
        return predictor_rejector_formula(double_mae(scores[..., :K], rows["targets"]), scores[..., K], rows["cost"])

    return Case("predictor_rejector[double_mae, psi=1]", K + 1, loss, abstention_table, _pair, bayes=False)


# Known not to be consistent: the same test that passes the others must be seen to fail them.
INCONSISTENT = [
    _cross_entropy_pair(),
    _wrong_psi(),
    _base("sum[hinge]", partial(sum_margin, phi=hinge), bayes=False),
    _base("max[hinge]", partial(max_margin, phi=hinge), bayes=False),
    _base("max[exponential]", partial(max_margin, phi=exponential), bayes=False),
]
