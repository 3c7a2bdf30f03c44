import numpy as np
import pytest
import torch

from deferral.intervals import bootstrap
from deferral.metrics import average
from deferral.reliability import brier, calibration_error, debiased_calibration_error, reliability


def test_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(400, generator=generator, dtype=torch.float64)
    happened = (torch.rand(400, generator=generator) < probability**2).double()
    table = reliability(probability, happened, bins=10)
    error = 0.0
    for number in range(10):
        inside = (probability >= number / 10) & (probability < (number + 1) / 10)
        torch.testing.assert_close(table.predicted[number], probability[inside].mean())
        torch.testing.assert_close(table.observed[number], happened[inside].mean())
        assert table.count[number] == inside.sum()
        error += float(inside.double().mean() * (happened[inside].mean() - probability[inside].mean()).abs())
    assert float(calibration_error(probability, happened, bins=10)) == pytest.approx(error)
    assert float(average(brier(probability, happened))) == pytest.approx(float((probability - happened).square().mean()))


def test_equal_mass_bins_keep_equal_values_together() -> None:
    probability = torch.tensor([0.1] * 50 + [0.5] * 3 + [0.9] * 47)
    happened = (torch.rand(100) < 0.5).double()
    table = reliability(probability, happened, bins=10, equal_mass=True)
    torch.testing.assert_close(table.predicted, torch.tensor([0.1, 0.5, 0.9]).double(), rtol=0, atol=1e-6)
    order = torch.randperm(100)
    again = reliability(probability[order], happened[order], bins=10, equal_mass=True)
    torch.testing.assert_close(again.observed, table.observed)
    spread = reliability(torch.rand(1000), torch.zeros(1000), bins=10, equal_mass=True)
    assert spread.count.tolist() == [100.0] * 10


def test_the_debiased_error_is_zero_on_average_where_the_plain_one_is_not() -> None:
    """Perfect probabilities, 200 rows, 400 repetitions."""
    generator = torch.Generator().manual_seed(0)
    plain, debiased = [], []
    for _ in range(400):
        probability = torch.rand(200, generator=generator, dtype=torch.float64)
        happened = (torch.rand(200, generator=generator) < probability).double()
        plain.append(calibration_error(probability, happened, equal_mass=True))
        debiased.append(debiased_calibration_error(probability, happened))
    errors = torch.stack(debiased)
    assert float(errors.mean().abs()) < 3 * float(errors.std()) / 20
    assert float(torch.stack(plain).mean()) > 0.05


def test_the_debiased_error_finds_a_true_miscalibration() -> None:
    probability = torch.full((20_000,), 0.7, dtype=torch.float64)
    happened = (torch.rand(20_000, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    assert float(debiased_calibration_error(probability, happened)) == pytest.approx(0.04, abs=0.004)


def test_the_debiased_error_by_hand_leaves_a_row_alone_in_its_bin_out() -> None:
    probability, happened = torch.tensor([0.1, 0.75, 0.75, 0.75, 0.75]), torch.tensor([1, 1, 1, 0, 0])
    by_hand = (0.5 - 0.75) ** 2 - 0.5 * 0.5 / 3
    assert float(debiased_calibration_error(probability, happened, bins=2)) == pytest.approx(by_hand)
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 1.0, 0.0, 0.0]])
    # Twice the first row alone: its residual without any variance.
    found = debiased_calibration_error(probability, happened, weights, bins=2)
    torch.testing.assert_close(found, torch.tensor([by_hand, 0.81]).double())


def test_the_debiased_error_of_perfect_probabilities_that_differ_within_a_bin_is_zero() -> None:
    sure = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert debiased_calibration_error(sure, sure, bins=1) == 0
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(300):
        probability = torch.rand(40, generator=generator, dtype=torch.float64)
        happened = (torch.rand(40, generator=generator, dtype=torch.float64) < probability).double()
        errors.append(debiased_calibration_error(probability, happened, bins=2))
    assert float(torch.stack(errors).mean().abs()) < 3 * float(torch.stack(errors).std()) / 300**0.5


def test_masks_weights_and_the_bootstrap_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(60, generator=generator, dtype=torch.float64)
    happened = torch.rand(60, generator=generator) < 0.5
    mask = torch.rand(60, generator=generator) < 0.5
    masked = calibration_error(probability, happened, mask=mask)
    torch.testing.assert_close(masked, calibration_error(probability[mask], happened[mask]))
    torch.testing.assert_close(masked, calibration_error(probability, happened, mask.double()))
    errors = bootstrap(lambda weights: calibration_error(probability, happened, weights), rows=60, resamples=20)
    assert errors.shape == (20,)
    assert bool(errors.isfinite().all())


def test_one_row_has_a_bin_and_fifteen_bins_are_usual() -> None:
    table = reliability(torch.tensor([0.25]), torch.tensor([1]))
    assert (table.predicted.tolist(), table.observed.tolist(), table.count.tolist()) == ([0.25], [1.0], [1.0])
    probability, happened = torch.rand(200), torch.rand(200) < 0.5
    for figure in (calibration_error, debiased_calibration_error):
        assert figure(probability, happened) == figure(probability, happened, bins=15)
    assert len(reliability(torch.arange(30) / 30, torch.ones(30)).count) == 15


def test_numpy_in_numpy_out() -> None:
    table = reliability(np.array([0.2, 0.8, 1.0, 0.0]), np.array([False, True, True, False]), bins=2)
    assert isinstance(table.count, np.ndarray)
    assert table.count.tolist() == [2, 2]


def test_a_sum_of_probabilities_may_be_a_rounding_above_one() -> None:
    above = torch.tensor(1.0).nextafter(torch.tensor(2.0)).repeat(4)
    right = torch.tensor([1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(calibration_error(above, right), calibration_error(torch.ones(4), right))
    torch.testing.assert_close(debiased_calibration_error(above, right), debiased_calibration_error(torch.ones(4), right))


def test_bad_input() -> None:
    half = torch.full((4,), 0.5)
    with pytest.raises(ValueError, match="one length"):
        reliability(half, torch.ones(3))
    with pytest.raises(ValueError, match="two non-empty vectors"):
        reliability(half[:0], half[:0])
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        calibration_error(half + 1, torch.ones(4))
    for outside in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            calibration_error(torch.tensor([0.5, outside]), torch.ones(2))
    with pytest.raises(ValueError, match=r"in \[0, 1\], got nan; .* by a mask"):
        calibration_error(torch.full((4,), torch.nan), torch.ones(4))
    with pytest.raises(ValueError, match=r"0 or 1 .* got 0\.5"):
        calibration_error(half, half)
    with pytest.raises(ValueError, match="at least one known row"):
        calibration_error(half, torch.ones(4), mask=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="bins"):
        reliability(half, torch.ones(4), bins=0)
    with pytest.raises(ValueError, match="at least two in some bin"):
        debiased_calibration_error(torch.tensor([0.1, 0.5, 0.9]), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_probability_at_the_edge_of_a_bin_lies_in_the_upper_one_in_any_precision(dtype: torch.dtype) -> None:
    for bins in (10, 20, 50):
        edges = torch.arange(1, bins, dtype=dtype) / bins
        table = reliability(edges, torch.ones(len(edges)), bins=bins)
        assert len(table.count) == bins - 1
