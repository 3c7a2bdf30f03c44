import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deferral import chow_scores, decide, decide_pair, deferral_margin, oracle


def test_ties_go_to_the_last_action_and_the_oracle_keeps_the_first() -> None:
    tied = torch.tensor([[1.0, 1.0, 0.0, 1.0], [2.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert decide(tied).tolist() == [3, 2, 3]
    assert oracle(-tied).tolist() == [0, 0, 0]


@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=4, max_size=4), min_size=1, max_size=8))
def test_decide_equals_a_loop(rows: list[list[float]]) -> None:
    expected = [max(range(4), key=lambda a: (row[a], a)) for row in rows]
    assert decide(torch.tensor(rows)).tolist() == expected
    cheapest = [min(range(4), key=lambda a: (row[a], a)) for row in rows]
    assert oracle(torch.tensor(rows)).tolist() == cheapest


def test_offsets_masks_and_nan() -> None:
    scores = torch.tensor([[1.0, 0.5, 0.0], [torch.nan, torch.nan, torch.nan], [torch.nan, 0.0, -1.0]])
    assert decide(scores).tolist() == [0, 2, 1]
    assert decide(scores, torch.tensor([0.0, 0.5, 0.0])).tolist() == [1, 2, 1]
    known = torch.tensor([[True, True], [False, False], [False, True]])
    assert decide(scores, torch.tensor([0.0, 5.0, 0.0]), mask=known).tolist() == [1, 0, 2]
    assert oracle(torch.tensor([[0.1, torch.nan], [torch.nan, 0.1]])).tolist() == [0, 1]
    assert decide(scores, mask=torch.zeros(3, 3, dtype=torch.bool)).tolist() == [-1, -1, -1]
    assert oracle(torch.tensor([[0.5, torch.nan]]), mask=torch.tensor([[False, True]])).tolist() == [1]
    assert oracle(torch.tensor([[0.5, 0.0, 0.1]]), mask=torch.tensor([[False, True]])).tolist() == [2]
    assert oracle(torch.tensor([[0.5, 0.0], [0.5, 0.0]]), mask=torch.tensor([[False, False], [True, False]])).tolist() == [-1, 0]


def test_half_precision_offsets_do_not_round_away() -> None:
    scores = torch.tensor([[256.0, 256.0]], dtype=torch.bfloat16)
    assert decide(scores, torch.tensor([0.5, 0.0])).tolist() == [0]


def test_the_pair_answers_iff_the_rejector_is_above_the_offset() -> None:
    scores = torch.tensor([[0.0, 1.0, -1.0]]).expand(3, 3)
    assert decide_pair(scores, torch.tensor([0.1, 0.0, -0.1])).tolist() == [1, 3, 3]
    assert decide_pair(scores, torch.tensor([0.1, 0.0, -0.1]), offset=-0.05).tolist() == [1, 1, 3]


def test_the_margin_defers_iff_it_is_not_negative() -> None:
    scores = torch.randn(100, 7).round()
    for own in (1, 4):
        assert torch.equal(deferral_margin(scores, num_own=own) >= 0, decide(scores) >= own)
        odd = scores.clone()
        odd[:3], odd[3:6, 0], odd[6:9, -1] = -torch.inf, torch.nan, torch.nan
        assert torch.equal(deferral_margin(odd, num_own=own)[3:] >= 0, decide(odd[3:]) >= own)
        assert deferral_margin(torch.full((1, 7), torch.nan), num_own=own).tolist() == [0.0]
        # With every expert closed there is nobody to defer to, whatever the own scores are.
        odd[3:6, own:], odd[0, :own] = -torch.inf, torch.nan
        assert deferral_margin(odd, num_own=own)[:6].isneginf().all()
    nobody, somebody = torch.tensor([[False, False], [False, True]])
    for broken in (torch.nan, -torch.inf):
        scores = torch.tensor([[broken, 0.0, -torch.inf], [broken, 0.0, 0.0]])
        assert deferral_margin(scores, num_own=1, mask=nobody).tolist() == [-torch.inf, -torch.inf]
        assert deferral_margin(scores, num_own=1, mask=somebody).tolist() == [-torch.inf, torch.inf]


def test_chow_abstains_iff_the_top_probability_is_at_most_one_minus_cost() -> None:
    p = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.875, 0.125]])
    assert decide(chow_scores(p, 0.25)).tolist() == [2, 2, 0]


def test_where_errors_differ_the_action_of_least_expected_cost_is_taken() -> None:
    harm = torch.tensor([[0.0, 9.0], [1.0, 0.0]])  # the label 0 must not be called 1
    p = torch.tensor([[0.02, 0.98], [0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
    scores = -torch.cat([p @ harm, torch.full((4, 1), 0.4)], dim=-1)
    assert decide(scores).tolist() == [1, 2, 2, 0]  # expected costs: .18 of 1; .8 and 1.8; .5 and 4.5; .1 of 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: decide(torch.tensor([[1, 2]])), "floating"),
        (lambda: chow_scores(torch.tensor([[1, 0]]), 0.1), "probabilities: expected a floating"),
        (lambda: chow_scores(torch.ones(3, 1), torch.rand(4)), "probabilities and cost differ in rows"),
        (lambda: chow_scores(torch.ones(3, 1), torch.tensor([0.1, torch.nan, 0.2])), r"numbers in \[0, 1\].*got nan"),
        (lambda: chow_scores(torch.ones(3, 1), torch.tensor([0.1, 0.1, 1.5])), r"numbers in \[0, 1\].*got 1.5"),
        (lambda: chow_scores(torch.ones(3, 1), -1.0), r"cost: expected a number in \[0, 1\], in units of one error, got -1"),
        (lambda: decide_pair(torch.randn(3, 2), torch.randn(2)), "one rejector value per row"),
        (lambda: deferral_margin(torch.randn(3, 2), num_own=2), r"expected 1\.\.1"),
        (lambda: decide(torch.randn(3, 5), torch.zeros(3)), "one offset per action"),
        (lambda: decide(torch.randn(3, 2), mask=torch.ones(2, 2).bool()), "differ in rows"),
    ],
)
def test_bad_input(call, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        call()
