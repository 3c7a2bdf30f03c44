"""Losses whose gradient is a closed form: value and gradient at once, in blocks of rows.

Autograd would keep and visit several more tables of the size of the scores, and take every exponential twice.  `vmap` and its
relatives, as gradients of costs, need what autograd can see: `has_closed_form` says where the plain formula is due.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from deferral.numerics import transformed

__all__ = ["closed_form", "has_closed_form", "in_blocks", "refuse_second_derivatives"]

# Numbers in the temporary tables of a block: on a CPU they stay in the cache; elsewhere many small blocks would wait for Python,
# and together they are as many as the scores, or these few.
CPU_BLOCK = 3 << 18
_LEAST_BLOCK = 1 << 24

# (scores, *tables, descent, losses): fills the last two, `descent` with minus the gradient.  Returns what every row of `descent`
# is still to be multiplied by, (rows, 1), in all blocks; or None.
Block = Callable[..., Tensor | None]


def has_closed_form(*constants: Tensor | float | None, compiled: bool = False) -> bool:
    """Whether the scores alone are differentiated, once, by eager autograd, or by a compiler that is welcome."""
    if transformed() or (torch.compiler.is_compiling() and not compiled) or _exporting():
        return False
    return not any(isinstance(constant, Tensor) and constant.requires_grad for constant in constants)


def _exporting() -> bool:
    """An exported program keeps no backward pass that is not autograd's own."""
    # torch before 2.7 has no is_exporting.
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def _is_last(gradient: Tensor) -> bool:
    """Whether the graph is freed after this backward pass, which is eager and of one gradient, not of a batch of them."""
    if torch.compiler.is_compiling() or transformed() or torch._C._functorch.is_legacy_batchedtensor(gradient):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def refuse_second_derivatives() -> None:
    """RuntimeError where a backward pass is asked for a graph of its own, which it would not record."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the loss has a closed gradient, which cannot be differentiated again: leave create_graph=True out, or use "
            "torch.func (grad, hessian), under which it is the plain formula"
        )


def closed_form(block: Block, scores: Tensor, *tables: Tensor | None, columns: int) -> Tensor:
    """The losses that `block` computes, differentiable in the scores.  (..., A), (..., W) or None each -> (...,)

    `columns` is how wide the temporaries of a block are.
    """
    # Squeezed here and not in `forward`: callers may not modify in place a view that an autograd function has returned.
    return _ClosedForm.apply(block, columns, scores, *tables).squeeze(-1)


def in_blocks(formula: Callable[..., Tensor], scores: Tensor, *tables: Tensor, columns: int, fixed: bool = True) -> Tensor:
    """formula(scores, *tables), differentiated by autograd block after block, so that it never keeps tables of all rows.

    (..., A), (..., W) each -> (...,); the formula, (rows, A), (rows, W) each -> (rows,), treats every row alike.  One that is
    not `fixed` may hold parameters of its own, whose gradient no block would see.
    """
    if not fixed or not has_closed_form(*tables):
        return formula(scores, *tables)
    batch = scores.shape[:-1]
    tables = tuple(table.expand(*batch, table.shape[-1]) for table in tables)
    if not (torch.is_grad_enabled() and scores.requires_grad):
        return closed_form(partial(_valued, formula=formula), scores, *tables, columns=columns)
    return closed_form(partial(_differentiated, formula=formula), scores, *tables, columns=columns)


def _valued(scores: Tensor, *rest: Tensor, formula: Callable[..., Tensor]) -> None:
    *tables, _, losses = rest
    losses.copy_(formula(scores, *tables).unsqueeze(-1))


def _differentiated(scores: Tensor, *rest: Tensor, formula: Callable[..., Tensor]) -> None:
    *tables, descent, losses = rest
    with torch.enable_grad():
        leaf = scores.detach().requires_grad_()
        values = formula(leaf, *tables)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    losses.copy_(values.detach().unsqueeze(-1))
    torch.neg(gradient, out=descent)


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        # *given and not one name each: without a gradient to take, torch.compile calls a `forward` whose parameters are as many
        # as its arguments without the context.
        block, columns, scores, *others = given
        descent = torch.empty_like(scores, memory_format=torch.contiguous_format)
        losses = scores.new_empty((*scores.shape[:-1], 1))
        rows = losses.numel()
        tables: Sequence[Any] = (scores, *others, descent, losses)
        if scores.dim() != 2:
            tables = [table if table is None else table.reshape(rows, table.shape[-1]) for table in tables]
        block_size = CPU_BLOCK if scores.device.type == "cpu" else max(_LEAST_BLOCK, scores.numel())
        count = 1 if torch.compiler.is_compiling() else math.ceil(rows * columns / block_size)
        if count <= 1:
            scale = block(*tables)
        else:
            blocks = zip(*(repeat(None) if table is None else table.chunk(count) for table in tables), strict=False)
            scales = [scale for parts in blocks if (scale := block(*parts)) is not None]
            scale = torch.cat(scales) if scales else None
        ctx.save_for_backward(descent, None if scale is None else scale.view_as(losses))
        ctx.others = len(others)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        descent, scale = ctx.saved_tensors
        down = -gradient
        if scale is not None:
            down.mul_(scale)
        # In the last backward pass nobody needs the saved table again: multiplying in place saves a second one.
        product = descent.mul_(down) if _is_last(gradient) else descent * down
        return None, None, product, *repeat(None, ctx.others)
