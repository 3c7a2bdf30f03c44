"""Blocks of rows and closed gradients change nothing: they equal one table and the plain formula under autograd."""

import importlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from deferral import losses
from deferral.losses.comp_sum import comp_sum_of_costs, targeted_comp_sum
from deferral.losses.comp_sum_compiled import recomputed_comp_sum
from deferral.losses.entries import entry, two_highest
from deferral.losses.margin import exponential, logistic, rho_margin, squared_hinge
from deferral.losses.predictor_rejector import max_rho_margin

ROWS, K, E = 7, 4, 3
A = K + E
USERS = [
    importlib.import_module(f"deferral.losses.{name}")
    for name in ("comp_sum", "closed_form", "probabilities", "published", "realizable")
]
CLOSED_FORM = importlib.import_module("deferral.losses.closed_form")
REALIZABLE = importlib.import_module("deferral.losses.realizable")
BLOCKS = importlib.import_module("deferral.losses.comp_sum_blocks")
TARGETS = torch.tensor([0, 3, 1, 2, 2, 0, 1])
MASK = torch.tensor([[True, True, False]] * 3 + [[False, True, True]] * 4)

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    **{f"two_stage mu={mu}": partial(losses.two_stage_deferral, mu=mu, ceiling=1.2) for mu in (0.0, 0.5, 1.0, 1.7, 2.0)},
    **{
        f"single_stage mu={mu}": lambda s, c, mu=mu: losses.single_stage_deferral(s, TARGETS, c[:, K:], mu=mu)
        for mu in (0.0, 0.5, 1.0, 1.7, 2.0)
    },
    "single_stage masked": lambda s, c: losses.single_stage_deferral(s, TARGETS, c[:, K:], mask=MASK),
    "row sums": lambda s, c: losses.two_stage_deferral(s, c, ceiling=c.sum(-1, keepdim=True)),
    "regression": lambda s, c: losses.regression_deferral(c[:, 0], s, c[:, 1:]),
    "comp_sum": lambda s, c: losses.comp_sum(s, c, mu=1.7),
    "one_vs_all": lambda s, c: losses.one_vs_all(s, TARGETS, c[:, K:].round()),
    "sum_margin logistic": lambda s, c: losses.sum_margin(s, c, phi=logistic),
    "sum_margin exponential": lambda s, c: losses.sum_margin(s, c, phi=exponential),
    "sum_margin masked": lambda s, c: losses.sum_margin(s, c, phi=squared_hinge, mask=MASK[:, :1].expand(ROWS, A)),
    "constrained_margin": lambda s, c: losses.constrained_margin(s, c, phi=squared_hinge),
    "realizable_experts": lambda s, c: losses.realizable_experts(s, TARGETS, c[:, K:].round(), q=0.5),
    "picce masked": lambda s, c: losses.picce(s, TARGETS, c[:, K:].round(), mask=MASK),
    "asymmetric_softmax masked": lambda s, c: losses.asymmetric_softmax(s, TARGETS, c[:, 0].round(), mask=MASK[:, 0]),
    "cost_sensitive_abstention": lambda s, c: losses.cost_sensitive_abstention(s, TARGETS, c[:, 0]),
    "max_rho_margin": lambda s, c: losses.predictor_rejector_abstention(s, c[:, 0], TARGETS, 0.2, base=max_rho_margin),
    "mae": lambda s, c: losses.predictor_rejector_abstention(s, c[:, 0], TARGETS, 0.2),
    "max_margin": lambda s, c: losses.max_margin(s, c, phi=rho_margin),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, A, dtype=torch.float64), torch.rand(ROWS, A, dtype=torch.float64)


