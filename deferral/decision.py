"""Decide: scores (..., A) become actions (...,).  Ties go to the last tied action, so to abstaining or deferring.

NumPy or torch in and out.
"""

import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch
from deferral.numerics import lift
from deferral.validation import (
    action_mask,
    check_probabilities,
    require_columns,
    require_cost,
    require_floating,
    require_num_own,
    require_rejector,
    require_tensor,
)

__all__ = ["chow_scores", "decide", "decide_pair", "deferral_margin", "margin_levels", "oracle"]


@numpy_or_torch
def decide(scores: Tensor, offsets: Tensor | float = 0.0, *, mask: Tensor | None = None) -> Tensor:
    """argmax_a scores[..., a] + offsets[..., a]; ties go to the last tied action, on every device.  (..., A) -> (...,)

    `offsets` (a number, or one per action, from `deferral.calibration`) is the one knob.  `mask` (bool, True = can be asked)
    has one column per action or, with fewer columns, belongs to the last ones (the experts).  A score of NaN counts as -inf,
    so a row of NaN goes to the last action: a broken predictor defers.  Where every action is masked the result is -1.

    Mao, Mohri, Zhong, "Theoretically Grounded Loss Functions and Algorithms for Score-Based Multi-Class Abstention"
    (AISTATS 2024), section 2: abstain iff the abstain score is at least every class score.
    """
    require_floating("scores", scores)
    if isinstance(offsets, Tensor) and offsets.dim() > 0 and offsets.shape[-1] != scores.shape[-1]:
        raise ValueError(f"one offset per action: scores {tuple(scores.shape)}, offsets {tuple(offsets.shape)}")
    values = lift(scores) + offsets
    values = values.where(~values.isnan(), -torch.inf)
    if mask is not None:
        mask = action_mask(scores, mask)
        values = values.where(mask, -torch.inf)
    best = values == values.amax(dim=-1, keepdim=True)
    if mask is not None:
        best = best & mask
    positions = torch.arange(values.shape[-1], device=values.device)
    return positions.where(best, -1).amax(dim=-1)


@numpy_or_torch
def decide_pair(scores: Tensor, rejector: Tensor, offset: float = 0.0) -> Tensor:
    """Predictor-rejector rule: answer argmax of the K class scores iff r > offset, else abstain (action K).

    (..., K), (...,) -> (...,).  r = offset abstains, and so does a row of NaN.  Mao, Mohri, Zhong, "Predictor-Rejector
    Multi-Class Abstention" (ALT 2024), eq. 1.
    """
    require_floating("scores", scores)
    require_rejector(rejector, scores.shape[:-1])
    return decide(scores).where((rejector > offset) & ~scores.isnan().all(dim=-1), scores.shape[-1])


@numpy_or_torch
def deferral_margin(scores: Tensor, *, num_own: int, mask: Tensor | None = None) -> Tensor:
    """Best expert score minus best own score; `decide` defers iff it is >= 0.  (..., A) -> (...,)

    `num_own` is K in the single stage and 1 in the two-stage form.  -inf where nobody can be asked: every expert masked, or at
    -inf, even where the own score is -inf or NaN as well (`decide`, which is not told who is an expert, sees a tie there).
    """
    require_tensor("scores", scores)
    require_num_own(scores, num_own)
    values = lift(scores)
    values = values.where(~values.isnan(), -torch.inf)
    if mask is not None:
        mask = action_mask(scores, mask, num_own)
        values = values.where(mask, -torch.inf)
    margin = values[..., num_own:].amax(dim=-1) - values[..., :num_own].amax(dim=-1)
    # -inf on both sides is a tie: of a row of NaN a broken predictor asks for help.
    margin = margin.where(~margin.isnan(), 0.0)
    can_ask = ~scores[..., num_own:].isneginf()
    if mask is not None:
        can_ask = can_ask & mask[..., num_own:]
    return margin.where(can_ask.any(dim=-1), -torch.inf)


