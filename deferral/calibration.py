"""Thresholds fitted on held-out scores.  On real data the natural threshold of a good surrogate may never defer."""

import torch
from torch import Tensor

from deferral.costs import pick
from deferral.decision import decide, deferral_margin
from deferral.validation import action_mask, check_costs, check_scores, require_actions

__all__ = ["fit_offsets"]


def fit_offsets(scores: Tensor, costs: Tensor, *, num_own: int = 1, mask: Tensor | None = None) -> Tensor:
    """Offsets that minimise the mean cost of `decide(scores, offsets)` on these rows, exactly.  (N, A), (N, A) -> (A,)

    The first `num_own` actions (K in the single stage, 1 in two stages) get 0, all experts one common number: who is the best
    expert stays the scores' choice, whether to defer is fitted.  Use rows that the scores were not trained on.  The threshold
    lies half way between two rows; among equally cheap ones it takes the one that defers least.  float64, O(N log N).
    """
    if scores.dim() != 2 or len(scores) == 0:
        raise ValueError(f"scores: expected at least one row and shape (N, A), got {tuple(scores.shape)}")
    require_actions(scores, costs)
    check_scores(scores)
    if bool(scores[:, :num_own].isneginf().any()):
        raise ValueError("scores: expected finite scores of the own actions, got -inf; an own action can always be taken")
    known = scores.double()
    if mask is not None:
        mask = action_mask(scores, mask, num_own)
        known = known.where(mask, -torch.inf)
    check_costs(costs, ceiling=None, mask=mask)
    margin = deferral_margin(known, num_own)
    # A row whose experts are all missing keeps the own answer at every threshold.
    asks = ~margin.isneginf()
    own = pick(costs, decide(known[:, :num_own])).double()
    asked = pick(costs, decide(known[:, num_own:]) + num_own).double()

    offsets = torch.zeros(scores.shape[-1], dtype=torch.float64, device=scores.device)
    levels, group = torch.unique(margin[asks], return_inverse=True)
    if len(levels) == 0:
        return offsets
    per_level = torch.zeros_like(levels).index_add(0, group, (own - asked)[asks])
    # saved[i]: what deferring every row at or above the i-th highest level saves; saved[0] is never deferring.
    saved = torch.cat([levels.new_zeros(1), per_level.flip(0).cumsum(0)])
    spread = (levels[-1] - levels[0]).clamp(min=1.0)
    edges = torch.cat([levels[:1] - spread, levels, levels[-1:] + spread])
    thresholds = ((edges[1:] + edges[:-1]) / 2).flip(0)
    # Sums in another order differ by rounding: within it, the one that defers least.
    as_good = saved >= saved.max() - 1e-12 * len(margin)
    offsets[num_own:] = -thresholds[as_good.int().argmax()]
    return offsets
