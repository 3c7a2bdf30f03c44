"""Losses by others against their formulas written out, and the accessors of the expert's correctness."""

import functools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deferral import Criterion, losses
from deferral.losses import margin
from deferral.losses.margin import logistic
from deferral.losses.predictor_rejector import constrained_rho_hinge, double_mae, mae, max_rho_margin

B, K, E = 8, 4, 3


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    correct = (torch.rand(B, E) < 0.5).double()
    correct[0], correct[1] = 0.0, 1.0
    return torch.randn(B, K + E, dtype=torch.float64), torch.randint(K, (B,)), correct


def at(table: Tensor, targets: Tensor) -> Tensor:
    return table[torch.arange(len(table)), targets]


def test_mozannar_sontag(batch) -> None:
    scores, y, m = batch
    p, right = scores[:, : K + 1].softmax(-1), m[:, 0]
    for alpha in (0.0, 0.5, 1.0):
        expected = -(alpha * right + 1 - right) * at(p, y).log() - right * p[:, K].log()
        torch.testing.assert_close(losses.mozannar_sontag(scores[:, : K + 1], y, right, alpha=alpha), expected)
    own = losses.single_stage_deferral(scores[:, : K + 1], y, (1 - right).unsqueeze(-1))
    torch.testing.assert_close(losses.mozannar_sontag(scores[:, : K + 1], y, right), own)


def test_one_vs_all_is_binary_cross_entropy_and_drops_missing_experts(batch) -> None:
    scores, y, m = batch
    hits = torch.cat([F.one_hot(y, K).double(), m], -1)
    expected = F.binary_cross_entropy_with_logits(scores, hits, reduction="none").sum(-1)
    torch.testing.assert_close(losses.one_vs_all(scores, y, m), expected)
    mask = torch.tensor([True, False, True]).expand(B, E)
    known = [*range(K), K, K + 2]
    without = losses.one_vs_all(scores[:, known], y, m[:, [0, 2]])
    torch.testing.assert_close(losses.one_vs_all(scores, y, m, mask=mask), without)
    torch.testing.assert_close(losses.one_vs_all(scores, F.one_hot(y, K).double(), m), expected)


@pytest.mark.ci_slow
@pytest.mark.parametrize("loss", [losses.one_vs_all, losses.realizable_experts])
def test_compiled_without_a_gradient_to_take(loss, batch) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*batch), loss(*batch))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.ci_slow)])
def test_a_large_score_leaves_the_other_binary_problems_their_digits(compiled: bool) -> None:
    torch._dynamo.reset()
    loss = torch.compile(losses.one_vs_all, backend="aot_eager", fullgraph=True) if compiled else losses.one_vs_all
    scores, right = torch.tensor([[1e4, 0.5, 1e4]]), torch.tensor([[1.0]])
    torch.testing.assert_close(loss(scores, torch.tensor([0]), right), F.softplus(torch.tensor([0.5])))


@pytest.mark.parametrize("classes", [3, 100, 300])
@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0, 12.0, 1e4])
def test_one_vs_all_has_its_digits_whether_unsure_or_all_but_certain(classes: int, scale: float) -> None:
    """In float32 as in float64: zeros are where a product of hundreds would vanish, large scores where it would be 1."""
    generator = torch.Generator().manual_seed(0)
    y, m = torch.randint(classes, (64,), generator=generator), torch.randint(2, (64, 2), generator=generator).float()
    right = 2 * torch.cat([F.one_hot(y, classes), m], -1) - 1
    for scores in (scale * right, scale * torch.randn(64, classes + 2, generator=generator)):
        coarse, fine = scores.clone().requires_grad_(), scores.double().requires_grad_()
        found, expected = losses.one_vs_all(coarse, y, m), losses.one_vs_all(fine, y, m.double())
        sums = F.binary_cross_entropy_with_logits(scores.double(), (right > 0).double(), reduction="none").sum(-1)
        torch.testing.assert_close(expected, sums, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.double(), sums, rtol=1e-3 if sums.min() < 1 else 1e-5, atol=1e-35)
        found.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(coarse.grad.double(), fine.grad, rtol=1e-5, atol=1e-7)


