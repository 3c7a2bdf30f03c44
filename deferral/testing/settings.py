"""The settings that a loss may be in: its packed scores, its rows, what every action is expected to cost, how scores decide."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deferral.costs import single_stage_costs
from deferral.decision import decide, decide_pair

__all__ = [
    "ABSTENTION",
    "ACCEPT",
    "CEILING",
    "ONE_EXPERT",
    "PAIR",
    "REGRESSION",
    "REGRESSION_ABSTENTION",
    "SINGLE_STAGE",
    "SINGLE_STAGE_BINARY",
    "TWO_STAGE",
    "A",
    "E",
    "K",
    "Loss",
    "Property",
    "Rows",
    "Setting",
    "draw_rows",
]

K, E, A = 3, 2, 3
CEILING = 1.3  # of the two-stage costs: a price stands on top of an error
_PRICES = torch.tensor([0.0] + (A - 1) * [CEILING - 1], dtype=torch.float64)

Rows = dict[str, Tensor]
Loss = Callable[[Tensor, Rows], Tensor]


@dataclass(frozen=True)
class Setting:
    """What is decided: the packed scores, what each action is expected to cost under a law over outcomes, who decides how."""

    name: str
    width: int
    expected_costs: Callable[[Tensor, Rows], Tensor]  # law (N, M), rows (N, M, ..) -> (N, actions)
    decide: Callable[[Tensor], Tensor]  # (..., width) -> (...,)
    classes: range = range(0)  # the columns of the scores that belong to the classes
    experts: range = range(0)  # those that belong to the experts
    expert_rows: str = ""  # the entry of the rows whose last columns, one per expert, are permuted with them
    random_experts: int = 0  # how many experts are right at random given the label
    predicts: bool = False  # whether column 0 is a prediction of the value, whose expectation it is to be


Property = Callable[[Loss, Setting], str | None]  # what was seen where it is violated


def draw_rows(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Rows:
    """Random rows of the given leading shape.

    targets (...,); cost (...,) of abstaining; expert_costs (..., E) in [0, 1]; expert_correct (..., E) in {0, 1}; costs (..., A)
    of a two-stage router, any in [0, 1.3] or, in half of the rows, errors and a price of 0.3 of asking an expert; wrong (...,) in
    {0, 1} of a fixed predictor; value (...,), the target of regression.
    """

    def uniform(*size: int) -> Tensor:
        return torch.rand(*shape, *size, generator=generator, dtype=dtype)

    return {
        "targets": torch.randint(K, shape, generator=generator),
        "cost": 0.05 + 0.55 * uniform(),
        "expert_costs": uniform(E),
        "expert_correct": (uniform(E) < 0.6).to(dtype),
        "costs": torch.where(uniform(1) < 0.5, CEILING * uniform(A), (uniform(A) < 0.5) + _PRICES.to(dtype)),
        "wrong": (uniform() < 0.5).to(dtype),
        "value": 3 * uniform() - 1.5,
    }


def _expectation(table: Callable[[Rows], Tensor]) -> Callable[[Tensor, Rows], Tensor]:
    return lambda law, rows: (law.unsqueeze(-1) * table(rows)).sum(dim=1)


def _abstention(rows: Rows) -> Tensor:
    return single_stage_costs(rows["targets"], rows["cost"].unsqueeze(-1), K)


def _variance(law: Tensor, rows: Rows) -> Tensor:
    mean = (law * rows["value"]).sum(dim=-1, keepdim=True)
    return (law * (rows["value"] - mean).square()).sum(dim=-1, keepdim=True)


def _regression(law: Tensor, rows: Rows) -> Tensor:
    return torch.cat([_variance(law, rows), (law.unsqueeze(-1) * rows["expert_costs"]).sum(dim=1)], dim=-1)


def _regression_abstention(law: Tensor, rows: Rows) -> Tensor:
    return torch.cat([_variance(law, rows), rows["cost"][:, :1]], dim=-1)


ABSTENTION = Setting("score-based abstention", K + 1, _expectation(_abstention), decide, classes=range(K))
PAIR = Setting(
    "predictor-rejector abstention",
    K + 1,
    _expectation(_abstention),
    lambda s: decide_pair(s[..., :K], s[..., K]),
    classes=range(K),
)
ACCEPT = Setting(
    "two-stage abstention",
    1,
    _expectation(lambda rows: torch.stack([rows["wrong"], rows["cost"]], dim=-1)),
    lambda s: (s[..., 0] <= 0).long(),
)
SINGLE_STAGE = Setting(
    "single-stage deferral",
    K + E,
    _expectation(lambda rows: single_stage_costs(rows["targets"], rows["expert_costs"], K)),
    decide,
    classes=range(K),
    experts=range(K, K + E),
    expert_rows="expert_costs",
)
SINGLE_STAGE_BINARY = Setting(
    "single-stage deferral to experts who are right or wrong",
    K + E,
    _expectation(lambda rows: single_stage_costs(rows["targets"], 1 - rows["expert_correct"], K)),
    decide,
    classes=range(K),
    experts=range(K, K + E),
    expert_rows="expert_correct",
    random_experts=E,
)
ONE_EXPERT = Setting(
    "single-stage deferral to one expert who is right or wrong",
    K + 1,
    _expectation(lambda rows: single_stage_costs(rows["targets"], 1 - rows["expert_correct"][..., :1], K)),
    decide,
    classes=range(K),
    random_experts=1,
)
TWO_STAGE = Setting(
    "two-stage deferral",
    A,
    _expectation(lambda rows: rows["costs"]),
    decide,
    experts=range(1, A),
    expert_rows="costs",
)
REGRESSION = Setting(
    "regression deferral: the prediction, then the scores",
    2 + E,
    _regression,
    lambda s: decide(s[..., 1:]),
    experts=range(2, 2 + E),
    expert_rows="expert_costs",
    predicts=True,
)
REGRESSION_ABSTENTION = Setting(
    "regression abstention: the prediction, then the rejector",
    2,
    _regression_abstention,
    lambda s: (s[..., 1] <= 0).long(),
    predicts=True,
)
