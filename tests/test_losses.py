"""Closed forms, and the equalities that tie the losses to one another and to cross-entropy."""

import inspect
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from deferral import Criterion, losses, single_stage_costs
from deferral.losses import (
    asymmetric_softmax,
    comp_sum,
    constrained_margin,
    cost_sensitive_abstention,
    deep_gamblers,
    madras,
    max_margin,
    mixture_of_experts,
    mozannar_sontag,
    one_vs_all,
    picce,
    predictor_rejector_abstention,
    realizable_deferral,
    realizable_experts,
    realizable_surrogate,
    regression_deferral,
    rejector_of_scores,
    score_based_abstention,
    single_stage_deferral,
    sum_margin,
    two_stage_abstention,
    two_stage_deferral,
)
from deferral.losses.margin import (
    constrained_losses,
    exponential,
    hinge,
    logistic,
    max_losses,
    rho_hinge,
    rho_margin,
    sigmoid,
    squared_hinge,
    sum_losses,
)
from deferral.losses.predictor_rejector import constrained_rho_hinge, double_mae, mae, max_rho_margin

B, K, E = 6, 4, 3


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, K + E, dtype=torch.float64), torch.randint(K, (B,)), torch.rand(B, E, dtype=torch.float64)


@pytest.mark.parametrize(
    ("mu", "textbook"),
    [
        (0.0, lambda p: 1 / p - 1),
        (0.4, lambda p: (p ** (0.4 - 1) - 1) / (1 - 0.4)),
        (1.0, lambda p: -p.log()),
        (1.7, lambda p: (1 - p**0.7) / 0.7),
        (2.0, lambda p: 1 - p),
    ],
)
def test_comp_sum_equals_its_textbook_forms(mu: float, textbook) -> None:
    scores, weights = torch.randn(50, 5, dtype=torch.float64), torch.rand(50, 5, dtype=torch.float64)
    expected = (weights * textbook(scores.softmax(-1))).sum(-1)
    torch.testing.assert_close(comp_sum(scores, weights, mu=mu), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mu", [1 - 1e-6, 1 + 1e-6])
def test_comp_sum_is_continuous_at_the_logistic(mu: float) -> None:
    scores, weights = torch.randn(50, 5, dtype=torch.float64), torch.rand(50, 5, dtype=torch.float64)
    torch.testing.assert_close(comp_sum(scores, weights, mu=mu), comp_sum(scores, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mu", [0.5, 1.0, 1.7, 2.0])
def test_comp_sum_gradient_is_its_closed_form(mu: float) -> None:
    scores = torch.randn(5, dtype=torch.float64, requires_grad=True)
    p = scores.detach().softmax(-1)
    gradient = torch.autograd.grad(comp_sum(scores, F.one_hot(torch.tensor(2), 5).double(), mu=mu), scores)[0]
    torch.testing.assert_close(gradient, p[2] ** (mu - 1) * (p - F.one_hot(torch.tensor(2), 5)))


def test_without_experts_every_deferral_loss_is_cross_entropy(batch) -> None:
    scores, targets, _ = batch
    expected = F.cross_entropy(scores[:, :K], targets, reduction="none")
    none = torch.zeros(B, 0, dtype=torch.float64)
    torch.testing.assert_close(single_stage_deferral(scores[:, :K], targets, none), expected)
    torch.testing.assert_close(two_stage_deferral(scores[:, :K], single_stage_costs(targets, none, K)), expected)


@pytest.mark.parametrize("mu", [0.0, 1.0, 1.7, 2.0])
@pytest.mark.parametrize("ceiling", [1.0, 1.25])
def test_single_stage_is_two_stage_on_its_own_cost_table(batch, mu: float, ceiling: float) -> None:
    scores, targets, costs = batch
    table = single_stage_costs(targets, costs, K)
    torch.testing.assert_close(
        single_stage_deferral(scores, targets, costs, mu=mu, ceiling=ceiling),
        two_stage_deferral(scores, table, mu=mu, ceiling=ceiling),
    )


def test_score_based_abstention_is_deferral_to_one_expert_of_constant_cost(batch) -> None:
    scores, targets, _ = batch
    packed = scores[:, : K + 1]
    expected = single_stage_deferral(packed, targets, torch.full((B, 1), 0.3, dtype=torch.float64))
    torch.testing.assert_close(score_based_abstention(packed, targets, 0.3), expected)


def test_two_stage_abstention_is_two_stage_deferral_with_the_weights_of_the_others() -> None:
    r, wrong = torch.randn(B, dtype=torch.float64), torch.tensor([0.0, 1, 0, 1, 1, 0], dtype=torch.float64)
    costs = torch.stack([wrong, torch.full_like(wrong, 0.2)], dim=-1)
    expected = two_stage_deferral(torch.stack([r, torch.zeros_like(r)], -1), costs, ceiling=costs.sum(-1, keepdim=True))
    torch.testing.assert_close(two_stage_abstention(r, wrong, 0.2), expected)


def test_two_stage_abstention_pushes_the_rejector_the_right_way() -> None:
    r = torch.zeros(2, requires_grad=True)
    two_stage_abstention(r, torch.tensor([1.0, 0.0]), 0.2).sum().backward()
    assert r.grad is not None
    assert r.grad[0] > 0  # wrong: descent lowers r, towards abstaining
    assert r.grad[1] < 0


def test_the_second_stage_does_not_move_the_class_scores() -> None:
    scores = torch.randn(B, K + 1, requires_grad=True)
    two_stage_abstention(rejector_of_scores(scores), torch.ones(B), 0.2).sum().backward()
    assert scores.grad is not None
    assert (scores.grad[:, :K] == 0).all()
    assert (scores.grad[:, K] != 0).all()


def test_sum_exponential_is_comp_sum_at_zero() -> None:
    scores, weights = torch.randn(B, 5, dtype=torch.float64), torch.rand(B, 5, dtype=torch.float64)
    torch.testing.assert_close(sum_margin(scores, weights, phi=exponential), comp_sum(scores, weights, mu=0.0))


def test_margin_functions_at_known_points() -> None:
    t = torch.tensor([-2.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    values = {
        exponential: [math.exp(2), 1, math.exp(-0.5), math.exp(-2)],
        logistic: [math.log1p(math.exp(-x)) for x in t.tolist()],
        hinge: [3, 1, 0.5, 0],
        squared_hinge: [9, 1, 0.25, 0],
        rho_margin: [1, 1, 0.5, 0],
        partial(rho_hinge, rho=2.0): [2, 1, 0.75, 0],
        sigmoid: [2 / (1 + math.exp(x)) for x in t.tolist()],
    }
    far = torch.tensor(-19.0, dtype=torch.float64)  # on the tangents, from -10 and from -9 on
    assert float(exponential(far)) == pytest.approx(math.exp(10) * (1 + 9))
    assert float(squared_hinge(far)) == 10**2 + 2 * 10 * 10
    for phi, expected in values.items():
        torch.testing.assert_close(phi(t), torch.tensor(expected, dtype=torch.float64))
        steps = phi(torch.linspace(-20, 20, 401, dtype=torch.float64))
        assert (steps.diff() <= 1e-12).all()
        grid = torch.linspace(-20, 0, 101, dtype=torch.float64)
        assert (phi(grid) >= phi(torch.zeros(1, dtype=torch.float64)) - 1e-12).all()


def test_base_surrogates_equal_their_definitions_by_loop() -> None:
    scores, weights = torch.randn(B, 4, dtype=torch.float64), torch.rand(B, 4, dtype=torch.float64)
    centred = scores - scores.mean(-1, keepdim=True)
    others = [[i for i in range(4) if i != k] for k in range(4)]
    sum_ = sum(weights[:, k] * sum(logistic(scores[:, k] - scores[:, i]) for i in others[k]) for k in range(4))
    constrained = sum(weights[:, k] * sum(squared_hinge(-centred[:, i]) for i in others[k]) for k in range(4))
    max_ = sum(weights[:, k] * rho_margin(scores[:, k] - scores[:, others[k]].amax(-1)) for k in range(4))
    torch.testing.assert_close(sum_margin(scores, weights, phi=logistic), sum_)
    torch.testing.assert_close(constrained_margin(scores, weights, phi=squared_hinge), constrained)
    torch.testing.assert_close(max_margin(scores, weights), max_)


def test_predictor_rejector_abstention_by_hand() -> None:
    """Probabilities 0.2, 0.3 and 0.5, the label the second class; r = ln 2."""
    scores, label = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log(), torch.tensor([1])
    rejector, cost = torch.tensor([2.0], dtype=torch.float64).log(), 0.1
    centred = scores - scores.mean(-1, keepdim=True)
    hinges = float((1 + centred[:, [0, 2]]).clamp(min=0).sum())
    for base, loss, psi in (
        (mae, 0.7, 1),
        (double_mae, 1.4, 2),
        (max_rho_margin, 1.0, 1),
        (constrained_rho_hinge, hinges, 3),
    ):
        assert float(base(scores, label)) == pytest.approx(loss)
        found = predictor_rejector_abstention(scores, rejector, label, cost, base=base)
        assert float(found) == pytest.approx(loss * 2 + psi * cost / 2)
        found = predictor_rejector_abstention(scores, rejector, label, cost, base=base, alpha=2.0)
        assert float(found) == pytest.approx(loss * 4 + 2 * psi * cost / 2)
    ahead = scores.flip(-1).cumsum(-1) / 8
    assert float(max_rho_margin(ahead, torch.tensor([0]))) == pytest.approx(1 - float(ahead[0, 0] - ahead[0, 1]))


def test_the_constrained_base_holds_the_cost_sensitive_one() -> None:
    scores, costs = torch.randn(B, 4, dtype=torch.float64), torch.rand(B, 4, dtype=torch.float64)
    expected = (costs * exponential(scores.mean(-1, keepdim=True) - scores)).sum(-1)
    torch.testing.assert_close(constrained_margin(scores, costs.sum(-1, keepdim=True) / 3 - costs), expected)


@pytest.mark.parametrize("surrogate", [comp_sum, sum_margin, constrained_margin, max_margin])
def test_a_masked_action_leaves_the_row(surrogate) -> None:
    scores, weights = torch.randn(B, 5, dtype=torch.float64), torch.rand(B, 5, dtype=torch.float64)
    mask = torch.ones(B, 5, dtype=torch.bool)
    torch.testing.assert_close(surrogate(scores, weights, mask=mask), surrogate(scores, weights))
    mask[:, 2] = False
    poisoned = scores.index_fill(-1, torch.tensor([2]), torch.nan).requires_grad_()
    loss = surrogate(poisoned, weights, mask=mask)
    known = [0, 1, 3, 4]
    torch.testing.assert_close(loss, surrogate(scores[:, known], weights[:, known]))
    loss.sum().backward()
    assert poisoned.grad is not None
    assert (poisoned.grad[:, 2] == 0).all()
    assert poisoned.grad.isfinite().all()


@pytest.mark.parametrize("losses", [sum_losses, constrained_losses, max_losses])
def test_a_masked_score_may_be_anything(losses) -> None:
    scores, mask = torch.randn(B, 4, dtype=torch.float64), torch.tensor([True, True, False, True])
    found = losses(scores.index_fill(-1, torch.tensor([2]), 100.0), phi=squared_hinge, mask=mask)
    torch.testing.assert_close(found[:, mask], losses(scores[:, mask], phi=squared_hinge))
    assert (found[:, 2] == 0).all()


@pytest.mark.parametrize("surrogate", [comp_sum, sum_margin, constrained_margin, max_margin])
def test_an_action_at_minus_infinity_without_weight_has_left_the_row(surrogate) -> None:
    scores, weights = torch.randn(B, 5, dtype=torch.float64), torch.rand(B, 5, dtype=torch.float64)
    scores[:, 2], weights[:, 2] = -torch.inf, 0.0
    scores.requires_grad_()
    known = [0, 1, 3, 4]
    loss = surrogate(scores, weights)
    torch.testing.assert_close(loss, surrogate(scores[:, known], weights[:, known]))
    assert torch.autograd.grad(loss.sum(), scores)[0].isfinite().all()


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0, 1.7, 2.0])
def test_abstaining_at_cost_one_and_score_minus_infinity_is_no_nan(mu: float) -> None:
    loss = score_based_abstention(torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([1]), 1.0, mu=mu)
    assert loss.isfinite().all()


def test_a_row_of_which_nothing_is_known_costs_nothing() -> None:
    scores = torch.randn(2, 4, requires_grad=True)
    mask = torch.tensor([[False] * 4, [True] * 4])
    loss = comp_sum(scores, torch.rand(2, 4), mask=mask)
    loss.sum().backward()
    assert loss[0] == 0
    assert scores.grad is not None
    assert (scores.grad[0] == 0).all()
    assert (scores.grad[1] != 0).all()


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0, 1.7, 2.0])
def test_an_expert_at_minus_infinity_of_weight_zero_is_no_nan(batch, mu: float) -> None:
    scores, targets, costs = batch
    scores = scores.index_fill(-1, torch.tensor([K + 1]), -torch.inf).requires_grad_()
    costs = costs.index_fill(-1, torch.tensor([1]), 1.0)
    loss = single_stage_deferral(scores, targets, costs, mu=mu)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_the_optimum_reads_off_the_law() -> None:
    """mu = 1: the softmax at the optimum is (p_1 .. p_K, 1 - c) / (2 - c)."""
    law, cost = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 0.4
    scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scores], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def risk() -> Tensor:
        optimizer.zero_grad()
        loss = score_based_abstention(scores, law, cost)
        loss.backward()
        return loss

    optimizer.step(risk)
    expected = torch.cat([law, torch.tensor([1 - cost], dtype=torch.float64)]) / (2 - cost)
    torch.testing.assert_close(scores.detach().softmax(-1), expected, atol=1e-6, rtol=1e-6)


