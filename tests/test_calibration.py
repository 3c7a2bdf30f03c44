from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deferral import decide, error_costs, fit_offsets, pick, two_stage_deferral
from deferral.calibration import budget_offsets, coverage_offsets, deferral_rate_offsets, fit_temperature
from deferral.decision import margin_levels


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
    offsets = fit_offsets(scores, costs.masked_fill(~every, torch.nan), mask=mask, num_own=1)
    actions = decide(scores, offsets, mask=mask)
    assert every.gather(-1, actions[:, None]).all()
    assert pick(costs, actions).mean().item() == pytest.approx(best_by_search(scores, costs, 1, mask))
    # Costs that are the same in every row are read as such.
    once = costs[0]
    torch.testing.assert_close(
        fit_offsets(scores, once, mask=every, num_own=1), fit_offsets(scores, once.expand(60, 4), mask=mask, num_own=1)
    )


def test_rounding_of_large_scores_moves_no_row() -> None:
    scores = 1000 + torch.randn(3000, 2)
    costs = torch.rand(3000, 2)
    exact = pick(costs, decide(scores.double(), fit_offsets(scores.double(), costs, num_own=1))).mean()
    torch.testing.assert_close(pick(costs, decide(scores, fit_offsets(scores, costs, num_own=1))).mean(), exact)


def test_among_equally_cheap_thresholds_the_one_that_defers_least() -> None:
    scores = torch.tensor([[0.0, 3.0], [0.0, 2.0], [0.0, 1.0]])
    costs = torch.tensor([[0.3, 0.6], [0.2, 0.1], [0.3, 0.1]], dtype=torch.float64)  # -0.3 + 0.1 + 0.2 is not quite 0
    assert (decide(scores, fit_offsets(scores, costs, num_own=1)) == 0).all()


def test_never_and_always_deferring_are_reached() -> None:
    scores = torch.randn(30, 2)
    free_expert = torch.tensor([[1.0, 0.0]]).expand(30, 2)
    assert (decide(scores, fit_offsets(scores, free_expert, num_own=1)) == 1).all()
    assert (decide(scores, fit_offsets(scores, free_expert.flip(-1), num_own=1)) == 0).all()
    with pytest.raises(ValueError, match="own action can always be taken"):
        fit_offsets(torch.full((3, 2), -torch.inf), torch.rand(3, 2), num_own=1)
    nobody = torch.zeros(30, 1, dtype=torch.bool)
    assert (decide(scores, fit_offsets(scores, free_expert, mask=nobody, num_own=1), mask=nobody) == 0).all()


