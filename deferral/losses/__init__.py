"""The surrogate losses of the thesis: pure functions of scores, one value per example, torch only.

Every loss is `(scores, ..., targets or costs, *, options) -> (...,)`: take the mean yourself, or wrap it in `Criterion`.
"""

from deferral.losses.comp_sum import comp_sum
from deferral.losses.criterion import Criterion
from deferral.losses.margin import constrained_margin, max_margin, sum_margin
from deferral.losses.multi_expert import single_stage_deferral, two_stage_deferral
from deferral.losses.predictor_rejector import predictor_rejector_abstention, two_stage_abstention
from deferral.losses.score_based import rejector_of_scores, score_based_abstention

__all__ = [
    "Criterion",
    "comp_sum",
    "constrained_margin",
    "max_margin",
    "predictor_rejector_abstention",
    "rejector_of_scores",
    "score_based_abstention",
    "single_stage_deferral",
    "sum_margin",
    "two_stage_abstention",
    "two_stage_deferral",
]
