import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from deferral import intervals
from deferral.curves import aurc, risk_coverage_curve
from deferral.intervals import (
    bootstrap,
    bootstrap_means,
    interval,
    mean_interval,
    metric_interval,
    on_rows,
    over_seeds,
    paired_difference,
)
from deferral.metrics import average, selective_risk
from deferral.reliability import debiased_calibration_error


def test_the_deviation_of_the_resampled_mean_is_its_closed_form() -> None:
    values = torch.randn(400, dtype=torch.float64)
    means = bootstrap_means(values, resamples=20_000)
    expected = values.std(correction=0) / math.sqrt(len(values))
    torch.testing.assert_close(means.std(), expected, rtol=0.03, atol=0)
    torch.testing.assert_close(means.mean(), values.mean(), atol=float(expected) / 30, rtol=0)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = sum(
        (lambda i: i.low <= 0.3 <= i.high)(mean_interval((torch.rand(300) < 0.3).float(), resamples=1000, seed=seed))
        for seed in range(300)
    )
    assert 0.90 < covered / 300 < 0.99


def test_columns_share_their_resamples() -> None:
    values = torch.rand(100, dtype=torch.float64)
    together = bootstrap_means(torch.stack([values, 2 * values], -1), resamples=50)
    torch.testing.assert_close(2 * together[:, 0], together[:, 1])
    torch.testing.assert_close(together[:, 0], bootstrap_means(values, resamples=50))


def test_the_same_seed_gives_the_same_interval() -> None:
    values = torch.rand(100)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)
    means = bootstrap_means(values, resamples=50)
    torch.testing.assert_close(bootstrap(lambda weights: average(values, weights), rows=100, resamples=50), means)
    assert not torch.equal(bootstrap_means(values, resamples=50, seed=1), means)


def test_a_lower_level_is_a_shorter_interval_and_one_row_a_point() -> None:
    values, zeros = torch.rand(100, dtype=torch.float64), torch.zeros(100)
    wide = mean_interval(values, resamples=300)
    for narrow in (mean_interval(values, level=0.5, resamples=300), paired_difference(values, zeros, level=0.5, resamples=300)):
        assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high
    assert over_seeds(values, level=0.5).high < over_seeds(values).high
    alone = mean_interval(torch.tensor([2.0]), resamples=3)
    assert (alone.low, alone.estimate, alone.high) == (2.0, 2.0, 2.0)


def test_paired_differences_are_narrower_where_rows_agree() -> None:
    rows = torch.rand(500)
    better = rows - 0.01
    gap = paired_difference(better, rows)
    assert gap.excludes_zero()
    assert gap.high - gap.half_width == pytest.approx((gap.low + gap.high) / 2)
    assert paired_difference(rows, better).excludes_zero()
    assert not paired_difference(rows, rows).excludes_zero()
    assert gap.high < 0
    assert gap.half_width < 1e-3 < mean_interval(rows).half_width


@pytest.mark.parametrize("ties", [False, True])
def test_weights_and_resampled_rows_are_two_ways_to_one_figure(ties: bool) -> None:
    confidence, loss = torch.rand(2, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if ties:
        confidence = (confidence * 5).round()
    by_weights = bootstrap(lambda weights: aurc(confidence, loss, weights), rows=40, resamples=30)
    by_rows = bootstrap(on_rows(aurc, confidence, loss), rows=40, resamples=30)
    torch.testing.assert_close(by_weights, by_rows)


def test_any_metric_of_another_library() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=80)
    labels = scores + generator.normal(size=80) > 0
    figure = metric_interval(on_rows(roc_auc_score, labels, scores), rows=80, resamples=200)
    assert figure.estimate == pytest.approx(roc_auc_score(labels, scores))
    assert figure.low < figure.estimate < figure.high
    columns = (pd.Series(labels)[::-1][::-1], scores.tolist())
    assert metric_interval(on_rows(roc_auc_score, *columns), rows=80, resamples=200) == figure


def test_a_metric_may_give_numpy() -> None:
    values = np.arange(5.0)
    found = metric_interval(lambda weights: weights.numpy() @ values / 5, rows=5)
    assert found == mean_interval(values)


def test_the_same_seed_draws_the_same_rows_for_every_metric() -> None:
    values = torch.rand(50, dtype=torch.float64)
    figure = metric_interval(lambda weights: average(values, weights), rows=50, resamples=100)
    mean = mean_interval(values, resamples=100)
    assert (figure.estimate, figure.low, figure.high) == pytest.approx((mean.estimate, mean.low, mean.high))


