import pytest
import torch

from deferral import chow_scores, decide, error_costs, fit_offsets, pick, single_stage_costs
from deferral.baselines import compare_confidence, deferral_gains, post_hoc_scores, selective_prediction


@pytest.fixture
def law() -> tuple[torch.Tensor, torch.Tensor]:
    """P(y | x) of 50 inputs and 4 classes, and the probability that each of 3 experts is right there."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(50, 4, generator=generator, dtype=torch.float64)
    return p / p.sum(-1, keepdim=True), torch.rand(50, 3, generator=generator, dtype=torch.float64)


def test_compare_confidence_at_the_true_probabilities_is_the_bayes_rule(law) -> None:
    p, q = law
    price = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)
    expected_costs = torch.cat([1 - p, 1 - q + price], dim=-1)
    actions = decide(compare_confidence(p, q, price=price))
    torch.testing.assert_close(pick(expected_costs, actions), expected_costs.amin(-1))
    assert (actions < 4).any()
    assert (actions >= 4).any()
    alone = decide(compare_confidence(p.amax(-1, keepdim=True), q, price=price))
    assert torch.equal(alone, (actions - 3).clamp(min=0))


def test_selective_prediction_is_chows_rule_to_the_best_expert(law) -> None:
    p, _ = law
    assert torch.equal(selective_prediction(p, torch.tensor([0.3], dtype=torch.float64)), chow_scores(p, 0.3))
    actions = decide(selective_prediction(p, torch.tensor([0.7, 0.4, 0.5], dtype=torch.float64)))
    assert torch.equal(actions == 5, p.amax(-1) <= 0.6)
    assert not ((actions == 4) | (actions == 6)).any()


def test_the_fitted_threshold_of_selective_prediction_beats_every_other(law) -> None:
    p, q = law
    generator = torch.Generator().manual_seed(1)
    targets = torch.multinomial(p, 1, generator=generator).squeeze(-1)
    answers = targets.unsqueeze(-1).where(torch.rand(50, 3, generator=generator) < q, (targets.unsqueeze(-1) + 1) % 4)
    expert_costs = error_costs(answers, targets).double()
    costs = single_stage_costs(targets, expert_costs, 4)
    scores = selective_prediction(p, expert_costs.mean(0))
    best = int(expert_costs.mean(0).argmin())
    by_threshold = [
        expert_costs[:, best].where(p.amax(-1) <= t, costs.gather(-1, p.argmax(-1, keepdim=True)).squeeze(-1)).mean().item()
        for t in [0.0, *p.amax(-1).tolist()]
    ]
    fitted = pick(costs, decide(scores, fit_offsets(scores, costs, num_own=4))).mean().item()
    assert fitted == pytest.approx(min(by_threshold))


def test_post_hoc_deferral_at_the_mean_gains_is_the_bayes_rule_of_the_frozen_predictor() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 6, (600,), generator=generator)
    costs = torch.rand(600, 3, generator=generator, dtype=torch.float64) + torch.rand(6, 3, generator=generator)[x]
    # The least-squares regression on a discrete x is the mean of every cell.
    means = torch.stack([costs[x == cell].mean(0) for cell in range(6)])
    gains = torch.stack([deferral_gains(costs)[x == cell].mean(0) for cell in range(6)])
    actions = decide(post_hoc_scores(gains))
    assert torch.equal(actions, means.argmin(-1))
    assert len(actions.unique()) > 1


def test_a_gain_is_the_own_cost_less_the_experts() -> None:
    assert deferral_gains(torch.tensor([[0.5, 0.25], [0.0, 1.0]])).tolist() == [[0.25], [-1.0]]


def test_an_expert_wins_a_tie() -> None:
    half = torch.tensor([[0.5]])
    assert decide(compare_confidence(half, half)).tolist() == [1]
    assert decide(post_hoc_scores(torch.zeros(1, 2))).tolist() == [2]


def test_half_precision_does_not_round_the_price() -> None:
    p, q = torch.tensor([[0.5]]).half(), torch.tensor([[0.75]]).bfloat16()
    expected = torch.tensor([[0.5, 0.75 - 0.2003]])
    torch.testing.assert_close(compare_confidence(p, q, price=0.2003), expected, rtol=0, atol=1e-6)


def test_asking_may_cost_more_than_an_error() -> None:
    assert compare_confidence(torch.tensor([[0.5]]), torch.tensor([[0.75]]), price=2.0).tolist() == [[0.5, -1.25]]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: compare_confidence(torch.rand(3, 2), torch.ones(3, 1).long()), "correctness: expected a floating dtype"),
        (lambda: compare_confidence(torch.rand(3, 2), torch.rand(4, 1)), "differ in rows"),
        (lambda: compare_confidence(torch.rand(3, 2), torch.rand(3, 2), price=torch.rand(3)), r"one per expert \(2\)"),
        (lambda: compare_confidence(torch.rand(3, 2), torch.rand(3, 2), price=[0.1, 0.2, 0.3]), r"one per expert \(2\)"),
        (lambda: selective_prediction(torch.rand(3, 2), torch.rand(3, 1)), r"one number per expert \(E,\)"),
        (lambda: deferral_gains(torch.rand(3, 1)), "one per expert"),
        (lambda: deferral_gains(torch.ones(3, 2).long()), "costs: expected a floating dtype"),
        (lambda: selective_prediction(torch.rand(3, 2), torch.ones(2).long()), "expected_costs: expected a floating dtype"),
        (lambda: selective_prediction(torch.ones(3, 2, dtype=torch.long), torch.rand(2)), "probabilities: expected a floating"),
        (lambda: selective_prediction(10 * torch.ones(3, 2), torch.rand(2)), "are they raw scores"),
        (lambda: compare_confidence(-torch.ones(3, 2), torch.rand(3, 1)), "are they raw scores"),
        (lambda: post_hoc_scores(torch.zeros(2, 1).long()), "gains: expected a floating dtype"),
        (lambda: selective_prediction(torch.rand(5), torch.rand(2)), r"single column is probabilities\.unsqueeze"),
        (lambda: compare_confidence(torch.rand(5), torch.rand(5)), r"single column is probabilities\.unsqueeze"),
        (lambda: compare_confidence(torch.rand(3, 2), torch.rand(3, 1), price=float("nan")), "price: expected numbers, got NaN"),
    ],
)
def test_bad_input(call, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        call()
