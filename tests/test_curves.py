"""Every curve and area against its definition: the mean over every order of the rows that the threshold cannot tell apart."""

from collections.abc import Callable
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from deferral import decide, pick
from deferral.curves import (
    accuracy_area,
    accuracy_coverage_curve,
    accuracy_gap,
    augrc,
    aurc,
    budget_curve,
    cost_coverage_curve,
    coverage_at_risk,
    excess_aurc,
    excess_system_aurc,
    generalized_risk_coverage_curve,
    own_and_asked,
    risk_coverage_curve,
    system_augrc,
    system_aurc,
)

ROWS = 6


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An order with ties, two costs and a price."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(0, 3, (ROWS,), generator=generator).double()
    own, deferred, price = torch.rand(3, ROWS, generator=generator, dtype=torch.float64)
    return order, own, deferred, price


def over_orders(order: Tensor, figure: Callable[[list[int]], list[float]]) -> Tensor:
    """The mean of a figure over all orders that put lower values of `order` first."""
    values = order.tolist()
    allowed = [rows for rows in permutations(range(len(values))) if all(values[a] <= values[b] for a, b in pairwise(rows))]
    return torch.tensor([figure(list(rows)) for rows in allowed], dtype=torch.float64).mean(0)


def mean(values: Tensor, rows: list[int]) -> float:
    return sum(values[i].item() for i in rows) / len(rows)


@pytest.mark.parametrize("seed", range(5))
def test_curves_of_abstention_equal_their_definition_under_ties(seed: int) -> None:
    confidence, loss, _, _ = draw(seed)
    risks = over_orders(-confidence, lambda rows: [mean(loss, rows[:k]) for k in range(1, ROWS + 1)])
    curve = risk_coverage_curve(confidence, loss)
    torch.testing.assert_close(curve.value[1:], risks)
    assert curve.value[0] == curve.value[1]
    torch.testing.assert_close(accuracy_coverage_curve(confidence, 1 - loss).value, 1 - curve.value)
    torch.testing.assert_close(generalized_risk_coverage_curve(confidence, loss).value, curve.value * curve.coverage)
    torch.testing.assert_close(aurc(confidence, loss), risks.mean())
    best = over_orders(loss, lambda rows: [mean(loss, rows[:k]) for k in range(1, ROWS + 1)]).mean()
    torch.testing.assert_close(excess_aurc(confidence, loss), risks.mean() - best)


@pytest.mark.parametrize("seed", range(5))
def test_the_coverage_at_a_risk_is_the_best_of_all_thresholds(seed: int) -> None:
    confidence, loss, _, _ = draw(seed)
    for at_most in [-0.1, 0.0, float(loss.mean()), *torch.linspace(0.2, 1.0, 9).tolist()]:
        kept = [confidence >= threshold for threshold in confidence.unique()]
        reached = [float(keep.double().mean()) for keep in kept if loss[keep].mean() <= at_most + 1e-12]
        assert float(coverage_at_risk(confidence, loss, at_most)) == pytest.approx(max(reached, default=0.0))
        counts = torch.tensor([[1, 2, 0, 1, 3, 1], [0, 0, 1, 0, 2, 0]])
        copies = [coverage_at_risk(confidence.repeat_interleave(n), loss.repeat_interleave(n), at_most) for n in counts]
        torch.testing.assert_close(coverage_at_risk(confidence, loss, at_most, counts.double()), torch.stack(copies))


def test_the_coverage_at_a_risk_that_is_met_exactly() -> None:
    for errors in range(101):
        wrong = torch.arange(100) < errors
        assert coverage_at_risk(torch.ones(100), wrong, errors / 100) == 1
        assert errors == 0 or coverage_at_risk(torch.ones(100), wrong, errors / 100 - 1e-6) == 0
    with pytest.raises(ValueError, match="at_most: expected a finite risk"):
        coverage_at_risk(torch.ones(2), torch.ones(2), float("nan"))


