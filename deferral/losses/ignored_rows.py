"""Rows whose target is `ignore_index`: they cost 0 and teach nothing."""

from torch import Tensor

from deferral.numerics import readable

__all__ = ["counted", "without_ignored"]


def without_ignored(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Targets that may be looked up, and which rows count; probabilities all count (None)."""
    if targets.is_floating_point():
        return targets, None
    counts = targets != ignore_index
    if readable(targets) and counts.all():
        return targets, None
    return targets.where(counts, 0), counts


def counted(losses: Tensor, counts: Tensor | None) -> Tensor:
    """The losses of the rows that count, 0 elsewhere.  (...,), (...,) -> (...,)"""
    return losses if counts is None else losses.where(counts, 0.0)
