"""Rows whose target is `ignore_index`: they cost 0 and teach nothing."""

from torch import Tensor

from deferral.numerics import readable

__all__ = ["costs_that_count", "counted", "without_ignored"]


def without_ignored(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Targets that may be looked up, and which rows count; probabilities all count (None)."""
    if targets.is_floating_point():
        return targets, None
    counts = targets != ignore_index
    if readable(targets) and counts.all():
        return targets, None
    return targets.where(counts, 0), counts


def costs_that_count(costs: Tensor, counts: Tensor | None, *, per_expert: bool = True) -> Tensor:
    """Costs, 0 in rows that do not count: what is not labelled has no cost, NaN say, and a gradient of 0 times NaN is NaN.

    (..., E), or (...,) where not `per_expert`.
    """
    if counts is None or not costs.is_floating_point():
        return costs
    return costs.where(counts.unsqueeze(-1) if per_expert else counts, 0.0)


def counted(losses: Tensor, counts: Tensor | None) -> Tensor:
    """The losses of the rows that count, 0 elsewhere.  (...,), (...,) -> (...,)"""
    return losses if counts is None else losses.where(counts, 0.0)
