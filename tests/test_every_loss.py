"""One list of losses (cases.py), every property over it."""

import pytest
import torch
from torch import Tensor

from deferral.losses import single_stage_deferral, two_stage_deferral
from deferral.numerics import KNEE
from tests.bayes import minimiser, wrong_decisions
from tests.cases import CASES, CEILING, INCONSISTENT, A, Case, E, K, Rows, draw_rows

PROBLEMS = 60
every_loss = pytest.mark.parametrize("case", CASES, ids=repr)


def random_problems(case: Case) -> tuple[Tensor, Rows, Tensor]:
    """Conditional laws p(y|x) (N, K), rows per (problem, label) with label-dependent costs, and every action's expected cost."""
    generator = torch.Generator().manual_seed(0)
    sharpness = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).repeat(PROBLEMS // 3)
    law = (torch.randn(PROBLEMS, K, generator=generator, dtype=torch.float64) * sharpness.unsqueeze(-1)).softmax(-1)
    rows = draw_rows((PROBLEMS, K), generator)
    rows["targets"] = torch.arange(K).expand(PROBLEMS, K)
    rows["cost"] = rows["cost"][:, :1].expand(PROBLEMS, K)  # the cost of abstaining is known beforehand
    rows["wrong"] = (rows["targets"] != 0).double()  # the fixed predictor answers class 0
    return law, rows, (law.unsqueeze(-1) * case.table(rows)).sum(dim=1)


def bayes_errors(case: Case) -> tuple[int, int]:
    law, rows, expected_costs = random_problems(case)

    def risk(scores: Tensor) -> Tensor:
        starts = scores.shape[0]
        every_label = {name: value.expand(starts, *value.shape) for name, value in rows.items()}
        return (law * case.loss(scores.unsqueeze(-2).expand(-1, -1, K, -1), every_label)).sum(dim=-1)

    actions = case.decide(minimiser(risk, PROBLEMS, case.width))
    return wrong_decisions(actions, expected_costs)


@every_loss
def test_the_minimiser_is_the_bayes_decision(case: Case) -> None:
    wrong, judged = bayes_errors(case)
    assert judged > 40
    assert wrong == 0


@pytest.mark.parametrize("case", INCONSISTENT, ids=repr)
def test_known_inconsistent_pairings_are_seen_to_fail(case: Case) -> None:
    wrong, judged = bayes_errors(case)
    assert wrong > 0.05 * judged


@pytest.mark.parametrize("mu", [0.0, 1.0, 1.7])
def test_answers_missing_at_random_leave_the_decision_right(mu: float) -> None:
    assert masked_bayes_errors(lambda s, c, mask: two_stage_deferral(s, c, mu=mu, ceiling=CEILING, mask=mask))[0] == 0


def test_weight_zero_inside_the_softmax_is_seen_to_fail() -> None:
    def column_kept(scores: Tensor, costs: Tensor, mask: Tensor) -> Tensor:
        return two_stage_deferral(scores, costs.where(mask, CEILING), ceiling=CEILING)

    wrong, judged = masked_bayes_errors(column_kept)
    assert wrong > 0.2 * judged


def masked_bayes_errors(loss) -> tuple[int, int]:
    """The own action is always known; each expert's answer is missing with a chance of its own."""
    generator = torch.Generator().manual_seed(0)
    law = torch.rand(PROBLEMS, K, generator=generator, dtype=torch.float64)
    law = law / law.sum(-1, keepdim=True)
    costs = CEILING * torch.rand(PROBLEMS, K, A, generator=generator, dtype=torch.float64)
    chance = torch.rand(PROBLEMS, E, generator=generator, dtype=torch.float64)
    patterns = torch.cartesian_prod(torch.tensor([False, True]), torch.tensor([False, True]))  # (4, E)
    weight = chance.unsqueeze(1).where(patterns, 1 - chance.unsqueeze(1)).prod(-1)  # (N, 4)
    masks = torch.cat([torch.ones(4, 1, dtype=torch.bool), patterns], dim=-1)

    def risk(scores: Tensor) -> Tensor:
        shape = (scores.shape[0], PROBLEMS, K, 4, A)
        losses = loss(scores[:, :, None, None].expand(shape), costs[None, :, :, None].expand(shape), masks.expand(shape))
        return (losses * law[None, :, :, None] * weight[None, :, None, :]).sum(dim=(-1, -2))

    actions = minimiser(risk, PROBLEMS, A).argmax(-1)
    return wrong_decisions(actions, (law.unsqueeze(-1) * costs).sum(1))


def example(case: Case, shape: tuple[int, ...] = (7,), dtype: torch.dtype = torch.float64) -> tuple[Tensor, Rows]:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(*shape, case.width, generator=generator, dtype=torch.float64).to(dtype)
    return scores, draw_rows(shape, generator, torch.float32 if dtype.itemsize < 4 else dtype)


@every_loss
def test_one_value_per_example(case: Case) -> None:
    scores, rows = example(case)
    assert case.loss(scores, rows).shape == (7,)


@every_loss
def test_gradcheck(case: Case) -> None:
    scores, rows = example(case)
    if not case.differentiable:
        # Kinks are hit with probability 0, but finite differences may step over one: move every score away from them.
        scores = scores * 0.37 + 0.011
    assert torch.autograd.gradcheck(lambda s: case.loss(s, rows), scores.requires_grad_())


@every_loss
def test_leading_dimensions_equal_a_loop(case: Case) -> None:
    scores, rows = example(case, (2, 3))
    loop = [[case.loss(scores[i, j], {name: value[i, j] for name, value in rows.items()}) for j in range(3)] for i in range(2)]
    torch.testing.assert_close(case.loss(scores, rows), torch.stack([torch.stack(line) for line in loop]))


@every_loss
def test_vmap_equals_the_batch(case: Case) -> None:
    scores, rows = example(case)
    torch.testing.assert_close(torch.vmap(case.loss)(scores, rows), case.loss(scores, rows))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_half_precision_is_finite_and_equals_float32(case: Case, dtype: torch.dtype, scale: float) -> None:
    scores, rows = example(case, dtype=torch.float32)
    half = (scores * scale).to(dtype).requires_grad_()
    loss = case.loss(half, rows)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, case.loss(half.detach().float(), rows))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert half.grad is not None
    assert half.grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e4, -1e4])
