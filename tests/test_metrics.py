from itertools import pairwise, permutations

import pytest
import torch

from deferral import error_costs, pick
from deferral.metrics import correct, cost_coverage_curve, deferral_cost, kept, load


def test_figures_by_hand() -> None:
    answers, targets = torch.tensor([[0, 1, 2], [1, 1, 0], [2, 2, 2]]), torch.tensor([0, 0, 2])
    costs = error_costs(answers, targets, price=[0.0, 0.1, 0.2], ceiling=1.2)
    actions = torch.tensor([0, 2, 1])
    torch.testing.assert_close(deferral_cost(costs, actions), torch.tensor([0.0, 0.2, 0.1]))
    assert correct(answers, targets, actions).tolist() == [1, 1, 1]
    assert kept(actions).tolist() == [1, 0, 0]
    assert load(actions, 1, 2).tolist() == [[0, 0], [0, 1], [1, 0]]


def test_abstention_loss_is_its_identity() -> None:
    """(1 - rho) * error on the accepted + rho * c, exactly."""
    scores_correct, cost = torch.rand(200) < 0.7, 0.2
    actions = (torch.rand(200) < 0.3).long()
    costs = torch.stack([1 - scores_correct.double(), torch.full((200,), cost, dtype=torch.float64)], -1)
    rho = actions.double().mean()
    error = 1 - scores_correct[actions == 0].double().mean()
    torch.testing.assert_close(deferral_cost(costs, actions).mean(), (1 - rho) * error + rho * cost)


def brute_force(margin, own, deferred) -> list[float]:
    """The mean over every order of the rows that respects the margins: keep the first k, defer the rest."""
    rows, orders = range(len(margin)), 0
    totals = [0.0] * (len(margin) + 1)
    for order in permutations(rows):
        if all(margin[a] <= margin[b] for a, b in pairwise(order)):
            orders += 1
            for k in range(len(margin) + 1):
                totals[k] += sum(own[i] for i in order[:k]) + sum(deferred[i] for i in order[k:])
    return [total / orders / len(margin) for total in totals]


@pytest.mark.parametrize("seed", range(5))
def test_the_curve_equals_its_definition_under_ties_and_any_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    margin = torch.randint(0, 3, (6,), generator=generator).double()
    own, deferred = torch.rand(2, 6, generator=generator, dtype=torch.float64)
    curve = cost_coverage_curve(margin, own, deferred)
    torch.testing.assert_close(curve.cost, torch.tensor(brute_force(margin.tolist(), own.tolist(), deferred.tolist())).double())
    order = torch.randperm(6, generator=generator)
    torch.testing.assert_close(cost_coverage_curve(margin[order], own[order], deferred[order]).cost, curve.cost)
    assert curve.coverage.tolist() == [k / 6 for k in range(7)]


def test_the_ends_of_the_curve_are_always_and_never_deferring() -> None:
    costs = torch.rand(50, 2)
    curve = cost_coverage_curve(torch.randn(50), *costs.unbind(-1))
    torch.testing.assert_close(curve.cost[0], costs[:, 1].double().mean())
    torch.testing.assert_close(curve.cost[-1], costs[:, 0].double().mean())


def test_small_integers_do_not_wrap_around() -> None:
    curve = cost_coverage_curve(torch.arange(3.0), torch.tensor([0, 0, 1], dtype=torch.uint8), torch.ones(3, dtype=torch.uint8))
    torch.testing.assert_close(curve.cost, torch.tensor([1, 2 / 3, 1 / 3, 1 / 3]).double())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="one target per row"):
        correct(torch.zeros(3, 2), torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="vectors of one length"):
        cost_coverage_curve(torch.rand(3), torch.rand(3), torch.rand(4))
    with pytest.raises(ValueError, match="non-empty"):
        cost_coverage_curve(torch.rand(0), torch.rand(0), torch.rand(0))
    with pytest.raises(ValueError, match="one action per row"):
        pick(torch.rand(3, 2), torch.zeros(4, dtype=torch.long))
