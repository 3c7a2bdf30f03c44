import numpy as np
import pytest
import torch

from deferral import decide, error_costs, pick
from deferral.metrics import average, correct, deferral_cost, kept, load, selective_risk, system_figures


def test_figures_by_hand() -> None:
    answers, targets = torch.tensor([[0, 1, 2], [1, 1, 0], [2, 2, 2]]), torch.tensor([0, 0, 2])
    costs = error_costs(answers, targets, price=[0.0, 0.1, 0.2], ceiling=1.2)
    actions = torch.tensor([0, 2, 1])
    torch.testing.assert_close(deferral_cost(costs, actions), torch.tensor([0.0, 0.2, 0.1]))
    assert correct(answers, targets, actions).tolist() == [1, 1, 1]
    assert kept(actions, num_own=1).tolist() == [1, 0, 0]
    assert load(actions, num_own=1, num_experts=2).tolist() == [[0, 0], [0, 1], [1, 0]]


def test_abstention_loss_is_its_identity() -> None:
    """(1 - rho) * error on the accepted + rho * c, exactly."""
    right, cost = torch.rand(200) < 0.7, 0.2
    actions = (torch.rand(200) < 0.3).long()
    costs = torch.stack([1 - right.double(), torch.full((200,), cost, dtype=torch.float64)], -1)
    rho = actions.double().mean()
    error = selective_risk(1 - right.double(), kept(actions, num_own=1))
    torch.testing.assert_close(average(deferral_cost(costs, actions)), (1 - rho) * error + rho * cost)


def test_system_figures_of_an_image_are_asked_for_by_rows() -> None:
    costs = torch.rand(2, 6, 3)
    answers, targets, actions = (torch.randint(3, shape) for shape in ((2, 6, 3), (2, 6), (2, 6)))
    with pytest.raises(ValueError, match=r"\(N, A\), got \(2, 6, 3\), .* every place is a row"):
        system_figures(costs, answers, targets, actions, num_own=1)
    flat = system_figures(costs.flatten(0, -2), answers.flatten(0, -2), targets.flatten(), actions.flatten(), num_own=1)
    assert flat["coverage"] == (actions == 0).double().mean()


def test_system_figures_equal_loops_over_the_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(0, 3, (60, 4), generator=generator)
    answers[:, 3] = -1  # the last action abstains
    targets = torch.randint(0, 3, (60,), generator=generator)
    mask = torch.rand(60, 4, generator=generator) < 0.7
    mask[:, 0] = mask[:, 3] = True
    costs = torch.rand(60, 4, generator=generator)
    actions = torch.randint(0, 4, (60,), generator=generator)
    figures = system_figures(costs, answers, targets, actions, mask=mask, num_own=1)

    known = [i for i in range(60) if mask[i, actions[i]]]
    answered = [i for i in known if actions[i] != 3]
    right = {i: float(answers[i, actions[i]] == targets[i]) for i in answered}
    own = [right[i] for i in answered if actions[i] == 0]
    others = [right[i] for i in answered if actions[i] != 0]
    expected = {
        "deferral cost": sum(float(costs[i, actions[i]]) for i in known) / len(known),
        "system accuracy": sum(right.values()) / len(answered),
        "coverage": len(own) / 60,
        "answered": len(answered) / 60,
        "accuracy where kept": sum(own) / len(own),
        "accuracy where deferred": sum(others) / len(others),
        "selective risk": 1 - sum(own) / len(own),
    }
    assert {name: float(value) for name, value in figures.items() if name != "load"} == pytest.approx(expected)
    assert figures["load"].tolist() == pytest.approx([float((actions == j).double().mean()) for j in (1, 2, 3)])


def test_an_empty_subset_has_no_figure() -> None:
    ones = torch.ones(4, 2)
    figures = system_figures(ones, ones.long(), torch.ones(4, dtype=torch.long), torch.ones(4, dtype=torch.long), num_own=1)
    assert figures["coverage"] == 0
    assert figures["accuracy where kept"].isnan()
    assert figures["selective risk"].isnan()
    assert figures["system accuracy"] == 1
    assert selective_risk(torch.rand(3), torch.zeros(3)).isnan()
    assert average(torch.full((3,), torch.nan)).isnan()