def test_targets_as_probabilities_are_the_expected_loss(batch) -> None:
    scores, targets, costs = batch
    r = scores[:, -1]
    hard, soft = targets, F.one_hot(targets, K).double()
    law = torch.rand(B, K, dtype=torch.float64).softmax(-1)
    for loss in (
        lambda t: single_stage_deferral(scores, t, costs, mu=1.7, ceiling=1.1),
        lambda t: score_based_abstention(scores[:, : K + 1], t, 0.2),
        *(
            partial(lambda base, t: predictor_rejector_abstention(scores[:, :K], r, t, 0.2, base=base), base)
            for base in (mae, double_mae, max_rho_margin, partial(constrained_rho_hinge, rho=2.0))
        ),
    ):
        torch.testing.assert_close(loss(soft), loss(hard))
        every = torch.stack([law[:, k] * loss(torch.full((B,), k)) for k in range(K)]).sum(0)
        torch.testing.assert_close(loss(law), every)


def test_gradients_flow_into_the_costs(batch) -> None:
    scores, targets, costs = batch
    costs.requires_grad_()
    single_stage_deferral(scores, targets, costs).sum().backward()
    torch.testing.assert_close(costs.grad, scores.log_softmax(-1)[:, K:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_rejector_is_lifted_before_it_is_scaled(dtype: torch.dtype) -> None:
    """3 * 3e4 is beyond float16."""
    scores, r, targets = torch.zeros(3, K), torch.tensor([3e4, -3e4, 0.7], dtype=dtype), torch.zeros(3, dtype=torch.int64)
    loss = partial(predictor_rejector_abstention, scores, targets=targets, cost=0.1, alpha=3.0, beta=1.3)
    torch.testing.assert_close(loss(r), loss(r.float()))
    assert loss(r).isfinite().all()


def test_sum_losses_of_two_actions_are_the_margin() -> None:
    scores = torch.tensor([[1.0, -0.5]])
    torch.testing.assert_close(sum_losses(scores, phi=logistic), logistic(torch.tensor([[1.5, -1.5]])))


@pytest.mark.parametrize("rho", [0.5, 1.0])
def test_the_constrained_rho_margin_is_consistent(rho: float) -> None:
    """At least sum_a w_a - w_decided, and equal to it at rho (A - 1) for one action and -rho for the others.

    Flat where no score is near 0, so that no minimiser by gradients shows it.
    """
    scores, weights = 2 * torch.randn(4000, 5, dtype=torch.float64), torch.rand(4000, 5, dtype=torch.float64)
    decided = scores.argmax(-1, keepdim=True)
    left = (weights.sum(-1, keepdim=True) - weights.gather(-1, decided)).squeeze(-1)
    phi = partial(rho_margin, rho=rho)
    assert (constrained_margin(scores, weights, phi=phi) >= left - 1e-12).all()
    vertex = torch.full_like(scores, -rho).scatter(-1, decided, 4 * rho)
    torch.testing.assert_close(constrained_margin(vertex, weights, phi=phi), left)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_costs_in_half_precision_are_lifted_before_they_are_taken_from_anything(batch, dtype: torch.dtype) -> None:
    """Costs may be half where scores are not: 1 - cost is then rounded no more than the cost was, and no target is at all."""
    scores, targets, costs = (part.float() if part.is_floating_point() else part for part in batch)
    law, full, router = F.one_hot(targets, K) * 0.94 + 0.015, torch.ones(B, E, dtype=torch.bool), scores[:, : 1 + E]
    for loss in (
        lambda c: single_stage_deferral(scores, targets, c),
        lambda c: single_stage_deferral(scores, law, c),
        lambda c: single_stage_deferral(scores, targets, c, ceiling=1.3),
        lambda c: two_stage_deferral(router[:, 1:], c, ceiling=1.3, mask=full),
        lambda c: score_based_abstention(scores[:, : K + 1], targets, c[:, 0]),
        lambda c: realizable_deferral(scores[:, : K + 1], targets, c[:, 0]),
        lambda c: cost_sensitive_abstention(scores[:, :K], targets, c[:, 0]),
        lambda c: regression_deferral(c[:, 0], router, c),
    ):
        torch.testing.assert_close(loss(costs.to(dtype)), loss(costs.to(dtype).float()), rtol=1e-6, atol=1e-6)
    # The sum of the costs is beyond float16.
    assert regression_deferral(torch.full((B,), 3e4).to(dtype), router, torch.full((B, E), 3e4).to(dtype)).isfinite().all()


def test_costs_in_double_precision_do_not_widen_the_loss(batch) -> None:
    """Costs from numpy are float64; a loss of float32 scores stays float32."""
    scores, targets, costs = (part.float() if part.is_floating_point() else part for part in batch)
    r, wrong = scores[:, 0], (costs[:, 1] < 0.5).float()
    for loss in (
        lambda c: single_stage_deferral(scores, targets, c),
        lambda c: predictor_rejector_abstention(scores[:, :K], r, targets, c[:, 0]),
        lambda c: two_stage_abstention(r, wrong.to(c.dtype), c[:, 0]),
        lambda c: realizable_deferral(scores[:, : K + 1], targets, c[:, 0]),
        lambda c: madras(scores[:, :K], r, targets, c[:, 0]),
    ):
        torch.testing.assert_close(loss(costs.double()), loss(costs))


def test_ignored_rows_cost_nothing_and_pull_nothing(batch) -> None:
    scores, targets, costs = batch
    ignored = targets.index_fill(0, torch.tensor([1, 3]), -100)
    right = (costs < 0.5).float()
    scores.requires_grad_()
    for loss in (
        lambda t, **o: single_stage_deferral(scores, t, costs, **o),
        lambda t, **o: single_stage_deferral(scores, t, costs, ceiling=1.2, **o),
        lambda t, **o: score_based_abstention(scores[:, : K + 1], t, 0.2, **o),
        lambda t, **o: predictor_rejector_abstention(scores[:, :K], scores[:, K], t, 0.2, **o),
        lambda t, **o: realizable_deferral(scores[:, : K + 1], t, costs[:, 0], **o),
        lambda t, **o: realizable_experts(scores, t, right, **o),
        lambda t, **o: mozannar_sontag(scores[:, : K + 1], t, right[:, 0], **o),
        lambda t, **o: one_vs_all(scores, t, right, **o),
        lambda t, **o: one_vs_all(scores, t, right, phi=exponential, **o),
        lambda t, **o: asymmetric_softmax(scores[:, : K + 1], t, right[:, 0], **o),
        lambda t, **o: realizable_surrogate(scores[:, : K + 1], t, right[:, 0], alpha=0.5, **o),
        lambda t, **o: cost_sensitive_abstention(scores[:, :K], t, 0.2, **o),
        lambda t, **o: madras(scores[:, :K], scores[:, K], t, costs[:, 0], **o),
        lambda t, **o: mixture_of_experts(scores[:, :K], scores[:, : 1 + E], t, right, **o),
        lambda t, **o: deep_gamblers(scores[:, : K + 1], t, reward=2.0, **o),
        lambda t, **o: picce(scores, t, right, **o),
    ):
        values, kept = loss(ignored), [0, 2, 4, 5]
        torch.testing.assert_close(values[kept], loss(targets)[kept])
        gradient = torch.autograd.grad(values.sum(), scores)[0]
        assert (values[[1, 3]] == 0).all()
        assert (gradient[[1, 3]] == 0).all()
        torch.testing.assert_close(loss(targets.where(targets != 2, -1), ignore_index=-1)[targets == 2].sum().item(), 0.0)
    mean = Criterion(single_stage_deferral)(scores, ignored, costs)
    torch.testing.assert_close(mean, single_stage_deferral(scores, targets, costs)[[0, 2, 4, 5]].mean())


def test_what_an_ignored_row_would_have_cost_nobody_needs_to_know(batch) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, K + E, generator=generator, dtype=torch.float64, requires_grad=True)
    targets, costs = torch.tensor([0, -100, 1]), torch.rand(3, E, generator=generator, dtype=torch.float64)
    unknown = torch.tensor([[False], [True], [False]])
    one, pair = scores[:, : K + 1], (scores[:, :K], scores[:, K])
    for loss in (
        lambda c: single_stage_deferral(scores, targets, c),
        lambda c: single_stage_deferral(scores, targets, c, ceiling=1.2),
        lambda c: score_based_abstention(one, targets, c[:, 0]),
        lambda c: predictor_rejector_abstention(*pair, targets, c[:, 0]),
        lambda c: realizable_deferral(one, targets, c[:, 0]),
        lambda c: realizable_experts(scores, targets, c.round()),
        lambda c: mozannar_sontag(one, targets, c[:, 0]),
        lambda c: one_vs_all(scores, targets, c),
        lambda c: one_vs_all(scores, targets, c, phi=exponential),
        lambda c: asymmetric_softmax(one, targets, c[:, 0]),
        lambda c: realizable_surrogate(one, targets, c[:, 0], alpha=0.5),
        lambda c: cost_sensitive_abstention(scores[:, :K], targets, c[:, 0]),
        lambda c: madras(*pair, targets, c[:, 0]),
        lambda c: mixture_of_experts(scores[:, :K], scores[:, : 1 + E], targets, c.round()),
        lambda c: picce(scores, targets, c.round()),
        lambda c: Criterion(single_stage_deferral)(scores, targets, c),
        lambda c: Criterion(score_based_abstention)(one, targets, c[:, 0]),
    ):
        values = [loss(costs), loss(costs.masked_fill(unknown, torch.nan))]
        torch.testing.assert_close(values[1], values[0])
        gradients = [torch.autograd.grad(value.sum(), scores, retain_graph=True)[0] for value in values]
        torch.testing.assert_close(gradients[1], gradients[0])


def test_gradients_of_single_rows() -> None:
    scores, targets = torch.randn(4, K + E, dtype=torch.float64), torch.randint(K, (4,))
    right = (torch.rand(4, E) < 0.5).double()
    for loss in (one_vs_all, lambda s, t, c: single_stage_deferral(s, t, c, ceiling=1.2), picce):
        together = scores.clone().requires_grad_()
        gradient = torch.autograd.grad(loss(together, targets, right).sum(), together)[0]
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(scores, targets, right), gradient)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        torch.vmap(torch.func.grad(one_vs_all))(scores, targets.fill_(K), right)


