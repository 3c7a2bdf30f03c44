"""Conformal risk control: a threshold whose risk is within its level in expectation, where the risk is monotone."""

import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch
from deferral.certified.risks import DeferralRate, Risk, SystemRisk, check_groups, checked_risks, of_rows
from deferral.certified.thresholds import level_edges

__all__ = ["conformal_risk_control", "conformal_risk_control_by_group"]


@numpy_or_torch
def conformal_risk_control(margin: Tensor, risk: SystemRisk | DeferralRate) -> tuple[float, bool]:
    """(threshold, holds): the boldest threshold with n/(n+1) * mean + ceiling/(n+1) <= at_most.  (N,) -> float, bool

    The expected risk on a new row, over the draw of these rows too, is at most `at_most`: on average over many calibrations,
    where `certify` speaks of nearly each of them.  The thresholds lie at these rows' own margins, or halfway between two.  If
    no threshold meets the inequality `holds` is False, the threshold is the safe end, and nothing is promised: the average is
    over all calibrations, those that do not hold counted as without risk.  Where the deferred costs alone may exceed the level,
    so that few calibrations hold, these few are the lucky ones and their risk may lie above it; `certify` says how rarely.

    Needs a cost of every row that is monotone in the threshold, that is own_cost >= deferred_cost in each (an expert who is
    never worse; deferred_cost = 0 counts the errors among kept rows over all rows).  ValueError elsewhere: use `certify`.
    A selective risk is a ratio, and not of this form.  Conformal risk control, theorem 1.
    """
    return _controlled(margin, _checked_monotone(margin, risk))


@numpy_or_torch
def conformal_risk_control_by_group(
    margin: Tensor, risk: SystemRisk | DeferralRate, groups: Tensor, *, num_groups: int
) -> tuple[Tensor, Tensor]:
    """(thresholds, holds) of the groups 0..G-1, each from its own rows.  (N,), (N,) -> (G,), (G,)

    The promise of `conformal_risk_control` in every group, on average over all calibrations, those in which the group's `holds`
    is False counted as without risk; a group without rows is promised nothing.
    For new rows: `decide_at(scores, thresholds[groups], num_own=num_own)`.
    """
    checked = _checked_monotone(margin, risk)
    check_groups(groups, margin, num_groups)
    members = [groups == group for group in range(num_groups)]
    thresholds, holds = zip(*(_controlled(margin[rows], of_rows(checked, rows)) for rows in members), strict=True)
    return torch.tensor(thresholds, dtype=torch.float64), torch.tensor(holds)


def _checked_monotone(margin: Tensor, risk: SystemRisk | DeferralRate) -> Risk:
    if not isinstance(risk, SystemRisk | DeferralRate):
        raise TypeError(
            f"risk: expected SystemRisk or DeferralRate, got {type(risk).__name__}; a selective risk is a ratio, which "
            "conformal risk control does not bound: use certify"
        )
    (checked,) = checked_risks(margin, risk)
    if isinstance(checked, SystemRisk):
        worse = checked.own_cost.double() < checked.deferred_cost.double()
        if bool(worse.any()):
            raise ValueError(
                f"risk: in {int(worse.sum())} of {len(worse)} rows deferring costs more than the own answer, so that the risk "
                "is not monotone in the threshold and conformal risk control promises nothing; use certify"
            )
    return checked


def _controlled(margin: Tensor, risk: Risk) -> tuple[float, bool]:
    """`conformal_risk_control` on checked rows; there may be none."""
    level, edges = level_edges(margin)
    if isinstance(risk, SystemRisk):
        ceiling, safe_end = risk.ceiling, -torch.inf
        own, deferred = risk.own_cost.double(), risk.deferred_cost.double()
    else:
        ceiling, safe_end = 1.0, torch.inf
        own, deferred = edges.new_zeros(len(margin)), (~margin.cpu().isneginf()).double()
    kept, asked = (edges.new_zeros(len(edges) - 1).index_add(0, level, cost) for cost in (own, deferred))
    zero = edges.new_zeros(1)
    total = torch.cat([zero, kept.cumsum(0)]) + torch.cat([asked.flip(0).cumsum(0).flip(0), zero])
    passed = edges[(total + ceiling) / (len(margin) + 1) <= risk.at_most]
    if len(passed) == 0:
        return safe_end, False
    return float(passed.amin() if isinstance(risk, DeferralRate) else passed.amax()), True