@pytest.mark.parametrize("at_once", [1, 100, 10_000])
def test_how_many_samples_are_drawn_at_once_changes_none(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bootstrap(lambda weights: weights, rows=7, resamples=90, seed=3)
    monkeypatch.setattr(intervals, "_CHUNK", at_once)
    assert torch.equal(bootstrap(lambda weights: weights, rows=7, resamples=90, seed=3), expected)


def test_samples_without_a_figure_are_left_out() -> None:
    loss, keep = torch.rand(20, dtype=torch.float64), torch.arange(20) < 1
    figure = metric_interval(lambda weights: selective_risk(loss, keep, weights), rows=20, resamples=500)
    assert figure.low == figure.high == pytest.approx(float(loss[0]))


def test_the_interval_over_seeds_is_that_of_student() -> None:
    values = torch.tensor([3.1, 3.4, 3.0])
    figures = over_seeds(values)
    low, high = stats.t.interval(0.95, 2, loc=values.double().mean(), scale=stats.sem(values.double()))
    assert (figures.low, figures.high) == pytest.approx((low, high))
    assert figures.deviation == pytest.approx(float(values.double().std()))
    assert figures.count == 3
    assert math.isnan(over_seeds(values[:1]).deviation)
    assert over_seeds(np.array([1.0, 1.0])).low == 1.0


def test_rows_without_a_value_stay_out_of_the_mean() -> None:
    values = torch.rand(50, dtype=torch.float64)
    values[::3] = torch.nan
    figure = mean_interval(values, resamples=200)
    assert figure.estimate == pytest.approx(float(values.nanmean()))
    gap = paired_difference(values, torch.zeros(50), resamples=200)
    assert (gap.low, gap.high) == pytest.approx((figure.low, figure.high))


def test_small_integers_do_not_wrap_around() -> None:
    gap = paired_difference(torch.tensor([0, 0, 0, 1], dtype=torch.uint8), torch.ones(4, dtype=torch.uint8))
    assert gap.estimate == -0.75


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        mean_interval(torch.rand(0))
    with pytest.raises(ValueError, match="NaN in all"):
        mean_interval(torch.tensor([torch.nan, torch.nan]))
    with pytest.raises(ValueError, match="infinity"):
        mean_interval(torch.tensor([1.0, torch.inf]))
    with pytest.raises(ValueError, match="NaN or infinity"):
        bootstrap_means(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="one number per row"):
        mean_interval(torch.rand(3, 2))
    with pytest.raises(ValueError, match="same rows"):
        paired_difference(torch.rand(3), torch.rand(4))
    for level in (0.0, 1.0, 95):
        with pytest.raises(ValueError, match="level"):
            interval(0.0, torch.rand(10), level=level)
        with pytest.raises(ValueError, match="level"):
            over_seeds(torch.rand(3), level=level)
    with pytest.raises(ValueError, match="one figure per sample"):
        metric_interval(lambda weights: weights[:, :2], rows=3)
    for figure in (0.5, np.float64(0.5), torch.tensor(0.5), torch.ones(5)):
        with pytest.raises(ValueError, match=r"one figure per sample, .* wrapped by on_rows"):
            metric_interval(lambda weights, figure=figure: figure, rows=3)
    with pytest.raises(TypeError, match=r"got Curve; .* \.at\(coverage\)"):
        metric_interval(lambda weights: risk_coverage_curve(torch.rand(3), torch.ones(3), weights), rows=3)
    with pytest.raises(ValueError, match="rows"):
        bootstrap(lambda weights: weights.sum(-1), rows=0)
    with pytest.raises(ValueError, match="one figure per seed"):
        over_seeds(torch.rand(0))
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_means(torch.rand(3), resamples=0)


def test_the_interval_of_a_debiased_error_lies_around_it() -> None:
    """Of calibrated probabilities its truth is 0; the percentiles of the resamples as they are often lie above it."""
    generator, missed = torch.Generator().manual_seed(0), 0
    for _ in range(20):
        probability = torch.rand(200, dtype=torch.float64, generator=generator)
        right = torch.rand(200, dtype=torch.float64, generator=generator) < probability
        found = metric_interval(
            lambda w, p=probability, r=right: debiased_calibration_error(p, r, w), 200, resamples=200, centred=True
        )
        assert found.low < found.estimate < found.high
        missed += not found.low <= 0 <= found.high
    assert missed <= 2


def test_one_interval_is_of_one_figure() -> None:
    with pytest.raises(ValueError, match="one figure per resample"):
        interval(0.0, torch.zeros(5, 2))
    with pytest.raises(ValueError, match="one figure per resample"):
        interval(0.0, torch.zeros(0))
    assert interval(1.0, torch.tensor([1, 1, 1])).low == 1


def test_a_figure_that_does_not_exist_has_no_interval() -> None:
    found = interval(math.nan, torch.tensor([0.1, 0.2, math.nan]))
    assert all(map(math.isnan, (found.low, found.high)))
    assert not found.excludes_zero()


def test_where_some_resamples_are_infinite_the_end_is_a_figure_or_infinite() -> None:
    finite = [float(value) for value in range(100)]
    assert interval(1.0, torch.tensor([*finite, torch.inf])).high == 98.0
    assert interval(1.0, torch.tensor([*finite, *[torch.inf] * 5])).high == torch.inf
    assert interval(1.0, torch.tensor([-torch.inf, *finite[:5]])).low == -torch.inf
    assert interval(1.0, torch.tensor(finite)).high == pytest.approx(96.525)