@pytest.mark.parametrize("num_own", [1, 3])
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_one_offset_per_expert_is_never_dearer_and_cannot_be_bettered_alone(num_own: int, ties: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(40, num_own + 3, generator=generator).double()
    scores = (2 * scores).round() / 2 if ties else scores
    costs = torch.rand(40, num_own + 3, generator=generator, dtype=torch.float64)
    mask = torch.rand(40, 3, generator=generator) < 0.8

    def cost(offsets: Tensor) -> float:
        return pick(costs, decide(scores, offsets, mask=mask)).mean().item()

    common = cost(fit_offsets(scores, costs, num_own=num_own, mask=mask))
    offsets = fit_offsets(scores, costs, num_own=num_own, mask=mask, per_expert=True)
    assert (offsets[:num_own] == 0).all()
    assert cost(offsets) <= common + 1e-12
    # Where expert j ties with the best of the others is where its rows change hands: try both sides of every such place.
    for expert in range(num_own, num_own + 3):
        closed = offsets.clone()
        closed[expert] = -torch.inf
        known = torch.cat([torch.ones(40, num_own).bool(), mask], -1)
        others = (scores + closed).where(known, -torch.inf).amax(-1)
        for tie in others - scores[:, expert]:
            for side in (-1e-9, 1e-9):
                closed[expert] = tie + side
                assert cost(offsets) <= cost(closed) + 1e-9


def test_one_offset_per_expert_corrects_each_experts_own_bias() -> None:
    """Scores that flatter one expert and wrong another: one number for both cannot mend it."""
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(2000, 3, generator=generator, dtype=torch.float64)
    scores = -costs + torch.tensor([0.0, 0.7, -0.4])
    best = costs.amin(-1).mean().item()

    def cost(per_expert: bool) -> float:
        return pick(costs, decide(scores, fit_offsets(scores, costs, per_expert=per_expert, num_own=1))).mean().item()

    assert cost(False) > best + 0.05
    assert cost(True) < best + 0.01


def every_rule(scores: Tensor, num_own: int, mask: Tensor) -> list[Tensor]:
    """The actions of every threshold that could matter, by falling number of rows kept."""
    asked = scores[:, num_own:].where(mask, -torch.inf)
    margin = asked.amax(-1) - scores[:, :num_own].amax(-1)
    levels = margin[margin.isfinite()].unique().flip(0)
    rules = []
    for threshold in [levels[0] + 1, *levels]:
        offsets = torch.zeros(scores.shape[-1], dtype=torch.float64)
        offsets[num_own:] = -threshold
        rules.append(decide(scores, offsets, mask=mask))
    return rules


@pytest.mark.parametrize("num_own", [1, 2])
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_coverage_rate_and_budget_are_met_and_used_up(num_own: int, ties: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(30, num_own + 2, generator=generator).double()
    scores = scores.round() if ties else scores
    mask = torch.rand(30, 2, generator=generator) < 0.7
    rules = every_rule(scores, num_own, mask)
    kept = [int((actions < num_own).sum()) for actions in rules]
    for rows in range(31):
        offsets = coverage_offsets(scores, rows / 30, num_own=num_own, mask=mask)
        assert int((decide(scores, offsets, mask=mask) < num_own).sum()) == min(k for k in kept if k >= rows)
        offsets = deferral_rate_offsets(scores, rows / 30, num_own=num_own, mask=mask)
        assert int((decide(scores, offsets, mask=mask) >= num_own).sum()) == max(30 - k for k in kept if 30 - k <= rows)

    prices = torch.rand(30, num_own + 2, generator=generator, dtype=torch.float64)
    prices[:, :num_own] = 0.0
    spent = [pick(prices, actions).mean().item() for actions in rules]
    for budget in [0.0, 0.05, 0.2, 1.0, *spent]:
        offsets = budget_offsets(scores, prices, budget, num_own=num_own, mask=mask)
        actions = decide(scores, offsets, mask=mask)
        assert pick(prices, actions).mean().item() <= budget + 1e-12
        assert int((actions < num_own).sum()) == min(k for k, price in zip(kept, spent, strict=True) if price <= budget + 1e-12)


def test_a_budget_in_currency() -> None:
    scores = torch.tensor([[0.0, 4.0, 1.0], [0.0, 3.0, 1.0], [0.0, 1.0, 2.0], [0.0, -1.0, -2.0]])
    prices = torch.tensor([0.001, 0.05, 0.01])  # dollars a query
    assert decide(scores, budget_offsets(scores, prices, 0.011, num_own=1)).tolist() == [0, 0, 0, 0]
    assert decide(scores, budget_offsets(scores, prices, 0.1019 / 4, num_own=1)).tolist() == [1, 0, 0, 0]
    assert decide(scores, budget_offsets(scores, prices, 0.102 / 4, num_own=1)).tolist() == [1, 1, 0, 0]
    assert decide(scores, budget_offsets(scores, prices, 1.0, num_own=1)).tolist() == [1, 1, 2, 1]
    with pytest.raises(ValueError, match=r"at least 0\.001 a row"):
        budget_offsets(scores, prices, 0.0009, num_own=1)
    # An expert below the price of the own answer: the budget can be met by deferring alone.
    assert (decide(scores, budget_offsets(scores, torch.tensor([0.3, 0.1, 0.1]), 0.1, num_own=1)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_rows_promised_are_the_rows_decided_in_every_dtype(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (300 + torch.randn(501, 4, generator=generator)).to(dtype)
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        deferred = (decide(scores, deferral_rate_offsets(scores, share, num_own=1)) > 0).double().mean().item()
        assert deferred <= share
        assert dtype == torch.float16 or deferred > share - 1 / 500
    huge = torch.tensor([[0.0, 1e17]] * 3, dtype=torch.float64)
    assert (decide(huge, coverage_offsets(huge, 1.0, num_own=1)) == 0).all()
    assert (decide(huge, coverage_offsets(huge, 0.5, num_own=1)) == 0).all()  # rows of equal margin stay together
    assert (decide(huge, coverage_offsets(huge, 0.0, num_own=1)) == 1).all()
    # 0.4 - 0.1 and 0.5 - 0.2 are one margin, whatever their last digit.
    near = torch.tensor([[0.1, 0.4], [0.2, 0.5]], dtype=torch.float64)
    assert (decide(near, deferral_rate_offsets(near, 0.5, num_own=1)) == 0).all()


FAR = torch.finfo(torch.float32).min


def extreme_scores(kind: str, num_own: int, experts: int, generator: torch.Generator) -> Tensor:
    """Scores that rounding or one number of another size could spoil."""
    scores = torch.randn(60, num_own + experts, generator=generator, dtype=torch.float64)
    if kind == "tenths":
        return (scores * 10).round() / 10
    if kind == "one row of 1e17":
        scores[7] += 1e17
    elif kind == "half the rows at 1e17":
        scores[::2] = 1e17 + 16 * scores[::2].round()
    elif kind == "neighbouring numbers":
        scores = 1 + 2.0**-52 * scores.round()
    elif kind == "closed by finfo.min":
        closed = torch.rand(60, experts, generator=generator) < 0.3
        closed[0] = True
        scores[:, num_own:] = scores[:, num_own:].masked_fill(closed, FAR)
    return scores


EXTREMES = ["tenths", "one row of 1e17", "half the rows at 1e17", "neighbouring numbers", "closed by finfo.min"]


def rules_between_levels(scores: Tensor, num_own: int) -> list[Tensor]:
    """The actions half way between any two margins that differ by more than the rounding of their own two scores."""
    own, asked = scores[:, :num_own].amax(-1), scores[:, num_own:].amax(-1)
    level = margin_levels(asked - own, torch.maximum(asked.abs(), own.abs()))
    parts = [(asked - own)[level == number] for number in range(int(level.max()) + 1)]
    rules = [decide(scores[:, :num_own])]
    for upper, lower in pairwise(parts):
        offsets = torch.zeros(scores.shape[-1], dtype=torch.float64)
        between = float(upper.min() / 2 + lower.max() / 2)
        # To lift experts by 1e38 is to forget who is the best.
        offsets[num_own:] = 1 - float(upper.min()) if between < FAR / 4 else -between
        rules.append(decide(scores, offsets))
    return rules


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize(("num_own", "experts"), [(1, 1), (2, 2)])
def test_extreme_scores_spoil_no_count(kind: str, num_own: int, experts: int) -> None:
    """At every share: never more rows than it allows, and as many as a threshold between two levels can defer."""
    scores = extreme_scores(kind, num_own, experts, torch.Generator().manual_seed(0))
    reachable = {int((actions >= num_own).sum()) for actions in rules_between_levels(scores, num_own)}
    assert len(reachable) > (1 if kind == "neighbouring numbers" else 15)
    for rows in range(61):
        deferred = int((decide(scores, deferral_rate_offsets(scores, rows / 60, num_own=num_own)) >= num_own).sum())
        assert max(number for number in reachable if number <= rows) <= deferred <= rows
        kept = int((decide(scores, coverage_offsets(scores, rows / 60, num_own=num_own)) < num_own).sum())
        assert rows <= kept <= min(60 - number for number in reachable if 60 - number >= rows)


@pytest.mark.parametrize("kind", EXTREMES)
def test_extreme_scores_spoil_no_fit(kind: str) -> None:
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        scores = extreme_scores(kind, 1, 1, generator)
        costs = torch.rand(60, 2, generator=generator, dtype=torch.float64)
        fitted = pick(costs, decide(scores, fit_offsets(scores, costs, num_own=1))).mean().item()
        assert fitted <= min(pick(costs, actions).mean().item() for actions in rules_between_levels(scores, 1)) + 1e-9


def test_one_row_closed_by_a_large_number_leaves_the_fit_of_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(1000, 3, generator=generator, dtype=torch.float64)
    scores = -costs + 0.1 * torch.randn(1000, 3, generator=generator)
    convention, closed = scores.clone(), scores.clone()
    convention[0, 1:], closed[0, 1:] = FAR, -torch.inf
    costs[0, 0] = 1.0  # deferring it would look better than keeping it
    torch.testing.assert_close(fit_offsets(convention, costs, num_own=1), fit_offsets(closed, costs, num_own=1))
    for share in (0.0, 0.3, 0.8):
        torch.testing.assert_close(coverage_offsets(convention, share, num_own=1), coverage_offsets(closed, share, num_own=1))


def test_levels_join_what_rounding_parts_and_no_chain_joins_all() -> None:
    votes = torch.arange(11).double() / 10
    margin = (votes - votes[:, None]).flatten()
    level = margin_levels(margin, torch.maximum(votes, votes[:, None]).flatten())
    assert len(margin.unique()) > 21
    assert torch.equal(level, 10 - (10 * margin).round().long())
    assert torch.equal(margin_levels(margin), level)
    # A thousand neighbours: any two that follow each other are within rounding, the first and the last are not.
    chain = 1 + 2.0**-52 * torch.arange(1000, dtype=torch.float64)
    level = margin_levels(chain)
    assert 100 < int(level.max()) < 999
    for number in range(int(level.max()) + 1):
        members = chain[level == number]
        assert members.max() - members.min() <= 8 * 2.0**-52
    # One row of another size joins nothing but itself.
    large = margin_levels(torch.arange(10).double(), torch.tensor([1.0] * 9 + [1e17]))
    assert len(large.unique()) >= 9
    assert margin_levels(torch.tensor([-torch.inf, 1.0, -torch.inf, 2.0])).tolist() == [2, 1, 2, 0]
    assert margin_levels(torch.tensor([])).tolist() == []


@pytest.mark.parametrize("mask", [-1e9, -1e30, torch.finfo(torch.float32).min, torch.finfo(torch.float64).min])
def test_a_mask_by_a_number_joins_no_other_levels(mask: float) -> None:
    votes = torch.arange(11).double() / 10
    margin = (votes - votes[:, None]).flatten()
    masked = torch.cat([margin, torch.full((500,), mask, dtype=torch.float64)])
    level = margin_levels(masked)
    assert torch.equal(level[:121], margin_levels(margin))
    assert level[121:].unique().tolist() == [21]
    # Margins that are large throughout are no mask.
    assert torch.equal(margin_levels(1e12 * margin[margin != 0]), margin_levels(margin[margin != 0], torch.ones(110)))


@pytest.mark.parametrize("per_expert", [False, True])
def test_weights_count_rows(per_expert: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, costs = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64).unbind()
    costs, times = costs.abs(), torch.randint(0, 4, (50,), generator=generator)
    weighted = fit_offsets(scores, costs, weights=times.double(), per_expert=per_expert, num_own=1)
    repeated = fit_offsets(
        scores.repeat_interleave(times, 0), costs.repeat_interleave(times, 0), per_expert=per_expert, num_own=1
    )
    actions = [decide(scores, offsets)[times > 0] for offsets in (weighted, repeated)]
    assert torch.equal(*actions)
    assert not torch.equal(actions[0], decide(scores, fit_offsets(scores, costs, per_expert=per_expert, num_own=1))[times > 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_small_budget_is_kept_to_whatever_the_prices_are_stored_in(dtype: torch.dtype) -> None:
    scores = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    prices = torch.tensor([0.0, 1.0, 100.0], dtype=dtype)
    for budget in (0.0, 0.001, 0.01):
        actions = decide(scores, budget_offsets(scores, prices, budget, num_own=1))
        spent = pick(prices.double().expand(20_000, 3), actions).mean().item()
        assert spent <= budget * (1 + 1e-6)
    assert spent > 0
    # An own price is no reason for slack either: the mean of exact tenths is a budget that they meet.
    tenth = torch.full((20_000, 3), 0.1, dtype=torch.float64)
    assert (decide(scores, budget_offsets(scores, tenth, 0.1, num_own=1)) > 0).all()
    with pytest.raises(ValueError, match="least that any threshold spends"):
        budget_offsets(scores, tenth, 0.1 - 1e-9, num_own=1)


def test_a_known_temperature_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)

    def loss(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores, targets, reduction="none")

    for factor in (1e-3, 0.4, 1.0, 3.0, 1e4):
        assert fit_temperature(loss, factor * logits) == pytest.approx(factor, rel=0.03)
    closed = F.pad(3 * logits, (0, 1), value=-torch.inf)
    assert fit_temperature(loss, closed) == pytest.approx(fit_temperature(loss, 3 * logits), rel=1e-6)
    wrong = (targets + 1) % 5
    for mask in (-1e4, torch.finfo(torch.float32).min):
        some = (3 * logits).scatter(
            -1, wrong[:, None], torch.full((20_000, 1), mask).where(torch.arange(20_000)[:, None] < 9000, 1.0)
        )
        expected = some.where(some > -9e3, -torch.inf)
        assert fit_temperature(loss, some) == pytest.approx(fit_temperature(loss, expected), rel=1e-6)
    temperature = torch.tensor(fit_temperature(loss, 3 * logits), dtype=torch.float64, requires_grad=True)
    loss(3 * logits.double() / temperature).mean().backward()
    assert abs(temperature.grad.item()) < 1e-8


def test_the_temperature_of_a_two_stage_surrogate_makes_its_probabilities_those_of_the_costs() -> None:
    """At mu = 1 the optimum has p_a proportional to the expected weight, here ceiling - cost."""
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(500, 3, generator=generator, dtype=torch.float64)
    optimum = (1 - costs).log()
    fitted = fit_temperature(lambda s: two_stage_deferral(s, costs), 2.5 * optimum)
    assert fitted == pytest.approx(2.5, rel=1e-6)
    closed = torch.cat([2.5 * optimum, torch.full((500, 1), -torch.inf, dtype=torch.float64)], -1)
    assert fit_temperature(lambda s: two_stage_deferral(s[:, :3], costs), closed) == pytest.approx(2.5, rel=1e-6)


def test_scores_without_a_best_temperature_are_refused() -> None:
    scores = torch.randn(50, 3, dtype=torch.float64)

    def against(targets: Tensor) -> float:
        return fit_temperature(lambda s: F.cross_entropy(s, targets, reduction="none"), scores)

    with pytest.raises(ValueError, match="as if no row were ever wrong"):
        against(scores.argmax(-1))
    with pytest.raises(ValueError, match="say less than constant ones"):
        against(scores.argmin(-1))
    with pytest.raises(ValueError, match="at least one row"):
        fit_temperature(lambda s: s.sum(-1), scores[:0])
    with pytest.raises(ValueError, match="finite numbers at every temperature"):
        fit_temperature(lambda s: s.sum(-1) * torch.nan, scores)
    with pytest.raises(ValueError, match="scores: expected finite numbers, got inf"):
        fit_temperature(lambda s: s.sum(-1), torch.tensor([[torch.inf, 0.0]]))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\]"):
        coverage_offsets(torch.randn(3, 2), 1.1, num_own=1)
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\]"):
        deferral_rate_offsets(torch.randn(3, 2), float("nan"), num_own=1)
    with pytest.raises(ValueError, match="at least one row"):
        coverage_offsets(torch.randn(0, 2), 0.5, num_own=1)
    with pytest.raises(ValueError, match="one price per action"):
        budget_offsets(torch.randn(3, 2), torch.rand(1), 0.5, num_own=1)
    with pytest.raises(ValueError, match="price: expected non-negative"):
        budget_offsets(torch.randn(3, 2), torch.tensor([0.0, -0.1]), 0.5, num_own=1)
    with pytest.raises(ValueError, match="own action"):
        coverage_offsets(torch.randn(3, 2), 0.5, mask=torch.zeros(3, 2, dtype=torch.bool), num_own=1)
    with pytest.raises(ValueError, match="at least one row"):
        fit_offsets(torch.randn(0, 2), torch.rand(0, 2), num_own=1)
    with pytest.raises(ValueError, match="finite"):
        fit_offsets(torch.full((3, 2), torch.nan), torch.rand(3, 2), num_own=1)
    with pytest.raises(ValueError, match="NaN"):
        fit_offsets(torch.randn(3, 2), torch.full((3, 2), torch.nan), num_own=1)
    with pytest.raises(ValueError, match="one cost per action"):
        fit_offsets(torch.randn(3, 2), torch.rand(3, 3), num_own=1)
    with pytest.raises(ValueError, match=r"weights: expected one per row, shape \(3,\)"):
        fit_offsets(torch.randn(3, 2), torch.rand(3, 2), weights=torch.ones(2), num_own=1)
    with pytest.raises(TypeError, match="weights: expected a torch tensor, or numbers"):
        fit_offsets(torch.randn(3, 2), torch.rand(3, 2), weights=["a"] * 3, num_own=1)
    with pytest.raises(ValueError, match="not all 0"):
        fit_offsets(torch.randn(3, 2), torch.rand(3, 2), weights=torch.zeros(3), num_own=1)
    with pytest.raises(ValueError, match="num_own"):
        coverage_offsets(torch.randn(3, 2), 0.5, num_own=2)
    for call in (lambda s: fit_offsets(s, torch.rand(3, 2), num_own=1), lambda s: coverage_offsets(s, 0.5, num_own=1)):
        with pytest.raises(TypeError, match="scores: expected a torch tensor, or numbers"):
            call([["a", "b"]] * 3)
        with pytest.raises(ValueError, match="scores: expected a column for every action"):
            call(torch.tensor(1.0))


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


def test_a_start_at_which_scores_overflow_is_passed_over() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 5, generator=generator)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    tiny = (60 * logits).softmax(-1)
    temperature = fit_temperature(lambda s: F.cross_entropy(s.float(), targets, reduction="none"), tiny)
    assert 0.1 < temperature < 10