@numpy_or_torch
def margin_levels(margin: Tensor, size: Tensor | None = None) -> Tensor:
    """The rank of every margin, 0 for the largest; margins that differ by float64 rounding alone share one.  (N,), (N,) -> (N,)

    0.8 - 0.7 and 0.3 - 0.2 are one margin.  `size` is how large the scores are that each margin is the difference of: two
    margins are one level within 2 eps times the sum of their sizes.  Without it the size is |margin|, but the median at least,
    of those that no mask by a number (finfo.min, -1e9) has made.
    A level starts at its largest margin and reaches no further than that, however many margins lie close together in a row.
    """
    if margin.dim() != 1 or (size is not None and size.shape != margin.shape):
        raise ValueError(
            f"margin, size: expected one number per row of each, (N,), got {tuple(margin.shape)}"
            + ("" if size is None else f" and {tuple(size.shape)}")
        )
    margin = margin.double()
    finite = margin.isfinite()
    if size is None:
        size = margin.abs().where(finite, 0.0)
        size = size.clamp(min=float(_unmasked(size[finite]).median())) if bool(finite.any()) else size
    falling, order = margin.sort(descending=True)
    rounding = 2 * torch.finfo(torch.float64).eps * size.double()[order]
    starts = torch.ones_like(falling, dtype=torch.bool)
    starts[1:] = falling[:-1] - falling[1:] > rounding[:-1] + rounding[1:]
    first = torch.arange(len(falling), device=falling.device).where(starts, 0).cummax(dim=0).values
    steps = ((falling[first] - falling) / (rounding[first] + rounding)).nan_to_num(0.0).floor()
    starts[1:] |= steps[1:] != steps[:-1]
    rank = starts.long().cumsum(dim=0) - 1
    return torch.empty_like(rank).index_copy(0, order, rank)


def _unmasked(size: Tensor) -> Tensor:
    """Without the sizes of masks by a number: those from 1e8 on, if they lie a thousand times above all others.  (N,) -> (M,)"""
    far = size >= 1e8
    masks = bool(far.any()) and not bool(far.all()) and bool(size[far].min() > 1e3 * size[~far].max())
    return size[~far] if masks else size


@numpy_or_torch
def oracle(costs: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The cheapest action of every row; ties keep the first, the own prediction.  (..., A) -> (...,)

    A cost of NaN is never the cheapest.  Where every action is masked the result is -1, as that of `decide`.
    """
    require_tensor("costs", costs)
    require_columns("costs", costs)
    known = costs.where(~costs.isnan(), torch.inf)
    if mask is not None:
        mask = action_mask(costs, mask)
        known = known.where(mask, torch.inf)
    positions = torch.arange(costs.shape[-1], device=costs.device)
    cheapest = known == known.amin(dim=-1, keepdim=True)
    if mask is None:
        return positions.where(cheapest, costs.shape[-1]).amin(dim=-1)
    first = positions.where(cheapest & mask, costs.shape[-1]).amin(dim=-1)
    return first.where(mask.any(dim=-1), -1)


@numpy_or_torch
def chow_scores(probabilities: Tensor, cost: Tensor | float) -> Tensor:
    """[p_1 .. p_K, 1 - cost]: `decide` on it abstains iff max p <= 1 - cost (Chow 1970).  (..., K) -> (..., K+1)

    With one expert of expected cost `cost`, the last action asks that expert.  Reads the values: raw scores are refused.
    """
    check_probabilities(probabilities)
    require_columns("probabilities", probabilities)
    require_cost("probabilities", probabilities.shape[:-1], cost)
    if isinstance(cost, Tensor):
        inside = (cost >= 0) & (cost <= 1)
        if not bool(inside.all()):
            raise ValueError(
                f"cost: expected numbers in [0, 1], in units of one error, got {cost[~inside].flatten()[0].item():g}"
            )
    threshold = torch.as_tensor(1 - cost, dtype=probabilities.dtype, device=probabilities.device)
    return torch.cat([probabilities, threshold.expand(probabilities.shape[:-1]).unsqueeze(-1)], dim=-1)