@pytest.mark.ci_slow
def test_a_compiled_loss_takes_a_mask_for_any_number_of_classes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(single_stage_deferral, backend="eager", fullgraph=True)
    for classes in (5, 7, 9):
        scores, targets, mask = torch.randn(4, classes + 2), torch.randint(classes, (4,)), torch.rand(4, 2) < 0.5
        costs = torch.rand(4, 2).round()
        torch.testing.assert_close(
            compiled(scores, targets, costs, mask=mask), single_stage_deferral(scores, targets, costs, mask=mask)
        )


def test_a_class_that_is_out_of_the_question_costs_nothing_beside_a_right_expert() -> None:
    scores = torch.tensor([[-torch.inf, 1.0, 2.0]], requires_grad=True)
    value = realizable_surrogate(scores, torch.tensor([0]), torch.tensor([1.0]))
    torch.testing.assert_close(value / 2, realizable_experts(scores, torch.tensor([0]), torch.tensor([[1.0]]), q=0.0))
    assert torch.autograd.grad(value.sum(), scores)[0][0, 1:].isfinite().all()


def test_every_loss_of_targets_can_ignore_rows() -> None:
    parameters = {name: inspect.signature(getattr(losses, name)).parameters for name in losses.__all__}
    assert {name for name, taken in parameters.items() if "targets" in taken and "ignore_index" not in taken} == set()


