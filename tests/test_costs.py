import pytest
import torch

from deferral import error_costs, pick, single_stage_costs, squared_costs
from deferral.validation import check_targets

ANSWERS = torch.tensor([[0, 1, 2], [1, 1, -1]])
TARGETS = torch.tensor([0, 1])


def test_error_costs_by_hand() -> None:
    costs = error_costs(ANSWERS[:, :2], TARGETS, alpha=[1.0, 0.5], price=[0.0, 0.25])
    torch.testing.assert_close(costs, torch.tensor([[0.0, 0.75], [0.0, 0.25]]))


def test_missing_answers_become_a_mask() -> None:
    costs, mask = error_costs(ANSWERS, TARGETS, price=0.1, ceiling=1.1, missing=-1)
    torch.testing.assert_close(costs, torch.tensor([[0.1, 1.1, 1.1], [0.1, 0.1, 0.0]]))
    assert mask.tolist() == [[True, True, True], [True, True, False]]


def test_costs_under_probabilities_are_expected_costs() -> None:
    law = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]], dtype=torch.float64)
    costs, _ = error_costs(ANSWERS, law, missing=-1)
    torch.testing.assert_close(costs, torch.tensor([[0.3, 0.8, 0.9], [0.0, 0.0, 0.0]], dtype=torch.float64))


def test_squared_costs_and_missing_numbers() -> None:
    answers = torch.tensor([[1.0, 3.0], [torch.nan, 2.0]])
    costs, mask = squared_costs(answers, torch.tensor([1.0, 1.0]), price=[0.0, 0.5], missing=float("nan"))
    torch.testing.assert_close(costs, torch.tensor([[0.0, 4.5], [0.0, 1.5]]))
    assert mask.tolist() == [[True, True], [False, True]]
    torch.testing.assert_close(squared_costs(answers[:1], torch.tensor([1.0])), torch.tensor([[0.0, 4.0]]))
    targets = torch.tensor([1.0, 1.0], requires_grad=True)
    squared_costs(answers, targets, missing=float("nan"))[0].sum().backward()
    assert targets.grad.tolist() == [-4.0, -2.0]


def test_a_number_that_stands_for_no_answer_is_masked_too() -> None:
    costs, mask = squared_costs(torch.tensor([[1.0, -1.0]]), torch.tensor([0.0]), alpha=2.0, price=3.0, missing=-1.0)
    assert (costs.tolist(), mask.tolist()) == ([[5.0, 0.0]], [[True, False]])


def test_an_error_may_weigh_more_than_one_and_asking_may_cost_more() -> None:
    costs = error_costs(ANSWERS[:, :2], TARGETS, alpha=[2.0, 1.0], price=[0.0, 3.0], ceiling=4.0)
    assert costs.tolist() == [[0.0, 4.0], [0.0, 3.0]]
    each_row = torch.tensor([[0.0, 0.5], [0.0, 0.25], [0.0, 0.0]])
    right = torch.ones(3, 2, dtype=torch.long)
    assert torch.equal(error_costs(right, right[:, 0], price=each_row, ceiling=1.5), each_row)


def test_no_rows_have_no_costs() -> None:
    none = torch.empty(0, 2, dtype=torch.long)
    for targets in (none[:, 0], torch.empty(0, 3)):
        assert error_costs(none, targets).shape == (0, 2)
        assert error_costs(none, targets, missing=-1)[1].shape == (0, 2)
    assert pick(torch.empty(0, 2), none[:, 0]).shape == (0,)


def test_the_single_stage_table() -> None:
    table = single_stage_costs(TARGETS, torch.tensor([[0.1], [0.2]]), 3)
    torch.testing.assert_close(table, torch.tensor([[0, 1, 1, 0.1], [1, 0, 1, 0.2]]))
    law = torch.tensor([[0.75, 0.25, 0.0]])
    assert single_stage_costs(law, torch.tensor([[0.5]]), 3).tolist() == [[0.25, 0.75, 1.0, 0.5]]