def with_gradient(loss: Loss, scores: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    leaf = scores.clone().requires_grad_()
    value = loss(leaf, costs)
    upstream = torch.arange(1.0, value.numel() + 1, dtype=value.dtype).reshape(value.shape)
    return value.detach(), torch.autograd.grad(value, leaf, upstream)[0]


@every_loss
def test_blocks_of_rows_equal_one_table(loss: Loss, batch, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = with_gradient(loss, *batch)
    for numbers in (1, 2 * A, 2 * A * A):  # a row at a time; two rows at a time, the last block a short one
        monkeypatch.setattr(CLOSED_FORM, "CPU_BLOCK", numbers)
        torch.testing.assert_close(with_gradient(loss, *batch), whole, rtol=1e-12, atol=1e-12)


@every_loss
def test_the_closed_form_equals_the_formula_under_autograd(loss: Loss, batch, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = with_gradient(loss, *batch)
    for module in USERS:
        monkeypatch.setattr(module, "has_closed_form", lambda *constants, **options: False)
    torch.testing.assert_close(with_gradient(loss, *batch), closed, rtol=1e-9, atol=1e-9)


@every_loss
def test_gradients_of_costs_change_no_value(loss: Loss, batch) -> None:
    scores, costs = batch
    value, gradient = with_gradient(loss, scores, costs)
    differentiable = with_gradient(loss, scores, costs.clone().requires_grad_())
    torch.testing.assert_close(differentiable, (value, gradient), rtol=1e-9, atol=1e-9)


def test_backward_twice_and_the_callers_tensors_stay_as_they_are(batch) -> None:
    for loss in LOSSES.values():
        scores, costs = (tensor.clone() for tensor in batch)
        scores.requires_grad_()
        total = loss(scores, costs).mean()
        first = torch.autograd.grad(total, scores, retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(total, scores)[0], first, rtol=0, atol=0)
        assert torch.equal(scores, batch[0])
        assert torch.equal(costs, batch[1])


@every_loss
def test_batched_gradients_are_those_of_one_after_the_other(loss: Loss, batch) -> None:
    scores, costs = batch[0].clone().requires_grad_(), batch[1]
    value = loss(scores, costs)
    upstream = torch.eye(value.numel(), dtype=value.dtype).reshape(-1, *value.shape)
    one_by_one = [torch.autograd.grad(value, scores, one, retain_graph=True)[0] for one in upstream]
    (together,) = torch.autograd.grad(value, scores, upstream, is_grads_batched=True)
    torch.testing.assert_close(together, torch.stack(one_by_one))


def test_a_batch_without_rows_gives_no_losses() -> None:
    scores, costs = torch.zeros(0, A, requires_grad=True), torch.zeros(0, A)
    for loss in (losses.two_stage_deferral, losses.sum_margin, losses.max_margin):
        value = loss(scores, costs)
        value.sum().backward()
        assert value.shape == (0,)


@every_loss
def test_without_gradients_the_value_is_the_same(loss: Loss, batch) -> None:
    expected = loss(*batch)
    with torch.inference_mode():
        torch.testing.assert_close(loss(*(tensor.clone() for tensor in batch)), expected)
        scores = batch[0].clone()
    torch.testing.assert_close(loss(scores, batch[1]), expected)
    with torch.no_grad():
        torch.testing.assert_close(loss(batch[0].clone().requires_grad_(), batch[1]), expected)


@every_loss
def test_autocast_takes_no_digits(loss: Loss, batch) -> None:
    single = [tensor.float() for tensor in batch]
    expected = with_gradient(loss, *single)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(with_gradient(loss, *single), expected, rtol=0, atol=0)


@pytest.mark.parametrize("mu", [0.0, 0.9, 0.999, 1.0, 1.001, 1.1, 2.0])
def test_single_precision_keeps_its_digits(mu: float, batch) -> None:
    exact = losses.two_stage_deferral(*batch, mu=mu)
    single = losses.two_stage_deferral(*(tensor.float() for tensor in batch), mu=mu)
    torch.testing.assert_close(single.double(), exact, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("mu", [0.0, 1.0, 1.7])
def test_any_layout_of_the_scores(mu: float) -> None:
    scores = torch.randn(3, A, 5, dtype=torch.float64, requires_grad=True)
    costs = torch.rand(A, dtype=torch.float64)
    losses.two_stage_deferral(scores.movedim(1, -1), costs, mu=mu).sum().backward()
    copied = scores.detach().movedim(1, -1).contiguous().requires_grad_()
    losses.two_stage_deferral(copied, costs.expand(3, 5, A).contiguous(), mu=mu).sum().backward()
    assert scores.grad is not None
    assert copied.grad is not None
    torch.testing.assert_close(scores.grad.movedim(1, -1), copied.grad)


def test_gradients_of_gradients_of_the_scores_are_refused_rather_than_zero(batch) -> None:
    scores, costs = batch
    loss = losses.two_stage_deferral(scores.requires_grad_(), costs).sum()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, scores, create_graph=True)


def test_hessians_by_torch_func(batch) -> None:
    """Where autograd sees the formula, gradients of gradients exist: at mu = 1 it is sum(w) (diag(p) - p p^T)."""
    scores, costs = batch[0][0], batch[1][0]
    p = scores.softmax(-1)
    expected = (1 - costs).sum() * (p.diag() - torch.outer(p, p))
    torch.testing.assert_close(torch.func.hessian(losses.two_stage_deferral)(scores, costs), expected)


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0, 1.7, 2.0])
@pytest.mark.parametrize(
    "case", ["ordinary", "target of probability e^-200", "impossible expert of weight 0", "weights that cancel"]
)
def test_the_softmax_of_torch_equals_its_parts(mu: float, case: str, batch, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, costs = batch
    if case == "target of probability e^-200":
        scores[2, TARGETS[2]] -= 200.0
    elif case == "impossible expert of weight 0":
        scores[3, K + 1], costs[3, K + 1] = -torch.inf, 1.0
    elif case == "weights that cancel":
        costs[4, K:] = 1.0
        costs[4, K] = 1 + (scores[4, K] - scores[4, TARGETS[4]]).exp() ** (1 - mu)

    def loss(scores: Tensor, costs: Tensor) -> Tensor:
        return losses.single_stage_deferral(scores, TARGETS, costs[:, K:], mu=mu)

    fused = with_gradient(loss, scores, costs)
    monkeypatch.setattr(BLOCKS, "readable", lambda tensor: False)
    torch.testing.assert_close(fused, with_gradient(loss, scores, costs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0, 1.7, 2.0])
@pytest.mark.parametrize(
    "case", ["ordinary", "action 0 of probability e^-200", "impossible action of weight 0", "one past the knee"]
)
def test_the_softmax_of_torch_equals_its_parts_for_weights_of_all_actions(
    mu: float, case: str, batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, costs = batch
    if case == "action 0 of probability e^-200":
        scores[2, 0] -= 200.0
    elif case == "impossible action of weight 0":
        scores[3, 2], costs[3, 2] = -torch.inf, 1.2
    elif case == "one past the knee":
        scores[5, 1] -= 12.0

    def loss(scores: Tensor, costs: Tensor) -> Tensor:
        return losses.two_stage_deferral(scores, costs, mu=mu, ceiling=1.2) + losses.comp_sum(scores, 1.2 - costs, mu=mu)

    fused = with_gradient(loss, scores, costs)
    monkeypatch.setattr(BLOCKS, "readable", lambda tensor: False)
    torch.testing.assert_close(fused, with_gradient(loss, scores, costs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0, 1.7, 2.0])
@pytest.mark.parametrize("case", ["ordinary", "unlikely target", "impossible action of weight 0", "past the knee"])
def test_the_gradient_taken_from_the_scores_once_more_equals_the_one_that_is_kept(mu: float, case: str, batch) -> None:
    scores, costs = batch
    ceiling, targets = costs.new_full((ROWS, 1), 1.2), TARGETS.unsqueeze(-1)
    if case == "unlikely target":
        scores[2, TARGETS[2]] -= 200.0
    elif case == "impossible action of weight 0":
        scores[3, K + 1], costs[3, K + 1] = -torch.inf, 1.2
    elif case == "past the knee":
        scores[5, K] -= 12.0
    pairs: list[tuple[Loss, Loss]] = [
        (
            lambda s, c: recomputed_comp_sum(s, c, None, ceiling, mu),
            lambda s, c: comp_sum_of_costs(s, c, ceiling, mu=mu),
        ),
        (
            lambda s, c: recomputed_comp_sum(s, 1.2 - c[:, K:], targets, None, mu),
            lambda s, c: targeted_comp_sum(s, TARGETS, 1.2 - c[:, K:], mu=mu),
        ),
    ]
    for recomputed, kept in pairs:
        torch.testing.assert_close(with_gradient(recomputed, scores, costs), with_gradient(kept, scores, costs))


@pytest.mark.slow
def test_entries_of_a_compiled_row_have_the_gradient_of_a_gather(batch) -> None:
    scores, weights = batch
    torch._dynamo.reset()

    def loss(scores: Tensor, weights: Tensor) -> Tensor:
        best, second, _ = two_highest(scores)
        return (entry(scores * weights, TARGETS.unsqueeze(-1)) + best.exp() - second.square()).squeeze(-1)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradient(compiled, scores, weights), with_gradient(loss, scores, weights))
    top = scores.topk(2).values
    torch.testing.assert_close(torch.cat(two_highest(scores)[:2], dim=-1), top)


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0])
def test_the_mass_of_the_right_is_the_same_from_scores_as_from_probabilities(q: float, batch, monkeypatch) -> None:
    scores, costs = batch
    right = costs[:, K:].round()
    right[2] = 0

    def loss(scores: Tensor, costs: Tensor) -> Tensor:
        return losses.realizable_experts(scores, TARGETS, right, q=q)

    from_probabilities = with_gradient(loss, scores, costs)
    monkeypatch.setattr(REALIZABLE, "readable", lambda tensor: False)
    torch.testing.assert_close(with_gradient(loss, scores, costs), from_probabilities, rtol=1e-9, atol=1e-9)
    # Nobody is right, and the target has no probability that float32 could tell from 0.
    scores[2, TARGETS[2]] -= 200.0
    monkeypatch.undo()
    unlikely = with_gradient(loss, scores, costs)
    for module in USERS:
        monkeypatch.setattr(module, "has_closed_form", lambda *constants, **options: False)
    torch.testing.assert_close(unlikely, with_gradient(loss, scores, costs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("readable", [True, False])
def test_large_scores_lose_no_digits_of_the_mass_of_the_right(readable: bool, batch, monkeypatch) -> None:
    scores, costs = batch
    scores = (8 * scores).round() / 8  # so that float32 holds them with and without the offset

    def loss(scores: Tensor, costs: Tensor) -> Tensor:
        return losses.realizable_experts(scores, TARGETS, costs[:, K:].round().float(), q=0.0)

    if not readable:
        monkeypatch.setattr(REALIZABLE, "readable", lambda tensor: False)
    torch.testing.assert_close(with_gradient(loss, scores.float() + 1e5, costs), with_gradient(loss, scores.float(), costs))


@pytest.mark.parametrize("only", range(3))
def test_an_action_without_a_rival_costs_nothing_wherever_it_stands(only: int) -> None:
    mask = torch.arange(3) == only
    scores = torch.where(mask, 5.0, -torch.inf).unsqueeze(0)
    assert losses.max_margin(scores, mask.float().unsqueeze(0)).item() == 0
    assert losses.max_margin(torch.randn(1, 3), torch.ones(1, 3), mask=mask.unsqueeze(0)).item() == 0
    assert max_rho_margin(scores, torch.tensor([only])).item() == 0
    best, second, _ = two_highest(scores)
    assert (best.item(), second.item()) == (5.0, -torch.inf)


def test_a_trace_sees_no_look_at_values(batch) -> None:
    scores, costs = batch

    def loss(scores: Tensor, targets: Tensor, costs: Tensor) -> Tensor:
        return losses.single_stage_deferral(scores, targets, costs)

    traced = make_fx(loss, tracing_mode="fake")(scores, TARGETS, costs[:, K:])
    other = torch.randn(ROWS, A, dtype=torch.float64)
    other[0, TARGETS[0]] = -500.0  # the path that the traced rows did not need
    torch.testing.assert_close(traced(other, TARGETS, costs[:, K:]), loss(other, TARGETS, costs[:, K:]))


@every_loss
def test_losses_may_be_changed_in_place(loss: Loss, batch) -> None:
    scores, costs = batch
    share = torch.rand(ROWS, dtype=torch.float64)
    expected = with_gradient(lambda s, c: loss(s, c) * share, scores, costs)

    def changed(scores: Tensor, costs: Tensor) -> Tensor:
        found = loss(scores, costs)
        found *= share
        return found

    torch.testing.assert_close(with_gradient(changed, scores, costs), expected)


@pytest.mark.parametrize("margin", ["sum_margin", "constrained_margin", "max_margin", "cost_sensitive_abstention"])
def test_a_margin_function_of_your_own_may_hold_parameters_or_have_no_slope(margin: str, batch) -> None:
    scores, costs = batch
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def loss(phi: Callable[[Tensor], Tensor]) -> Tensor:
        if margin == "cost_sensitive_abstention":
            return losses.cost_sensitive_abstention(scores, TARGETS, costs[:, 0], phi=phi).sum()
        return getattr(losses, margin)(scores, costs, phi=phi).sum()

    (slope,) = torch.autograd.grad(loss(lambda t: logistic(scale * t)), scale)
    step = 1e-6
    below, above = (loss(lambda t, by=by: logistic((2.0 + by) * t)) for by in (-step, step))
    torch.testing.assert_close(slope, (above - below) / (2 * step), rtol=1e-6, atol=1e-6)
    rho = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(loss(partial(rho_margin, rho=rho)), rho)[0].isfinite()
    scores.requires_grad_()
    assert not loss(lambda t: (t <= 0).double()).requires_grad


@every_loss
def test_nothing_is_differentiated_where_nobody_asks(loss: Loss, batch, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, costs = batch
    value = loss(scores.clone().requires_grad_(), costs).detach()
    monkeypatch.setattr(CLOSED_FORM, "_differentiated", None)
    torch.testing.assert_close(loss(scores, costs), value)
    with torch.no_grad():
        torch.testing.assert_close(loss(scores.clone().requires_grad_(), costs), value)
    with torch.inference_mode():
        torch.testing.assert_close(loss(scores, costs), value)