def test_a_class_axis_elsewhere_is_moved(batch) -> None:
    """Segmentation: scores (B, K+1, H, W), targets (B, H, W)."""
    scores, targets = torch.randn(2, K + 1, 3, 5), torch.randint(K, (2, 3, 5))
    values = score_based_abstention(scores.movedim(1, -1), targets, 0.1)
    assert values.shape == (2, 3, 5)
    torch.testing.assert_close(values[1, 2, 4], score_based_abstention(scores[1, :, 2, 4], targets[1, 2, 4], 0.1))


def test_class_weights_have_the_digits_of_the_scores() -> None:
    law, scores, costs = torch.tensor([[1.0, 0.0]]).bfloat16(), torch.zeros(1, 3), torch.zeros(1, 1)
    torch.testing.assert_close(
        single_stage_deferral(scores, law, costs, ceiling=1.02), single_stage_deferral(scores, law.float(), costs, ceiling=1.02)
    )
    generator = torch.Generator().manual_seed(0)
    scores, costs = (torch.rand(9, width, generator=generator, dtype=torch.float64) for width in (5, 2))
    labels = torch.arange(9) % 3
    table = single_stage_costs(labels, costs, 3)
    single, two = single_stage_deferral(scores, labels, costs, ceiling=1.3), two_stage_deferral(scores, table, ceiling=1.3)
    torch.testing.assert_close(single, two, rtol=1e-12, atol=1e-12)


def test_derivatives_are_taken_forwards_too() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, tangent = (torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    labels, right = torch.arange(5) % 4, torch.arange(10).view(5, 2) % 3 == 0
    for loss in (
        lambda s: single_stage_deferral(s, labels, 1 - right.double()),
        lambda s: one_vs_all(s, labels, right),
        lambda s: realizable_deferral(s[:, :5], labels, (~right[:, 0]).double()),
    ):
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(loss(forward_ad.make_dual(scores, tangent))).tangent
        leaf = scores.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf).sum(), leaf)
        torch.testing.assert_close(found, (gradient * tangent).sum(-1))