def test_what_is_nobodys_is_not_kept_and_a_class_is_not_a_missing_answer() -> None:
    assert kept(torch.tensor([-1, 0, 1]), num_own=1).tolist() == [0, 1, 0]
    answers = torch.tensor([[255, 3]], dtype=torch.uint8)
    assert correct(answers, torch.tensor([255]), torch.tensor([0])).tolist() == [1]


def test_what_nobody_answers_has_no_cost_and_is_neither_right_nor_wrong() -> None:
    """`decide` gives action -1 where every action is masked."""
    mask = torch.tensor([[True, True], [False, False]])
    actions = decide(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), mask=mask)
    costs, answers, targets = torch.tensor([[0.25, 1.0], [0.5, 0.5]]), torch.tensor([[1, 0], [1, 1]]), torch.tensor([1, 1])
    assert actions.tolist() == [0, -1]
    for known in (None, mask):
        figures = system_figures(costs, answers, targets, actions, mask=known, num_own=1)
        assert float(figures["deferral cost"]) == 0.25
        assert (float(figures["system accuracy"]), float(figures["answered"]), float(figures["coverage"])) == (1.0, 0.5, 0.5)
        assert figures["load"].tolist() == [0.0]
    unknown = correct(torch.tensor([[torch.nan, 1.0]]), torch.tensor([1]), torch.tensor([0]))
    assert unknown.isnan().all()


def test_weights_are_numbers_of_copies_and_keep_their_leading_dimensions() -> None:
    values = torch.rand(5, 2, dtype=torch.float64)
    values[1, 0] = torch.nan
    weights = torch.tensor([[1, 2, 0, 1, 3], [0, 0, 0, 0, 2]])
    result = average(values, weights.double())
    assert result.shape == (2, 2)
    for row in range(2):
        torch.testing.assert_close(result[row], values.repeat_interleave(weights[row], dim=0).nanmean(0))


def test_numpy_in_numpy_out() -> None:
    costs, actions = np.array([[0.0, 1.0], [0.5, 0.25]]), np.array([1, 1])
    assert isinstance(deferral_cost(costs, actions), np.ndarray)
    assert average(deferral_cost(costs, actions)) == 0.625
    figures = system_figures(costs, np.array([[0, 1], [1, 1]]), np.array([1, 1]), actions, num_own=1)
    assert isinstance(figures["load"], np.ndarray)
    assert figures["system accuracy"] == 1.0
    read_only = np.broadcast_to(np.float32(1.0), (3,))
    assert average(read_only) == 1.0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="one target per row"):
        correct(torch.zeros(3, 2), torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="one action per row"):
        pick(torch.rand(3, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one row"):
        average(torch.rand(0))
    with pytest.raises(ValueError, match="at least one row"):
        average(torch.tensor(1.0))
    with pytest.raises(ValueError, match="got infinity"):
        average(torch.tensor([1.0, torch.inf]))
    with pytest.raises(ValueError, match="two vectors of one length"):
        selective_risk(torch.rand(3), torch.ones(4))
    with pytest.raises(ValueError, match="not all 0"):
        average(torch.rand(3), torch.zeros(3))
    with pytest.raises(TypeError, match="bool"):
        deferral_cost(torch.rand(3, 2), torch.zeros(3, dtype=torch.long), mask=torch.ones(3, 2))


@pytest.mark.parametrize("keep", [[torch.nan, 1.0, 0.0], [0.2, 0.9, 0.1]])
def test_to_keep_a_row_is_yes_or_no(keep: list[float]) -> None:
    with pytest.raises(ValueError, match="keep: expected bool, or 1 and 0"):
        selective_risk(torch.tensor([1.0, 0.0, 0.0]), torch.tensor(keep))
