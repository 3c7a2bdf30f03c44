import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deferral import decide, error_costs, fit_offsets, pick, two_stage_deferral


def best_by_search(scores: Tensor, costs: Tensor, num_own: int, mask: Tensor | None = None) -> float:
    """The cheapest mean cost over every threshold that could matter."""
    asked = scores[:, num_own:] if mask is None else scores[:, num_own:].where(mask, -torch.inf)
    margin = asked.amax(-1) - scores[:, :num_own].amax(-1)
    margin = margin[margin.isfinite()]
    candidates = torch.cat([margin, margin - 1e-6, margin.max()[None] + 1]).double()
    costs_at = []
    for threshold in candidates:
        offsets = torch.zeros(scores.shape[-1], dtype=torch.float64)
        offsets[num_own:] = -threshold
        costs_at.append(pick(costs, decide(scores.double(), offsets, mask=mask)).mean().item())
    return min(costs_at)


@pytest.mark.parametrize("num_own", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_fitted_offset_is_the_best_of_all(num_own: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-4, 5, (40, 5), generator=generator).double() / 2  # with ties
    costs = torch.rand(40, 5, generator=generator, dtype=torch.float64)
    offsets = fit_offsets(scores, costs, num_own=num_own)
    assert (offsets[:num_own] == 0).all()
    fitted = pick(costs, decide(scores, offsets)).mean().item()
    assert fitted == pytest.approx(best_by_search(scores, costs, num_own))


@pytest.mark.parametrize("seed", range(4))
def test_masked_experts_are_never_asked_and_never_counted(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, costs = torch.randn(2, 60, 4, generator=generator).double().unbind()
    costs = costs.abs()
    mask = torch.rand(60, 3, generator=generator) < 0.4
    every = torch.cat([torch.ones(60, 1).bool(), mask], -1)
    offsets = fit_offsets(scores, costs.masked_fill(~every, torch.nan), mask=mask)
    actions = decide(scores, offsets, mask=mask)
    assert every.gather(-1, actions[:, None]).all()
    assert pick(costs, actions).mean().item() == pytest.approx(best_by_search(scores, costs, 1, mask))


def test_rounding_of_large_scores_moves_no_row() -> None:
    scores = 1000 + torch.randn(3000, 2)
    costs = torch.rand(3000, 2)
    exact = pick(costs, decide(scores.double(), fit_offsets(scores.double(), costs))).mean()
    torch.testing.assert_close(pick(costs, decide(scores, fit_offsets(scores, costs))).mean(), exact)


def test_among_equally_cheap_thresholds_the_one_that_defers_least() -> None:
    scores = torch.tensor([[0.0, 3.0], [0.0, 2.0], [0.0, 1.0]])
    costs = torch.tensor([[0.3, 0.6], [0.2, 0.1], [0.3, 0.1]], dtype=torch.float64)  # -0.3 + 0.1 + 0.2 is not quite 0
    assert (decide(scores, fit_offsets(scores, costs)) == 0).all()


def test_never_and_always_deferring_are_reached() -> None:
    scores = torch.randn(30, 2)
    free_expert = torch.tensor([[1.0, 0.0]]).expand(30, 2)
    assert (decide(scores, fit_offsets(scores, free_expert)) == 1).all()
    assert (decide(scores, fit_offsets(scores, free_expert.flip(-1))) == 0).all()
    with pytest.raises(ValueError, match="own action can always be taken"):
        fit_offsets(torch.full((3, 2), -torch.inf), torch.rand(3, 2))
    nobody = torch.zeros(30, 1, dtype=torch.bool)
    assert (decide(scores, fit_offsets(scores, free_expert, mask=nobody), mask=nobody) == 0).all()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        fit_offsets(torch.randn(0, 2), torch.rand(0, 2))
    with pytest.raises(ValueError, match="finite"):
        fit_offsets(torch.full((3, 2), torch.nan), torch.rand(3, 2))
    with pytest.raises(ValueError, match="NaN"):
        fit_offsets(torch.randn(3, 2), torch.full((3, 2), torch.nan))
    with pytest.raises(ValueError, match="one cost per action"):
        fit_offsets(torch.randn(3, 2), torch.rand(3, 3))


def train(model: nn.Module, loss, x: Tensor, steps: int = 400) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x)).mean().backward()
        optimizer.step()


def test_a_second_stage_fitted_on_the_predictors_own_rows_never_defers() -> None:
    """On its training rows the predictor is never wrong: the router learns that asking is never worth its price."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, 20, generator=generator)
        noisy = torch.rand(rows, generator=generator) < 0.5  # half of the labels left of 0 cannot be predicted
        y = (x[:, 1] > 0).long()
        return x, torch.where((x[:, 0] < 0) & noisy, 1 - y, y)

    own_rows, held_out, test = draw(200), draw(200), draw(2000)
    predictor = nn.Sequential(nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 2))
    train(predictor, lambda s: F.cross_entropy(s, own_rows[1]), own_rows[0])
    predictor.requires_grad_(False)
    assert (predictor(own_rows[0]).argmax(-1) == own_rows[1]).all()

    def deferred(rows: tuple[Tensor, Tensor]) -> float:
        x, y = rows
        expert_is_right = y  # at a price of 0.2
        answers = torch.stack([predictor(x).argmax(-1), expert_is_right], -1)
        costs = error_costs(answers, y, price=[0.0, 0.2], ceiling=1.2)
        torch.manual_seed(0)
        router = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))
        train(router, lambda s: two_stage_deferral(s, costs, mu=1.7, ceiling=1.2), x, steps=100)
        return decide(router(test[0])).double().mean().item()

    assert deferred(own_rows) < 0.01
    assert deferred(held_out) > 0.25
