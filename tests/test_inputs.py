"""What metrics, decisions and intervals take, and what they say of what they do not."""

from dataclasses import fields, is_dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from deferral.baselines import compare_confidence, deferral_gains, post_hoc_scores, selective_prediction
from deferral.calibration import budget_offsets, coverage_offsets, deferral_rate_offsets, fit_offsets, fit_temperature
from deferral.capacity import fit_capacities
from deferral.certified import (
    DeferralRate,
    SelectiveRisk,
    SystemRisk,
    certify,
    certify_by_group,
    conformal_risk_control,
    conformal_risk_control_by_group,
    decide_at,
    p_value_of_mean,
    safest_first,
    threshold_grid,
)
from deferral.costs import error_costs, pick, single_stage_costs, squared_costs
from deferral.curves import (
    accuracy_area,
    accuracy_coverage_curve,
    accuracy_gap,
    aurc,
    budget_curve,
    coverage_at_risk,
    excess_system_aurc,
    own_and_asked,
    risk_coverage_curve,
    system_augrc,
)
from deferral.decision import chow_scores, decide, decide_pair, deferral_margin, margin_levels, oracle
from deferral.experts import draw_answers, draw_with_skill, even_skill, hide_answers, label_counts
from deferral.intervals import bootstrap, interval, mean_interval, metric_interval, over_seeds
from deferral.metrics import average, correct, deferral_cost, kept, load, system_figures
from deferral.reliability import brier, calibration_error, reliability

QUARTER = torch.tensor(0.25, requires_grad=True)
ROWS = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
PRICED = error_costs(torch.tensor([[0, 1], [1, -1]]), torch.tensor([0, 1]), missing=-1)


class Column:
    """A column of a table as pandas and polars have it: NumPy makes an array of it, and it is no array."""

    def __init__(self, values: list) -> None:
        self.values = values

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.values, dtype)


@pytest.mark.parametrize("form", [list, tuple, np.array, Column])
def test_lists_and_columns_are_taken_like_arrays(form) -> None:
    order, wrong = [0.9, 0.8, 0.3, 0.2], [0.0, 0.0, 1.0, 0.0]
    expected = aurc(torch.tensor(order), torch.tensor(wrong))
    found = aurc(form(order), form(wrong))
    assert isinstance(found, np.generic)
    assert found == pytest.approx(float(expected))
    assert isinstance(aurc(torch.tensor(order), form(wrong)), torch.Tensor)
    np.testing.assert_allclose(brier(form([0.5, 1.0]), form([1, 0])), [0.25, 1.0])
    assert average(form([1.0, 3.0]), weights=form([3.0, 1.0])) == 1.5
    np.testing.assert_array_equal(kept(form([0, 1]), num_own=1), [1, 0])
    assert mean_interval(form(wrong), resamples=100).estimate == 0.25


@pytest.mark.parametrize("bad", [["a", "b"], [None, 1.0], np.array(["a", "b"]), np.array([1, None])])
def test_what_holds_no_numbers_is_named(bad) -> None:
    with pytest.raises(TypeError, match="loss: expected a torch tensor, or numbers"):
        aurc([0.1, 0.2], bad)