def test_asymmetric_softmax_is_its_own_probability(batch) -> None:
    """Cao et al.: the expert's probability is exp(s_K) / (sum of all exponentials but that of the best class)."""
    scores, y, m = batch
    packed, right = scores[:, : K + 1], m[:, 0]
    exponentials = packed.exp()
    accuracy = exponentials[:, K] / (exponentials.sum(-1) - exponentials[:, :K].amax(-1))
    expected = F.cross_entropy(packed[:, :K], y, reduction="none") - (right * accuracy.log() + (1 - right) * (1 - accuracy).log())
    torch.testing.assert_close(losses.asymmetric_softmax(packed, y, right), expected)


def test_realizable_family(batch) -> None:
    scores, y, m = batch
    packed, right = scores[:, : K + 1], m[:, 0]
    p = packed.softmax(-1)
    both = at(p, y) + right * p[:, K]
    torch.testing.assert_close(losses.realizable_surrogate(packed, y, right), -2 * both.log())
    cross_entropy = F.cross_entropy(packed[:, :K], y, reduction="none")
    mixed = losses.realizable_surrogate(packed, y, right, alpha=0.3)
    torch.testing.assert_close(mixed, -0.6 * both.log() + 0.7 * cross_entropy)
    cost = torch.rand(B, dtype=torch.float64)
    for q in (0.3, 1.0):
        expected = (cost * (1 - at(p, y) ** q) + (1 - cost) * (1 - (at(p, y) + p[:, K]) ** q)) / q
        torch.testing.assert_close(losses.realizable_deferral(packed, y, cost, q=q), expected)
    linear = losses.single_stage_deferral(packed, y, cost.unsqueeze(-1), mu=2.0) - (1 - cost)
    torch.testing.assert_close(losses.realizable_deferral(packed, y, cost), linear)
    together = at(scores.softmax(-1), y) + (m * scores.softmax(-1)[:, K:]).sum(-1)
    torch.testing.assert_close(losses.realizable_experts(scores, y, m), 1 - together)
    torch.testing.assert_close(losses.realizable_experts(scores, y, m, q=0.0), -together.log())


def test_realizable_router() -> None:
    scores = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    costs = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 0, 0]])
    loss = losses.realizable_router(scores, costs)
    p = scores.detach().softmax(-1)
    torch.testing.assert_close(loss.detach(), torch.stack([-(p[0, 0] + p[0, 2]).log(), p[0, 0] * 0, p[0, 0] * 0]))
    loss.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_abstention_losses(batch) -> None:
    scores, y, _ = batch
    g, hit = scores[:, :K], F.one_hot(y, K).double()
    expected = 0.2 * logistic(at(g, y)) + 0.8 * ((1 - hit) * logistic(-g)).sum(-1)
    torch.testing.assert_close(losses.cost_sensitive_abstention(g, y, 0.2), expected)
    p = scores[:, : K + 1].softmax(-1)
    torch.testing.assert_close(losses.deep_gamblers(scores[:, : K + 1], y, reward=2.2), -(2.2 * at(p, y) + p[:, K]).log())
    with pytest.raises(ValueError, match="at most the 4 classes"):
        losses.deep_gamblers(scores[:, : K + 1], y, reward=5.0)


def test_mixtures(batch) -> None:
    scores, y, m = batch
    classes, gate = scores[:, :K], torch.randn(B, 1 + E, dtype=torch.float64)
    p, w = classes.softmax(-1), gate.softmax(-1)
    expected = -(w[:, 0] * at(p, y) + (w[:, 1:] * m).sum(-1)).log()
    torch.testing.assert_close(losses.mixture_of_experts(classes, gate, y, m), expected)
    r, cost = torch.randn(B, dtype=torch.float64), 1 - m[:, 0]
    expected = (1 - r.sigmoid()) * F.cross_entropy(classes, y, reduction="none") + r.sigmoid() * cost
    torch.testing.assert_close(losses.madras(classes, r, y, cost), expected)
    with pytest.raises(ValueError, match="one column for the classifier and one per expert"):
        losses.mixture_of_experts(classes, gate[:, 1:], y, m)


