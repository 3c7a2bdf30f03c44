"""One list of losses (cases.py), every property over it (deferral.testing), and what each claims."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from deferral import losses
from deferral.losses import single_stage_deferral, two_stage_deferral
from deferral.testing import (
    ACCEPT,
    CEILING,
    PAIR,
    PROBLEMS,
    PROPERTIES,
    REGRESSION,
    REGRESSION_ABSTENTION,
    TWO_STAGE,
    A,
    E,
    K,
    bayes,
    bayes_errors,
    draw_rows,
    example,
    minimiser,
    wrong_decisions,
)
from tests.cases import CASES, Case

every_loss = pytest.mark.parametrize("case", CASES, ids=repr)
NOT_A_SURROGATE = {"Criterion", "expert_correctness", "rejector_of_scores", "comp_sum"}
# Of the search for a minimiser: half of what others get, whose losses may be flatter than any in the list.
STEPS = 200
ELSEWHERE = {"learned_loss", "selective_net"}  # test_published.py: they decide nothing, or couple rows


def test_every_exported_loss_is_in_the_list() -> None:
    covered = {case.function for case in CASES} | {"two_stage_abstention", "realizable_deferral", "regression_deferral"}
    assert {"accept", "realizable_family", "regression", "two_stage_by_row_sum"} <= covered
    assert set(losses.__all__) - NOT_A_SURROGATE - ELSEWHERE <= covered


@every_loss
@pytest.mark.parametrize("check", [p for p in PROPERTIES if p is not bayes], ids=lambda p: p.__name__)
def test_property(case: Case, check) -> None:
    assert check(case.loss, case.setting) is None


@every_loss
def test_the_minimiser_is_the_bayes_decision_where_that_is_claimed(case: Case) -> None:
    wrong, judged = bayes_errors(case.loss, case.setting, starts=case.starts, steps=STEPS)
    assert judged >= 50
    if case.bayes:
        assert wrong == 0
    elif case.bayes is False:
        assert wrong > 0


@pytest.mark.parametrize("case", [c for c in CASES if c.bayes_with_deterministic_experts], ids=repr)
def test_with_an_expert_that_is_a_function_of_x_some_are_consistent(case: Case) -> None:
    wrong, judged = bayes_errors(case.loss, case.setting, deterministic_experts=True, steps=STEPS)
    assert judged > 50
    assert wrong == 0


@pytest.mark.parametrize(("q", "law"), [(0.0, (0.65, 0.33, 0.02)), (0.7, (0.52, 0.47, 0.01)), (1.0, (0.52, 0.47, 0.01))])
def test_the_certificate_that_only_q_1_is_consistent_with_an_expert_that_is_a_function_of_x(q: float, law) -> None:
    """It answers the likeliest class, whose mass that class and asking may share: for q < 1 a dearer class then has more."""
    p, wrong = torch.tensor(law, dtype=torch.float64), torch.tensor([0.0, 1.0, 1.0])

    def risk(shares: Tensor) -> Tensor:
        return (p * losses.realizable_deferral(shares.log().expand(3, -1), torch.arange(3), wrong, q=q)).sum()

    best = (p.log() / (1 - q) if q < 1 else 1e3 * p.log()).softmax(-1)
    shared, answering = (torch.cat([best[:1] * (1 - share), best[1:], best[:1] * share]) for share in (0.5, 0.01))
    torch.testing.assert_close(risk(shared), risk(answering))
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(1000, 4, generator=generator, dtype=torch.float64).softmax(-1)
    assert risk(shared) <= min(risk(other) for other in others)
    assert (shared.argmax(), answering.argmax()) == (1 if q < 1 else 0, 0)


@pytest.mark.parametrize(
    ("q", "law", "accuracy"), [(0.0, (0.5062, 0.4938), 0.6174), (0.7, (0.505, 0.495), 0.526), (1.0, (0.5062, 0.4938), 0.6174)]
)
def test_the_certificate_that_only_q_1_is_consistent_with_an_expert_right_at_random(q: float, law, accuracy: float) -> None:
    """Two classes, an expert of the same accuracy for both labels, better than the best class: Bayes defers."""
    p = torch.tensor(law, dtype=torch.float64)

    def risk(scores: Tensor) -> Tensor:
        right, wrong = (losses.realizable_deferral(scores, p, torch.tensor(cost), q=q) for cost in (0.0, 1.0))
        return accuracy * right + (1 - accuracy) * wrong

    scores = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scores], max_iter=200, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = risk(scores)
        value.backward()
        return value

    optimizer.step(closure)
    assert scores.grad is not None
    assert float(scores.grad.abs().max()) < 1e-6
    assert scores.argmax() == (2 if q == 1.0 else 0)


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
        values = loss(scores[:, :, None, None].expand(shape), costs[None, :, :, None].expand(shape), masks.expand(shape))
        return (values * law[None, :, :, None] * weight[None, :, None, :]).sum(dim=(-1, -2))

    actions = minimiser(risk, PROBLEMS, A, starts=6, steps=STEPS).argmax(-1)
    return wrong_decisions(actions, (law.unsqueeze(-1) * costs).sum(1))


@pytest.mark.parametrize("ceiling", ["fixed", "row sum"])
@pytest.mark.parametrize("mu", [0.0, 1.0, 1.7])
def test_answers_missing_at_random_leave_the_decision_right(mu: float, ceiling: str) -> None:
    def loss(scores: Tensor, costs: Tensor, mask: Tensor) -> Tensor:
        top = CEILING if ceiling == "fixed" else costs.where(mask, 0.0).sum(-1, keepdim=True)
        return two_stage_deferral(scores, costs, mu=mu, ceiling=top, mask=mask)

    assert masked_bayes_errors(loss)[0] == 0


def test_weight_zero_inside_the_softmax_is_seen_to_fail() -> None:
    def column_kept(scores: Tensor, costs: Tensor, mask: Tensor) -> Tensor:
        return two_stage_deferral(scores, costs.where(mask, CEILING), ceiling=CEILING)

    wrong, judged = masked_bayes_errors(column_kept)
    assert wrong > 0.2 * judged


@pytest.mark.parametrize("case", [c for c in CASES if c.setting not in (PAIR, REGRESSION, REGRESSION_ABSTENTION)], ids=repr)
def test_float16_at_ten_thousand_is_finite(case: Case) -> None:
    """Where no two unbounded factors meet: the pair multiplies l by Phi(r), regression squares the user's prediction."""
    for scale in (1e4, -1e4):
        scores, rows = example(case.setting, dtype=torch.float16)
        scores = (scores * scale).requires_grad_()
        loss = case.loss(scores, rows)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert scores.grad is not None
        assert scores.grad.isfinite().all()