@pytest.mark.parametrize("unit", [2.0**-40, 2.0**40])
def test_the_coverage_at_a_risk_does_not_depend_on_the_unit_of_the_loss(unit: float) -> None:
    confidence, loss = torch.rand(2, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for at_most in (0.0, 0.4, float(loss.mean()), 0.6):
        assert coverage_at_risk(confidence, loss * unit, at_most * unit) == coverage_at_risk(confidence, loss, at_most)


@pytest.mark.parametrize("seed", range(5))
def test_curves_of_the_system_equal_their_definition_under_ties(seed: int) -> None:
    margin, own, deferred, price = draw(seed)

    def cost(rows: list[int]) -> list[float]:
        return [(sum(own[i] for i in rows[:k]) + sum(deferred[i] for i in rows[k:])) / ROWS for k in range(ROWS + 1)]

    def spend(rows: list[int]) -> list[float]:
        return [sum(price[i] for i in rows[k:]) / ROWS for k in range(ROWS + 1)]

    costs, spends = over_orders(margin, cost), over_orders(margin, spend)
    curve = cost_coverage_curve(margin, own, deferred)
    torch.testing.assert_close(curve.value, costs)
    assert curve.coverage.tolist() == pytest.approx([k / ROWS for k in range(ROWS + 1)])
    area = ((costs[1:] + costs[:-1]) / 2).mean()
    torch.testing.assert_close(system_aurc(margin, own, deferred), area)
    best = over_orders(own - deferred, cost)
    torch.testing.assert_close(excess_system_aurc(margin, own, deferred), area - ((best[1:] + best[:-1]) / 2).mean())
    budget = budget_curve(margin, own, deferred, price)
    torch.testing.assert_close(budget.spend, spends.flip(0))
    torch.testing.assert_close(budget.value, costs.flip(0))
    torch.testing.assert_close(budget.at(float(spends[0])), costs[0])


@pytest.mark.parametrize("seed", range(3))
def test_no_figure_depends_on_the_order_of_the_rows(seed: int) -> None:
    order, own, deferred, price = draw(seed)
    shuffled = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))
    weights = price + 0.1
    for figure, columns in [
        (aurc, (own,)),
        (excess_aurc, (own,)),
        (augrc, (own,)),
        (coverage_at_risk, (own, 0.5)),
        (system_aurc, (own, deferred)),
        (excess_system_aurc, (own, deferred)),
        (system_augrc, (own, deferred)),
    ]:
        here = figure(order, *columns, weights)
        moved = (column[shuffled] if isinstance(column, Tensor) else column for column in columns)
        there = figure(order[shuffled], *moved, weights[shuffled])
        torch.testing.assert_close(here, there, msg=str(figure))


