"""Thresholds with a promise: on new rows a risk exceeds its level with probability at most delta, or not in expectation.

A fitted threshold (`deferral.calibration`) meets its target on the rows it was fitted on, and misses it on new ones about every
other time.  Here each of some thresholds, fixed beforehand, is tested on rows that had no part in choosing them, and the answer
is one that passed.  Nothing is assumed but that the rows are independent draws from the law of the rows to come.  NumPy or torch
in and out.

The rule at a threshold t: defer iff margin >= t, with `margin = deferral_margin(scores.double(), num_own=...)`, in float64.
`decide_at` serves it.  Offsets for `decide` would not do: scores - t >= own and scores - own >= t are not the same in floating
point, and where scores tie a whole population may lie between them.

Learn then test: Angelopoulos, Bates, Candès, Jordan, Lei, "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk
Control" (2021).  Conformal risk control: Angelopoulos, Bates, Fisch, Lei, Schuster (ICLR 2024).
"""

from deferral.certified.betting import p_value_of_mean
from deferral.certified.conformal import conformal_risk_control, conformal_risk_control_by_group
from deferral.certified.learn_then_test import Certificate, certify, certify_by_group, safest_first
from deferral.certified.risks import DeferralRate, Risk, SelectiveRisk, SystemRisk
from deferral.certified.thresholds import decide_at, threshold_grid

__all__ = [
    "Certificate",
    "DeferralRate",
    "Risk",
    "SelectiveRisk",
    "SystemRisk",
    "certify",
    "certify_by_group",
    "conformal_risk_control",
    "conformal_risk_control_by_group",
    "decide_at",
    "p_value_of_mean",
    "safest_first",
    "threshold_grid",
]
