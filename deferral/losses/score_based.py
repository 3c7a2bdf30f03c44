"""Abstention with one extra score: K class scores, then the score of abstaining.  Both stages.

Mao, Mohri, Zhong, "Theoretically Grounded Loss Functions and Algorithms for Score-Based Multi-Class Abstention"
(AISTATS 2024, arXiv 2310.14770).
"""

from torch import Tensor

from deferral.losses.comp_sum import targeted_comp_sum
from deferral.losses.ignored_rows import costs_that_count, counted, without_ignored
from deferral.numerics import cast_like, lift
from deferral.validation import require_cost, require_floating, require_targets

__all__ = ["rejector_of_scores", "score_based_abstention"]


def score_based_abstention(
    scores: Tensor, targets: Tensor, cost: Tensor | float, *, mu: float = 1.0, ignore_index: int = -100
) -> Tensor:
    """l_mu(s, y) + (1 - cost) l_mu(s, K): single stage.  (..., K+1), (...,) or (..., K) -> (...,)

    Column K is the abstain score: abstain iff it is at least every class score (`decide`).  `cost` in [0, 1] is a number or
    one per row.  Bayes-consistent for every mu in [0, 2]; mu = 1.7 is Cao et al. 2022's generalised cross-entropy, mu = 1 is
    Mozannar and Sontag 2020 at constant cost.  At the optimum of mu = 1 the abstain probability is (1 - c) / (2 - c).  Rows
    whose target is `ignore_index` give 0.
    """
    require_floating("scores", scores)
    require_targets(scores, targets, scores.shape[-1] - 1)
    require_cost("scores", scores.shape[:-1], cost)
    targets, counts = without_ignored(targets, ignore_index)
    weight = (1 - costs_that_count(cast_like(cost, scores), counts, per_expert=False)).unsqueeze(-1)
    return counted(targeted_comp_sum(scores, targets, weight, mu=mu), counts)


def rejector_of_scores(scores: Tensor) -> Tensor:
    """r = max_k s_k - s_K, the class scores detached; pass it to `two_stage_abstention`.  (..., K+1) -> (...,)

    This is the second stage of the score-based form (AISTATS 2024): the class scores are fixed, the abstain score is learned.
    """
    require_floating("scores", scores)
    if scores.shape[-1] < 2:
        raise ValueError(f"scores: expected class scores and the score of abstaining, got shape {tuple(scores.shape)}")
    scores = lift(scores)
    return scores[..., :-1].detach().amax(dim=-1) - scores[..., -1]
