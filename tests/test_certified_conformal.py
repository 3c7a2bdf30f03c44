"""Conformal risk control: a promise about the mean over all calibrations."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("scipy")

from scipy.stats import binom

from deferral.certified import DeferralRate, SelectiveRisk, SystemRisk, conformal_risk_control, conformal_risk_control_by_group
from tests.certified_laws import TRIALS, draw


def test_conformal_risk_control_holds_in_expectation_and_wastes_little() -> None:
    """Errors among the kept rows, over all rows: t^2 / 4.  With 24 rows and a level of 1/24 the plain rule lets one through."""
    rows, level = 24, 1 / 24

    def mean_risk(rule: Callable[[Tensor, Tensor], float]) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(0)
        risks = []
        for _ in range(TRIALS):
            margin, wrong, _ = draw(rows, generator)
            risks.append(min(max(rule(margin, wrong), 0.0), 1.0) ** 2 / 4)
        values = torch.tensor(risks)
        return float(values.mean()), float(values.std() / math.sqrt(TRIALS))

    def conformal(margin: Tensor, wrong: Tensor) -> float:
        threshold, holds = conformal_risk_control(margin, SystemRisk(wrong, torch.zeros_like(wrong), level))
        assert holds
        return threshold

    def plain(margin: Tensor, wrong: Tensor) -> float:
        errors = margin[wrong].sort().values
        return float(errors[1]) if len(errors) > 1 else 1.0

    mean, error = mean_risk(conformal)
    assert 0.75 * level < mean <= level + 3 * error
    mean, error = mean_risk(plain)
    assert mean > level + 10 * error


def test_conformal_risk_control_holds_in_every_group_and_the_pooled_one_does_not() -> None:
    """Errors among the kept rows of a group, over its rows: slope t^2 / 2."""
    rows, level, slopes = 40, 0.1, torch.tensor([0.3, 0.9], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(2).repeat_interleave(rows)
    by_group, pooled = [], []
    for _ in range(400):
        margin, wrong, _ = draw(2 * rows, generator, slopes[groups])
        risk = SystemRisk(wrong, torch.zeros_like(wrong), level)
        thresholds, holds = conformal_risk_control_by_group(margin, risk, groups, num_groups=3)
        assert holds.tolist() == [True, True, False]
        assert thresholds[2] == -torch.inf
        by_group.append(slopes * thresholds[:2].clamp(0, 1) ** 2 / 2)
        pooled.append(slopes * min(conformal_risk_control(margin, risk)[0], 1.0) ** 2 / 2)
    means = torch.stack(by_group).mean(0)
    errors = torch.stack(by_group).std(0) / math.sqrt(400)
    assert (means <= level + 3 * errors).all()
    assert (means > 0.7 * level).all()
    assert torch.stack(pooled).mean(0)[1] > 1.3 * level
    # Each group's threshold is the one of its rows alone.
    alone = SystemRisk(risk.own_cost[rows:], risk.deferred_cost[rows:], level)
    assert thresholds[1] == conformal_risk_control(margin[rows:], alone)[0]
    rate, holds = conformal_risk_control_by_group(margin, DeferralRate(0.1), groups, num_groups=3)
    assert holds.tolist() == [True, True, False]
    assert rate[2] == torch.inf
    assert ((margin >= rate[groups]).view(2, rows).sum(-1) == 3).all()  # (3 + 1) / (40 + 1) <= 0.1
    for at_most, asked in ((4 / 41, 3), (4 / 41 - 1e-9, 2)):
        rate, _ = conformal_risk_control_by_group(margin, DeferralRate(at_most), groups, num_groups=2)
        assert ((margin >= rate[groups]).view(2, rows).sum(-1) == asked).all()


def test_conformal_deferral_rate_is_a_conformal_quantile() -> None:
    """Of 19 rows and a new one each is as likely to have the highest margin: 1 in 20."""
    generator = torch.Generator().manual_seed(0)
    deferred = []
    for _ in range(TRIALS):
        margin, _, _ = draw(19, generator)
        threshold, holds = conformal_risk_control(margin, DeferralRate(0.1))
        assert holds
        assert int((margin >= threshold).sum()) == 1
        deferred.append(1 - threshold)
    mean = sum(deferred) / TRIALS
    # Half way between the two highest margins: 1 - E[threshold] = (1/20 + 2/20) / 2.
    assert mean == pytest.approx(0.075, abs=0.005)


def test_conformal_risk_control_refuses_what_it_cannot_promise() -> None:
    margin, own, expert = draw(200, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"not monotone in the threshold.*use certify"):
        conformal_risk_control(margin, SystemRisk(own, expert, 0.2))
    with pytest.raises(TypeError, match="use certify"):
        conformal_risk_control(margin, SelectiveRisk(own, 0.2))
    nothing = torch.zeros_like(own)
    assert conformal_risk_control(margin[:5], SystemRisk(own[:5], nothing[:5], 0.1)) == (-torch.inf, False)
    assert conformal_risk_control(margin[:5], DeferralRate(0.1)) == (torch.inf, False)
    assert conformal_risk_control(margin, SystemRisk(nothing, nothing, 0.1)) == (torch.inf, True)


def test_the_conformal_promise_is_about_all_calibrations_not_those_that_hold() -> None:
    """The own answer is always wrong, the expert with one chance: it holds iff the expert erred seldom, by luck or by skill."""
    rows, level = 20, 0.1
    held = [
        conformal_risk_control(
            torch.arange(rows).double(), SystemRisk(torch.ones(rows).bool(), torch.arange(rows) < wrong, at_most=level)
        )[1]
        for wrong in range(rows + 1)
    ]
    assert held[0]
    for errs in np.linspace(0, 1, 51):
        # Whenever it holds the risk is `errs`, be that above the level.
        assert errs * binom.cdf(sum(held) - 1, rows, errs) <= level
