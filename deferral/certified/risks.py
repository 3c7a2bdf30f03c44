"""What can be promised: the mean loss of kept answers, the mean cost of the system, the share of rows deferred."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deferral.arrays import tensor_of
from deferral.validation import above_ceiling, check_costs, require_number, require_tensor

__all__ = ["DeferralRate", "Risk", "SelectiveRisk", "SystemRisk", "check_groups", "check_margin", "checked_risks", "of_rows"]


@dataclass(frozen=True)
class SelectiveRisk:
    """E[loss | kept] <= at_most: the mean loss of the own answers that are kept, in [0, ceiling].  (N,)

    A bool loss (`answers != targets`) is tested by the exact binomial tail, a floating one by Hoeffding-Bentkus.  `ceiling` is
    the largest loss that any row can have; a squared error has none, and is promised when it is clipped at one.
    """

    loss: Tensor
    at_most: float
    ceiling: float = 1.0


@dataclass(frozen=True)
class SystemRisk:
    """E[own_cost if kept else deferred_cost] <= at_most: the mean cost of the system, in [0, ceiling].  (N,), (N,)

    `deferred_cost` is what the expert would cost who is asked where the row is deferred.  Two bool tensors (wrong or not) are
    tested by the exact binomial tail, floating costs by Hoeffding-Bentkus.  Not monotone in the threshold where an expert can
    be wrong on rows that the own predictor gets right.
    """

    own_cost: Tensor
    deferred_cost: Tensor
    at_most: float
    ceiling: float = 1.0


@dataclass(frozen=True)
class DeferralRate:
    """P(deferred) <= at_most, tested by the exact binomial tail."""

    at_most: float


Risk = SelectiveRisk | SystemRisk | DeferralRate


def checked_risks(margin: Tensor, risks: Risk | Sequence[Risk]) -> list[Risk]:
    """The risks with tensors on the CPU, of one length, in range; where nobody can be asked, deferring costs the own answer."""
    check_margin(margin)
    given = list(risks) if isinstance(risks, list | tuple) else [risks]
    if not given:
        raise ValueError("risks: expected at least one risk, got none")
    checked: list[Risk] = []
    for risk in given:
        if not isinstance(risk, Risk):
            raise TypeError(f"risks: expected SelectiveRisk, SystemRisk or DeferralRate, got {type(risk).__name__}")
        ceiling = 1.0 if isinstance(risk, DeferralRate) else risk.ceiling
        require_number("ceiling", ceiling)
        require_number("at_most", risk.at_most)
        if not 0.0 < ceiling < float("inf"):
            raise ValueError(
                f"ceiling: expected the largest loss that any row can have, a finite number > 0, got {ceiling}; where there is "
                "none, clip the losses at one"
            )
        if not 0.0 < risk.at_most < ceiling:
            raise ValueError(f"at_most: expected a level between 0 and the largest possible, {ceiling:g}, got {risk.at_most}")
        if isinstance(risk, SelectiveRisk):
            risk = replace(risk, loss=_checked_losses("loss", tensor_of("loss", risk.loss), margin, ceiling))
        elif isinstance(risk, SystemRisk):
            own = _checked_losses("own_cost", tensor_of("own_cost", risk.own_cost), margin, ceiling)
            alone = margin.cpu().isneginf()
            deferred = tensor_of("deferred_cost", risk.deferred_cost).cpu()
            if deferred.shape == own.shape:
                deferred = deferred.where(~alone, own)
            risk = replace(risk, own_cost=own, deferred_cost=_checked_losses("deferred_cost", deferred, margin, ceiling))
        checked.append(risk)
    return checked


def of_rows(risk: Risk, rows: Tensor) -> Risk:
    rows = rows.cpu()
    if isinstance(risk, SelectiveRisk):
        return replace(risk, loss=risk.loss[rows])
    if isinstance(risk, SystemRisk):
        return replace(risk, own_cost=risk.own_cost[rows], deferred_cost=risk.deferred_cost[rows])
    return risk


def check_margin(margin: Tensor) -> None:
    require_tensor("margin", margin)
    if margin.dtype != torch.float64:
        raise TypeError(
            f"margin: expected float64, got {margin.dtype}; compute deferral_margin of scores in float64 (scores.double()), as "
            "`decide_at` does: rounded before the threshold or after it, a margin may lie on either side of it"
        )
    if margin.dim() != 1 or len(margin) == 0:
        raise ValueError(f"margin: expected at least one row and shape (N,), got {tuple(margin.shape)}")
    if bool((margin.isnan() | (margin == torch.inf)).any()):
        raise ValueError("margin: expected numbers, or -inf where nobody can be asked, got NaN or +inf")


def check_groups(groups: Tensor, margin: Tensor, num_groups: int) -> None:
    require_tensor("groups", groups)
    if groups.is_floating_point() or groups.dtype == torch.bool or groups.shape != margin.shape:
        raise ValueError(
            f"groups: expected one integer index per row, shape {tuple(margin.shape)}, got {groups.dtype} of shape "
            f"{tuple(groups.shape)}"
        )
    if num_groups < 1 or bool(((groups < 0) | (groups >= num_groups)).any()):
        raise ValueError(
            f"groups: expected indices in 0..num_groups - 1, got {int(groups.min())}..{int(groups.max())} with "
            f"num_groups={num_groups}"
        )


def _checked_losses(name: str, values: Tensor, margin: Tensor, ceiling: float) -> Tensor:
    if values.shape != margin.shape:
        raise ValueError(f"{name}: expected one number per row, shape {tuple(margin.shape)}, got {tuple(values.shape)}")
    values = values.detach().cpu()
    if values.dtype == torch.bool and ceiling < 1.0:
        raise ValueError(
            f"{name}: of bool the largest loss is 1, above ceiling={ceiling:g}; leave ceiling out, or pass what an error counts, "
            f"{name} * {ceiling:g}"
        )
    if values.dtype != torch.bool:
        if not values.is_floating_point():
            zero_or_one = bool(((values == 0) | (values == 1)).all())
            exact = f"{name}.bool() has the exact test for 0 and 1 (in NumPy {name}.astype(bool))"
            advice = exact if zero_or_one else f"convert with {name}.double() (in NumPy {name}.astype(float))"
            raise TypeError(f"{name}: expected bool or a floating dtype, got {values.dtype}; {advice}")
        if bool(values.isnan().any()):
            raise ValueError(f"{name}: expected a number for each row, got NaN; leave these rows out, of the margin too")
        check_costs(values, ceiling=None, name=name)
        if above_ceiling(highest := float(values.max()), ceiling):
            raise ValueError(
                f"{name}: the largest is {highest:g}, above ceiling={ceiling:g}; pass as ceiling, to the risk, the largest that "
                f"any row can have, not the largest of these rows, or clip at one: {name}.clamp(max={ceiling:g})"
            )
        values = values.double().clamp(max=ceiling)
    return values
