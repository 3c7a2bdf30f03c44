import math

import pytest
import torch

from deferral.intervals import bootstrap_means, interval, mean_interval, paired_difference


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


def test_paired_differences_are_narrower_where_rows_agree() -> None:
    rows = torch.rand(500)
    better = rows - 0.01
    gap = paired_difference(better, rows)
    assert gap.excludes_zero()
    assert gap.high < 0
    assert gap.half_width < 1e-3 < mean_interval(rows).half_width


def test_small_integers_do_not_wrap_around() -> None:
    gap = paired_difference(torch.tensor([0, 0, 0, 1], dtype=torch.uint8), torch.ones(4, dtype=torch.uint8))
    assert gap.estimate == -0.75


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        mean_interval(torch.rand(0))
    with pytest.raises(ValueError, match="NaN"):
        mean_interval(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="one number per row"):
        mean_interval(torch.rand(3, 2))
    with pytest.raises(ValueError, match="same rows"):
        paired_difference(torch.rand(3), torch.rand(4))
    with pytest.raises(ValueError, match="level"):
        interval(0.0, torch.rand(10), level=95)
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_means(torch.rand(3), resamples=0)
