"""Regression with deferral: the identities of the thesis, and the optimum's predictor."""

import pytest
import torch
from torch import Tensor

from deferral.losses import comp_sum, regression_abstention, regression_deferral, two_stage_deferral
from deferral.losses.margin import exponential

B, E = 6, 3


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.rand(B, dtype=torch.float64), torch.randn(B, 1 + E, dtype=torch.float64), torch.rand(B, E, dtype=torch.float64)


def test_it_is_the_formula_of_the_paper(batch) -> None:
    loss, scores, c = batch
    log_p = scores.log_softmax(-1)
    total = c.sum(-1)
    expected = -total * log_p[:, 0] - (E - 1) * loss
    for j in range(E):
        expected = expected - (loss + total - c[:, j]) * log_p[:, 1 + j]
    torch.testing.assert_close(regression_deferral(loss, scores, c), expected)


def test_two_stage_is_the_router_with_the_weights_of_the_others(batch) -> None:
    loss, scores, c = batch
    costs = torch.cat([loss.unsqueeze(-1), c], -1)
    router = two_stage_deferral(scores, costs, ceiling=costs.sum(-1, keepdim=True))
    torch.testing.assert_close(regression_deferral(loss, scores, c) + (E - 1) * loss, router)


def test_one_expert_of_constant_cost_is_abstention(batch) -> None:
    loss, scores, _ = batch
    r = scores[:, 0]
    pair = torch.stack([r, torch.zeros_like(r)], -1)
    expected = regression_deferral(loss, pair, torch.full((B, 1), 0.3, dtype=torch.float64))
    torch.testing.assert_close(regression_abstention(loss, r, 0.3), expected)


def test_the_predictors_gradient_has_a_weight_that_is_not_negative() -> None:
    """sum_j l(r, j) - (n_e - 1), in nats."""
    scores = 10 * torch.randn(1000, 1 + E, dtype=torch.float64)
    loss = torch.rand(1000, dtype=torch.float64, requires_grad=True)
    weight = torch.autograd.grad(regression_deferral(loss, scores, torch.rand(1000, E).double()).sum(), loss)[0]
    every = torch.ones(1000, 1 + E, dtype=torch.float64)
    every[:, 0] = 0
    torch.testing.assert_close(weight, comp_sum(scores, every) - (E - 1))
    assert (weight >= -1e-9).all()


def test_a_missing_expert_leaves_the_row(batch) -> None:
    loss, scores, c = batch
    mask = torch.tensor([True, False, True]).expand(B, E)
    poisoned = c.index_fill(-1, torch.tensor([1]), torch.nan)
    known = regression_deferral(loss, scores[:, [0, 1, 3]], c[:, [0, 2]])
    torch.testing.assert_close(regression_deferral(loss, scores, poisoned, mask=mask), known)
    torch.testing.assert_close(
        regression_deferral(loss, scores, c, mask=torch.ones(B, E, dtype=torch.bool)), regression_deferral(loss, scores, c)
    )


def test_the_optimal_predictor_is_the_mean_where_it_is_kept() -> None:
    values, law = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    packed = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([packed], max_iter=200, line_search_fn="strong_wolfe")

    def risk() -> Tensor:
        optimizer.zero_grad()
        loss = regression_deferral((packed[0] - values).square(), packed[1:].expand(3, 2), torch.full((3, 1), 0.5).double())
        mean = (law * loss).sum()
        mean.backward()
        return mean

    optimizer.step(risk)
    torch.testing.assert_close(packed[0].detach(), (law * values).sum(), atol=1e-4, rtol=0)
    assert packed[1] > packed[2]


def test_bad_input(batch) -> None:
    loss, scores, c = batch
    with pytest.raises(ValueError, match="one more column than experts"):
        regression_deferral(loss, scores[:, 1:], c)
    with pytest.raises(ValueError, match="squeeze"):
        regression_abstention(loss, scores[:, :1], 0.2)
    with pytest.raises(ValueError, match="non-negative"):
        regression_abstention(loss, scores[:, 0], -0.2, phi=exponential)
    with pytest.raises(TypeError, match="floating"):
        regression_deferral(loss.long(), scores, c)


def test_experts_who_cost_the_same_everywhere_are_one_row() -> None:
    loss, scores, costs = torch.rand(6), torch.randn(6, 3), torch.tensor([0.2, 0.5])
    expected = regression_deferral(loss, scores, costs.expand(6, 2))
    for row in (costs, costs.unsqueeze(0)):
        torch.testing.assert_close(regression_deferral(loss, scores, row), expected)
