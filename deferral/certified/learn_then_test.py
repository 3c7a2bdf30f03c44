"""Learn then test: thresholds whose risks are within their levels, wrongly with probability at most delta."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch, tensor_of
from deferral.certified.risks import DeferralRate, Risk, SelectiveRisk, check_groups, checked_risks, of_rows
from deferral.errors import installing
from deferral.validation import require_floating, require_number

try:
    from scipy.special import bdtr, rel_entr
except ModuleNotFoundError as error:
    raise ImportError(f"certified thresholds need SciPy: {installing('calibration')}") from error

__all__ = ["Certificate", "certify", "certify_by_group", "safest_first"]


@dataclass(frozen=True)
class Certificate:
    """The threshold chosen, and how every candidate did.

    `holds` says whether the promise was made.  Where nothing is certified it is False, and `threshold` falls back to the end
    at which the fewest own answers are at stake: -inf, deferring everything; or +inf, keeping everything, where only the
    deferral rate is bounded.

    `thresholds`, `p_values`, `certified` and `coverage` (the share of these rows that is kept) have one entry per candidate,
    in the order they came in; `estimates` (T, R) are the plain means of each risk, NaN where nothing is kept.
    """

    threshold: float
    holds: bool
    thresholds: Tensor
    p_values: Tensor
    certified: Tensor
    coverage: Tensor
    estimates: Tensor


@numpy_or_torch
def certify(
    margin: Tensor,
    risks: Risk | Sequence[Risk],
    thresholds: Tensor,
    *,
    delta: float = 0.05,
    method: Literal["fixed_sequence", "bonferroni"] = "fixed_sequence",
) -> Certificate:
    """A threshold at which all risks are within their levels, wrongly with probability at most delta.  (N,), (T,)

    P(some risk > at_most at the returned threshold, and `holds`) <= delta over the draw of these rows.  The thresholds must
    not depend on these rows: fix them, or take `threshold_grid` of others.

    - "fixed_sequence" tests in the order given, each at delta, and stops at the first that fails.  Sort from the safest to
      the boldest: a selective risk by rising threshold, beginning where enough rows are kept to be sure of anything (with no
      error among n kept rows p = (1 - at_most)^n); a deferral rate by falling threshold; a risk that is not monotone, or
      several risks, by `safest_first` on other rows.
    - "bonferroni" tests each at delta / T, in no order.

    Either is valid for risks of any shape.  Among the certified thresholds the highest is returned, which keeps most; where
    only the deferral rate is bounded the lowest, which defers most.  O(N log N + T log N).

    Learn then test (2021), sections 2 and 3: p-values of proposition 1 and, for several risks, the largest of theirs.
    """
    return _certified(margin, checked_risks(margin, risks), thresholds, delta, method)


@numpy_or_torch
def certify_by_group(
    margin: Tensor,
    risks: Risk | Sequence[Risk],
    thresholds: Tensor | Sequence[Tensor],
    groups: Tensor,
    *,
    num_groups: int,
    delta: float = 0.05,
    method: Literal["fixed_sequence", "bonferroni"] = "fixed_sequence",
) -> list[Certificate]:
    """One certificate per group 0..G-1, all of them right at once with probability 1 - delta.  (N,), (T,), (N,) -> G

    Each group is certified on its own rows at delta / G (union bound), from the same thresholds or from one set per group.
    `groups` (N,) are indices below `num_groups`; a group without rows is promised nothing.  For new rows:
    `thresholds = torch.tensor([c.threshold for c in certificates], dtype=torch.float64)`, and then
    `decide_at(scores, thresholds[groups], num_own=num_own)`.
    """
    _check_delta(delta)
    risks = checked_risks(margin, risks)
    check_groups(groups, margin, num_groups)
    if not isinstance(thresholds, Tensor | list | tuple):
        raise TypeError(f"thresholds: expected a tensor (T,), or a list of one for each group, got {type(thresholds).__name__}")
    candidates = [thresholds] * num_groups if isinstance(thresholds, Tensor) else [tensor_of("thresholds", x) for x in thresholds]
    if len(candidates) != num_groups:
        raise ValueError(f"thresholds: expected one set for all groups or one for each of {num_groups}, got {len(candidates)}")
    members = [groups == group for group in range(num_groups)]
    return [
        _certified(margin[rows], [of_rows(risk, rows) for risk in risks], of_group, delta / num_groups, method)
        for rows, of_group in zip(members, candidates, strict=True)
    ]


@numpy_or_torch
def safest_first(margin: Tensor, risks: Risk | Sequence[Risk], thresholds: Tensor) -> Tensor:
    """The thresholds by rising p-value on some OTHER rows than those to be certified: an order for a fixed sequence.

    For risks that are not monotone and for several at once.  Split fixed sequence testing: Learn then test (2021), section 3.
    """
    thresholds = _checked_thresholds(thresholds)
    p_values, _, _ = _tested(margin, checked_risks(margin, risks), thresholds)
    return thresholds[torch.from_numpy(p_values).argsort(stable=True)]


def _check_delta(delta: float) -> None:
    require_number("delta", delta)
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta: expected a probability of being wrong in (0, 1), got {delta}")


def _certified(margin: Tensor, risks: list[Risk], thresholds: Tensor, delta: float, method: str) -> Certificate:
    """`certify` on checked rows; there may be none."""
    _check_delta(delta)
    thresholds = _checked_thresholds(thresholds)
    p_values, kept, estimates = _tested(margin, risks, thresholds)
    if method == "fixed_sequence":
        certified = np.logical_and.accumulate(p_values <= delta)
    elif method == "bonferroni":
        certified = p_values <= delta / len(thresholds)
    else:
        raise ValueError(f"method: expected 'fixed_sequence' or 'bonferroni', got {method!r}")
    rates_alone = all(isinstance(risk, DeferralRate) for risk in risks)
    passed = thresholds[torch.from_numpy(certified)]
    if len(passed) == 0:
        threshold = torch.inf if rates_alone else -torch.inf
    else:
        threshold = float(passed.amin() if rates_alone else passed.amax())
    return Certificate(
        threshold=threshold,
        holds=len(passed) > 0,
        thresholds=thresholds,
        p_values=torch.from_numpy(p_values),
        certified=torch.from_numpy(certified),
        coverage=torch.from_numpy(kept / max(len(margin), 1)),
        estimates=torch.from_numpy(estimates),
    )


def _tested(margin: Tensor, risks: list[Risk], thresholds: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per threshold: the largest p-value, how many rows are kept, and the mean of each risk.  -> (T,), (T,), (T, R)"""
    rows = len(margin)
    rising, order = margin.detach().double().cpu().sort()
    # Where nobody can be asked (margin -inf) the own answer is kept at every threshold.
    kept = torch.searchsorted(rising, thresholds).clamp(min=int(rising.isneginf().sum())).numpy()

    def sums(values: Tensor) -> np.ndarray:
        """The sum over the first 0, 1, .. N rows by rising margin."""
        return np.concatenate([[0.0], values.double()[order].numpy().cumsum()])

    p_values, means = [], []
    for risk in risks:
        if isinstance(risk, DeferralRate):
            total, size, ceiling, exact = rows - kept, np.full_like(kept, rows), 1.0, True
        elif isinstance(risk, SelectiveRisk):
            ceiling = risk.ceiling
            total, size = sums(risk.loss)[kept] / ceiling, kept
            exact = risk.loss.dtype == torch.bool and ceiling == 1.0
        else:
            own, deferred = sums(risk.own_cost), sums(risk.deferred_cost)
            ceiling = risk.ceiling
            total, size = (own[kept] + deferred[-1] - deferred[kept]) / ceiling, np.full_like(kept, rows)
            exact = risk.own_cost.dtype == torch.bool == risk.deferred_cost.dtype and ceiling == 1.0
        p_values.append(_p_values(total, size, risk.at_most / ceiling, exact=exact))
        means.append(np.where(size > 0, ceiling * total / np.maximum(size, 1), np.nan))
    return np.max(p_values, axis=0), kept, np.stack(means, axis=-1)


