from itertools import product

import pytest
import torch

from deferral import decide, pick

pytest.importorskip("scipy")

from deferral.capacity import fit_capacities


def best_by_search(scores: torch.Tensor, capacities: list[int], num_own: int) -> float:
    """The largest sum of scores over every assignment there is."""
    rows, actions = scores.shape
    values = scores.tolist()
    best = -float("inf")
    for assignment in product(range(actions), repeat=rows):
        if all(assignment.count(num_own + j) <= capacity for j, capacity in enumerate(capacities)):
            best = max(best, sum(values[row][action] for row, action in enumerate(assignment)))
    return best


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("num_own", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_small_assignments_are_optimal_and_priced(seed: int, num_own: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, num_own + 2, generator=generator).double()
    scores = (2 * scores).round() if ties else scores
    mask = torch.rand(5, 2, generator=generator) < 0.9
    capacities = torch.randint(0, 4, (2,), generator=generator).tolist()
    found = fit_capacities(scores, capacities, num_own=num_own, mask=mask)

    known = scores.clone()
    known[:, num_own:] = known[:, num_own:].where(mask, -torch.inf)
    total = pick(known, found.actions).sum().item()
    assert total == pytest.approx(best_by_search(known, capacities, num_own))
    loads = torch.bincount(found.actions, minlength=num_own + 2)[num_own:]
    limits = torch.tensor(capacities)
    assert (loads <= limits).all()

    # Strong duality: rows at their best price-adjusted score plus what the capacities are worth is the optimum.
    assert (found.prices >= 0).all()
    priced = known - torch.cat([torch.zeros(num_own).double(), found.prices])
    assert priced.amax(-1).sum().item() + float(found.prices @ limits.double()) == pytest.approx(total)
    assert (found.prices[loads < limits] == 0).all()
    if not ties:
        assert torch.equal(found.offsets[num_own:], -found.prices)
        assert torch.equal(decide(scores, found.offsets, mask=mask), found.actions)


@pytest.mark.parametrize("shift", [0.0, 0.1, 1000.1])  # tenths are no binary numbers
def test_among_ties_the_online_rule_stays_within_every_capacity(shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    assigned = decided = 0.0
    for trial in range(40):
        experts, num_own = 1 + trial % 3, 1 + trial % 2
        scores = torch.randint(-3, 4, (30, num_own + experts), generator=generator).double() / 10 + shift
        if trial % 5 == 0:
            scores = scores[torch.randint(0, 3, (30,), generator=generator)]  # three rows, ten times each
        mask = torch.rand(30, experts, generator=generator) < 0.8 if trial % 4 == 0 else None
        capacities = torch.randint(0, 15, (experts,), generator=generator)
        found = fit_capacities(scores, capacities, num_own=num_own, mask=mask)
        actions = decide(scores, found.offsets, mask=mask)
        assert (torch.bincount(actions, minlength=num_own + experts)[num_own:] <= capacities).all()
        own = scores[:, :num_own].amax(-1).sum().item()
        assigned += pick(scores, found.actions).sum().item() - own
        decided += pick(scores, actions).sum().item() - own
    assert 0.6 * assigned < decided < assigned


def test_a_tie_that_exceeds_the_capacity_is_priced_out_just_above() -> None:
    """Confidences in tenths against 0.85: a tenth of the rows are worth the same, and a rule asks about all of them or none."""
    votes = torch.arange(1000).remainder(10).double() / 10
    scores = torch.stack([votes, torch.full_like(votes, 0.85)], -1)
    for capacity, asked in ((50, 0), (100, 100), (150, 100), (299, 200), (1000, 900)):
        found = fit_capacities(scores, [capacity], num_own=1)
        assert int(found.actions.sum()) == min(capacity, 900)
        deferred = decide(scores, found.offsets) == 1
        assert int(deferred.sum()) == asked
        assert torch.equal(deferred, votes < asked / 1000 - 0.05)


def test_a_finite_number_that_stands_for_a_mask_moves_no_price() -> None:
    scores = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    masked, convention = scores.clone(), scores.clone()
    masked[:5, 1:], convention[:5, 1:] = -torch.inf, torch.finfo(torch.float32).min
    expected, found = fit_capacities(masked, [30, 40], num_own=1), fit_capacities(convention, [30, 40], num_own=1)
    assert torch.equal(found.actions, expected.actions)
    torch.testing.assert_close(found.prices, expected.prices)


@pytest.mark.parametrize("experts", [1, 4])
def test_the_online_rule_is_the_assignment_and_keeps_the_loads_on_new_rows(experts: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> torch.Tensor:
        difficulty = torch.randn(rows, 1, generator=generator)
        noise = torch.randn(rows, 1 + experts, generator=generator)
        return noise + difficulty * torch.linspace(0, 1, 1 + experts) + torch.tensor([0.0] + [1.0] * experts)

    fitted, fresh = draw(3000), draw(30_000)
    share = 0.6 / experts
    found = fit_capacities(fitted, [share] * experts, num_own=1)
    assert torch.equal(decide(fitted, found.offsets), found.actions)
    loads = torch.bincount(found.actions, minlength=1 + experts)[1:]
    assert (loads <= round(share * 3000)).all()
    # At a price, the load is a share estimated from 3,000 rows: five standard deviations.
    fresh_shares = torch.bincount(decide(fresh, found.offsets), minlength=1 + experts)[1:] / 30_000
    assert ((fresh_shares - loads / 3000).abs() < 5 * (share * (1 - share) / 3000 + share / 30_000) ** 0.5).all()
    # No cheaper rule: what is assigned at random within the same loads gains less.
    shuffled = found.actions[torch.randperm(3000, generator=generator)]
    assert pick(fitted, found.actions).sum() > pick(fitted, shuffled).sum() + 500


def test_the_price_lies_between_the_gain_of_one_more_and_the_loss_of_one_fewer() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(60, 3, generator=generator).double() + torch.tensor([0.0, 1.0, 1.0])

    def total(first: int) -> float:
        return pick(scores, fit_capacities(scores, [first, 15], num_own=1).actions).sum().item()

    price = fit_capacities(scores, [10, 15], num_own=1).prices[0].item()
    assert total(11) - total(10) <= price <= total(10) - total(9)
    assert total(11) > total(10)
    # Gains of 1, 5 and 3: a second answer would gain 3, losing the first costs 5, and no row moves between.
    few = torch.tensor([[0.0, 1.0], [0.0, 5.0], [0.0, 3.0]])
    found = fit_capacities(few, [1], num_own=1)
    assert found.prices.item() == pytest.approx(4.0)
    assert decide(few, found.offsets).tolist() == found.actions.tolist() == [0, 1, 0]


def test_capacities_that_bind_nobody_change_nothing() -> None:
    scores = torch.randn(40, 4)
    free = fit_capacities(scores, [1.0, 1.0, 1.0], num_own=1)
    assert torch.equal(free.actions, decide(scores))
    assert (free.offsets == 0).all()
    assert torch.equal(fit_capacities(scores, [40, 100, 40], num_own=1).actions, decide(scores))
    closed = fit_capacities(scores, [0, 0, 0], num_own=1)
    assert (closed.actions == 0).all()
    assert (decide(scores, closed.offsets) == 0).all()
    all_equal = fit_capacities(torch.zeros(6, 3), [1, 2], num_own=1)
    assert (torch.bincount(all_equal.actions, minlength=3)[1:] <= torch.tensor([1, 2])).all()
    assert (decide(torch.zeros(6, 3), all_equal.offsets) == 0).all()


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_the_units_of_the_scores_do_not_matter(size: float) -> None:
    scores = torch.randn(200, 3, dtype=torch.float64)
    plain, scaled = (fit_capacities(unit * scores, [30, 40], num_own=1) for unit in (1.0, size))
    assert torch.equal(scaled.actions, plain.actions)
    torch.testing.assert_close(scaled.prices / size, plain.prices, rtol=1e-6, atol=0.0)
    # Three rows gain 2 and three gain 1: with room for five, a rule asks about the first three.
    tied = size * torch.tensor([[0.0, 2.0], [0.0, 1.0]], dtype=torch.float64).repeat(3, 1)
    assert decide(tied, fit_capacities(tied, [5], num_own=1).offsets).tolist() == [1, 0] * 3


@pytest.mark.parametrize("size", [1e9, -1e9])
def test_a_price_is_never_lost_in_the_rounding_of_the_scores(size: float) -> None:
    own = torch.full((6,), size, dtype=torch.float64)
    scores = torch.stack([own, own.nextafter(torch.full_like(own, torch.inf))], -1)
    found = fit_capacities(scores, [3], num_own=1)
    assert int(found.actions.sum()) == 3
    assert not decide(scores, found.offsets).any()


def test_a_share_is_rounded_down_and_a_tenth_is_a_tenth_in_float32() -> None:
    scores = torch.tensor([0.0, 1.0]).repeat(1000, 1) + 0.1 * torch.rand(1000, 2)
    for share, rows in ((torch.tensor([0.1]), 100), ([0.1], 100), (torch.tensor([0.0999]), 99), ([1], 1), ([1.0], 1000)):
        assert int(fit_capacities(scores, share, num_own=1).actions.sum()) == rows


def test_bad_input() -> None:
    scores = torch.randn(6, 3)
    with pytest.raises(ValueError, match="one number for each of 2 experts"):
        fit_capacities(scores, [3], num_own=1)
    with pytest.raises(TypeError, match="got both in"):
        fit_capacities(scores, (3, 0.5), num_own=1)
    with pytest.raises(TypeError, match=r"got torch\.bfloat16, which rounds them too far"):
        fit_capacities(scores, torch.tensor([0.1, 0.1], dtype=torch.bfloat16), num_own=1)
    with pytest.raises(ValueError, match="shares of the rows"):
        fit_capacities(scores, [float("nan"), 0.5], num_own=1)
    with pytest.raises(ValueError, match=">= 0"):
        fit_capacities(scores, [-1, 2], num_own=1)
    with pytest.raises(TypeError, match="integers"):
        fit_capacities(scores, torch.tensor([True, False]), num_own=1)
    with pytest.raises(ValueError, match="num_own"):
        fit_capacities(scores, [], num_own=3)
    with pytest.raises(ValueError, match="finite"):
        fit_capacities(scores.fill_(torch.nan), [1, 1], num_own=1)
    with pytest.raises(ValueError, match="at least one row"):
        fit_capacities(torch.randn(0, 3), [1, 1], num_own=1)
    with pytest.raises(TypeError, match="scores: expected a torch tensor, or numbers"):
        fit_capacities(None, [1, 1], num_own=1)
    with pytest.raises(TypeError, match="capacities: expected a torch tensor, or numbers that NumPy makes an array of, got list"):
        fit_capacities(torch.randn(6, 3), ["all", "all"], num_own=1)
