"""Realizable problems: some linear hypothesis decides without loss; which losses find it, and which are known not to."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deferral import decide, error_costs, pick, single_stage_costs
from deferral.losses import (
    predictor_rejector_abstention,
    realizable_experts,
    realizable_router,
    single_stage_deferral,
    two_stage_deferral,
)
from deferral.losses.predictor_rejector import double_mae
from tests.cases import CASES, Case

K, D, N = 3, 5, 400


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """A linear W with K + 1 rows: where a class scores highest, that is the label, and the expert is right now and then;
    where the expert scores highest, it is right and the label is anything."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(K + 1, D, generator=generator, dtype=torch.float64)
    w[K] *= 1.5
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    decided = (x @ w.T).argmax(-1)
    deferred = decided == K
    anything = torch.randint(K, (N,), generator=generator)
    targets = anything.where(deferred, decided.clamp(max=K - 1))
    lucky = torch.rand(N, generator=generator) < 0.6
    assert 0.2 < deferred.double().mean() < 0.6
    return x, targets, (deferred | lucky).double()


def minimise(loss: Callable[[], Tensor], *weights: Tensor) -> None:
    """All the way: the gradient vanishes."""
    optimizer = torch.optim.LBFGS(
        weights, max_iter=500, history_size=20, tolerance_grad=1e-8, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    closure()
    assert all(float(weight.grad.abs().max()) < 1e-4 for weight in weights if weight.grad is not None)


def system_error(case: Case, problem, *, start: Tensor | None = None) -> tuple[float, Tensor]:
    x, targets, correct = problem
    rows = {"targets": targets, "expert_correct": torch.stack([correct, torch.zeros_like(correct)], dim=-1)}
    w = torch.zeros(K + 1, D, dtype=torch.float64) if start is None else start.clone()
    w.requires_grad_()
    minimise(lambda: case.loss(x @ w.T, rows).mean(), w)
    actions = decide((x @ w.T).detach())
    return float(pick(single_stage_costs(targets, 1 - correct.unsqueeze(-1), K), actions).mean()), w.detach()


LOGARITHMIC = next(case for case in CASES if case.name == "realizable_family[q=0.0]")


def test_the_claimed_reach_zero(problem) -> None:
    """The members with q > 0 and mu = 2 are not convex: they are started from q = 0, as the docstrings say."""
    error, start = system_error(LOGARITHMIC, problem)
    assert error < 0.01
    for case in CASES:
        if case.realizable:
            assert system_error(case, problem, start=start)[0] < 0.01, case


@pytest.mark.parametrize("case", [case for case in CASES if case.realizable is False], ids=repr)
def test_the_others_are_seen_to_stop_above_zero(case: Case, problem) -> None:
    assert system_error(case, problem)[0] > 0.03


def test_a_router_at_mu_2_is_realizable_and_the_logistic_is_not_for_three_actions() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, D, generator=generator, dtype=torch.float64)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    best = (x @ w.T).argmax(-1)
    answers = torch.where(torch.rand(N, 3, generator=generator) < 0.6, 1, 0).scatter(-1, best.unsqueeze(-1), 1)
    costs = error_costs(answers, torch.ones(N, dtype=torch.long)).double()

    logistic, of_logistic = cost_of(lambda scores: two_stage_deferral(scores, costs), x, costs)
    assert logistic > 0.03
    # Mu = 2 is slow to start: its docstring starts it from a solution of one of these.
    router, of_router = cost_of(lambda scores: realizable_router(scores, costs), x, costs)
    assert router < 0.01
    for start in (of_logistic, of_router):
        assert cost_of(lambda scores: two_stage_deferral(scores, costs, mu=2.0), x, costs, start)[0] < 0.01


def cost_of(loss: Callable[[Tensor], Tensor], x: Tensor, costs: Tensor, start: Tensor | None = None) -> tuple[float, Tensor]:
    """The mean cost of the linear minimiser's decisions, and the minimiser (A, D)."""
    w = (torch.zeros(costs.shape[-1], D, dtype=torch.float64) if start is None else start.clone()).requires_grad_()
    minimise(lambda: loss(x @ w.T).mean(), w)
    return float(pick(costs, decide((x @ w.T).detach())).mean()), w.detach()


def test_with_two_experts_too() -> None:
    """As in `problem`: where an expert scores highest it is right, and the label is anything; elsewhere right now and then."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(K + 2, D, generator=generator, dtype=torch.float64)
    w[K:] *= 1.5
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    decided = (x @ w.T).argmax(-1)
    assert torch.bincount(decided).amin() > 0.05 * N
    targets = torch.randint(K, (N,), generator=generator).where(decided >= K, decided.clamp(max=K - 1))
    lucky = torch.rand(N, 2, generator=generator) < 0.6
    correct = (lucky | (decided.unsqueeze(-1) == torch.arange(K, K + 2))).double()
    costs = single_stage_costs(targets, 1 - correct, K)
    error, start = cost_of(lambda scores: realizable_experts(scores, targets, correct, q=0.0), x, costs)
    assert error < 0.01
    for q in (0.7, 1.0):
        assert cost_of(lambda scores, q=q: realizable_experts(scores, targets, correct, q=q), x, costs, start)[0] < 0.01
    assert cost_of(lambda scores: realizable_router(scores, costs), x, costs)[0] < 0.01
    assert cost_of(lambda scores: single_stage_deferral(scores, targets, 1 - correct), x, costs)[0] > 0.03


def test_the_pair_with_twice_mae_is_realizable() -> None:
    """Where the cost is 0 one may always abstain: a region of free abstention, a linear predictor elsewhere."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    w, r = torch.randn(K, D, generator=generator, dtype=torch.float64), torch.randn(D, generator=generator, dtype=torch.float64)
    free = x @ r <= 0
    targets = torch.randint(K, (N,), generator=generator).where(free, (x @ w.T).argmax(-1))
    cost = torch.where(free, 0.0, 0.3).double()
    h = torch.zeros(K, D, dtype=torch.float64, requires_grad=True)
    rejector = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    # Started from cross-entropy, as the docstring says.
    minimise(lambda: F.cross_entropy(x @ h.T, targets, reduction="none")[~free].mean(), h)
    minimise(lambda: predictor_rejector_abstention(x @ h.T, x @ rejector, targets, cost, base=double_mae).mean(), h, rejector)
    answers = x @ rejector > 0
    wrong = (x @ h.T).argmax(-1) != targets
    assert float(torch.where(answers, wrong.double(), cost).mean()) < 0.01