def test_pick() -> None:
    assert pick(ANSWERS, torch.tensor([2, 0])).tolist() == [2, 1]
    with pytest.raises(ValueError, match="one action per row"):
        pick(ANSWERS, torch.tensor([[0], [1]]))


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: error_costs(ANSWERS, TARGETS), ValueError, "missing=-1"),
        (lambda: error_costs(ANSWERS.float(), TARGETS), TypeError, "squared_costs"),
        (lambda: error_costs(ANSWERS[0], TARGETS), ValueError, "unsqueeze"),
        (lambda: error_costs(ANSWERS[:, :2], TARGETS, price=[0.1, 0.1, 0.1]), ValueError, "one per column"),
        (lambda: error_costs(ANSWERS[:, :2], TARGETS, price=[0.0, 0.2]), ValueError, r"Pass ceiling=1\.2"),
        (lambda: error_costs(ANSWERS[:, :2], TARGETS, price=-0.1), ValueError, "price: expected non-negative"),
        (lambda: error_costs(ANSWERS[:, :2], TARGETS, price=float("nan")), ValueError, "NaN"),
        (lambda: error_costs(ANSWERS[:, :2] + 5, torch.rand(2, 3).softmax(-1)), ValueError, r"in 0\.\.2, got 6"),
        (lambda: error_costs(ANSWERS[:, :2], torch.tensor([[5.0, 3.0], [2.0, -1.0]])), ValueError, "non-negative probabilities"),
        (lambda: error_costs(ANSWERS[:, :2], TARGETS, price=torch.zeros(3, 1, 2)), ValueError, "one per column"),
        (lambda: error_costs(ANSWERS[:, :2], TARGETS, ceiling=float("nan")), ValueError, "ceiling"),
        (lambda: single_stage_costs(TARGETS, torch.ones(2, 1, dtype=torch.long), 3), TypeError, "floating"),
        (lambda: single_stage_costs(TARGETS, torch.ones(2), 3), ValueError, "expert_costs: expected shape"),
        (lambda: error_costs(ANSWERS, TARGETS - 100), ValueError, "targets: expected class indices, got -100"),
        (lambda: single_stage_costs(TARGETS - 100, torch.ones(2, 1), 3), ValueError, r"class indices in 0\.\.2"),
        (lambda: squared_costs(torch.tensor([[torch.nan]]), torch.ones(1)), ValueError, "NaN"),
        (lambda: error_costs(ANSWERS[:, :2], ["a", "b"]), TypeError, "targets: expected a torch tensor, or numbers"),
        (lambda: error_costs(ANSWERS[:, :2], TARGETS, price="a"), TypeError, "price: expected a torch tensor, or numbers"),
        (lambda: error_costs(ANSWERS[:, :2], TARGETS, ceiling="a"), TypeError, "ceiling: expected a number, got 'a'"),
        (lambda: error_costs(ANSWERS[:, :2], TARGETS, missing=0.5), TypeError, r"missing: expected a whole number, got 0\.5"),
        (
            lambda: single_stage_costs(TARGETS, torch.rand(2, 1), 3.0),
            TypeError,
            "num_classes: expected a whole number",
        ),
        (lambda: squared_costs(torch.ones(3), torch.ones(3)), ValueError, "answers: expected shape"),
        (lambda: squared_costs(torch.ones(3, 1), torch.ones(3), price=-0.1), ValueError, "price: expected non-negative"),
        (lambda: squared_costs(torch.ones(3, 1), torch.ones(3), alpha=-0.1), ValueError, "alpha: expected non-negative"),
        (lambda: squared_costs(torch.ones(3, 2), torch.ones(3), alpha=[1.0] * 3), ValueError, "alpha: expected one number"),
    ],
)
def test_bad_input(call, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()


def test_labels_and_answers_may_have_any_integer_dtype() -> None:
    law = torch.tensor([[0.2, 0.8], [0.5, 0.5]])
    wide = torch.tensor([[1], [0]])
    assert torch.equal(error_costs(wide.to(torch.uint8), law), error_costs(wide, law))
    labels, costs = torch.tensor([1, 0]), torch.rand(2, 1)
    assert torch.equal(single_stage_costs(labels.to(torch.int32), costs, 2), single_stage_costs(labels, costs, 2))


def test_the_ceiling_is_what_can_occur_not_what_did() -> None:
    """No row of this sample is wrong and priced at once, yet the next one may be."""
    with pytest.raises(ValueError, match="ceiling"):
        error_costs(torch.tensor([[0]]), torch.tensor([0]), price=0.2)


def test_actions_are_indices_of_any_integer_dtype() -> None:
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for dtype in (torch.int32, torch.uint8, torch.int64):
        assert pick(table, torch.tensor([1, 0], dtype=dtype)).tolist() == [2, 3]
    for actions in (torch.tensor([1.0, 0.0]), torch.tensor([True, False])):
        with pytest.raises(TypeError, match="indices of an integer dtype"):
            pick(table, actions)


def test_the_last_class_of_small_integers_is_an_answer() -> None:
    targets = torch.tensor([255, 3])
    for dtype in (torch.int64, torch.uint8):
        costs, known = error_costs(targets.unsqueeze(-1).to(dtype), targets, missing=-1)
        assert known.all()
        assert not costs.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_that_a_teacher_rounded_are_probabilities(dtype: torch.dtype) -> None:
    teacher = torch.randn(500, 10, generator=torch.Generator().manual_seed(0)).to(dtype).softmax(-1)
    check_targets(teacher, 10)
    with pytest.raises(ValueError, match="sum to 1"):
        check_targets(teacher * 0.9, 10)


def test_answers_that_are_integers_lose_nothing_beside_targets_of_half_precision() -> None:
    for answer, target, squared in ((1001, 1000.0, 1.0), (3, 300.0, 88209.0)):
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            found = squared_costs(torch.tensor([[answer]]), torch.tensor([target], dtype=dtype))
            assert found.item() == squared
    # One more than float32 can count to.
    assert squared_costs(torch.tensor([[2**24 + 1]]), torch.tensor([2.0**24], dtype=torch.float64)).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_price_is_not_swallowed_by_half_precision(dtype: torch.dtype) -> None:
    answers, target = torch.tensor([[1.0, 1.0]], dtype=dtype), torch.tensor([0.0], dtype=dtype)
    torch.testing.assert_close(squared_costs(answers, target, price=[0.0, 0.003]), torch.tensor([[1.0, 1.003]]))
    assert squared_costs(torch.tensor([[300.0]], dtype=dtype), target).item() == 90_000


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.int16])
def test_answers_of_any_integer_type(dtype: torch.dtype) -> None:
    answers = torch.tensor([[1, 0]]).to(dtype)
    assert error_costs(answers, torch.tensor([1])).tolist() == [[0.0, 1.0]]
    assert error_costs(answers, torch.tensor([[0.25, 0.75]])).tolist() == [[0.25, 0.75]]
