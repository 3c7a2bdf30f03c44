"""Conformal risk control: a threshold whose risk is within its level in expectation, where the risk is monotone."""

import torch
from torch import Tensor

from deferral.certified.risks import DeferralRate, SystemRisk, checked_risks

__all__ = ["conformal_risk_control"]


def conformal_risk_control(margin: Tensor, risk: SystemRisk | DeferralRate) -> tuple[float, bool]:
    """(threshold, holds): the boldest threshold with n/(n+1) * mean + ceiling/(n+1) <= at_most.  (N,) -> float, bool

    The expected risk on a new row, over the draw of these rows too, is at most `at_most`: on average over many calibrations,
    where `certify` speaks of nearly each of them.  The thresholds are these rows' own margins.  If no threshold meets the
    inequality `holds` is False, and the threshold is the safe end.

    Needs a cost of every row that is monotone in the threshold, that is own_cost >= deferred_cost in each (an expert who is
    never worse; deferred_cost = 0 counts the errors among kept rows over all rows).  ValueError elsewhere: use `certify`.
    A selective risk is a ratio, and not of this form.  Conformal risk control, theorem 1.
    """
    if not isinstance(risk, SystemRisk | DeferralRate):
        raise TypeError(
            f"risk: expected SystemRisk or DeferralRate, got {type(risk).__name__}; a selective risk is a ratio, which "
            "conformal risk control does not bound: use certify"
        )
    (checked,) = checked_risks(margin, risk)
    levels, level, sizes = margin.detach().double().cpu().unique(return_inverse=True, return_counts=True)
    # edges[k] keeps the k lowest levels; half way to the next, so that rounding decides about no row.
    edges = torch.cat([levels.new_tensor([-torch.inf]), (levels[1:] + levels[:-1]) / 2, levels.new_tensor([torch.inf])])
    zero = torch.zeros(1, dtype=torch.float64)
    if not isinstance(checked, SystemRisk):
        ceiling, safe_end = 1.0, torch.inf
        deferred_rows = len(margin) - torch.cat([zero, sizes.cumsum(0).double()])
        total = deferred_rows.clamp(max=float((levels > -torch.inf).double() @ sizes.double()))
    else:
        ceiling, safe_end = checked.ceiling, -torch.inf
        own, deferred = checked.own_cost.double(), checked.deferred_cost.double()
        worse = own < deferred
        if bool(worse.any()):
            raise ValueError(
                f"risk: in {int(worse.sum())} of {len(worse)} rows deferring costs more than the own answer, so that the risk "
                "is not monotone in the threshold and conformal risk control promises nothing; use certify"
            )
        excess = torch.zeros(len(levels), dtype=torch.float64).index_add(0, level, own - deferred)
        total = deferred.sum() + torch.cat([zero, excess.cumsum(0)])
    passed = edges[(total + ceiling) / (len(margin) + 1) <= risk.at_most]
    if len(passed) == 0:
        return safe_end, False
    return float(passed.amin() if isinstance(risk, DeferralRate) else passed.amax()), True