@pytest.mark.parametrize("action", [-1, 2, 10])
def test_an_action_without_a_column_is_named(action: int) -> None:
    with pytest.raises(ValueError, match=r"actions: expected columns 0..1 of the table, got .*abstaining needs a column"):
        pick(torch.zeros(2, 2), torch.tensor([1, action]))
    if action > 0:
        with pytest.raises(ValueError, match="abstaining needs a column"):
            deferral_cost(torch.zeros(2, 2), torch.tensor([1, action]))
        with pytest.raises(ValueError, match="abstaining needs a column"):
            correct(torch.zeros(2, 2), torch.zeros(2), torch.tensor([1, action]))


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: brier(np.array([1.1, 0.5]), np.array([0, 1])), ValueError, "probability: expected numbers in"),
        (lambda: brier(np.array([-0.1, 0.5]), np.array([0, 1])), ValueError, "probability: expected numbers in"),
        (lambda: brier(np.array([0.3, 0.5]), np.array([0, 2])), ValueError, "outcome: expected numbers in"),
        (lambda: p_value_of_mean(np.zeros(3), 0.1, delta=0.0), ValueError, "delta: expected a probability"),
        (lambda: p_value_of_mean(np.zeros(3), 0.1, delta=2.0), ValueError, "delta: expected a probability"),
        (
            lambda: compare_confidence(torch.full((1, 2), 0.5), torch.tensor([[5.0]])),
            ValueError,
            "correctness: expected numbers in",
        ),
        (lambda: oracle([["a", "b"]]), TypeError, "costs: expected a torch tensor, or numbers"),
        (lambda: oracle(PRICED), TypeError, r"got a tuple of 2; with missing=.* \(costs, mask\): pass the two one"),
        (
            lambda: fit_offsets(ROWS, tuple(map(torch.Tensor.numpy, PRICED)), num_own=1),
            TypeError,
            "costs: .* pass the two one by one",
        ),
        (lambda: fit_offsets(ROWS, ROWS > 0, num_own=1), TypeError, r"costs\.float\(\), in NumPy costs\.astype\(float\)"),
        (lambda: oracle(None), TypeError, "costs: expected a torch tensor, or numbers"),
        (lambda: decide(ROWS, "a"), TypeError, "offsets: expected a torch tensor, or numbers"),
        (lambda: decide(ROWS, True), TypeError, "offsets: expected a number, got True"),
        (lambda: decide(ROWS.to(torch.complex64)), TypeError, "scores: expected real numbers, got torch.complex64"),
        (lambda: decide(ROWS, mask=torch.tensor(True)), ValueError, "mask: expected 2 columns"),
        (lambda: decide_pair(ROWS, ROWS[:, 0], None), TypeError, "offset: expected a number, got None"),
        (lambda: decide_pair(ROWS, ROWS[:, 0], ROWS[:, 0]), TypeError, r"offset: expected a number, got shape \(2,\) of"),
        (lambda: chow_scores(torch.tensor(0.5), 0.1), ValueError, "probabilities: expected a column"),
        (lambda: chow_scores(ROWS, "a"), TypeError, "cost: expected a torch tensor, or numbers"),
        (lambda: deferral_margin(torch.tensor(0.5), num_own=1), ValueError, "scores: expected a column"),
        (lambda: deferral_margin(ROWS, num_own=1.0), TypeError, "num_own: expected a whole number, got 1.0"),
        (lambda: deferral_margin(ROWS, num_own=True), TypeError, "num_own: expected a whole number, got True"),
        (lambda: margin_levels(ROWS), ValueError, r"one number per row of each, \(N,\), got \(2, 2\)"),
        (lambda: margin_levels(ROWS[:, 0], ROWS[:1, 0]), ValueError, r"got \(2,\) and \(1,\)"),
        (lambda: post_hoc_scores(torch.tensor(1.0)), ValueError, "gains: expected a column"),
        (lambda: compare_confidence(ROWS, ROWS, price=None), TypeError, "price: expected a torch tensor, or numbers"),
        (lambda: coverage_offsets(ROWS, "a", num_own=1), TypeError, "coverage: expected a number, got 'a'"),
        (lambda: budget_offsets(ROWS, ROWS[0], None, num_own=1), TypeError, "budget: expected a number, got None"),
        (lambda: fit_offsets(ROWS, ROWS, num_own=1, per_expert="no"), TypeError, "per_expert: expected True or False, got 'no'"),
        (lambda: fit_temperature(None, ROWS), TypeError, "loss: expected a function, got NoneType"),
        (lambda: kept(None, num_own=1), TypeError, "actions: expected a torch tensor, or numbers"),
        (lambda: kept(torch.tensor([0]), num_own="a"), TypeError, "num_own: expected a whole number, got 'a'"),
        (lambda: kept(np.array([True, False]), num_own=1), TypeError, r"actions: expected indices .* got torch\.bool"),
        (lambda: kept(torch.tensor([0]), num_own=-1), ValueError, "num_own: expected a number of actions >= 0, got -1"),
        (lambda: load([0.5], num_own=1, num_experts=1), TypeError, r"actions: expected indices .* got torch\.float64"),
        (lambda: load(torch.tensor([0]), num_own=1, num_experts=-1), ValueError, "num_own, num_experts: expected numbers"),
        (lambda: reliability(ROWS[0], [0, 1], bins=2.5), TypeError, "bins: expected a whole number, got 2.5"),
        (lambda: reliability(ROWS[0], [0, 1], equal_mass=np.ones(2)), TypeError, "equal_mass: expected True or False"),
        (lambda: calibration_error(ROWS[0], [0, 1], bins=None), TypeError, "bins: expected a whole number, got None"),
        (lambda: coverage_at_risk(ROWS[0], ROWS[1], "a"), TypeError, "at_most: expected a number, got 'a'"),
        (lambda: risk_coverage_curve(ROWS[0], ROWS[1]).at("a"), TypeError, "coverage: expected a torch tensor, or numbers"),
        (lambda: accuracy_area(ROWS[0], ROWS[1, :1]), ValueError, "right: expected one number per row"),
        (lambda: accuracy_coverage_curve(ROWS[0], ROWS[1, :1]), ValueError, "right: expected one number per row"),
        (lambda: accuracy_gap(ROWS[0], ROWS[1, :1]), ValueError, "right: expected one number per row"),
        (lambda: excess_system_aurc(*ROWS, ROWS[0, :1]), ValueError, "deferred_cost: expected one number per row"),
        (lambda: system_augrc(*ROWS, ROWS[0] / 0), ValueError, "deferred_cost: expected numbers, got NaN or infinity in 2 rows"),
        (lambda: selective_prediction(ROWS, ROWS[0] / 0), ValueError, "expected_costs: expected finite costs, got infinity"),
        (lambda: selective_prediction(ROWS, ROWS[0] * torch.nan), ValueError, "expected_costs: expected numbers, got NaN"),
        (lambda: budget_curve(*ROWS, ROWS[0], ROWS[0, :1]), ValueError, "price: expected one number per row"),
        (
            lambda: budget_curve(*ROWS, ROWS[0], ROWS[0], own_price=[0.0] * 3),
            ValueError,
            "own_price: expected one number per row",
        ),
        (lambda: bootstrap("mean", 3), TypeError, "metric: expected a function, got str"),
        (lambda: bootstrap(lambda w: w.sum(-1), 2.5), TypeError, "rows: expected a whole number, got 2.5"),
        (lambda: metric_interval(lambda w: w.sum(-1), 0), ValueError, "rows: expected at least one row, got 0"),
        (lambda: mean_interval(ROWS[0], resamples=1e3), TypeError, "resamples: expected a whole number, got 1000.0"),
        (lambda: mean_interval(ROWS[0], seed=-1), ValueError, "seed: expected a whole number >= 0, got -1"),
        (lambda: mean_interval(ROWS[0], level="95%"), TypeError, "level: expected a number, got '95%'"),
        (lambda: interval(ROWS[0], ROWS[1]), ValueError, r"estimate: expected one number, got shape \(2,\)"),
        (lambda: p_value_of_mean("a", 0.1), TypeError, "losses: expected a torch tensor, or numbers"),
        (lambda: p_value_of_mean(np.zeros(3), None), TypeError, "at_most: expected a number, got None"),
        (lambda: p_value_of_mean(np.zeros(3), 0.1, delta="a"), TypeError, "delta: expected a number, got 'a'"),
        (lambda: oracle(torch.zeros(2, 0)), ValueError, "costs: expected a column for every action"),
        (lambda: decide(torch.zeros(2, 0)), ValueError, "scores: expected a column for every action"),
        (lambda: decide(torch.tensor(1.0)), ValueError, "scores: expected a column for every action"),
        (lambda: over_seeds([0.1, float("nan")]), ValueError, "leave out the seeds that failed"),
        (lambda: fit_capacities(torch.zeros(4, 3), [1, 0.5], num_own=1), TypeError, "got both"),
        *(
            (
                lambda costs=costs, num_own=num_own: system_figures(
                    torch.zeros(2, costs), torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, dtype=torch.int64), num_own=num_own
                ),
                ValueError,
                said,
            )
            for costs, num_own, said in ((3, 0, "num_own"), (3, 5, "num_own"), (2, 1, "costs, answers"))
        ),
    ],
)
def test_bad_input_is_told(call, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()


def test_an_expert_closed_by_its_score_is_asked_by_no_curve() -> None:
    scores = torch.tensor([[0.2, -torch.inf], [0.2, 0.5], [torch.nan, -torch.inf], [-torch.inf, -torch.inf]])
    costs = torch.tensor([[1.0, 0.1]]).expand(4, 2)
    closed = own_and_asked(scores, costs, num_own=1)
    masked = own_and_asked(scores.nan_to_num(0.0, neginf=0.0), costs, num_own=1, mask=~scores[:, 1:].isneginf())
    for one, other in zip(closed, masked, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    assert closed[0].isneginf().tolist() == closed[2].isnan().tolist() == [True, False, True, True]


def test_what_is_masked_is_not_known() -> None:
    assert average(np.ma.array([1.0, 2.0, 100.0], mask=[0, 0, 1])) == 1.5
    assert average(np.ma.array([1.0, 2.0, 3.0], mask=False)) == 2.0
    with pytest.raises(TypeError, match="actions: expected no masked entries in int64"):
        deferral_cost(np.ones((2, 2)), np.ma.array([0, 1], mask=[0, 1]))


@pytest.mark.parametrize("dtype", [">i4", "u2", "u4", "u8", "u1"])
def test_integers_of_any_size_and_order_of_bytes(dtype: str) -> None:
    assert deferral_cost(np.array([[1.0, 0.0], [0.5, 0.25]], ">f8"), np.array([1, 0], dtype)).tolist() == [0.0, 0.5]


def of_numpy(value):
    """An argument with every tensor as NumPy."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, list):
        return [of_numpy(each) for each in value]
    if isinstance(value, SelectiveRisk | SystemRisk):
        return replace(value, **{field.name: of_numpy(getattr(value, field.name)) for field in fields(value)})
    return value


def same(found, expected, *, kind: type = np.ndarray) -> None:
    """The same numbers in the same dtypes, in arrays where tensors were (or in tensors)."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, kind | np.generic)
        assert np.asarray(found).dtype == expected.numpy().dtype
        np.testing.assert_array_equal(np.asarray(found), expected.numpy())
    elif isinstance(expected, tuple | list):
        for one, other in zip(found, expected, strict=True):
            same(one, other, kind=kind)
    elif is_dataclass(expected):
        for field in fields(expected):
            same(getattr(found, field.name), getattr(expected, field.name), kind=kind)
    else:
        assert type(found) is type(expected)
        assert found == expected


same_tensors = partial(same, kind=torch.Tensor)

_generator = torch.Generator().manual_seed(0)
SCORES, COSTS = torch.randn(40, 3, generator=_generator), torch.rand(40, 3, generator=_generator)
ANSWERS, TARGETS = torch.randint(3, (40, 3), generator=_generator), torch.randint(3, (40,), generator=_generator)
MARGIN, CHANCES = deferral_margin(SCORES.double(), num_own=1), SCORES.softmax(-1)
EDGES, GROUPS = torch.linspace(-1, 1, 9, dtype=torch.float64), TARGETS % 2
KNOWN = torch.rand(40, 3, generator=_generator) > 0.3
KNOWN[:, 0] = True
WRONG = SelectiveRisk(ANSWERS[:, 0] != TARGETS, at_most=0.9)
MONOTONE = SystemRisk(ANSWERS[:, 0] != TARGETS, torch.zeros(40, dtype=torch.bool), at_most=0.3)


@pytest.mark.parametrize(
    ("function", "arguments", "options"),
    [
        (decide, [SCORES], {"mask": KNOWN}),
        (decide, [SCORES, torch.tensor([0.0, 0.5, -0.5])], {}),
        (decide_pair, [SCORES, COSTS[:, 0]], {"offset": 0.5}),
        (deferral_margin, [SCORES], {"num_own": 1, "mask": KNOWN}),
        (margin_levels, [MARGIN], {}),
        (oracle, [COSTS], {"mask": KNOWN}),
        (chow_scores, [CHANCES, 0.1], {}),
        (chow_scores, [CHANCES, COSTS[:, 0]], {}),
        (pick, [COSTS, TARGETS], {}),
        (error_costs, [ANSWERS, TARGETS], {"price": torch.tensor([0.0, 0.1, 0.2]), "ceiling": 1.2, "missing": 0}),
        (error_costs, [ANSWERS, TARGETS], {"price": [0.0, 0.1, 0.2], "ceiling": 1.2}),
        (squared_costs, [SCORES, COSTS[:, 0]], {"alpha": 0.5, "price": 0.1}),
        (single_stage_costs, [TARGETS, COSTS], {"num_classes": 3}),
        (fit_offsets, [SCORES, COSTS], {"num_own": 1, "mask": KNOWN, "weights": COSTS[:, 0], "per_expert": True}),
        (coverage_offsets, [SCORES, 0.7], {"num_own": 1, "mask": KNOWN}),
        (deferral_rate_offsets, [SCORES, 0.2], {"num_own": 1}),
        (budget_offsets, [SCORES, torch.tensor([0.0, 0.5, 1.0]), 0.2], {"num_own": 1}),
        (fit_capacities, [SCORES, [3, 5]], {"num_own": 1, "mask": KNOWN}),
        (fit_capacities, [SCORES, torch.tensor([0.1, 0.2])], {"num_own": 1}),
        (decide_at, [SCORES, 0.1], {"num_own": 1, "mask": KNOWN}),
        (decide_at, [SCORES, MARGIN], {"num_own": 1}),
        (threshold_grid, [MARGIN, 9], {}),
        (certify, [MARGIN, WRONG, EDGES], {}),
        (certify, [MARGIN, [MONOTONE, DeferralRate(0.8)], EDGES], {"method": "bonferroni"}),
        (certify_by_group, [MARGIN, WRONG, EDGES, GROUPS], {"num_groups": 2}),
        (safest_first, [MARGIN, WRONG, EDGES], {}),
        (conformal_risk_control, [MARGIN, MONOTONE], {}),
        (conformal_risk_control_by_group, [MARGIN, MONOTONE, GROUPS], {"num_groups": 2}),
        (selective_prediction, [CHANCES, torch.tensor([0.1, 0.2])], {}),
        (compare_confidence, [CHANCES, COSTS], {"price": torch.tensor([0.1, 0.0, 0.2])}),
        (deferral_gains, [COSTS], {}),
        (post_hoc_scores, [SCORES], {}),
        (draw_answers, [even_skill(0.7, 3), TARGETS], {"seed": 0}),
        (draw_with_skill, [torch.tensor([0.5, 0.9]), TARGETS, 3], {"seed": 0}),
        (hide_answers, [ANSWERS, 0.5], {"seed": 0}),
        (label_counts, [ANSWERS, 3], {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_numpy_in_is_numpy_out_with_the_numbers_of_torch(function, arguments: list, options: dict) -> None:
    expected = function(*arguments, **options)
    first, *others = map(of_numpy, arguments)
    options = {name: of_numpy(value) for name, value in options.items()}
    same(function(first, *others, **options), expected)
    # Of both kinds at once comes torch.
    same_tensors(function(arguments[0], *others, **options), expected)


def test_a_risk_may_be_numpy_beside_tensors_and_a_grid_per_group_as_well() -> None:
    expected = certify_by_group(MARGIN, WRONG, [EDGES, EDGES[:4]], GROUPS, num_groups=2)
    found = certify_by_group(MARGIN, of_numpy(WRONG), [EDGES.numpy(), EDGES[:4].numpy()], GROUPS, num_groups=2)
    same_tensors(found, expected)
    same(p_value_of_mean(COSTS[:, 0], 0.9), torch.tensor(p_value_of_mean(COSTS[:, 0].numpy(), 0.9)))


def test_the_temperature_of_numpy_scores() -> None:
    def loss(scores: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(scores, ANSWERS[:, 0], reduction="none")

    scores = SCORES + torch.nn.functional.one_hot(ANSWERS[:, 0], 3)
    assert fit_temperature(loss, scores.numpy()) == fit_temperature(loss, scores)


def test_numbers_of_numpy_count_as_numbers() -> None:
    same(decide(SCORES.numpy(), np.float32(0.5)), decide(SCORES, 0.5))
    same(coverage_offsets(SCORES.numpy(), np.array(0.5), num_own=np.int64(1)), coverage_offsets(SCORES, 0.5, num_own=1))
    same(threshold_grid(MARGIN.numpy(), np.array(5)), threshold_grid(MARGIN, 5))
    same(threshold_grid(MARGIN.numpy(), 5, coverage=np.array([0.5, 1.0])), threshold_grid(MARGIN, 5, coverage=(0.5, 1.0)))  # type: ignore[arg-type]
    same(aurc(np.array([0.1, 0.3], np.longdouble), [0.0, 1.0]), aurc(torch.tensor([0.1, 0.3]), torch.tensor([0.0, 1.0])))


@pytest.mark.parametrize("price", [Decimal("0.25"), Fraction(1, 4), [Decimal("0.25"), Fraction(1, 4)], [QUARTER, 0.25]])
def test_prices_may_be_exact_or_tensors_of_their_own(price) -> None:
    answers, targets = torch.tensor([[0, 1], [1, 1]]), torch.tensor([0, 1])
    expected = error_costs(answers, targets, price=0.25, ceiling=2.0)
    same_tensors(error_costs(answers, targets, price=price, ceiling=2.0), expected)
    same(error_costs(answers.numpy(), targets.numpy(), price=price, ceiling=2.0), expected)


def test_decisions_compile_in_one_graph() -> None:
    def decided(scores: torch.Tensor) -> torch.Tensor:
        asked = deferral_margin(scores, num_own=1) >= 0
        return decide(scores, 0.1, mask=scores > -1) * 10 + asked

    torch.testing.assert_close(torch.compile(decided, backend="eager", fullgraph=True)(SCORES), decided(SCORES))


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="compilers before know too little of NumPy")
def test_figures_on_numpy_and_on_lists_may_stand_in_what_is_compiled() -> None:
    curve = risk_coverage_curve(MARGIN, COSTS[:, 0] > 0.5)

    def figures(values: torch.Tensor, array: np.ndarray) -> tuple:
        return average(values, [1.0] * len(values)), average(array), curve.at(0.5)

    given = MARGIN, MARGIN.numpy()
    for found, expected in zip(torch.compile(figures, backend="eager")(*given), figures(*given), strict=True):
        np.testing.assert_allclose(found, expected)