def test_picce_pulls_only_the_likeliest_right_expert(batch) -> None:
    scores, y, m = batch
    log_p = scores.log_softmax(-1)
    best = torch.stack([log_p[i, K:][m[i] > 0].max() if m[i].any() else log_p.new_zeros(()) for i in range(B)])
    torch.testing.assert_close(losses.picce(scores, y, m), -at(log_p, y) - best)


def test_picce_asks_nobody_where_two_experts_share_out_what_the_best_one_is_right_on() -> None:
    """The first is right on 60% of either half, the others on a half each: 60, 50 and 50%; the likelier class has 55%."""
    chances, rights = torch.tensor([0.3, 0.2, 0.3, 0.2]), torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 1]])
    classes = torch.tensor([0.55, 0.45])

    def risk(shares: list[float]) -> Tensor:
        scores, targets = torch.tensor(shares).log().expand(4, 2, -1), torch.arange(2).expand(4, 2)
        each = losses.picce(scores, targets, rights[:, None].expand(-1, 2, -1).float())
        return (chances[:, None] * classes * each).sum()

    # Both are the least under their order of the experts: each weight is a share of the mass that the order leaves.
    asks, answers = [0.275, 0.225, 0.3, 0.1, 0.1], [0.275, 0.225, 1e-9, 0.25, 0.25]
    assert (max(asks), max(answers)) == (asks[2], answers[0])
    mass, least = torch.tensor([0.55, 0.45, 0.6, 0.2, 0.2]), torch.tensor([0.55, 0.45, 0.5, 0.5])
    torch.testing.assert_close(risk(asks), -(mass * (mass / 2).log()).sum())
    torch.testing.assert_close(risk(answers), -(least * (least / 2).log()).sum())
    assert risk(answers) < risk(asks) - 0.2


def test_learned_loss_fits_the_conditional_loss() -> None:
    estimate, loss = torch.zeros(3, requires_grad=True), torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    losses.learned_loss(estimate, loss).sum().backward()
    assert estimate.grad is not None
    assert estimate.grad.tolist() == [-2, -4, -6]
    assert loss.grad is None


def test_selective_net_is_its_formula_and_divides_by_the_coverage() -> None:
    per_row, selection, auxiliary = torch.rand(50).double(), torch.randn(50).double(), torch.rand(50).double()
    g = selection.sigmoid()
    risk = (per_row * g).mean() / g.mean() + 32 * max(0.0, 0.8 - float(g.mean())) ** 2
    loss = losses.selective_net(per_row, selection, auxiliary, coverage=0.8)
    torch.testing.assert_close(loss, 0.5 * risk + 0.5 * auxiliary.mean())
    free = losses.selective_net(per_row, selection, auxiliary, coverage=1.0, penalty=0.0, alpha=1.0)
    torch.testing.assert_close(free, (per_row * g).mean() / g.mean())
    assert losses.selective_net(per_row, torch.full((50,), -1e4).double(), auxiliary, coverage=0.8).isfinite()
    for coverage in (0.0, 1.1):
        with pytest.raises(ValueError, match="coverage"):
            losses.selective_net(per_row, selection, auxiliary, coverage=coverage)


