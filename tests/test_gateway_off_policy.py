"""Policies are judged by draws of another: without bias, once a draw, and allowing for what was not seen."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deferral.gateway.off_policy import (
    Draws,
    alike,
    cautious_gain,
    compare,
    doubly_robust,
    interval_of_mean,
    of_no_use,
)
from deferral.intervals import mean_interval


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_doubly_robust_is_right_on_average_whatever_the_estimate(seed: int) -> None:
    """The sum over all draws, each times its probability, is the cost of the policy's action: exactly."""
    rng = np.random.default_rng(seed)
    chances, cost, estimate = rng.dirichlet(np.ones(3)), rng.normal(size=3), rng.normal(size=(3, 3))
    estimate[:] = estimate[0]
    every = Draws(np.arange(3), chances, cost, estimate, np.arange(3))
    for action in range(3):
        values = doubly_robust(every, np.full(3, action))
        assert chances @ values == pytest.approx(cost[action])


def test_estimates_agree_with_the_truth_of_a_simulated_log() -> None:
    rng = np.random.default_rng(0)
    rows = 1000
    cost_of = rng.random((rows, 3)) ** 2
    seen = cost_of + rng.normal(0, 0.3, (rows, 3))
    chances = rng.dirichlet(np.full(3, 2.0), rows) * 0.85 + 0.05
    action = (chances.cumsum(1) > rng.random(rows)[:, None]).argmax(1)
    every = np.arange(rows)
    for estimate in (np.zeros((rows, 3)), cost_of):
        draws = Draws(action, chances[every, action], seen[every, action], estimate, every)
        old, new = np.zeros(rows, int), cost_of.argmin(1)
        truth = cost_of[:, 0].mean() - cost_of.min(1).mean()
        judged = compare(draws, old, new)
        assert judged.gain.low < truth < judged.gain.high
        assert judged.gain_weighted.low < truth < judged.gain_weighted.high
        assert judged.old.low < cost_of[:, 0].mean() < judged.old.high
        assert judged.new.low < cost_of.min(1).mean() < judged.new.high
        assert judged.gain.half_width < 0.2
        gains = torch.from_numpy(doubly_robust(draws, old) - doubly_robust(draws, new))
        by_rows = mean_interval(gains, resamples=2000)
        assert (judged.gain.low, judged.gain.high) == pytest.approx((by_rows.low, by_rows.high)), "each row is a group"
    assert judged.differ == (old != new).sum()
    assert judged.seen[0] == ((old != new) & (action == 0)).sum()


def test_answers_that_are_judged_more_often_do_not_count_for_more() -> None:
    """All draws of two kinds of queries in their proportions, of which expert 1 is judged once in three: the gain is exact."""
    cost = np.array([[0.2, 0.9], [0.7, 0.1]])
    judged = [(0, 0, 9), (0, 1, 1), (1, 0, 3), (1, 1, 3)]  # kind, expert, judged answers; unjudged: none, 2, none, 6
    kind, action = np.array([(kind, expert) for kind, expert, count in judged for _ in range(count)]).T
    propensity = np.where(kind == action, 0.75, 0.25)
    estimate = np.tile([0.5, 0.3], (len(kind), 1))
    draws = Draws(action, propensity, cost[kind, action], estimate, np.arange(len(kind)), np.where(action == 0, 1.0, 1 / 3))
    old, new = np.zeros(len(kind), int), kind
    found = compare(draws, old, new)
    assert found.old.estimate == pytest.approx((0.2 + 0.7) / 2)
    assert found.new.estimate == pytest.approx((0.2 + 0.1) / 2)
    assert found.gain.estimate == pytest.approx((0.7 - 0.1) / 2)
    assert found.gain_weighted.estimate == pytest.approx((0.7 - 0.1) / 2)
    assert compare(replace(draws, heard=1.0), old, new).gain.estimate != pytest.approx((0.7 - 0.1) / 2, abs=0.02)


def test_policies_that_agree_gain_nothing_and_repeated_queries_count_as_one_draw() -> None:
    rng = np.random.default_rng(0)
    action, cost = rng.integers(0, 2, 200), rng.random(200)
    draws = Draws(action, np.full(200, 0.5), cost, np.zeros((200, 2)), np.arange(200))
    same = compare(draws, action, action)
    assert (same.gain.low, same.gain.estimate, same.gain.high) == (0, 0, 0)
    assert (same.gain_weighted.estimate, same.differ) == (0, 0)
    other = compare(draws, np.zeros(200, int), np.ones(200, int))
    fourfold = Draws(*(np.repeat(column, 4, 0) for column in (action, draws.propensity, cost, draws.estimate, draws.group)))
    again = compare(fourfold, np.zeros(800, int), np.ones(800, int))
    assert again.gain.estimate == pytest.approx(other.gain.estimate)
    assert again.gain.half_width == pytest.approx(other.gain.half_width)
    assert again.gain_weighted.half_width == pytest.approx(other.gain_weighted.half_width)
    assert again.seen == other.seen, "25 calls of one agent are one draw"
    assert alike([0.5, None, 0.25, 0.5, None]).tolist() == [3, 1, 2, 3, 0]


