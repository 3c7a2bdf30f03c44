"""What metrics, decisions and intervals take, and what they say of what they do not."""

import numpy as np
import pytest
import torch

from deferral.baselines import compare_confidence
from deferral.capacity import fit_capacities
from deferral.certified import p_value_of_mean
from deferral.costs import pick
from deferral.curves import aurc, own_and_asked
from deferral.decision import decide, oracle
from deferral.intervals import mean_interval, over_seeds
from deferral.metrics import average, correct, deferral_cost, kept, system_figures
from deferral.reliability import brier


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
        (lambda: oracle(np.zeros((1, 2))), TypeError, "costs: expected a torch tensor"),
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