@pytest.mark.parametrize(
    "loss",
    [
        losses.one_vs_all,
        losses.picce,
        losses.realizable_experts,
        lambda s, y, m, **o: losses.realizable_experts(s, y, m, q=0.0, **o),
        lambda s, y, m, **o: losses.mixture_of_experts(2 * s[:, :K], s[:, K - 1 :], y, m, **o),
        lambda s, y, m, **o: losses.realizable_router(s[:, K - 1 :], torch.cat([(y == 0).double()[:, None], 1 - m], -1), **o),
    ],
    ids=["one_vs_all", "picce", "realizable_experts", "q=0", "mixture_of_experts", "realizable_router"],
)
def test_a_missing_expert_leaves_the_row(loss, batch) -> None:
    scores, y, m = batch
    torch.testing.assert_close(loss(scores, y, m, mask=torch.ones(B, E, dtype=torch.bool)), loss(scores, y, m))
    known, experts = [*range(K), K, K + 2], [0, 2]
    poisoned = scores.index_fill(-1, torch.tensor([K + 1]), torch.nan).requires_grad_()
    value = loss(poisoned, y, m, mask=torch.tensor([True, False, True]).expand(B, E))
    torch.testing.assert_close(value, loss(scores[:, known], y, m[:, experts]))
    gradient = torch.autograd.grad(value.sum(), poisoned)[0]
    assert (gradient[:, K + 1] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "loss",
    [
        losses.mozannar_sontag,
        losses.asymmetric_softmax,
        lambda s, y, m, **o: losses.realizable_surrogate(s, y, m, **o) / 2,
        lambda s, y, m, **o: losses.realizable_deferral(s, y, 1 - m, q=0.0, **o),
        lambda s, y, m, **o: losses.madras(s[:, :K], s[:, K], y, 1 - m, **o),
    ],
    ids=["mozannar_sontag", "asymmetric_softmax", "realizable_surrogate", "realizable_deferral", "madras"],
)
def test_without_its_one_expert_a_row_is_cross_entropy(loss, batch) -> None:
    scores, y, m = batch
    packed, right = scores[:, : K + 1], m[:, 0]
    torch.testing.assert_close(loss(packed, y, right, mask=torch.ones(B, dtype=torch.bool)), loss(packed, y, right))
    mask = torch.arange(B) % 2 == 0
    value = loss(packed.requires_grad_(), y, right, mask=mask)
    torch.testing.assert_close(value[mask], loss(packed, y, right)[mask])
    torch.testing.assert_close(value[~mask], F.cross_entropy(packed[:, :K], y, reduction="none")[~mask])
    assert (torch.autograd.grad(value.sum(), packed)[0][~mask, K] == 0).all()


def fitted(loss, width: int) -> Tensor:
    scores = torch.zeros(width, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scores], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def risk() -> Tensor:
        optimizer.zero_grad()
        value = loss(scores)
        value.backward()
        return value

    optimizer.step(risk)
    return scores.detach()