@pytest.mark.parametrize(
    ("old_error", "new_error", "least", "most"), [(0.02, 0.02, 0, 0.05), (0.02, 0.05, 0, 0.05), (0.3, 0.05, 0.6, 1)]
)
def test_a_rare_error_that_was_not_seen_is_allowed_for(old_error: float, new_error: float, least: float, most: float) -> None:
    """A thousand requests, half of which the new router decides otherwise; its choice is drawn one time in twenty."""
    rng = np.random.default_rng(0)
    old, new = np.zeros(1000, int), np.repeat([1, 0], 500)
    passed, naive = [], []
    for _ in range(200):
        explored = rng.random(1000) < 0.05
        failed = (rng.random(1000) < np.where(explored, new_error, old_error)).astype(float)
        expected = np.tile([old_error, new_error], (1000, 1))
        draws = Draws(explored.astype(int), np.where(explored, 0.05, 0.95), failed, expected, np.arange(1000))
        passed.append(cautious_gain(draws, old, new) > 0)
        mean, half = interval_of_mean(doubly_robust(draws, old) - doubly_robust(draws, new), np.ones(1000), np.arange(1000))
        assert half is not None
        naive.append(mean > half)
    assert least <= np.mean(passed) <= most
    assert np.mean(naive) > (0.2 if old_error == new_error else 0.0), "which is why"
    assert cautious_gain(draws, old, old) == -np.inf


def test_a_rare_right_answer_of_the_old_choice_that_was_not_seen_is_allowed_for() -> None:
    """Both choices are right one time in twenty.  A router before the old one decided as the new one: the old is explored."""
    rng = np.random.default_rng(0)
    old, new = np.repeat([1, 0], 500), np.zeros(1000, int)
    passed, naive, better = [], [], []
    for _ in range(200):
        explored = rng.random(1000) < 0.05
        draws = Draws(
            explored.astype(int), np.where(explored, 0.05, 0.95), (rng.random(1000) < 0.95) + 0.1, np.full((1000, 2), 1.05),
            np.arange(1000), worst=1.1, perfect=0.1,
        )  # fmt: skip
        passed.append(cautious_gain(draws, old, new) > 0)
        mean, half = interval_of_mean(doubly_robust(draws, old) - doubly_robust(draws, new), np.ones(1000), np.arange(1000))
        assert half is not None
        naive.append(mean > half)
        often = replace(draws, cost=np.where(explored, 0.95, 0.45) > rng.random(1000))
        better.append(cautious_gain(often, old, new) > 0)
    assert np.mean(passed) <= 0.05
    assert np.mean(naive) > 0.2, "which is why"
    assert np.mean(better) > 0.9


def test_one_more_draw_stands_for_no_more_than_all_rows_that_are_decided_otherwise() -> None:
    old, new = np.zeros(13, int), np.repeat([1, 0], [3, 10])
    draws = Draws(new, np.full(13, 0.01), np.zeros(13), np.zeros((13, 2)), np.arange(13))
    mean, half = interval_of_mean(np.append(np.zeros(13), -3.0), np.ones(14), np.arange(14))
    assert half is not None
    assert cautious_gain(draws, old, new) == pytest.approx(mean - half)


def test_a_draw_of_no_use_is_a_dear_one() -> None:
    price, action = np.append(np.arange(1.0, 102.0), [7.0, 9.0]), np.repeat([2, 0], [101, 2])
    found = of_no_use(np.ones(103), price, action)
    assert found[:100].tolist() == [101.0] * 100, "99 in a hundred cost 100 at most"
    assert found[100:].tolist() == [102.0, 9.98, 10.0]
    rng, equal = np.random.default_rng(0), []
    for _ in range(200):
        # Two experts of the same cost, of which one has answers whose lengths vary widely.
        old, new, drawn = np.zeros(4000, int), (rng.random(4000) < 0.4).astype(int), (rng.random(4000) < 0.05).astype(int)
        paid = np.where(drawn == 1, 0.3 * np.exp(1.5 * rng.normal(size=4000) - 1.125), 0.3)
        cost = (rng.random(4000) < 0.2) + paid
        draws = Draws(drawn, np.where(drawn == 1, 0.05, 0.95), cost, np.full((4000, 2), 0.5), np.arange(4000))
        equal.append(
            [
                cautious_gain(replace(draws, worst=worst), old, new) > 0
                for worst in (of_no_use(np.ones(4000), paid, drawn), 1 + paid)
            ]
        )
    useless, mean = np.mean(equal, axis=0)
    assert useless <= 0.05
    assert mean > useless, "which is why"


def test_the_interval_of_a_mean_is_that_of_its_groups() -> None:
    values, stands_for = np.random.default_rng(0).normal(size=60), np.ones(60)
    mean, half = interval_of_mean(values, stands_for, np.arange(60))
    assert (mean, half) == pytest.approx((values.mean(), 1.96 * values.std(ddof=1) / 60**0.5))
    fourfold = interval_of_mean(np.repeat(values, 4), np.ones(240), np.repeat(np.arange(60), 4))
    assert fourfold == pytest.approx((mean, half))
    assert interval_of_mean(values, stands_for, np.zeros(60, int)) == (mean, None)
    assert interval_of_mean(np.array([0.0, 1.0]), np.ones(2), np.arange(2)) == pytest.approx((0.5, 1.96 * 0.5))