FIRST_OF_FUNCTION = {case.function: case for case in reversed(CASES)}.values()


@pytest.mark.ci_slow
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=repr(c), marks=() if c in FIRST_OF_FUNCTION else pytest.mark.slow) for c in CASES]
)
def test_compiled_equals_eager_in_one_graph(case: Case) -> None:
    scores, rows = example(case.setting, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(case.loss, fullgraph=True, backend="aot_eager")

    def value_and_gradient(loss) -> tuple[Tensor, Tensor]:
        leaf = scores.clone().requires_grad_()
        value = loss(leaf, rows)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    torch.testing.assert_close(value_and_gradient(compiled), value_and_gradient(case.loss))


@pytest.mark.ci_slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_with_at_most_one_recompilation(backend: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(two_stage_deferral, fullgraph=True, backend=counter)
    for rows in (4, 7, 12, 40):
        scores = torch.randn(rows, A, requires_grad=True)
        costs = draw_rows((rows,), torch.Generator().manual_seed(0), torch.float32)["costs"]
        expected = two_stage_deferral(scores, costs, ceiling=CEILING)
        torch.testing.assert_close(compiled(scores, costs, ceiling=CEILING), expected)
    assert counter.frame_count <= 2


@pytest.mark.ci_slow
def test_compiled_once_for_all_numbers() -> None:
    """Costs, ceilings and rewards are swept; after the first two, no number needs a program of its own."""
    scores, targets, costs = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1]), torch.rand(6, 5)
    for loss in (
        lambda s, number: losses.score_based_abstention(s, targets, number),
        lambda s, number: losses.predictor_rejector_abstention(s, s[:, 0], targets, number),
        lambda s, number: losses.regression_abstention(costs[:, 0], s[:, 0], number),
        lambda s, number: two_stage_deferral(s, costs, ceiling=1 + number),
        lambda s, number: losses.deep_gamblers(s, targets, reward=2 + number),
    ):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(loss, fullgraph=True, backend=counter)
        for number in (0.1, 0.2, 0.35, 0.4):
            torch.testing.assert_close(compiled(scores, number), loss(scores, number))
        assert counter.frame_count <= 2


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="exports with gradients need torch 2.7")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=repr(c), marks=pytest.mark.ci_slow if c.function is two_stage_deferral else pytest.mark.slow)
        for c in FIRST_OF_FUNCTION
    ],
)
def test_an_exported_loss_keeps_its_gradient(case: Case) -> None:
    class Step(torch.nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return case.loss(scores, rows)

    scores, rows = example(case.setting, dtype=torch.float32)
    scores.requires_grad_()
    for strict in (False, True):
        exported = torch.export.export(Step(), (scores,), strict=strict).module()
        value, expected = exported(scores), case.loss(scores, rows)
        torch.testing.assert_close(value, expected)
        gradients = [torch.autograd.grad(each.sum(), scores)[0] for each in (value, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("case", [c for c in CASES if c.bound is not None], ids=repr)
def test_the_surrogate_bounds_the_deferral_loss(case: Case) -> None:
    """loss / bound >= cost of the decision + a constant of the row.

    With weights ceiling - cost the surrogate bounds sum_{a != decision} weight_a, which is the cost of the decision plus
    sum_a weight_a - ceiling; a loss that weighs the costs themselves bounds the cost of the decision.
    """
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows((4000, 1), generator)
    scores = 3 * torch.randn(4000, case.setting.width, generator=generator, dtype=torch.float64)
    costs = case.setting.expected_costs(torch.ones(4000, 1, dtype=torch.float64), rows)
    decided = costs.gather(-1, case.setting.decide(scores).unsqueeze(-1)).squeeze(-1)
    constant: Tensor | float = 0.0
    if case.setting not in (ACCEPT, PAIR):
        ceiling = CEILING if case.setting is TWO_STAGE else 1.0
        constant = (ceiling - costs).sum(-1) - ceiling
    values = case.loss(scores, {name: value[:, 0] for name, value in rows.items()})
    assert (values / case.bound >= decided + constant - 1e-9).all()


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@every_loss
def test_cuda_equals_cpu_without_synchronising(case: Case) -> None:
    scores, rows = example(case.setting, dtype=torch.float32)
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


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@every_loss
def test_compiled_for_cuda_equals_cpu_without_synchronising(case: Case) -> None:
    scores, rows = example(case.setting, dtype=torch.float32)
    leaf = scores.clone().requires_grad_()
    expected = case.loss(leaf, rows)
    expected.sum().backward()
    on_device = {name: value.cuda() for name, value in rows.items()}
    torch._dynamo.reset()
    compiled = torch.compile(case.loss, fullgraph=True)
    compiled(scores.cuda().requires_grad_(), on_device).sum().backward()
    moved = scores.cuda().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = compiled(moved, on_device)
        loss.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved.grad.cpu(), leaf.grad, rtol=1e-5, atol=1e-5)


def test_a_masked_expert_gets_no_gradient_and_no_say() -> None:
    rows = draw_rows((5,), torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False]]).expand(5, E)
    scores = torch.randn(5, K + E, dtype=torch.float64)
    poisoned = scores.clone()
    poisoned[:, -1] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 0.0])
    for packed in (scores.clone(), poisoned):
        packed.requires_grad_()
        loss = single_stage_deferral(packed, rows["targets"], rows["expert_costs"], mask=mask)
        loss.sum().backward()
        assert packed.grad is not None
        assert (packed.grad[:, -1] == 0).all()
        without = single_stage_deferral(scores[:, :-1], rows["targets"], rows["expert_costs"][:, :-1])
        torch.testing.assert_close(loss, without)