@pytest.mark.parametrize("mu", [0.5, 1.0, 1.5])
def test_the_minimiser_carries_the_experts_accuracy(mu: float) -> None:
    """Accuracy .8 and .3, whatever the label."""
    law, accuracy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.8, 0.3], dtype=torch.float64)
    scores = fitted(lambda s: losses.single_stage_deferral(s, law, 1 - accuracy, mu=mu), 5)
    torch.testing.assert_close(losses.expert_correctness(scores, 3, mu=mu), accuracy, atol=1e-4, rtol=1e-4)
    for phi in (margin.logistic, margin.exponential, margin.squared_hinge):
        scores = fitted(functools.partial(losses.one_vs_all, targets=law, expert_correct=accuracy, phi=phi), 5)
        read = losses.expert_correctness(scores, 3, loss=losses.one_vs_all, phi=phi)
        torch.testing.assert_close(read, accuracy, atol=1e-4, rtol=1e-4)
    scores = fitted(lambda s: losses.asymmetric_softmax(s, law, accuracy[0]), 4)
    read = losses.expert_correctness(scores, 3, loss=losses.asymmetric_softmax)
    torch.testing.assert_close(read, accuracy[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mu", [0.5, 1.0, 1.5])
def test_the_minimiser_carries_the_experts_costs_at_a_ceiling_above_one(mu: float) -> None:
    law, costs = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64), torch.tensor([0.3, 1.1], dtype=torch.float64)
    scores = fitted(lambda s: losses.single_stage_deferral(s, law, costs, mu=mu, ceiling=1.25), 5)
    torch.testing.assert_close(losses.expert_correctness(scores, 3, mu=mu, ceiling=1.25), 1 - costs, atol=1e-4, rtol=1e-4)


def test_correctness_is_refused_where_it_is_not_defined() -> None:
    with pytest.raises(ValueError, match="picce defines no probability"):
        losses.expert_correctness(torch.randn(5), 3, loss=losses.picce)
    with pytest.raises(ValueError, match="only rank the actions"):
        losses.expert_correctness(torch.randn(5), 3, mu=2.0)
    with pytest.raises(ValueError, match="none but with single_stage_deferral, got mu="):
        losses.expert_correctness(torch.randn(5), 3, loss=losses.one_vs_all, mu=1.7)
    with pytest.raises(ValueError, match="hinge defines no probability"):
        losses.expert_correctness(torch.randn(5), 3, loss=losses.one_vs_all, phi=margin.hinge)
    with pytest.raises(ValueError, match="none but with one_vs_all, got exponential"):
        losses.expert_correctness(torch.randn(5), 3, phi=margin.exponential)
    with pytest.raises(ValueError, match=r"expected 1\.\.4"):
        losses.expert_correctness(torch.randn(5), 5)
    assert math.isclose(float(losses.expert_correctness(torch.zeros(4), 3)[0]), 1 / 3, rel_tol=1e-6)


OF_EXPERTS = [
    losses.one_vs_all,
    losses.picce,
    losses.realizable_experts,
    lambda s, y, m: losses.mixture_of_experts(s[:, :K], s[:, -1 - E :], y, m),
    lambda s, y, m: losses.mozannar_sontag(s[:, [*range(K), -1]], y, m[:, -1]),
    lambda s, y, m: losses.asymmetric_softmax(s[:, [*range(K), -1]], y, m[:, -1]),
    lambda s, y, m: losses.realizable_surrogate(s[:, [*range(K), -1]], y, m[:, -1]),
]
of_experts = pytest.mark.parametrize(
    "loss", OF_EXPERTS, ids=["ova", "picce", "realizable", "mixture", "mozannar_sontag", "asymmetric", "surrogate"]
)


@of_experts
def test_an_answer_that_is_right_may_be_said_in_bool(loss, batch) -> None:
    scores, y, m = batch
    torch.testing.assert_close(loss(scores, y, m.bool()), loss(scores, y, m))


@of_experts
@pytest.mark.parametrize("soft", [False, True])
def test_a_wrong_expert_at_minus_infinity_is_no_nan(loss, soft: bool, batch) -> None:
    scores, y, m = batch
    scores[:, -1], m[:, -1] = -torch.inf, 0.0
    far = scores.index_fill(1, torch.tensor([K + E - 1]), -1e4)
    targets = F.one_hot(y, K).double() if soft else y
    loss_there = loss(scores.requires_grad_(), targets, m)
    torch.testing.assert_close(loss_there, loss(far, targets, m))
    assert torch.autograd.grad(loss_there.sum(), scores)[0].isfinite().all()


@of_experts
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_second_derivatives_are_finite(loss, scale: float, batch) -> None:
    scores, y, m = batch
    assert torch.func.hessian(lambda s: loss(s, y, m).sum())(scale * scores).isfinite().all()
    gamble = torch.func.hessian(lambda s: losses.deep_gamblers(s, y, reward=2.2).sum())
    assert gamble(scale * scores[:, : K + 1]).isfinite().all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s, y, m: losses.madras(s[:, :K], s[:, -1:], y, m[:, 0]), "squeeze(-1)"),
        (lambda s, y, m: losses.madras(s[:, :K], s[:, -1], y, m[:, :1]), "scores and expert_cost differ in rows"),
        (lambda s, y, m: losses.cost_sensitive_abstention(s, y, m[:, :1]), "scores and cost differ in rows"),
        (lambda s, y, m: losses.mixture_of_experts(s, s[:, None, : 1 + E], y, m), "scores and gate differ in rows"),
        (lambda s, y, m: losses.mixture_of_experts(s, s[:, : 1 + E], y, m[None]), "scores and expert_correct differ in rows"),
        (lambda s, y, m: losses.asymmetric_softmax(s[:, :2], 0 * y, m[:, 0]), "at least two classes and one expert"),
        (lambda s, y, m: losses.madras(s[:, :K], s[:, -1], y, m[:, 0], mask=m[:, :1] > 0), "scores and mask differ in rows"),
        (lambda s, y, m: losses.one_vs_all(s, y, m[:, 0]), "one column per expert, (..., E), got"),
        (lambda s, y, m: losses.picce(s, y, m[:, 0]), "for one expert use .unsqueeze(-1) of"),
        (lambda s, y, m: losses.realizable_experts(s, y, m[:, 0]), "one number per row"),
        (lambda s, y, m: losses.single_stage_deferral(s, y, m[:, 0]), "expert_costs: expected one column per expert"),
    ],
)
def test_shapes_that_would_broadcast_to_a_table_are_refused(call, said: str, batch) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        call(*batch)