def _p_values(total: np.ndarray, size: np.ndarray, level: float, *, exact: bool) -> np.ndarray:
    """How likely `size` losses in [0, 1] of mean `level` sum to `total` or less: at most this.  (T,), (T,) -> (T,)

    For 0/1 losses P(Bin(n, level) <= total); else the smaller of Hoeffding's exp(-n KL(mean, level)) and Bentkus's
    e P(Bin(n, level) <= ceil(total)): Bates, Angelopoulos, Lei, Malik, Jordan, "Distribution-Free, Risk-Controlling Prediction
    Sets" (2021), section 3.1.
    """
    some = np.maximum(size, 1)
    # A sum of prices may lie above a whole number by a rounding.
    bound = bdtr(np.clip(np.ceil(total - 1e-9), 0, some), some, level)
    if not exact:
        mean = np.minimum(np.clip(total, 0, None) / some, level)
        hoeffding = np.exp(-some * (rel_entr(mean, level) + rel_entr(1 - mean, 1 - level)))
        bound = np.minimum(hoeffding, np.e * bound)
    return np.where(size > 0, np.minimum(bound, 1.0), 1.0)


def _checked_thresholds(thresholds: Tensor) -> Tensor:
    require_floating("thresholds", thresholds)
    thresholds = thresholds.detach().double().cpu()
    if thresholds.dim() != 1 or len(thresholds) == 0 or bool(thresholds.isnan().any()):
        raise ValueError(f"thresholds: expected at least one number, shape (T,), got {tuple(thresholds.shape)} or a NaN")
    return thresholds