def test_extreme_scores_give_finite_loss_and_gradient(case: Case, dtype: torch.dtype, scale: float) -> None:
    scores, rows = example(case, dtype=dtype)
    scores = (scores * scale).requires_grad_()
    loss = case.loss(scores, rows)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("case", [c for c in CASES if "mu=0" in c.name or "mu=1.0" in c.name], ids=repr)
def test_the_most_wrong_rows_keep_a_gradient(case: Case) -> None:
    scores, rows = example(case, dtype=torch.float32)
    scores = (scores * 1e4).requires_grad_()
    case.loss(scores, rows).sum().backward()
    assert scores.grad is not None
    assert (scores.grad.abs().amax(-1) > 1e-3).any()
    assert KNEE < 1e4


@every_loss
def test_compiled_equals_eager_in_one_graph(case: Case) -> None:
    scores, rows = example(case, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(case.loss, fullgraph=True, backend="aot_eager")

    def value_and_gradient(loss) -> tuple[Tensor, Tensor]:
        leaf = scores.clone().requires_grad_()
        value = loss(leaf, rows)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    torch.testing.assert_close(value_and_gradient(compiled), value_and_gradient(case.loss))


def test_compiled_by_inductor() -> None:
    scores, rows = torch.randn(4, A, requires_grad=True), draw_rows((4,), torch.Generator().manual_seed(0), torch.float32)
    compiled = torch.compile(two_stage_deferral, fullgraph=True)
    expected = two_stage_deferral(scores, rows["costs"], ceiling=CEILING)
    torch.testing.assert_close(compiled(scores, rows["costs"], ceiling=CEILING), expected)


@every_loss
def test_autocast_changes_nothing(case: Case) -> None:
    scores, rows = example(case, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = case.loss(scores, rows)
    torch.testing.assert_close(under, case.loss(scores, rows))


@pytest.mark.parametrize("case", [c for c in CASES if c.width == A and "stage_abst" not in c.name], ids=repr)
def test_permuting_actions_permutes_nothing_else(case: Case) -> None:
    scores, rows = example(case)
    order = torch.tensor([2, 0, 1])
    permuted = case.loss(scores[:, order], rows | {"costs": rows["costs"][:, order]})
    torch.testing.assert_close(permuted, case.loss(scores, rows))


@pytest.mark.parametrize("case", [c for c in CASES if c.width > A], ids=repr)
def test_permuting_classes_and_experts_permutes_nothing_else(case: Case) -> None:
    scores, rows = example(case)
    classes, experts = torch.tensor([2, 0, 1]), torch.arange(K, case.width).flip(0)
    relabelled = rows | {"targets": classes.argsort()[rows["targets"]]}
    if case.width == K + E:
        relabelled["expert_costs"] = rows["expert_costs"].flip(-1)
    permuted = case.loss(scores[:, torch.cat([classes, experts])], relabelled)
    torch.testing.assert_close(permuted, case.loss(scores, rows))


@pytest.mark.parametrize("mu", [0.0, 1.0, 1.7, 2.0])
def test_the_surrogate_bounds_the_deferral_loss(mu: float) -> None:
    """sum_a w_a l_mu(s, a) / l_mu(p = 1/2) >= sum_{a != decision} w_a = cost of the decision + sum_a w_a - ceiling."""
    scores, costs = 3 * torch.randn(2000, A, dtype=torch.float64), CEILING * torch.rand(2000, A, dtype=torch.float64)
    at_half = two_stage_deferral(torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, 1.0]), mu=mu)
    surrogate = two_stage_deferral(scores, costs, mu=mu, ceiling=CEILING) / at_half
    decided = costs.gather(-1, scores.argmax(-1, keepdim=True)).squeeze(-1)
    assert (surrogate >= decided + (CEILING - costs).sum(-1) - CEILING - 1e-9).all()


@pytest.mark.cuda
@every_loss
def test_cuda_equals_cpu_without_synchronising(case: Case) -> None:
    scores, rows = example(case, dtype=torch.float32)
    expected = case.loss(scores, rows)
    on_device = {name: value.cuda() for name, value in rows.items()}
    moved = scores.cuda().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = case.loss(moved, on_device)
        loss.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.cpu(), expected)


def test_a_masked_expert_gets_no_gradient_and_no_say() -> None:
    rows = draw_rows((5,), torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False]]).expand(5, E)
    scores = torch.randn(5, K + E, dtype=torch.float64)
    poisoned = scores.clone()
    poisoned[:, -1] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 0.0])
    for packed in (scores, poisoned):
        packed.requires_grad_()
        loss = single_stage_deferral(packed, rows["targets"], rows["expert_costs"], mask=mask)
        loss.sum().backward()
        assert packed.grad is not None
        assert (packed.grad[:, -1] == 0).all()
        without = single_stage_deferral(scores[:, :-1], rows["targets"], rows["expert_costs"][:, :-1])
        torch.testing.assert_close(loss, without)
