"""Thresholds that are served as they were certified: ties, masks, groups, grids."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("scipy")

from deferral import decide, deferral_margin
from deferral.certified import DeferralRate, SystemRisk, certify, conformal_risk_control, decide_at, threshold_grid
from deferral.certified.risks import checked_risks
from deferral.certified.thresholds import level_edges


def tenths(rows: int, actions: int, generator: torch.Generator) -> Tensor:
    """Shares of ten votes: their differences tie, but for their last digit."""
    return torch.randint(0, 11, (rows, actions), generator=generator).double() / 10


@pytest.mark.parametrize("num_own", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_the_rule_that_is_served_is_the_rule_that_was_certified(num_own: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = tenths(500, num_own + 2, generator)
    scores[:50, num_own:] = -torch.inf
    scores[50:80, -1] = -torch.inf
    mask = torch.rand(500, 2, generator=generator) < 0.7 if masked else None
    margin = deferral_margin(scores, num_own=num_own, mask=mask)
    open_experts = scores[:, num_own:] > -torch.inf
    open_experts = open_experts if mask is None else open_experts & mask
    own = decide(scores[:, :num_own])
    grid = torch.cat([torch.arange(-10, 11) / 10.0, margin[margin.isfinite()], torch.tensor([-torch.inf, torch.inf])]).double()
    found = certify(margin, DeferralRate(0.5), grid, method="bonferroni")
    for threshold, coverage in zip(grid.tolist(), found.coverage.tolist(), strict=True):
        actions = decide_at(scores, threshold, num_own=num_own, mask=mask)
        kept = actions < num_own
        assert kept.double().mean().item() == coverage
        assert torch.equal(actions[kept], own[kept])
        asked = actions[~kept] - num_own
        assert open_experts[~kept].gather(-1, asked[:, None]).all()
        best = scores[:, num_own:].where(open_experts, -torch.inf).amax(-1)[~kept]
        assert torch.equal(scores[:, num_own:][~kept].gather(-1, asked[:, None]).squeeze(-1), best)
    everybody = decide_at(scores, -torch.inf, num_own=num_own, mask=mask)
    assert torch.equal(everybody >= num_own, open_experts.any(-1))
    assert (decide_at(scores, torch.inf, num_own=num_own, mask=mask) < num_own).all()
    assert torch.equal(decide_at(scores, 0.0, num_own=num_own, mask=mask), decide(scores, mask=mask))


def test_rounding_moves_no_tied_population_to_the_other_side() -> None:
    """Every row has the scores 0.1 and 0.5: 0.5 - 0.1 >= 0.4, but 0.5 - 0.4 < 0.1.  Kept, 40% of the rows are wrong."""
    scores = torch.tensor([[0.1, 0.5]], dtype=torch.float64).expand(2000, 2)
    wrong = torch.rand(2000, generator=torch.Generator().manual_seed(0)) < 0.4
    risk = SystemRisk(wrong, torch.zeros_like(wrong), 0.1)
    found = certify(deferral_margin(scores, num_own=1), risk, torch.tensor([0.4], dtype=torch.float64))
    assert found.holds
    actions = decide_at(scores, found.threshold, num_own=1)
    assert wrong[actions == 0].sum() / 2000 <= 0.1


def test_one_threshold_per_row_serves_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 5, generator=generator).half()  # any dtype: the rule is in float64
    groups = torch.randint(0, 3, (300,), generator=generator)
    thresholds = torch.tensor([-torch.inf, 0.4, torch.inf], dtype=torch.float64)
    actions = decide_at(scores, thresholds[groups], num_own=2)
    for group, threshold in enumerate(thresholds.tolist()):
        assert torch.equal(actions[groups == group], decide_at(scores[groups == group], threshold, num_own=2))
    assert (actions[groups == 0] >= 2).all()
    assert (actions[groups == 2] < 2).all()
    with pytest.raises(ValueError, match="NaN"):
        decide_at(scores, torch.nan, num_own=2)
    with pytest.raises(TypeError, match=r"float64 tensor, got torch\.float32"):
        decide_at(scores, thresholds[groups].float(), num_own=2)
    with pytest.raises(TypeError, match=r"float64 tensor, got torch\.float32"):
        decide_at(scores, thresholds[groups].float().numpy(), num_own=2)
    with pytest.raises(ValueError, match=r"one per row of shape \(300,\), got \(3,\)"):
        decide_at(scores, thresholds, num_own=2)
    with pytest.raises(TypeError, match="scores: expected a torch tensor, or numbers"):
        decide_at([["a"]], 0.0, num_own=2)
    with pytest.raises(ValueError, match="own action"):
        decide_at(scores, 0.0, num_own=2, mask=torch.zeros(300, 5, dtype=torch.bool))


def test_a_broken_predictor_defers_where_somebody_can_be_asked() -> None:
    scores = torch.tensor([[torch.nan, 0.0, 1.0]]).repeat(2, 1)
    mask = torch.tensor([[True, True], [False, False]])
    assert decide_at(scores, 0.5, num_own=1, mask=mask).tolist() == [2, 0]
    assert decide_at(scores, -torch.inf, num_own=1, mask=mask).tolist() == [2, 0]
    closed = torch.tensor([[torch.nan, -torch.inf, -torch.inf], [-torch.inf] * 3])
    for threshold in (-torch.inf, -1.0, 0.0, torch.inf):
        assert decide_at(closed, threshold, num_own=1).tolist() == [0, 0]


def test_a_mask_by_a_number_leaves_the_thresholds_of_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    margin = torch.rand(400, generator=generator, dtype=torch.float64)
    masked = torch.rand(400, generator=generator) < 0.7
    risk = SystemRisk((torch.rand(400, generator=generator) < margin / 3).double(), torch.zeros(400, dtype=torch.float64), 0.2)
    closed = margin.masked_fill(masked, -torch.inf)
    convention = margin.masked_fill(masked, torch.finfo(torch.float32).min)
    assert torch.equal(threshold_grid(convention, 20, coverage=(0.75, 1.0)), threshold_grid(closed, 20, coverage=(0.75, 1.0)))
    assert conformal_risk_control(convention, risk) == conformal_risk_control(closed, risk)


def test_a_grid_keeps_the_shares_it_was_asked_for_and_hits_no_row() -> None:
    margin = torch.rand(1000, dtype=torch.float64)
    grid = threshold_grid(margin, 10)
    kept = (margin < grid.unsqueeze(-1)).double().mean(-1)
    torch.testing.assert_close(kept, torch.linspace(0.1, 1.0, 10, dtype=torch.float64))
    assert not torch.isin(grid, margin).any()
    assert grid[-1] == torch.inf
    tied = torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    assert threshold_grid(tied, 50).tolist() == [1.5, torch.inf]
    assert threshold_grid(tied[:1], 5).tolist() == [torch.inf]
    votes = tenths(5000, 2, torch.Generator().manual_seed(0))
    margin = deferral_margin(votes, num_own=1)
    assert len(margin.unique()) > 21
    expected = torch.cat([torch.arange(-19, 20, 2) / 20.0, torch.tensor([torch.inf])]).double()
    torch.testing.assert_close(threshold_grid(margin, 5000, coverage=(1e-3, 1.0)), expected)


def test_edges_between_levels_keep_exactly_the_levels_below() -> None:
    generator = torch.Generator().manual_seed(0)
    close = 1 + 2.0**-52 * 5 * torch.arange(40, dtype=torch.float64)  # five units in the last place apart
    for margin in (
        tenths(60, 1, generator).squeeze(-1) - 0.3,
        close,
        torch.nextafter(torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, 1.0]).double()),
        torch.cat([close, torch.full((3,), -torch.inf), torch.full((2,), torch.finfo(torch.float64).min, dtype=torch.float64)]),
    ):
        level, edges = level_edges(margin)
        assert len(edges) == int(level.max()) + 2 > 2
        for number, edge in enumerate(edges):
            assert torch.equal((margin < edge) | margin.isneginf(), (level < number) | margin.isneginf())


def test_a_row_that_nobody_can_be_asked_about_keeps_its_own_cost_beside_costs_of_another_dtype() -> None:
    margin, own = torch.tensor([-torch.inf, 0.0], dtype=torch.float64), torch.tensor([1.5, 1.0])
    (checked,) = checked_risks(margin, SystemRisk(own, torch.tensor([False, True]), at_most=1.0, ceiling=2.0))
    assert checked.deferred_cost.tolist() == [1.5, 1.0]