def test_a_mask_of_numbers_is_none(batch) -> None:
    scores, y, m = batch
    for call in (
        lambda: losses.madras(scores[:, :K], scores[:, -1], y, m[:, 0], mask=m[:, 0]),
        lambda: losses.realizable_deferral(scores[:, : K + 1], y, m[:, 0], mask=m[:, 0]),
    ):
        with pytest.raises(TypeError, match="mask: expected a bool tensor"):
            call()


@pytest.mark.parametrize(
    ("criterion", "arguments"),
    [
        (Criterion(losses.one_vs_all), lambda s, y, m: (s, y, m)),
        (Criterion(losses.picce), lambda s, y, m: (s, y, m)),
        (Criterion(losses.mozannar_sontag), lambda s, y, m: (s[:, : K + 1], y, m[:, 0])),
        (Criterion(losses.cost_sensitive_abstention, cost=0.1), lambda s, y, m: (s[:, :K], y)),
        (Criterion(functools.partial(losses.cost_sensitive_abstention, phi=logistic), cost=0.1), lambda s, y, m: (s[:, :K], y)),
        *((Criterion(base), lambda s, y, m: (s[:, :K], y)) for base in (mae, double_mae, max_rho_margin, constrained_rho_hinge)),
        (Criterion(functools.partial(max_rho_margin, rho=2.0)), lambda s, y, m: (s[:, :K], y)),
        (Criterion(losses.mixture_of_experts), lambda s, y, m: (s[:, :K], s[:, : 1 + E], y, m)),
        (Criterion(losses.madras), lambda s, y, m: (s[:, :K], s[:, K], y, m[:, 0])),
        (Criterion(losses.deep_gamblers, reward=2.2), lambda s, y, m: (s[:, : K + 1], y)),
    ],
)
def test_criterion_knows_which_columns_are_classes(criterion, arguments, batch) -> None:
    scores, y, m = batch
    last = torch.full_like(y, K - 1)
    torch.testing.assert_close(
        criterion(*arguments(scores, last, m)), criterion(*arguments(scores, F.one_hot(last, K).double(), m))
    )
    with pytest.raises(ValueError, match=rf"class indices in 0\.\.{K - 1}, got {K}"):
        criterion(*arguments(scores, last + 1, m))


def test_an_impossible_class_counts_nothing_under_probabilities() -> None:
    scores, label = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([1])
    law = torch.nn.functional.one_hot(label, 3).float()
    soft, hard = (losses.cost_sensitive_abstention(scores, targets, 0.1) for targets in (law, label))
    torch.testing.assert_close(soft, hard)


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0, 2.0])
def test_without_experts_a_loss_of_experts_is_that_of_the_classes(mu: float, batch) -> None:
    scores, y, m = batch
    classes, nobody = scores[:, :K], m[:, :0]
    plain = losses.comp_sum(classes, torch.nn.functional.one_hot(y, K).to(classes.dtype), mu=mu)
    torch.testing.assert_close(losses.single_stage_deferral(classes, y, nobody, mu=mu), plain)
    if mu == 1:
        torch.testing.assert_close(losses.picce(classes, y, nobody), plain)
