"""The surrogate losses of the thesis, of its follow-ups and of others: pure functions of scores, torch only.

Every loss is `(scores, ..., targets or costs, *, options) -> (...,)`, one value per example: take the mean yourself, or wrap it
in `Criterion`.  Exceptions: `two_stage_abstention` takes the rejector and the predictor's errors; `regression_deferral`,
`regression_abstention` and `learned_loss` take the predictor's loss; `selective_net` gives one value for a whole batch.
"""

from deferral.losses.comp_sum import comp_sum
from deferral.losses.correctness import expert_correctness
from deferral.losses.criterion import Criterion
from deferral.losses.margin import constrained_margin, max_margin, sum_margin
from deferral.losses.multi_expert import single_stage_deferral, two_stage_deferral
from deferral.losses.predictor_rejector import predictor_rejector_abstention, two_stage_abstention
from deferral.losses.published import (
    asymmetric_softmax,
    cost_sensitive_abstention,
    deep_gamblers,
    learned_loss,
    madras,
    mixture_of_experts,
    mozannar_sontag,
    one_vs_all,
    picce,
    realizable_surrogate,
    selective_net,
)
from deferral.losses.realizable import realizable_deferral, realizable_experts, realizable_router
from deferral.losses.regression import regression_abstention, regression_deferral
from deferral.losses.score_based import rejector_of_scores, score_based_abstention

__all__ = [
    "Criterion",
    "asymmetric_softmax",
    "comp_sum",
    "constrained_margin",
    "cost_sensitive_abstention",
    "deep_gamblers",
    "expert_correctness",
    "learned_loss",
    "madras",
    "max_margin",
    "mixture_of_experts",
    "mozannar_sontag",
    "one_vs_all",
    "picce",
    "predictor_rejector_abstention",
    "realizable_deferral",
    "realizable_experts",
    "realizable_router",
    "realizable_surrogate",
    "regression_abstention",
    "regression_deferral",
    "rejector_of_scores",
    "score_based_abstention",
    "selective_net",
    "single_stage_deferral",
    "sum_margin",
    "two_stage_abstention",
    "two_stage_deferral",
]
