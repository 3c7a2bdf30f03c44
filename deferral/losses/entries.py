"""Single entries of the rows of a table, written so that the compiler fuses them into one loop with the rest of the row."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deferral.losses.closed_form import has_closed_form
from deferral.numerics import transformed

__all__ = ["entry", "hits_of", "one_hot", "two_highest", "with_target"]


def entry(table: Tensor, index: Tensor) -> Tensor:
    """The number at an index of each row; an index outside of it is an error.  (..., A), (..., 1) -> (..., 1)"""
    if torch.compiler.is_compiling() and has_closed_form(compiled=True):
        return _Entry.apply(table, index)
    return table.gather(-1, index)


def hits_of(index: Tensor, width: int) -> Tensor:
    """True at the index of each row.  (..., 1) -> (..., width) bool"""
    return torch.arange(width, device=index.device) == index


def one_hot(targets: Tensor, width: int) -> Tensor:
    """1 at the target of each row; a target outside of 0..width-1 is an error.  (...,) -> (..., width)

    `F.one_hot`, but for `torch.func`, under which that reads its values.
    """
    if not transformed():
        return F.one_hot(targets, width)
    index = targets.unsqueeze(-1)
    nothing = torch.zeros(width, dtype=torch.int64, device=targets.device).expand(*targets.shape, width).gather(-1, index)
    return hits_of(index, width) + nothing


def with_target(targets: Tensor, at_target: Tensor | float, last: Tensor, width: int) -> Tensor:
    """Rows of `at_target` at the target, `last` in the last columns, 0 elsewhere.  (..., 1), (..., W) -> (..., width)"""
    return torch.where(hits_of(targets, width), at_target, F.pad(last, (width - last.shape[-1], 0)))


def two_highest(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The highest number of each row, the next one, and where the highest stands.  (..., A) -> (..., 1), (..., 1), (..., A) bool

    Two sweeps over the row: on a GPU `topk` takes ten times as long.
    """
    first = table.detach().argmax(dim=-1, keepdim=True)
    is_first = hits_of(first, table.shape[-1])
    others = table.masked_fill(is_first, -torch.inf)
    return entry(table, first), entry(others, others.detach().argmax(dim=-1, keepdim=True)), is_first


class _Entry(torch.autograd.Function):
    """A gather whose gradient a compiler can compute in the loop that reads it, where a scatter needs a table of its own."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.width = table.shape[-1]
        return table.gather(-1, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return torch.where(hits_of(index, ctx.width), gradient, 0.0), None
