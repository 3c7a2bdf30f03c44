"""Losses whose gradient is a closed form: value and gradient at once, in blocks of rows.

Autograd would keep and visit several more tables of the size of the scores, and take every exponential twice.  `vmap` and its
relatives, as gradients of costs, need what autograd can see: `has_closed_form` says where the plain formula is due.
"""

import math
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

__all__ = ["closed_form", "has_closed_form", "readable"]

# Numbers in a temporary table, at most.  On a CPU it stays in the cache.
BLOCK = {"cpu": 3 << 18}

# (scores, weights, targets, ceiling, descent, losses): fills the last two, `descent` with minus the gradient.  Returns what every
# row of `descent` is still to be multiplied by, (rows, 1), in all blocks; or None.
Block = Callable[[Tensor, Tensor, Any, Any, Tensor, Tensor], Tensor | None]


def readable(tensor: Tensor) -> bool:
    """Whether a look at the values waits for nobody and breaks no graph: a plain tensor on a CPU that nothing traces."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def has_closed_form(*constants: Tensor | float | None, compiled: bool = False) -> bool:
    """Whether the scores alone are differentiated, once, by eager autograd, or by a compiler that is welcome."""
    if torch._C._are_functorch_transforms_active() or (torch.compiler.is_compiling() and not compiled):
        return False
    return not any(isinstance(constant, Tensor) and constant.requires_grad for constant in constants)


def closed_form(
    block: Block, scores: Tensor, weights: Tensor, targets: Tensor | None, ceiling: Tensor | None, *, columns: int
) -> Tensor:
    """The losses that `block` computes, differentiable in the scores.  (..., A), (..., W), (..., 1), (..., 1) -> (...,)

    `columns` is how wide the temporaries of a block are.
    """
    return _ClosedForm.apply(block, columns, scores, weights, targets, ceiling)


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, block: Block, columns: int, scores: Tensor, weights: Tensor, targets: Tensor | None, ceiling: Tensor | None
    ) -> Tensor:
        descent = torch.empty_like(scores, memory_format=torch.contiguous_format)
        losses = scores.new_empty((*scores.shape[:-1], 1))
        rows = losses.numel()
        tables: Sequence[Any] = (scores, weights, targets, ceiling, descent, losses)
        if scores.dim() != 2:
            tables = [table if table is None else table.reshape(rows, table.shape[-1]) for table in tables]
        count = 1 if torch.compiler.is_compiling() else math.ceil(rows * columns / BLOCK.get(scores.device.type, 1 << 24))
        if count <= 1:
            scale = block(*tables)
        else:
            blocks = zip(*(repeat(None) if table is None else table.chunk(count) for table in tables), strict=False)
            scales = [scale for parts in blocks if (scale := block(*parts)) is not None]
            scale = torch.cat(scales) if scales else None
        ctx.save_for_backward(descent, None if scale is None else scale.view_as(losses))
        return losses.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the loss has a closed gradient, which cannot be differentiated again: leave create_graph=True out, or use "
                "torch.func (grad, hessian), under which it is the plain formula"
            )
        descent, scale = ctx.saved_tensors
        down = -gradient.unsqueeze(-1)
        return None, None, descent * (down if scale is None else down.mul_(scale)), None, None, None
