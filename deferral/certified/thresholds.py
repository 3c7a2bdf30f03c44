"""Candidates for a certificate, and the rule that is served with it."""

from numbers import Real

import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch
from deferral.certified.risks import check_margin
from deferral.decision import decide, deferral_margin, margin_levels
from deferral.validation import action_mask, check_mask, require_floating, require_number

__all__ = ["decide_at", "level_edges", "threshold_grid"]


@numpy_or_torch
def decide_at(scores: Tensor, threshold: float | Tensor, *, num_own: int, mask: Tensor | None = None) -> Tensor:
    """Defer iff `deferral_margin(scores.double(), num_own, mask=mask)` >= threshold, what a certificate is about.  -> (...,)

    (..., A), float or (...,) -> (...,).  Deferred rows ask the best expert, the others take the best own action, with the ties
    of `decide`.  A row where nobody can be asked (masked, or every expert at -inf) keeps its own answer at every threshold,
    -inf included.  One threshold per row, float64, serves groups: `thresholds[groups]`.
    """
    require_floating("scores", scores)
    margin = deferral_margin(scores.double(), num_own=num_own, mask=mask)
    experts = None
    if mask is not None:
        mask = action_mask(scores, mask, num_own)
        check_mask(mask, num_own, scores.shape[-1])
        experts = mask[..., num_own:]
    deferred = (margin >= _checked_threshold(threshold, margin)) & ~margin.isneginf()
    return (decide(scores[..., num_own:], mask=experts) + num_own).where(deferred, decide(scores[..., :num_own]))


@numpy_or_torch
def threshold_grid(margin: Tensor, size: int, *, coverage: tuple[float, float] = (0.1, 1.0)) -> Tensor:
    """Rising thresholds that keep evenly spaced shares of some OTHER rows than those to be certified.  (M,) -> (T,)

    Each lies half way between two margins that differ by more than rounding; at most `size`, fewer where margins tie.  A share
    of 1 is +inf, never deferring.  A selective risk needs a lowest coverage at which enough rows are kept; see `certify`.
    """
    check_margin(margin)
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    try:
        lowest, highest = coverage
    except (TypeError, ValueError):
        raise TypeError(f"coverage: expected two numbers, the lowest and the highest, got {coverage!r}") from None
    for end in (lowest, highest):
        require_number("coverage", end)
    if not 0.0 < lowest <= highest <= 1.0:
        raise ValueError(f"coverage: expected 0 < lowest <= highest <= 1, got {coverage}")
    level, edges = level_edges(margin)
    keeps = level.bincount().cumsum(0).double() / len(margin)
    wanted = torch.linspace(float(lowest), float(highest), size, dtype=torch.float64, device=edges.device)
    return edges[1:][torch.searchsorted(keeps, wanted - 1e-9)].unique()


def level_edges(margin: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's level by rising margin, and rising thresholds: the k-th keeps exactly the k lowest levels.  -> (N,), (L+1,)

    On the CPU.  Half way between two levels, from -inf to +inf.
    """
    margin = margin.detach().double().cpu()
    falling = margin_levels(margin)
    count = int(falling.max()) + 1 if len(margin) else 0
    level = count - 1 - falling
    lowest, highest = (
        margin.new_empty(count).scatter_reduce(0, level, margin, reduce, include_self=False) for reduce in ("amin", "amax")
    )
    below, above = highest[:-1], lowest[1:]
    between = below / 2 + above / 2
    # Between neighbouring numbers half way is one of them; a threshold that equals a margin defers it.
    between = between.where((between > below) | below.isneginf(), above)
    ends = margin.new_tensor([-torch.inf, torch.inf])
    return level, torch.cat([ends[:1], between, ends[1:]])[: count + 1]


def _checked_threshold(threshold: float | Tensor, margin: Tensor) -> Tensor:
    if isinstance(threshold, Tensor):
        if threshold.dtype != torch.float64:
            raise TypeError(
                f"threshold: expected a number or a float64 tensor, got {threshold.dtype}; a rounded threshold is another one: "
                "torch.tensor(thresholds, dtype=torch.float64)"
            )
        if threshold.shape not in ((), margin.shape):
            raise ValueError(
                f"threshold: expected one number, or one per row of shape {tuple(margin.shape)}, got {tuple(threshold.shape)}"
            )
    elif not isinstance(threshold, Real):
        raise TypeError(
            f"threshold: expected a number or a float64 tensor, got {type(threshold).__name__}; convert an array with "
            "torch.from_numpy"
        )
    value = torch.as_tensor(threshold, dtype=torch.float64, device=margin.device)
    if bool(value.isnan().any()):
        raise ValueError("threshold: expected a number or an infinity, got NaN")
    return value
