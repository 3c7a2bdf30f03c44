"""Judge: figures of the actions that were taken.  Curves over a threshold are in `deferral.curves`.

A per-row figure is one number per row, NaN where the row has none (it was handed to nobody, or the answer is not known).
`average` takes its mean over the rows that have one; `deferral.intervals` gives its interval and paired differences.
Weights count rows: weight 2 is the same as the row twice, weight 0 as leaving it out; leading dimensions of the weights (as
the bootstrap has them) become leading dimensions of the result.  NumPy or torch in and out.
"""

import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch
from deferral.costs import pick
from deferral.validation import action_mask, check_weights, require_indices, require_num_own

__all__ = ["average", "correct", "deferral_cost", "kept", "load", "selective_risk", "system_figures"]


@numpy_or_torch
def deferral_cost(costs: Tensor, actions: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The cost of the action taken: the deferral loss itself.  (..., A), (...,) -> (...,)

    With a mask (..., A) or (..., E), the cost of an action that is not known is NaN, and so is that of action -1 (nobody's).  A
    mean over what is left leans towards the own answers, which are always known: compare on rows where all is.
    """
    return _known(pick(costs, actions.clamp(min=0)), costs, actions, mask)


@numpy_or_torch
def correct(answers: Tensor, targets: Tensor, actions: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """1 where the answer of whoever was asked is right, 0 where it is wrong.  (..., A), (...,), (...,) -> (...,)

    `answers` (..., A) has one column per action, class indices.  NaN where there is no answer: it is -1 (abstaining) or NaN, the
    mask (..., A) or (..., E) says that it is not known, or the action is -1 (nobody's).  The average is the system accuracy.
    """
    if targets.shape != actions.shape:
        raise ValueError(f"one target per row: actions {tuple(actions.shape)}, targets {tuple(targets.shape)}")
    answer = pick(answers, actions.clamp(min=0))
    # Whole numbers as int64: 255 is a class of uint8 answers, and -1 is not.
    given = ((answer if answer.is_floating_point() else answer.long()) != -1) & ~answer.isnan()
    right = (answer == targets).to(torch.get_default_dtype()).where(given, torch.nan)
    return _known(right, answers, actions, mask)


@numpy_or_torch
def kept(actions: Tensor, *, num_own: int) -> Tensor:
    """1 where an own action is taken, else 0; the average is the coverage.  (...,) -> (...,)

    Action -1, which `decide` gives where every action is masked, is nobody's: 0.
    """
    require_indices("actions", actions)
    if num_own < 0:
        raise ValueError(f"num_own: expected a number of actions >= 0, got {num_own}")
    return ((actions >= 0) & (actions < num_own)).to(torch.get_default_dtype())


@numpy_or_torch
def load(actions: Tensor, *, num_own: int, num_experts: int) -> Tensor:
    """1 in the column of the expert who is asked; the average is each expert's share of the rows.  (...,) -> (..., E)"""
    require_indices("actions", actions)
    if num_own < 0 or num_experts < 0:
        raise ValueError(f"num_own, num_experts: expected numbers of actions >= 0, got {num_own} and {num_experts}")
    experts = torch.arange(num_own, num_own + num_experts, device=actions.device)
    return (actions.unsqueeze(-1) == experts).to(torch.get_default_dtype())


@numpy_or_torch
def average(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over the rows that have a figure (are not NaN); NaN where no row has one.  (N, ...), (..., N) -> (..., ...)"""
    if values.dim() == 0 or len(values) == 0:
        raise ValueError(f"values: expected at least one row, got shape {tuple(values.shape)}")
    figures = values.double()
    if bool(figures.isinf().any()):
        raise ValueError("values: expected numbers, or NaN where a row has none, got infinity")
    weights = check_weights(weights, figures)
    known = ~figures.isnan()
    flat, known = figures.where(known, 0.0).reshape(len(values), -1), known.double().reshape(len(values), -1)
    total, mass = weights @ flat, weights @ known
    return (total / mass).where(mass > 0, torch.nan).reshape((*weights.shape[:-1], *values.shape[1:]))


@numpy_or_torch
def selective_risk(loss: Tensor, keep: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean own loss on the rows that are kept; NaN where none is.  (N,), (N,), (..., N) -> (...,)

    `keep` is bool, or 1 and 0 as from `kept`.  Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks"
    (NeurIPS 2017), eq. 2.
    """
    if loss.shape != keep.shape or loss.dim() != 1:
        raise ValueError(f"loss, keep: expected two vectors of one length, got {tuple(loss.shape)} and {tuple(keep.shape)}")
    if not bool(((keep == 0) | (keep == 1)).all()):
        raise ValueError("keep: expected bool, or 1 and 0 in each row")
    return average(loss.double().where(keep.bool(), torch.nan), weights)


@numpy_or_torch
def system_figures(
    costs: Tensor,
    answers: Tensor,
    targets: Tensor,
    actions: Tensor,
    *,
    num_own: int,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """All figures of one system.  (N, A) costs and answers, (N,) targets and actions, (..., N) weights -> name: (...,)

    deferral cost; system accuracy (of the rows that get an answer); coverage (share that the own predictor answers); answered
    (share that gets an answer); accuracy where kept, accuracy where deferred (NaN where there is no such row), selective risk
    (1 - accuracy where kept); load, each expert's share of the rows (..., E).
    """
    if costs.shape != answers.shape or costs.dim() != 2:
        raise ValueError(
            f"costs, answers: expected a column of each for every action, (N, A), got {tuple(costs.shape)}, "
            f"{tuple(answers.shape)}; of more dimensions every place is a row: .flatten(0, -2), .flatten() of targets and actions"
        )
    require_num_own(costs, num_own)
    right = correct(answers, targets, actions, mask=mask)
    own = kept(actions, num_own=num_own).bool()
    accuracy_kept = average(right.where(own, torch.nan), weights)
    return {
        "deferral cost": average(deferral_cost(costs, actions, mask=mask), weights),
        "system accuracy": average(right, weights),
        "coverage": average(own.double(), weights),
        "answered": average((~right.isnan()).double(), weights),
        "accuracy where kept": accuracy_kept,
        "accuracy where deferred": average(right.where(~own, torch.nan), weights),
        "selective risk": 1 - accuracy_kept,
        "load": average(load(actions, num_own=num_own, num_experts=answers.shape[-1] - num_own), weights),
    }


def _known(values: Tensor, table: Tensor, actions: Tensor, mask: Tensor | None) -> Tensor:
    known = actions >= 0
    if mask is not None:
        known = known & pick(action_mask(table, mask).expand(table.shape), actions.clamp(min=0))
    return values.where(known, torch.nan)
