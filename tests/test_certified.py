"""What is promised is kept: on laws whose risk is known at every threshold, over 700 calibrations each."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("scipy")

from scipy.stats import binom

from deferral.certified import (
    DeferralRate,
    Risk,
    SelectiveRisk,
    SystemRisk,
    certify,
    certify_by_group,
    safest_first,
    threshold_grid,
)
from deferral.certified.learn_then_test import _p_values
from tests.certified_laws import ALLOWED, DELTA, GRID, draw, plug_in, selective_risk, system_risk, violations

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


def test_p_values_of_other_losses_are_the_smaller_of_hoeffding_and_bentkus() -> None:
    level, size = 0.3, 40
    smaller = set()
    for total in (0.0, 0.4, 3.0, 7.5, 9.2, 11.0):
        mean = total / size
        divergence = (mean * math.log(mean / level) if mean else 0.0) + (1 - mean) * math.log((1 - mean) / (1 - level))
        hoeffding, bentkus = math.exp(-size * divergence), math.e * binom.cdf(math.ceil(total), size, level)
        (found,) = _p_values(np.array([total]), np.array([size]), level, exact=False)
        assert found == pytest.approx(min(hoeffding, bentkus, 1.0))
        smaller.add(hoeffding < bentkus)
    assert smaller == {False, True}
    assert _p_values(np.array([30.0, 0.0]), np.array([size, 0]), level, exact=False).tolist() == [1.0, 1.0]


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


def test_unless_told_otherwise_a_certificate_is_wrong_at_most_once_in_twenty() -> None:
    """Where every second answer is wrong, four are all right once in 16 draws, and five once in 32."""
    for rows, held in ((4, False), (5, True)):
        margin, risk = torch.zeros(rows, dtype=torch.float64), SelectiveRisk(torch.zeros(rows, dtype=torch.bool), 0.5)
        always = torch.tensor([torch.inf], dtype=torch.float64)
        (of_group,) = certify_by_group(margin, risk, always, torch.zeros(rows).long(), num_groups=1)
        assert certify(margin, risk, always).holds == of_group.holds == held


def test_one_kept_row_has_a_mean() -> None:
    margin, always = torch.zeros(1, dtype=torch.float64), torch.tensor([torch.inf], dtype=torch.float64)
    assert certify(margin, SelectiveRisk(torch.tensor([True]), 0.5), always).estimates.tolist() == [[1.0]]


def test_a_selective_risk_of_numbers_is_promised_in_their_own_unit() -> None:
    generator = torch.Generator().manual_seed(0)
    margin, loss = torch.rand(2, 200, generator=generator, dtype=torch.float64)
    inner = certify(margin, SelectiveRisk(loss, 0.6), GRID)
    outer = certify(margin, SelectiveRisk(4 * loss, 2.4, ceiling=4.0), GRID)
    torch.testing.assert_close(outer.p_values, inner.p_values)
    torch.testing.assert_close(outer.estimates, 4 * inner.estimates)
    with pytest.raises(ValueError, match=r"above ceiling=1; .* not the largest of these rows"):
        certify(margin, SelectiveRisk(4 * loss, 0.6), GRID)
    with pytest.raises(ValueError, match="between 0 and the largest possible, 4"):
        certify(margin, SelectiveRisk(4 * loss, 4.0, ceiling=4.0), GRID)


def test_bad_input() -> None:
    margin, wrong, expert = draw(10, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="margin"):
        certify(margin[:0], DeferralRate(0.1), GRID)
    with pytest.raises(ValueError, match="margin"):
        certify(margin * torch.nan, DeferralRate(0.1), GRID)
    with pytest.raises(TypeError, match="margin: expected a torch tensor, or numbers"):
        certify(["a"], DeferralRate(0.1), GRID)
    with pytest.raises(TypeError, match=r"margin: expected float64, got torch\.int64"):
        certify([0, 1], DeferralRate(0.1), GRID)
    with pytest.raises(TypeError, match=r"expected float64, got torch\.float32.*decide_at"):
        certify(margin.float(), DeferralRate(0.1), GRID)
    with pytest.raises(TypeError, match="thresholds: expected a torch tensor, or numbers"):
        certify(margin, DeferralRate(0.1), "all")
    with pytest.raises(TypeError, match="loss: expected a torch tensor, or numbers"):
        certify(margin, SelectiveRisk(None, 0.1), GRID)
    for risk in (None, 0.1, "a"):
        with pytest.raises(TypeError, match="risks: expected SelectiveRisk, SystemRisk or DeferralRate"):
            certify(margin, risk, GRID)
    with pytest.raises(TypeError, match=r"at_most: expected a number, got '0\.1'"):
        certify(margin, SelectiveRisk(wrong, "0.1"), GRID)
    with pytest.raises(TypeError, match="delta: expected a number, got None"):
        certify(margin, SelectiveRisk(wrong, 0.1), GRID, delta=None)
    with pytest.raises(ValueError, match="thresholds"):
        certify(margin, DeferralRate(0.1), torch.tensor([0.1, torch.nan]))
    with pytest.raises(ValueError, match="thresholds: expected at least one"):
        certify(margin, DeferralRate(0.1), GRID[:0])
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
    with pytest.raises(ValueError, match=r"ceiling: expected .* a finite number > 0, got inf"):
        certify(margin, SelectiveRisk(wrong.double(), 0.1, ceiling=math.inf), GRID)
    for risk in (SelectiveRisk(~wrong & wrong, 0.1, ceiling=0.2), SystemRisk(wrong, 0.1 * expert, 0.1, ceiling=0.2)):
        with pytest.raises(ValueError, match=r"of bool the largest loss is 1, above ceiling=0\.2"):
            certify(margin, risk, GRID)
    with pytest.raises(ValueError, match="NaN"):
        certify(margin, SystemRisk(wrong.float(), expert * torch.nan, 0.1), GRID)
    with pytest.raises(ValueError, match="groups"):
        certify_by_group(margin, DeferralRate(0.1), GRID, torch.zeros(9).long(), num_groups=1)
    with pytest.raises(ValueError, match=r"indices in 0\.\.num_groups - 1, got 0\.\.9 with num_groups=9"):
        certify_by_group(margin, DeferralRate(0.1), GRID, torch.arange(10), num_groups=9)
    with pytest.raises(ValueError, match="groups: expected one integer index per row"):
        certify_by_group(margin, DeferralRate(0.1), GRID, torch.arange(10).double().numpy(), num_groups=10)
    with pytest.raises(TypeError, match=r"num_groups: expected a whole number, got 1\.0"):
        certify_by_group(margin, DeferralRate(0.1), GRID, torch.zeros(10).long(), num_groups=1.0)
    with pytest.raises(TypeError, match=r"thresholds: expected a tensor .* got NoneType"):
        certify_by_group(margin, DeferralRate(0.1), None, torch.zeros(10).long(), num_groups=1)
    with pytest.raises(ValueError, match="one for each of 1"):
        certify_by_group(margin, DeferralRate(0.1), [GRID, GRID], torch.zeros(10).long(), num_groups=1)
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        threshold_grid(margin, 0)
    with pytest.raises(TypeError, match=r"size: expected a whole number, got 2\.5"):
        threshold_grid(margin, 2.5)
    for coverage in (0.5, (0.1, 0.5, 1.0), None):
        with pytest.raises(TypeError, match="coverage: expected two numbers, the lowest and the highest"):
            threshold_grid(margin, 3, coverage=coverage)
    with pytest.raises(TypeError, match="coverage: expected a number, got 'a'"):
        threshold_grid(margin, 3, coverage=("a", 1.0))
    assert len(threshold_grid(margin, 1)) == 1
    for coverage in ((0.0, 1.0), (0.5, 1.1)):
        with pytest.raises(ValueError, match="coverage"):
            threshold_grid(margin, 10, coverage=coverage)


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
