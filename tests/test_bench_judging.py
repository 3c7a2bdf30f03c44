"""The figures of a cell."""

import pytest
import torch

from benchmarks.harness.judging import Judged, Outputs, figures, fixed, judge, single_stage
from deferral.costs import single_stage_costs
from deferral.decision import decide
from deferral.metrics import deferral_cost


def test_a_single_stage_decides_alike_over_classes_and_over_keep_or_ask() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 7, generator=generator)
    targets = torch.randint(4, (200,), generator=generator)
    costs = torch.rand(200, 3, generator=generator)
    outputs = single_stage(scores, targets, 4, costs)
    whole = deferral_cost(single_stage_costs(targets, costs, 4), decide(scores))
    assert torch.equal(deferral_cost(outputs.costs, decide(outputs.scores)), whole)
    judged = judge(outputs, outputs)
    assert torch.equal(judged.natural_cost, whole)
    assert judged.cost.mean() <= judged.natural_cost.mean()  # on its own rows a fitted threshold cannot lose


def test_figures_meet_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, costs = torch.randn(300, 2, generator=generator), torch.rand(300, 2, generator=generator)
    outputs = Outputs(scores, costs, (costs > 0.5).float())
    judged, never = judge(outputs, outputs), fixed(outputs, 0)
    found = figures(judged, {"never": never})
    rho, accepted = 1 - found["coverage"]["estimate"], found["accepted_cost"]["estimate"]
    asked = float((judged.cost * (1 - judged.kept)).sum() / (1 - judged.kept).sum())
    # The identity of the abstention loss: (1 - rho) * cost of what is kept + rho * cost of asking.
    assert found["cost"]["estimate"] == pytest.approx((1 - rho) * accepted + rho * asked, abs=1e-4)
    assert found["load"] == [pytest.approx(rho, abs=1e-5)]
    gap = found["difference"]["never"]
    assert gap["estimate"] == pytest.approx(float((judged.cost - costs[:, 0]).mean()), abs=1e-5)
    assert gap["low"] < gap["estimate"] < gap["high"]
    assert found["error"]["estimate"] == pytest.approx(float(judged.error.mean()), abs=1e-5)
    assert "accepted_cost" not in figures(fixed(outputs, 1), {})


def test_a_threshold_that_is_not_ahead_by_its_error_is_not_taken() -> None:
    scores = torch.tensor([[0.0, -1.0], [0.0, -0.5], [0.0, 1.0], [0.0, 2.0]])
    costs = torch.tensor([[0.3, 0.2], [0.3, 0.1], [0.3, 0.1], [0.3, 0.1]])
    calibration = Outputs(scores, costs)
    # Deferring everything gains 0.1, 0.2, 0 and 0: 0.075 on average, 1.57 standard errors.
    taken, left = judge(calibration, calibration, errors_ahead=1.5), judge(calibration, calibration, errors_ahead=1.6)
    assert taken.kept.tolist() == [0, 0, 0, 0]
    assert left.kept.tolist() == left.natural_kept.tolist() == [1, 1, 0, 0]
    assert judge(calibration, calibration).kept.sum() == 0


def test_rows_may_have_actions_of_their_own() -> None:
    outputs = Outputs(torch.zeros(3, 2), torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]]))
    assert fixed(outputs, torch.tensor([0, 1, 0])).cost.tolist() == pytest.approx([0.1, 0.8, 0.3])


def test_rows_of_several_splits_are_averaged() -> None:
    rows = torch.tensor([0, 2, 0, 3])
    ones = torch.ones(4)
    judged = Judged(
        cost=torch.tensor([1.0, 2.0, 3.0, 4.0]),
        natural_cost=ones,
        kept=torch.tensor([1.0, 1.0, 0.0, 0.0]),
        natural_kept=ones,
        own_cost=torch.tensor([5.0, 6.0, 7.0, 8.0]),
        load=torch.tensor([[0.0], [0.0], [1.0], [1.0]]),
    )
    mean = judged.mean_over(rows, 5)
    assert mean.cost.tolist() == [2.0, 2.0, 4.0]
    assert mean.kept.tolist() == [0.5, 1.0, 0.0]
    assert (mean.own_cost * mean.kept).tolist() == pytest.approx([2.5, 6.0, 0.0])  # of row 0 one of two splits kept it
    assert mean.load.flatten().tolist() == [0.5, 0.0, 1.0]
