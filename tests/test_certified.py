"""What is promised is kept: on laws whose risk is known at every threshold, over 700 calibrations each."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("scipy")

from scipy.stats import binom

from deferral import decide, deferral_margin
from deferral.certified import (
    Certificate,
    DeferralRate,
    Risk,
    SelectiveRisk,
    SystemRisk,
    certify,
    certify_by_group,
    conformal_risk_control,
    conformal_risk_control_by_group,
    decide_at,
    safest_first,
    threshold_grid,
)
from deferral.certified.learn_then_test import _p_values
from deferral.certified.risks import checked_risks
from deferral.certified.thresholds import level_edges

DELTA = 0.1
TRIALS = 1000
ALLOWED = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / TRIALS)
# 0.4, 0.3, 0.6 and 0.7, where the laws below cross their levels, lie between two of these.
GRID = torch.arange(0.125, 1.0, 0.01, dtype=torch.float64)


# The law: the margin is uniform on (0, 1), the own answer is wrong with probability margin / 2, the expert with 5%, but with 60%
# where the margin is above 0.8: the rows that look most like theirs are not, and the risk of the system is not monotone.


def draw(rows: int, generator: torch.Generator, slope: Tensor | float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    margin, own, expert = torch.rand(3, rows, generator=generator, dtype=torch.float64)
    return margin, own < slope * margin, expert < torch.where(margin < 0.8, 0.05, 0.6)


def selective_risk(threshold: float, slope: float = 0.5) -> float:
    return slope * threshold / 2


def system_risk(threshold: float, price: float = 0.0) -> float:
    t = min(max(threshold, 0.0), 1.0)
    asked = 0.05 * (0.8 - t) + 0.12 if t < 0.8 else 0.6 * (1 - t)
    return t**2 / 4 + asked + price * (1 - t)


def plug_in(certificate: Certificate, *levels: float, lowest: bool = False) -> float:
    """The threshold that one would take without a certificate: the boldest whose plain means are within the levels."""
    within = (certificate.estimates <= torch.tensor(levels)).all(-1)
    passed = certificate.thresholds[within]
    if len(passed) == 0:
        return torch.nan
    return float(passed.min() if lowest else passed.max())


def violations(trial: Callable[[torch.Generator], tuple[bool, bool, bool]]) -> tuple[float, float, float]:
    """The shares of trials in which the certified threshold broke its promise, the plain one did, and a promise was made."""
    generator = torch.Generator().manual_seed(0)
    certified, plain, promised = torch.tensor([trial(generator) for _ in range(TRIALS)]).double().mean(0).tolist()
    return certified, plain, promised


METHODS = ["fixed_sequence", "bonferroni"]
ROWS = {"fixed_sequence": 800, "bonferroni": 2000}  # one test in ninety at a time costs power


@pytest.mark.parametrize("method", METHODS)
def test_selective_risk(method: str) -> None:
    def trial(generator: torch.Generator) -> tuple[bool, bool, bool]:
        margin, wrong, _ = draw(ROWS[method], generator)
        found = certify(margin, SelectiveRisk(wrong, 0.1), GRID, delta=DELTA, method=method)
        return (
            found.holds and selective_risk(found.threshold) > 0.1,
            selective_risk(plug_in(found, 0.1)) > 0.1,
            found.holds,
        )

    certified, plain, promised = violations(trial)
    assert certified <= ALLOWED
    assert plain > 0.4
    assert promised > 0.8


def test_selective_risk_of_a_loss_that_is_not_0_or_1() -> None:
    """A loss that is uniform between 0 and margin / 2: half as large on average."""

    def trial(generator: torch.Generator) -> tuple[bool, bool, bool]:
        margin, _, _ = draw(800, generator)
        loss = margin / 2 * torch.rand(800, generator=generator, dtype=torch.float64)
        found = certify(margin, SelectiveRisk(loss, 0.1), GRID, delta=DELTA)
        return (
            found.holds and selective_risk(found.threshold) / 2 > 0.1,
            selective_risk(plug_in(found, 0.1)) / 2 > 0.1,
            found.holds,
        )

    certified, plain, promised = violations(trial)
    assert certified <= ALLOWED
    assert plain > 0.4
    assert promised > 0.9


@pytest.mark.ci_slow
@pytest.mark.parametrize("price", [0.0, 0.02])
@pytest.mark.parametrize("method", METHODS)
def test_system_risk_that_is_not_monotone(method: str, price: float) -> None:
    level = system_risk(0.6, price)

    def risk(rows: tuple[Tensor, Tensor, Tensor]) -> SystemRisk:
        _, own, expert = rows
        return SystemRisk(own, expert, level) if price == 0 else SystemRisk(own.double(), expert + price, level, ceiling=1.02)

    def trial(generator: torch.Generator) -> tuple[bool, bool, bool]:
        others, rows = draw(500, generator), draw(1500, generator)
        grid = safest_first(others[0], risk(others), GRID) if method == "fixed_sequence" else GRID
        found = certify(rows[0], risk(rows), grid, delta=DELTA, method=method)
        return (
            found.holds and system_risk(found.threshold, price) > level + 1e-9,
            system_risk(plug_in(found, level), price) > level + 1e-9,
            found.holds,
        )

    at_grid = torch.tensor([system_risk(t, price) for t in GRID.tolist()]).diff()
    assert (at_grid > 0).any()
    assert (at_grid < 0).any()
    certified, plain, promised = violations(trial)
    assert certified <= ALLOWED
    assert plain > 0.4
    assert promised > 0.7


@pytest.mark.parametrize("method", METHODS)
def test_deferral_rate(method: str) -> None:
    def trial(generator: torch.Generator) -> tuple[bool, bool, bool]:
        margin, _, _ = draw(300, generator)
        found = certify(margin, DeferralRate(0.3), GRID.flip(0), delta=DELTA, method=method)
        return found.holds and 1 - found.threshold > 0.3, 1 - plug_in(found, 0.3, lowest=True) > 0.3, found.holds

    certified, plain, promised = violations(trial)
    assert certified <= ALLOWED
    assert plain > 0.4
    assert promised == 1.0


@pytest.mark.ci_slow
def test_two_risks_at_once() -> None:
    """A selective risk of at most 0.1 needs a threshold below 0.4, a deferral rate of at most 0.7 one above 0.3."""

    def trial(generator: torch.Generator) -> tuple[bool, bool, bool]:
        (others, others_wrong, _), (margin, wrong, _) = draw(1000, generator), draw(3000, generator)
        grid = safest_first(others, [SelectiveRisk(others_wrong, 0.1), DeferralRate(0.7)], GRID)
        found = certify(margin, [SelectiveRisk(wrong, 0.1), DeferralRate(0.7)], grid, delta=DELTA)
        plain = plug_in(found, 0.1, 0.7)
        return found.holds and not 0.3 <= found.threshold <= 0.4, not 0.3 <= plain <= 0.4, found.holds

    certified, plain, promised = violations(trial)
    assert certified <= ALLOWED
    assert plain > 0.4
    assert promised > 0.4


@pytest.mark.ci_slow
@pytest.mark.parametrize("method", METHODS)
def test_all_groups_at_once(method: str) -> None:
    slopes = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)

    def trial(generator: torch.Generator) -> tuple[bool, bool, bool]:
        groups = torch.randint(0, 3, (3 * ROWS[method],), generator=generator)
        margin, wrong, _ = draw(len(groups), generator, slopes[groups])
        found = certify_by_group(margin, SelectiveRisk(wrong, 0.12), GRID, groups, num_groups=3, delta=DELTA, method=method)
        broken = [c.holds and selective_risk(c.threshold, s) > 0.12 for c, s in zip(found, slopes.tolist(), strict=True)]
        plain = [selective_risk(plug_in(c, 0.12), s) > 0.12 for c, s in zip(found, slopes.tolist(), strict=True)]
        return any(broken), any(plain), all(c.holds for c in found)

    certified, plain, promised = violations(trial)
    assert certified <= ALLOWED
    assert plain > 0.7
    assert promised > 0.4


@pytest.mark.parametrize("method", METHODS)
def test_many_thresholds_just_outside_of_the_level_find_no_lucky_one(method: str) -> None:
    """Own answers and expert are wrong equally often, a hair too often: whatever is certified is a violation."""

    def trial(generator: torch.Generator) -> tuple[bool, bool, bool]:
        margin, own, expert = torch.rand(3, 500, generator=generator, dtype=torch.float64)
        found = certify(margin, SystemRisk(own < 0.2001, expert < 0.2001, 0.2), GRID, delta=DELTA, method=method)
        return found.holds, bool((found.estimates <= 0.2).any()), bool((found.p_values <= DELTA).any())

    certified, plain, uncorrected = violations(trial)
    assert certified <= ALLOWED
    assert plain > 0.6
    assert uncorrected > 0.2


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


@pytest.mark.parametrize(("size", "level"), [(1, 0.3), (20, 0.05), (60, 0.5), (200, 0.11)])
def test_p_values_of_binary_losses_are_those_of_the_binomial_and_never_too_small(size: int, level: float) -> None:
    """At the edge of the null P(p <= u) <= u for every u that p can take: summed over all outcomes, without simulation."""
    errors = torch.arange(size + 1).double().numpy()
    sizes = torch.full((size + 1,), size).numpy()
    chances = binom.pmf(errors, size, level)
    exact = _p_values(errors, sizes, level, exact=True)
    assert exact == pytest.approx(binom.cdf(errors, size, level))
    bounded = _p_values(errors, sizes, level, exact=False)
    assert (bounded >= exact - 1e-12).all()
    for p_values in (exact, bounded):
        for value in p_values:
            assert chances[p_values <= value].sum() <= value + 1e-12
    assert _p_values(errors[:1], sizes[:1], level, exact=False)[0] == pytest.approx((1 - level) ** size)


def test_everything_that_is_counted_against_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    margin = torch.randint(0, 6, (50,), generator=generator).double()  # ties, on thresholds too
    margin[:4] = -torch.inf  # nobody can be asked
    own, deferred = torch.rand(2, 50, generator=generator, dtype=torch.float64)
    deferred[:4] = torch.nan
    grid = torch.tensor([-torch.inf, 3.0, 0.5, 6.0, torch.inf, 2.0])
    risks: list[Risk] = [SelectiveRisk(own, 0.6), SystemRisk(own, 2 * deferred, 1.2, ceiling=2.0), DeferralRate(0.5)]
    found = certify(margin, risks, grid, method="bonferroni")
    for number, threshold in enumerate(grid):
        kept = (margin < threshold) | margin.isneginf()
        estimates = [own[kept].mean(), torch.where(kept, own, 2 * deferred).mean(), (~kept).double().mean()]
        torch.testing.assert_close(found.estimates[number], torch.stack(estimates))
        assert found.coverage[number] == kept.double().mean()
        alone = [certify(margin, risk, threshold[None]).p_values.item() for risk in risks]
        assert found.p_values[number] == max(alone)
    assert found.certified.tolist() == (found.p_values <= 0.05 / 6).tolist()


def test_a_fixed_sequence_stops_at_the_first_failure_and_bonferroni_does_not() -> None:
    margin = torch.linspace(0, 1, 1000, dtype=torch.float64)
    wrong = (margin > 0.5) & (margin < 0.6)  # the selective risk rises to 1/6, and falls again to 1/10
    grid = torch.tensor([0.2, 0.4, 0.62, 0.99])
    risk = SelectiveRisk(wrong, 0.13)
    stopped = certify(margin, risk, grid)
    assert stopped.certified.tolist() == [True, True, False, False]
    assert stopped.threshold == pytest.approx(0.4)
    searched = certify(margin, risk, grid, method="bonferroni")
    assert searched.certified.tolist() == [True, True, False, True]
    assert searched.threshold == pytest.approx(0.99)
    reordered = safest_first(margin, risk, grid)
    assert certify(margin, risk, reordered).threshold == pytest.approx(0.99)


def test_nothing_certified_is_no_promise_and_falls_back_to_the_safe_end() -> None:
    margin, wrong, expert = draw(10, torch.Generator().manual_seed(0))
    for risks, end in (
        (SelectiveRisk(wrong, 0.01), -torch.inf),
        (SystemRisk(wrong, expert, 0.01), -torch.inf),
        ([SelectiveRisk(wrong, 0.01), DeferralRate(0.01)], -torch.inf),
        (DeferralRate(0.01), torch.inf),
    ):
        found = certify(margin, risks, GRID)
        assert (found.holds, found.threshold) == (False, end)
        assert not found.certified.any()
    groups = torch.tensor([0] * 5 + [2] * 5)
    by_group = certify_by_group(margin, SelectiveRisk(torch.zeros_like(wrong), 0.7), GRID[-1:], groups, num_groups=4)
    assert [c.holds for c in by_group] == [True, False, True, False]
    assert [c.threshold for c in by_group][1::2] == [-torch.inf, -torch.inf]
    # Five kept rows without an error have p = 0.3^5, and each of the four groups a quarter of delta.
    for delta, held in ((3.99 * 0.3**5, False), (4.01 * 0.3**5, True)):
        by_group = certify_by_group(
            margin, SelectiveRisk(torch.zeros_like(wrong), 0.7), GRID[-1:], groups, num_groups=4, delta=delta
        )
        assert [c.holds for c in by_group] == [held, False, held, False]


def tenths(rows: int, actions: int, generator: torch.Generator) -> Tensor:
    """Shares of ten votes: their differences tie, but for their last digit."""
    return torch.randint(0, 11, (rows, actions), generator=generator).double() / 10


@pytest.mark.parametrize("num_own", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_the_rule_that_is_served_is_the_rule_that_was_certified(num_own: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = tenths(500, num_own + 2, generator)
    scores[:50, num_own:] = -torch.inf
    scores[50:80, -1] = -torch.inf
    mask = torch.rand(500, 2, generator=generator) < 0.7 if masked else None
    margin = deferral_margin(scores, num_own=num_own, mask=mask)
    open_experts = scores[:, num_own:] > -torch.inf
    open_experts = open_experts if mask is None else open_experts & mask
    own = decide(scores[:, :num_own])
    grid = torch.cat([torch.arange(-10, 11) / 10.0, margin[margin.isfinite()], torch.tensor([-torch.inf, torch.inf])]).double()
    found = certify(margin, DeferralRate(0.5), grid, method="bonferroni")
    for threshold, coverage in zip(grid.tolist(), found.coverage.tolist(), strict=True):
        actions = decide_at(scores, threshold, num_own=num_own, mask=mask)
        kept = actions < num_own
        assert kept.double().mean().item() == coverage
        assert torch.equal(actions[kept], own[kept])
        asked = actions[~kept] - num_own
        assert open_experts[~kept].gather(-1, asked[:, None]).all()
        best = scores[:, num_own:].where(open_experts, -torch.inf).amax(-1)[~kept]
        assert torch.equal(scores[:, num_own:][~kept].gather(-1, asked[:, None]).squeeze(-1), best)
    everybody = decide_at(scores, -torch.inf, num_own=num_own, mask=mask)
    assert torch.equal(everybody >= num_own, open_experts.any(-1))
    assert (decide_at(scores, torch.inf, num_own=num_own, mask=mask) < num_own).all()
    assert torch.equal(decide_at(scores, 0.0, num_own=num_own, mask=mask), decide(scores, mask=mask))


def test_rounding_moves_no_tied_population_to_the_other_side() -> None:
    """Every row has the scores 0.1 and 0.5: 0.5 - 0.1 >= 0.4, but 0.5 - 0.4 < 0.1.  Kept, 40% of the rows are wrong."""
    scores = torch.tensor([[0.1, 0.5]], dtype=torch.float64).expand(2000, 2)
    wrong = torch.rand(2000, generator=torch.Generator().manual_seed(0)) < 0.4
    risk = SystemRisk(wrong, torch.zeros_like(wrong), 0.1)
    found = certify(deferral_margin(scores, num_own=1), risk, torch.tensor([0.4], dtype=torch.float64))
    assert found.holds
    actions = decide_at(scores, found.threshold, num_own=1)
    assert wrong[actions == 0].sum() / 2000 <= 0.1


def test_one_threshold_per_row_serves_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 5, generator=generator).half()  # any dtype: the rule is in float64
    groups = torch.randint(0, 3, (300,), generator=generator)
    thresholds = torch.tensor([-torch.inf, 0.4, torch.inf], dtype=torch.float64)
    actions = decide_at(scores, thresholds[groups], num_own=2)
    for group, threshold in enumerate(thresholds.tolist()):
        assert torch.equal(actions[groups == group], decide_at(scores[groups == group], threshold, num_own=2))
    assert (actions[groups == 0] >= 2).all()
    assert (actions[groups == 2] < 2).all()
    with pytest.raises(ValueError, match="NaN"):
        decide_at(scores, torch.nan, num_own=2)
    with pytest.raises(TypeError, match=r"float64 tensor, got torch\.float32"):
        decide_at(scores, thresholds[groups].float(), num_own=2)
    with pytest.raises(TypeError, match="got ndarray"):
        decide_at(scores, thresholds[groups].numpy(), num_own=2)
    with pytest.raises(ValueError, match=r"one per row of shape \(300,\), got \(3,\)"):
        decide_at(scores, thresholds, num_own=2)
    with pytest.raises(TypeError, match="got ndarray"):
        decide_at(scores.numpy(), 0.0, num_own=2)
    with pytest.raises(ValueError, match="own action"):
        decide_at(scores, 0.0, num_own=2, mask=torch.zeros(300, 5, dtype=torch.bool))


def test_a_broken_predictor_defers_where_somebody_can_be_asked() -> None:
    scores = torch.tensor([[torch.nan, 0.0, 1.0]]).repeat(2, 1)
    mask = torch.tensor([[True, True], [False, False]])
    assert decide_at(scores, 0.5, num_own=1, mask=mask).tolist() == [2, 0]
    assert decide_at(scores, -torch.inf, num_own=1, mask=mask).tolist() == [2, 0]
    closed = torch.tensor([[torch.nan, -torch.inf, -torch.inf], [-torch.inf] * 3])
    for threshold in (-torch.inf, -1.0, 0.0, torch.inf):
        assert decide_at(closed, threshold, num_own=1).tolist() == [0, 0]


def test_a_mask_by_a_number_leaves_the_thresholds_of_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    margin = torch.rand(400, generator=generator, dtype=torch.float64)
    masked = torch.rand(400, generator=generator) < 0.7
    risk = SystemRisk((torch.rand(400, generator=generator) < margin / 3).double(), torch.zeros(400, dtype=torch.float64), 0.2)
    closed = margin.masked_fill(masked, -torch.inf)
    convention = margin.masked_fill(masked, torch.finfo(torch.float32).min)
    assert torch.equal(threshold_grid(convention, 20, coverage=(0.75, 1.0)), threshold_grid(closed, 20, coverage=(0.75, 1.0)))
    assert conformal_risk_control(convention, risk) == conformal_risk_control(closed, risk)


def test_a_grid_keeps_the_shares_it_was_asked_for_and_hits_no_row() -> None:
    margin = torch.rand(1000, dtype=torch.float64)
    grid = threshold_grid(margin, 10)
    kept = (margin < grid.unsqueeze(-1)).double().mean(-1)
    torch.testing.assert_close(kept, torch.linspace(0.1, 1.0, 10, dtype=torch.float64))
    assert not torch.isin(grid, margin).any()
    assert grid[-1] == torch.inf
    tied = torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    assert threshold_grid(tied, 50).tolist() == [1.5, torch.inf]
    assert threshold_grid(tied[:1], 5).tolist() == [torch.inf]
    votes = tenths(5000, 2, torch.Generator().manual_seed(0))
    margin = deferral_margin(votes, num_own=1)
    assert len(margin.unique()) > 21
    expected = torch.cat([torch.arange(-19, 20, 2) / 20.0, torch.tensor([torch.inf])]).double()
    torch.testing.assert_close(threshold_grid(margin, 5000, coverage=(1e-3, 1.0)), expected)


def test_edges_between_levels_keep_exactly_the_levels_below() -> None:
    generator = torch.Generator().manual_seed(0)
    close = 1 + 2.0**-52 * 5 * torch.arange(40, dtype=torch.float64)  # five units in the last place apart
    for margin in (
        tenths(60, 1, generator).squeeze(-1) - 0.3,
        close,
        torch.nextafter(torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, 1.0]).double()),
        torch.cat([close, torch.full((3,), -torch.inf), torch.full((2,), torch.finfo(torch.float64).min, dtype=torch.float64)]),
    ):
        level, edges = level_edges(margin)
        assert len(edges) == int(level.max()) + 2 > 2
        for number, edge in enumerate(edges):
            assert torch.equal((margin < edge) | margin.isneginf(), (level < number) | margin.isneginf())


def test_bad_input() -> None:
    margin, wrong, expert = draw(10, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="margin"):
        certify(margin[:0], DeferralRate(0.1), GRID)
    with pytest.raises(ValueError, match="margin"):
        certify(margin * torch.nan, DeferralRate(0.1), GRID)
    with pytest.raises(TypeError, match="margin: expected a torch tensor, got ndarray"):
        certify(margin.numpy(), DeferralRate(0.1), GRID)
    with pytest.raises(TypeError, match=r"expected float64, got torch\.float32.*decide_at"):
        certify(margin.float(), DeferralRate(0.1), GRID)
    with pytest.raises(TypeError, match="thresholds: expected a torch tensor, got ndarray"):
        certify(margin, DeferralRate(0.1), GRID.numpy())
    with pytest.raises(TypeError, match="loss: expected a torch tensor, got ndarray"):
        certify(margin, SelectiveRisk(wrong.numpy(), 0.1), GRID)
    with pytest.raises(ValueError, match="thresholds"):
        certify(margin, DeferralRate(0.1), torch.tensor([0.1, torch.nan]))
    with pytest.raises(ValueError, match="delta"):
        certify(margin, DeferralRate(0.1), GRID, delta=1.0)
    with pytest.raises(ValueError, match="method"):
        certify(margin, DeferralRate(0.1), GRID, method="best")
    with pytest.raises(ValueError, match="at least one risk"):
        certify(margin, [], GRID)
    with pytest.raises(TypeError, match="SelectiveRisk"):
        certify(margin, [0.1], GRID)
    with pytest.raises(ValueError, match="at_most"):
        certify(margin, SelectiveRisk(wrong, 1.0), GRID)
    with pytest.raises(ValueError, match="one number per row"):
        certify(margin, SelectiveRisk(wrong[:5], 0.1), GRID)
    with pytest.raises(TypeError, match="floating"):
        certify(margin, SelectiveRisk(wrong.long(), 0.1), GRID)
    with pytest.raises(ValueError, match="ceiling"):
        certify(margin, SystemRisk(wrong.float(), expert + 0.1, 0.1), GRID)
    with pytest.raises(ValueError, match="NaN"):
        certify(margin, SystemRisk(wrong.float(), expert * torch.nan, 0.1), GRID)
    with pytest.raises(ValueError, match="groups"):
        certify_by_group(margin, DeferralRate(0.1), GRID, torch.zeros(9).long(), num_groups=1)
    with pytest.raises(ValueError, match=r"indices in 0\.\.num_groups - 1, got 0\.\.9 with num_groups=9"):
        certify_by_group(margin, DeferralRate(0.1), GRID, torch.arange(10), num_groups=9)
    with pytest.raises(TypeError, match="groups: expected a torch tensor"):
        certify_by_group(margin, DeferralRate(0.1), GRID, torch.arange(10).numpy(), num_groups=10)
    with pytest.raises(ValueError, match="one for each of 1"):
        certify_by_group(margin, DeferralRate(0.1), [GRID, GRID], torch.zeros(10).long(), num_groups=1)
    for coverage in ((0.0, 1.0), (0.5, 1.1)):
        with pytest.raises(ValueError, match="coverage"):
            threshold_grid(margin, 10, coverage=coverage)


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


def test_a_row_that_nobody_can_be_asked_about_keeps_its_own_cost_beside_costs_of_another_dtype() -> None:
    margin, own = torch.tensor([-torch.inf, 0.0], dtype=torch.float64), torch.tensor([1.5, 1.0])
    (checked,) = checked_risks(margin, SystemRisk(own, torch.tensor([False, True]), at_most=1.0, ceiling=2.0))
    assert checked.deferred_cost.tolist() == [1.5, 1.0]


def test_no_more_is_promised_by_more_groups() -> None:
    margin, wrong = torch.rand(40, dtype=torch.float64), torch.zeros(40, dtype=torch.bool)
    for delta in (1.0, 3.9, 0.0):
        with pytest.raises(ValueError, match=r"delta: expected a probability of being wrong in \(0, 1\)"):
            certify_by_group(
                margin, SelectiveRisk(wrong, 0.1), torch.tensor([0.5]).double(), torch.arange(40) % 4, num_groups=4, delta=delta
            )


def test_losses_of_0_and_1_that_are_integers_are_to_be_tested_exactly() -> None:
    margin = torch.rand(3, dtype=torch.float64)
    for loss, said in (
        (torch.tensor([0, 1, 1]), r"loss.bool\(\) has the exact test"),
        (torch.tensor([0, 2, 1]), r"convert with loss.double\(\)"),
        (torch.tensor([0.0, torch.nan, 1.0]), "leave these rows out"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            certify(margin, SelectiveRisk(loss, 0.1), torch.tensor([0.5]).double())