@pytest.mark.parametrize("figure", [aurc, excess_aurc, augrc, system_aurc, excess_system_aurc, system_augrc])
def test_a_weight_is_a_number_of_copies(figure: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    order, own, deferred = torch.rand(3, 8, generator=generator, dtype=torch.float64)
    order = (order * 4).round()
    weights = torch.randint(0, 4, (5, 8), generator=generator)
    weights[:, 0] = 1
    columns = (own, deferred) if "system" in figure.__name__ else (own,)
    batch = figure(order, *columns, weights.double())
    for row, counts in enumerate(weights):
        copies = [column.repeat_interleave(counts) for column in (order, *columns)]
        torch.testing.assert_close(batch[row], figure(*copies))


def test_an_area_that_was_published_as_both_122_and_437() -> None:
    """Rows of equal confidence, 30% of them wrong: whatever their order, the area is .3."""
    loss = (torch.arange(1000) % 10 < 3).double()
    for rows in (loss, loss.sort().values, loss.sort(descending=True).values):
        assert float(aurc(torch.zeros(1000), rows)) == pytest.approx(0.3)


def test_augrc_is_its_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.randint(0, 20, (300,), generator=generator).double()
    wrong = (torch.rand(300, generator=generator) < 0.4 - confidence / 100).double()
    error = float(wrong.mean())
    expected = (1 - roc_auc_score(1 - wrong, confidence)) * error * (1 - error) + error**2 / 2
    assert float(augrc(confidence, wrong)) == pytest.approx(expected)


def test_a_perfect_order_has_no_excess_and_the_worst_has_most() -> None:
    loss = torch.rand(50, dtype=torch.float64)
    assert float(excess_aurc(-loss, loss)) == pytest.approx(0, abs=1e-12)
    assert float(excess_aurc(loss, loss)) > float(excess_aurc(torch.rand(50), loss)) > 0
    gain = loss - 0.3
    assert float(excess_system_aurc(gain, loss, torch.full((50,), 0.3))) == pytest.approx(0, abs=1e-12)


def test_the_gap_to_the_oracle_is_the_excess_of_the_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.randint(0, 9, (200,), generator=generator)
    right = (torch.rand(200, generator=generator) < 0.7).double()
    torch.testing.assert_close(accuracy_area(confidence, right), 1 - aurc(confidence, 1 - right))
    torch.testing.assert_close(accuracy_gap(confidence, right), excess_aurc(confidence, 1 - right))


def test_a_row_that_nobody_can_be_asked_about_costs_and_spends_its_own_at_every_threshold() -> None:
    margin, own, deferred, price = draw(1)
    margin[2], deferred[2] = -torch.inf, torch.nan
    curve = budget_curve(margin, own, deferred, price)
    rest = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(curve.spend[-1] * ROWS, price[rest].sum())
    torch.testing.assert_close(curve.value[-1] * ROWS, deferred[rest].sum() + own[2])


def test_margins_that_differ_by_rounding_are_one_level() -> None:
    """Scores in tenths: .8 - .7 and .3 - .2 are one margin, as they are for a threshold."""
    generator = torch.Generator().manual_seed(0)
    tenths = torch.randint(0, 11, (400, 2), generator=generator)
    costs = torch.rand(400, 2, generator=generator, dtype=torch.float64)
    own, asked = costs.unbind(-1)
    exact = system_aurc(tenths[:, 1] - tenths[:, 0], own, asked)
    rounded = own_and_asked(tenths.double() / 10, costs, num_own=1)
    assert len(rounded[0].unique()) > 21
    torch.testing.assert_close(system_aurc(*rounded), exact)
    torch.testing.assert_close(
        budget_curve(*rounded, asked).at(0.2), budget_curve(tenths[:, 1] - tenths[:, 0], own, asked, asked).at(0.2)
    )


def test_a_mask_by_a_number_leaves_the_order_of_the_other_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, costs = torch.rand(2, 400, 2, generator=generator, dtype=torch.float64)
    scores[:250, 1] = torch.finfo(torch.float32).min
    margin, own, asked = own_and_asked(scores, costs, num_own=1)
    assert (margin == torch.finfo(torch.float32).min).sum() == 250
    near = margin.clamp(min=-10)
    torch.testing.assert_close(system_aurc(margin, own, asked), system_aurc(near, own, asked))
    budgets = torch.linspace(0.05, 0.4, 8)
    torch.testing.assert_close(
        budget_curve(margin, own, asked, asked).at(budgets), budget_curve(near, own, asked, asked).at(budgets)
    )


def test_handing_over_to_nobody_is_abstaining() -> None:
    margin, loss = torch.rand(2, 40, dtype=torch.float64)
    nobody = torch.full((40,), torch.nan)
    abstaining, system = risk_coverage_curve(-margin, loss), cost_coverage_curve(margin, loss, nobody)
    torch.testing.assert_close(system.value, abstaining.value)
    torch.testing.assert_close(system_augrc(margin, loss, nobody), augrc(-margin, loss))
    expert = torch.rand(40, dtype=torch.float64)
    torch.testing.assert_close(system_augrc(margin, loss, expert), system_aurc(margin, loss, expert))


def test_a_missing_answer_leaves_sum_and_count() -> None:
    margin, own, deferred, _ = draw(0)
    margin = torch.arange(ROWS).double()
    deferred[[1, 4]] = torch.nan
    curve = cost_coverage_curve(margin, own, deferred)
    for k in range(ROWS + 1):
        answered = torch.cat([own[:k], deferred[k:][~deferred[k:].isnan()]])
        torch.testing.assert_close(curve.value[k], answered.mean())
    torch.testing.assert_close(system_aurc(margin, own, deferred), torch.trapezoid(curve.value, curve.coverage))


def test_the_ends_of_the_curve_are_always_and_never_deferring() -> None:
    costs = torch.rand(50, 2)
    curve = cost_coverage_curve(torch.randn(50), *costs.unbind(-1))
    torch.testing.assert_close(curve.value[0], costs[:, 1].double().mean())
    torch.testing.assert_close(curve.value[-1], costs[:, 0].double().mean())
    torch.testing.assert_close(curve.at(0.5), curve.value[25])
    torch.testing.assert_close(curve.at(0.51), (curve.value[25] + curve.value[26]) / 2)


@pytest.mark.parametrize("num_own", [1, 3])
def test_own_and_asked_are_what_decide_takes(num_own: int) -> None:
    generator = torch.Generator().manual_seed(num_own)
    scores, costs = torch.randn(2, 200, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(200, 5 - num_own, generator=generator) < 0.5
    margin, own, deferred = own_and_asked(scores, costs, num_own=num_own, mask=mask)
    for offset in (-0.5, 0.0, 0.7):
        offsets = torch.tensor([0.0] * num_own + [offset] * (5 - num_own))
        expected = pick(costs, decide(scores, offsets, mask=mask))
        torch.testing.assert_close(own.where(margin < -offset, deferred), expected)
    assert torch.equal(deferred.isnan(), ~mask.any(-1))
    assert torch.equal(margin == -torch.inf, ~mask.any(-1))


def test_numpy_in_numpy_out() -> None:
    confidence, loss = np.random.default_rng(0).random((2, 30))
    area = aurc(confidence[::-1], loss.astype(np.float32)[::-1])
    assert isinstance(area, np.float64)
    assert float(area) == pytest.approx(float(aurc(torch.from_numpy(confidence), torch.from_numpy(loss))), rel=1e-6)
    curve = risk_coverage_curve(confidence, loss)
    assert isinstance(curve.value, np.ndarray)
    assert isinstance(curve.at(1.0), np.float64)
    assert float(curve.at(1.0)) == pytest.approx(loss.mean())
    assert isinstance(curve.at(np.array([0.5, 1.0])), np.ndarray)
    spent = budget_curve(confidence, loss, loss, loss + 1)
    assert isinstance(spent.at(0.5), np.float64)
    assert isinstance(spent.at(np.array([0.25, 0.5])), np.ndarray)
    torch_spent = budget_curve(*map(torch.from_numpy, (confidence, loss, loss, loss + 1)))
    assert float(spent.at(0.5)) == pytest.approx(float(torch_spent.at(0.5)), rel=1e-6)


def test_small_integers_do_not_wrap_around() -> None:
    curve = cost_coverage_curve(torch.arange(3), torch.tensor([0, 0, 1], dtype=torch.uint8), torch.ones(3, dtype=torch.uint8))
    torch.testing.assert_close(curve.value, torch.tensor([1, 2 / 3, 1 / 3, 1 / 3]).double())
    assert float(aurc(torch.arange(3, dtype=torch.uint8), torch.tensor([1, 0, 0], dtype=torch.uint8))) == pytest.approx(1 / 9)


def test_bad_input() -> None:
    rows = torch.rand(3)
    with pytest.raises(ValueError, match="non-empty vector"):
        aurc(torch.rand(0), torch.rand(0))
    with pytest.raises(ValueError, match="loss: expected one number per row"):
        aurc(rows, torch.rand(4))
    with pytest.raises(ValueError, match="NaN in 1 rows"):
        aurc(torch.tensor([0.0, torch.nan, 1.0]), rows)
    with pytest.raises(ValueError, match="loss: expected numbers, got NaN"):
        risk_coverage_curve(rows, torch.tensor([0.0, torch.nan, 1.0]))
    with pytest.raises(ValueError, match="loss: expected numbers, got NaN or infinity in 1 rows"):
        aurc(rows, torch.tensor([0.0, torch.inf, 1.0]))
    with pytest.raises(ValueError, match="weights: expected one per row"):
        aurc(rows, rows, torch.ones(4))
    with pytest.raises(ValueError, match="weights: expected finite"):
        aurc(rows, rows, torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="coverage"):
        risk_coverage_curve(rows, rows).at(80)
    with pytest.raises(ValueError, match="never deferring already spends"):
        budget_curve(rows, rows, rows, rows + 1, own_price=0.5).at(0.4)
    summed = budget_curve(rows, rows, rows, rows + 1, own_price=0.1)
    torch.testing.assert_close(summed.at(0.1), summed.value[0])
    with pytest.raises(ValueError, match="at least the own price"):
        budget_curve(rows, rows, rows, rows, own_price=2.0)
    with pytest.raises(ValueError, match="leave out"):
        excess_system_aurc(rows, rows, torch.full((3,), torch.nan))
    with pytest.raises(ValueError, match="one cost per action"):
        own_and_asked(torch.rand(3, 2), torch.rand(3, 3), num_own=1)


@pytest.mark.parametrize("seed", range(8))
def test_a_weight_is_a_number_of_copies_where_some_are_never_answered(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    margin, copies = torch.randint(0, 5, (12,), generator=generator), torch.randint(0, 4, (12,), generator=generator)
    own, deferred = torch.rand(2, 12, dtype=torch.float64, generator=generator)
    deferred[torch.rand(12, generator=generator) < 0.5] = torch.nan
    if seed == 0:
        deferred[:] = torch.nan
    repeated = [values.repeat_interleave(copies) for values in (margin, own, deferred)]
    area, curve = system_aurc(*repeated), cost_coverage_curve(*repeated)
    torch.testing.assert_close(area, torch.trapezoid(curve.value, curve.coverage))
    weights = torch.stack([copies, torch.ones_like(copies)]).double()
    areas = system_aurc(margin, own, deferred, weights)
    torch.testing.assert_close(areas, torch.stack([area, system_aurc(margin, own, deferred)]))


def test_a_budget_pays_for_all_that_is_free() -> None:
    costs = torch.tensor([1.0, 1.0, 1.0]), torch.zeros(3)
    curve = budget_curve(torch.tensor([3.0, 2.0, 1.0]), *costs, torch.tensor([0.0, 0.0, 0.6]))
    assert curve.at(0.0).item() == pytest.approx(1 / 3)
    assert curve.at(0.1).item() == pytest.approx(1 / 6)
    assert curve.at(9.0) == 0
    assert budget_curve(torch.tensor([3.0, 2.0, 1.0]), *costs, torch.zeros(3)).at(0.0) == 0


def test_in_a_budget_too_a_weight_is_a_number_of_copies() -> None:
    columns = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    margin, own, deferred, price, own_price = columns
    price = price + own_price
    copies = torch.tensor([[1, 2, 0, 1, 3, 1, 0, 1], [1] * 8])
    batch = budget_curve(margin, own, deferred, price, own_price=own_price, weights=copies.double())
    budgets = torch.tensor([0.7, 0.9, 1.1])
    for row, counts in enumerate(copies):
        margins, *others, own_prices = (column.repeat_interleave(counts) for column in (margin, own, deferred, price, own_price))
        curve = budget_curve(margins, *others, own_price=own_prices)
        torch.testing.assert_close(batch.spend[row, [0, -1]], curve.spend[[0, -1]])
        torch.testing.assert_close(batch.at(budgets)[row], curve.at(budgets))
        torch.testing.assert_close(batch.at(0.9)[row], curve.at(0.9))
    assert budget_curve(margin, own, deferred, price).at(0.0) == own.mean()


def test_margins_of_scores_in_single_precision_are_in_double() -> None:
    scores = torch.tensor([[1.0, 1e-8], [1.0, 0.0]])
    margin, *_ = own_and_asked(scores, torch.ones(2, 2), num_own=1)
    assert margin[0] > margin[1]


def test_a_budget_that_rounding_parts_from_its_point_pays_for_the_free_rows_too() -> None:
    prices = torch.tensor([0.1, 0.1, 0.1, 0.0], dtype=torch.float64)
    curve = budget_curve(torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.ones(4), torch.zeros(4), prices)
    assert curve.at(0.075) == pytest.approx(0.0, abs=1e-9)
