"""Price: answers, targets and prices become cost tables (..., A), in units of one error.

A cost table has one column per action.  `alpha` weighs an expert's error and `price` (beta in the papers) is what asking
costs: `cost_j = alpha_j * error_j + price_j`.  NumPy or torch in and out.
"""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch, tensor_of
from deferral.numerics import readable
from deferral.validation import check_costs, check_targets, require_floating, require_indices, require_tensor

__all__ = ["error_costs", "pick", "single_stage_costs", "squared_costs"]

PerExpert = float | Sequence[float] | Tensor


@overload
def error_costs(
    answers: Any, targets: Any, *, alpha: PerExpert = ..., price: PerExpert = ..., ceiling: float = ...
) -> Tensor: ...
@overload
def error_costs(
    answers: Any, targets: Any, *, alpha: PerExpert = ..., price: PerExpert = ..., ceiling: float = ..., missing: int
) -> tuple[Tensor, Tensor]: ...
@numpy_or_torch
def error_costs(
    answers: Tensor,
    targets: Tensor,
    *,
    alpha: PerExpert = 1.0,
    price: PerExpert = 0.0,
    ceiling: float = 1.0,
    missing: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """cost_j = alpha_j * 1[answer_j != target] + price_j.  (..., A), (...,) or (..., K) -> (..., A)

    `answers` are class indices, one column per expert (put the own predictor's answers first for two-stage deferral).
    `targets` are class indices, or probabilities (..., K), which give the expected cost.  `alpha` and `price` are numbers or
    one number per column.  With `missing=-1`, the answers equal to -1 are unknown, and the result is `(costs, mask)`: mask is
    True where the answer is known, and an unknown cost is 0.  `pick` would take it for free: judge with
    `deferral.metrics.deferral_cost(costs, actions, mask=mask)`, which is NaN there.

    `ceiling` is the largest cost that can occur, max(alpha + price): pass the same one to the loss.  Raises ValueError where
    a cost can exceed it, since the weight `ceiling - cost` of the loss would be negative.

    Cost structure: Mao, Mohri, Zhong, "Principled Approaches for Learning to Defer with Multiple Experts" (2024), section 2.
    """
    require_tensor("answers", answers)
    require_tensor("targets", targets)
    if answers.is_floating_point() or answers.dtype == torch.bool:
        raise TypeError(
            f"answers: expected class indices of an integer dtype, got {answers.dtype}; for answers that are real numbers "
            "use squared_costs"
        )
    _check_columns("answers", answers, targets.shape[:-1] if targets.is_floating_point() else targets.shape)
    if targets.is_floating_point():
        check_targets(targets, targets.shape[-1])
    elif targets.numel() and int(targets.min()) < 0:
        raise ValueError(
            f"targets: expected class indices, got {int(targets.min())}; a row without a label has no costs: leave it out, or, "
            "where the loss will ignore it, give it any label, as in targets.clamp(min=0)"
        )
    # Half precision would swallow small prices.
    dtype = torch.promote_types(targets.dtype, torch.float32) if targets.is_floating_point() else torch.get_default_dtype()
    alpha_row, price_row = _per_expert(alpha, "alpha", answers, dtype), _per_expert(price, "price", answers, dtype)
    check_costs(alpha_row, ceiling=None, name="alpha")
    check_costs(price_row, ceiling=None, name="price")
    check_costs(alpha_row + price_row, ceiling=ceiling)
    # 255 is a class of uint8 answers.
    answers = answers.long()
    known = None if missing is None else answers != missing
    num_classes = targets.shape[-1] if targets.is_floating_point() else None
    _check_answers(answers, num_classes, known)
    if targets.is_floating_point():
        error = 1 - targets.to(dtype).gather(-1, answers if known is None else answers.where(known, 0))
    else:
        error = (answers != targets.unsqueeze(-1)).to(dtype)
    costs = alpha_row * error + price_row
    return costs if known is None else (costs.where(known, 0.0), known)


@overload
def squared_costs(answers: Any, targets: Any, *, alpha: PerExpert = ..., price: PerExpert = ...) -> Tensor: ...
@overload
def squared_costs(
    answers: Any, targets: Any, *, alpha: PerExpert = ..., price: PerExpert = ..., missing: float
) -> tuple[Tensor, Tensor]: ...
@numpy_or_torch
def squared_costs(
    answers: Tensor,
    targets: Tensor,
    *,
    alpha: PerExpert = 1.0,
    price: PerExpert = 0.0,
    missing: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """cost_j = alpha_j * (answer_j - target)^2 + price_j.  (..., A), (...,) -> (..., A)

    With `missing` given (a number, or float("nan")), the answers equal to it are unknown, and the result is `(costs, mask)`
    with cost 0 where the mask is False.  Standardise the targets first: costs are compared with prices.

    Mao, Mohri, Zhong, "Regression with Multi-Expert Deferral" (ICML 2024), section 2.
    """
    require_tensor("answers", answers)
    require_tensor("targets", targets)
    # Half precision would swallow small prices, and square large errors to infinity.
    of_targets = torch.promote_types(targets.dtype, torch.float32) if targets.is_floating_point() else torch.get_default_dtype()
    answers = answers.to(torch.promote_types(answers.dtype, torch.float32) if answers.is_floating_point() else of_targets)
    targets = targets.to(torch.promote_types(targets.dtype, answers.dtype))
    _check_columns("answers", answers, targets.shape)
    alpha_row = _per_expert(alpha, "alpha", answers, answers.dtype)
    price_row = _per_expert(price, "price", answers, answers.dtype)
    check_costs(alpha_row, ceiling=None, name="alpha")
    check_costs(price_row, ceiling=None, name="price")
    known = None
    if missing is not None:
        known = ~(answers.isnan() if missing != missing else answers == missing)
        answers = answers.where(known, 0.0)
    costs = alpha_row * (answers - targets.unsqueeze(-1)).square() + price_row
    check_costs(costs, ceiling=None, mask=known)
    return costs if known is None else (costs.where(known, 0.0), known)


@numpy_or_torch
def single_stage_costs(targets: Tensor, expert_costs: Tensor, num_classes: int) -> Tensor:
    """The table [1 - one_hot(target), expert_costs] that single-stage deferral is judged on.  (...,), (..., E) -> (..., K+E)

    Action k < K answers class k and costs one error if it is wrong; action K + j asks expert j.  `targets` may be
    probabilities (..., K).  Reads the values.
    """
    require_floating("expert_costs", expert_costs)
    require_tensor("targets", targets)
    _check_columns("expert_costs", expert_costs, targets.shape[:-1] if targets.is_floating_point() else targets.shape)
    check_targets(targets, num_classes)
    hit = targets if targets.is_floating_point() else torch.nn.functional.one_hot(targets.long(), num_classes)
    return torch.cat([1 - hit.to(expert_costs.dtype), expert_costs], dim=-1)


@numpy_or_torch
def pick(table: Tensor, actions: Tensor) -> Tensor:
    """table[..., action]: the chosen action's answer or cost, as it stands in the table.  (..., A), (...,) -> (...,)

    A table with missing answers says nothing of them: `deferral.metrics.deferral_cost` and `correct` take its mask.
    """
    require_tensor("table", table)
    require_tensor("actions", actions)
    if table.shape[:-1] != actions.shape:
        raise ValueError(
            f"one action per row: table {tuple(table.shape)}, actions {tuple(actions.shape)}; actions come from decide(scores)"
        )
    require_indices("actions", actions)
    if readable(actions) and actions.numel() and not (int(actions.min()) >= 0 and int(actions.max()) < table.shape[-1]):
        raise ValueError(
            f"actions: expected columns 0..{table.shape[-1] - 1} of the table, got {int(actions.min())}..{int(actions.max())}; "
            "abstaining needs a column of its own (its cost, and the answer -1), and -1 is nobody's action"
        )
    return table.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)


def _per_expert(value: PerExpert, name: str, answers: Tensor, dtype: torch.dtype) -> Tensor:
    row = tensor_of(name, value).to(answers.device, dtype)
    if row.dim() > 0 and (row.shape[-1] != answers.shape[-1] or row.dim() > answers.dim()):
        raise ValueError(
            f"{name}: expected one number, or one per column of answers {tuple(answers.shape)}, got shape {tuple(row.shape)}; "
            "did you leave out the own predictor's column (its price is usually 0)?"
        )
    return row


def _check_columns(name: str, table: Tensor, rows: torch.Size) -> None:
    if table.dim() == 0 or table.shape[:-1] != rows:
        raise ValueError(
            f"{name}: expected shape ({', '.join(map(str, (*rows, 'A')))}), one column per expert, got {tuple(table.shape)}; "
            f"for a single expert use {name}.unsqueeze(-1), and targets have no axis of experts"
        )


def _check_answers(answers: Tensor, num_classes: int | None, known: Tensor | None) -> None:
    given = answers if known is None else answers[known]
    if given.numel() == 0:
        return
    low, high = int(given.min()), int(given.max())
    if low < 0:
        raise ValueError(
            f"answers: expected class indices, got {low}; if that means 'no answer', pass missing={low} and use the mask"
        )
    if num_classes is not None and high >= num_classes:
        raise ValueError(f"answers: expected class indices in 0..{num_classes - 1}, got {high}")
