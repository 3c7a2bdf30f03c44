"""Partial logs, and queries unlike the log."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from deferral.routing import Log, Outcome
from deferral.routing.encoders import NgramEncoder
from deferral.routing.evaluation import routability
from deferral.routing.held_out import HeldOut, blend, judged, skill
from deferral.routing.partial_logs import OutcomeModel, doubly_robust, observed
from deferral.routing.replay import events_of
from deferral.routing.shift import familiarity, refitted, shifted_folds, shrinkage
from deferral.routing.table import Table
from deferral.routing.vectors import Vectors

pytestmark = pytest.mark.ci_slow


def table_of(quality: np.ndarray, chance: np.ndarray, *, seed: int = 0, logged: bool = True) -> Table:
    mask = np.random.default_rng(seed).random(quality.shape) < chance
    propensity = np.where(mask & logged, chance, np.nan).astype(np.float32)
    names = [f"expert {number}" for number in range(quality.shape[1])]
    hidden = np.where(mask, quality, 0).astype(np.float32)
    nothing = np.full(quality.shape, np.nan, np.float32)
    return Table([str(row) for row in range(len(quality))], names, hidden, np.zeros(quality.shape), mask, nothing, propensity)


def hard_and_easy(rows: int) -> tuple[np.ndarray, np.ndarray, Vectors]:
    """Both experts are right on easy queries, the second sometimes on hard ones; it is asked the hard ones."""
    generator = np.random.default_rng(1)
    hard = generator.random(rows) < 0.5
    quality = (generator.random((rows, 2)) < np.where(hard[:, None], [0.1, 0.3], [0.9, 0.9])).astype(np.float32)
    chance = np.where(hard[:, None], [0.1, 0.6], [0.6, 0.1])
    # Of the difficulty, the vectors say nothing.
    return quality, chance, Vectors(np.ones((rows, 1), np.float32), np.zeros((rows, 1), np.float32))


def test_doubly_robust_outcomes_have_the_means_of_the_full_table_and_naive_ones_have_not() -> None:
    quality, chance, vectors = hard_and_easy(6000)
    means = {}
    for logged in (True, False):
        table = table_of(quality, chance, logged=logged)
        means[logged] = doubly_robust(vectors, table.quality, observed(table), seed=0).mean(0)
    np.testing.assert_allclose(means[True], quality.mean(0), atol=0.03)
    assert means[False][1] < means[False][0]  # the better expert looks worse
    assert quality.mean(0)[1] > quality.mean(0)[0]


def test_a_full_table_is_taken_as_it_is() -> None:
    quality, _, vectors = hard_and_easy(50)
    table = table_of(quality, np.ones_like(quality))
    assert doubly_robust(vectors, table.quality, observed(table), seed=0) is table.quality


def test_a_cell_has_no_part_in_its_own_guess_and_what_others_did_has() -> None:
    generator = np.random.default_rng(0)
    difficulty = generator.normal(size=(2000, 1))
    quality = (0.5 + 0.2 * difficulty + 0.02 * generator.normal(size=(2000, 3))).astype(np.float32)
    vectors = Vectors(np.ones((2000, 1), np.float32), np.zeros((2000, 1), np.float32))
    weights = (generator.random(quality.shape) < 0.6).astype(np.float32)
    model = OutcomeModel().fit(vectors, quality, weights)
    left = np.where(weights > 0, quality - 0.5, 0).astype(float)
    guess = model._from_others(left, weights > 0)
    moved = left.copy()
    moved[:, 0] += 1.0 * (weights[:, 0] > 0)
    again = model._from_others(moved, weights > 0)
    np.testing.assert_allclose(guess[:, 0], again[:, 0], atol=1e-9)
    informed = (weights[:, 0] == 0) & (weights[:, 1] > 0)
    assert np.abs(guess[informed, 0] - 0.2 * difficulty[informed, 0]).mean() < 0.05
    # By hand: the conditional mean of a normal law.
    row = int(np.flatnonzero((weights == [0, 1, 1]).all(1))[0])
    inside = model.covariance[1:, 1:]
    assert guess[row, 0] == pytest.approx(model.covariance[0, 1:] @ np.linalg.solve(inside, left[row, 1:]), abs=1e-9)


def test_guesses_of_many_experts_take_no_table_of_experts_by_experts_for_every_row() -> None:
    rows, experts = 1000, 60
    generator = np.random.default_rng(0)
    model, factor = OutcomeModel(), generator.normal(size=(experts, experts))
    model.means, model.covariance = np.zeros(experts), factor @ factor.T / experts + np.eye(experts)
    known = generator.integers(0, experts, (rows, 1)) == np.arange(experts)
    known[:10] = generator.random((10, experts)) < 0.5
    left = np.where(known, generator.normal(size=known.shape), 0)
    tracemalloc.start()
    guess = model._from_others(left, known)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 * rows * experts * 10
    for row in (0, 9, 10, 999):
        for cell in range(experts):
            others = np.flatnonzero(known[row] & (np.arange(experts) != cell))
            solved = np.linalg.solve(model.covariance[np.ix_(others, others)], left[row, others])
            assert guess[row, cell] == pytest.approx(model.covariance[cell, others] @ solved, abs=1e-9)


def test_an_expert_of_one_outcome_is_not_weighed_up() -> None:
    quality, _, vectors = hard_and_easy(500)
    chance = np.ones_like(quality)
    chance[1:, 1] = 0
    table = table_of(quality, np.maximum(chance, 1e-9), logged=False)
    assert table.mask[:, 1].sum() == 1
    found = doubly_robust(vectors, table.quality, observed(table), seed=0)
    assert np.isfinite(found).all()
    assert np.abs(found[:, 1]).max() < 2


def test_a_refitted_encoder_has_not_heard_the_words_of_others() -> None:
    texts = [f"{'integral of x' if row % 2 else 'emperor of Rome'} {row % 7}" for row in range(60)]
    vectors = NgramEncoder(dimensions=4).fit(texts)
    maths = np.arange(60) % 2 == 1
    around = refitted(vectors, np.flatnonzero(maths), seed=0)
    assert around.share is not None
    assert vectors.share is not None
    assert around.share[~maths].mean() < around.share[maths].mean()
    assert around.share[~maths].mean() < vectors.share[~maths].mean()
    plain = Vectors(vectors.dense, vectors.extra)
    assert refitted(plain, np.arange(10), seed=0) is plain


def test_clusters_stay_whole_in_shifted_folds() -> None:
    texts = [f"{word} {word} {row}" for row in range(40) for word in ("integral", "emperor", "pointer", "protein", "contract")]
    cluster, fold = shifted_folds(NgramEncoder(dimensions=8).fit(texts), 4, seed=0)
    assert len(cluster) == 200
    assert len({(a, b) for a, b in zip(cluster.tolist(), fold.tolist(), strict=True)}) == len(set(cluster.tolist()))
    assert len(set(fold.tolist())) == 4


def test_familiarity_rises_from_strange_to_known() -> None:
    generator = np.random.default_rng(0)
    knots, chance = familiarity(generator.normal(2, 0.5, 1000), generator.normal(0, 0.5, 600), np.arange(600) % 10)
    assert (np.diff(chance) >= 0).all()
    assert np.interp(-1, knots, chance) < 0.05
    assert np.interp(3, knots, chance) > 0.95


def test_reliance_is_what_clusters_agree_on() -> None:
    generator = np.random.default_rng(0)
    cluster = np.arange(2000) % 10
    estimate = generator.normal(size=(2000, 3))
    assert shrinkage(estimate, estimate, cluster) == pytest.approx(1)
    assert shrinkage(estimate, -estimate, cluster) == 0
    assert shrinkage(estimate, generator.normal(size=(2000, 3)), cluster) < 0.2
    mixed = estimate * np.where(cluster < 5, 1.25, 0.75)[:, None]
    slopes = np.where(np.arange(10) < 5, 1.25, 0.75)
    lower = 1 - 1.8595 * slopes.std(ddof=1) * np.sqrt(1.1)
    assert shrinkage(estimate, mixed, cluster) == pytest.approx(lower, abs=1e-4)
    two = cluster < 2
    assert shrinkage(estimate[two], estimate[two], cluster[two]) == 0, "of two subjects nothing follows for a third"


@pytest.mark.parametrize("clusters", [3, 5, 10])
def test_the_slope_of_a_subject_to_come_is_as_often_below_the_stated_end_as_is_said(clusters: int) -> None:
    generator = np.random.default_rng(0)
    missed = []
    for _ in range(600):
        slopes = generator.normal(1, 0.15, clusters + 1)
        cluster = np.arange(30 * clusters) % clusters
        estimate = generator.normal(size=(len(cluster), 2))
        truth = slopes[cluster][:, None] * estimate + 0.1 * generator.normal(size=estimate.shape)
        mean = slopes[:-1].mean()
        missed.append(slopes[-1] < mean * shrinkage(estimate, truth, cluster))
    assert np.mean(missed) < 0.05 + 2 * (0.05 * 0.95 / 600) ** 0.5


def test_skill_of_two_experts_is_the_gain_over_all_trade_offs() -> None:
    generator = np.random.default_rng(0)
    means = np.tile([0.5, 0.6], (200, 1))
    quality = (generator.random((200, 2)) < means).astype(float)
    estimate = np.clip(means + 0.1 * generator.normal(size=(200, 2)), 0.2, 0.8)
    relative = np.linspace(-1, 1, 4001)  # price difference over the price of an error
    gap, static, true = estimate[:, 1] - estimate[:, 0], means[:, 1] - means[:, 0], quality[:, 1] - quality[:, 0]
    gains = ((gap[:, None] > relative) * 1.0 - (static[:, None] > relative)) * (true[:, None] - relative)
    np.testing.assert_allclose(np.trapezoid(gains, relative, axis=1), skill(estimate, means, quality)[1], atol=1e-3)


def test_a_policy_without_skill_is_not_better_and_one_with_skill_is_not_turned_down_where_nothing_shows() -> None:
    generator = np.random.default_rng(0)
    means, price = np.tile([0.5, 0.6], (3000, 1)), np.tile([0.0, 1.0], (3000, 1))
    known = generator.random(3000) < 0.5
    quality = np.stack([known, generator.random(3000) < 0.6], -1).astype(float)
    errors = np.geomspace(1.2, 200, 20)
    good = np.stack([0.3 + 0.4 * known, np.full(3000, 0.6)], -1)
    assert judged(good, price, means, price, quality, errors).better.all()
    bad = np.stack([0.7 - 0.4 * known, np.full(3000, 0.6)], -1)
    assert not judged(bad, price, means, price, quality, errors).better.any()


def test_a_policy_is_not_judged_by_prices_that_it_cannot_know() -> None:
    generator = np.random.default_rng(0)
    means = quality = np.tile([0.5, 0.6], (500, 1))
    paid = generator.lognormal(size=(500, 2)) * [0.5, 1.0]
    expected, errors = np.broadcast_to(paid.mean(0), paid.shape), np.geomspace(1, 100, 9)
    found = judged(means, expected, means, paid, quality, errors)
    np.testing.assert_array_equal(found.gain, 0)
    hindsight, foresight = (routability(means, paid, quality, prices) for prices in (None, expected))
    assert hindsight.predicted > foresight.predicted + 0.01
    assert foresight.predicted == pytest.approx(foresight.static_mix, abs=1e-9)


FOLD = np.arange(4000) % 4


def held_of(deviations: dict[str, np.ndarray], truth: np.ndarray) -> HeldOut:
    nothing = np.zeros(4000, np.float32)
    return HeldOut(deviations, np.zeros_like(truth), truth, nothing, FOLD, np.empty((4000, 0), np.float32))


def test_blending_weights_follow_the_rows_of_mass() -> None:
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(2, 4000, 2)).astype(np.float32)
    first = np.arange(4000) < 2000
    truth = np.where(first[:, None], one, other)
    held = held_of({"one": one, "other": other}, truth)
    even, only = blend(held), blend(held, np.where(first, 1.0, 1e-9))
    assert even["one"] == pytest.approx(even["other"], abs=0.05)
    assert only["one"] > 0.9
    assert only["other"] < 0.1


def test_an_estimator_that_is_of_no_use_is_left_out_and_the_others_are_blended_as_without_it() -> None:
    generator = np.random.default_rng(0)
    one, other, noise, chance, own = generator.normal(size=(5, 4000, 2)).astype(np.float32)
    # The echo repeats another estimator, with noise of its own.
    held = held_of({"noise": noise, "one": one, "echo": one + own, "other": other}, one + other + 2 * chance)
    weights = blend(held)
    assert weights["noise"] == weights["echo"] == 0
    rest = replace(held, deviations={"one": one, "other": other})
    assert {name: weights[name] for name in ("one", "other")} == pytest.approx(blend(rest))
    # Of a few rows nobody can tell.
    assert all(weight > 0 for name, weight in blend(held.rows(np.arange(400))).items() if name != "noise")
    useful = blend(held_of({"noise": noise, "one": one, "other": other}, one + other + 0.2 * noise))
    assert useful["noise"] > 0.2


def test_the_blend_is_the_ridge_regression_towards_equal_weights() -> None:
    generator = np.random.default_rng(1)
    one, other, chance = generator.normal(size=(3, 4000, 3)).astype(np.float32)
    truth = 0.7 * one + 0.4 * other + chance
    weights = blend(held_of({"one": one, "other": other}, truth))
    x = np.stack([part - part.mean(1, keepdims=True) for part in (one, other)], -1).reshape(-1, 2).astype(np.float64)
    y = (truth - truth.mean(1, keepdims=True)).ravel().astype(np.float64)
    average = x.mean(1)
    equal = y @ average / (average @ average) / 2
    # As if the weights were known to lie about 0.1 from equal ones.
    pull = y.var() / 0.1**2
    expected = np.linalg.solve(x.T @ x + pull * np.eye(2), x.T @ y + pull * equal)
    np.testing.assert_allclose(list(weights.values()), expected, rtol=1e-5)


def test_a_blend_of_estimators_that_say_nothing_is_nothing() -> None:
    nothing = np.zeros((4000, 3), np.float32)
    assert blend(held_of({"one": nothing, "other": nothing}, nothing)) == {"one": 0.0, "other": 0.0}


def test_a_query_that_comes_often_weighs_by_its_share_of_the_decisions() -> None:
    """Half of the queries come 20 times and are easy; both experts are right as often, and one is asked nine times in ten."""
    generator = np.random.default_rng(0)
    log = Log()
    for number in range(3000):
        often = number % 2 == 0
        for _ in range(20 if often else 1):
            place = int(generator.random() < 0.1)
            good = float(generator.random() < (0.9 if often else 0.5))
            log.append(Outcome(f"query {number}", "ab"[place], good, 0.0, propensity=(0.9, 0.1)[place]))
    table = log.table()
    weights = observed(table)
    sums = weights.sum(0) / weights.sum() * 2
    np.testing.assert_allclose(sums, 1, atol=0.1)
    np.testing.assert_allclose((weights * table.quality).sum(0) / weights.sum(0), 0.7, atol=0.06)
    some = table.rows(np.arange(100))
    assert some.asked is not None
    assert some.asked.shape == (100, 2)
    # Without propensities the shares of all decisions stand for them.
    unlogged = observed(replace(table, propensity=np.full_like(table.propensity, np.nan)))
    np.testing.assert_allclose(unlogged, weights, rtol=0.1)


def test_a_policy_that_changed_weighs_by_each_of_its_propensities() -> None:
    generator = np.random.default_rng(0)
    log = Log()
    for number in range(400):
        for turn in range(50):
            chance = (0.95, 0.05) if turn < 25 else (0.05, 0.95)
            place = int(generator.random() < chance[1])
            log.append(Outcome(f"query {number}", "ab"[place], 1.0, 0.0, propensity=chance[place]))
        for _ in range(50):
            place = int(generator.random() < 0.5)
            log.append(Outcome(f"steady {number}", "ab"[place], 1.0, 0.0, propensity=0.5))
    weights = observed(log.table())
    np.testing.assert_allclose(weights[::2].mean(0), weights[1::2].mean(0), rtol=0.05)


def test_one_repeated_outcome_leaves_the_queries_that_all_were_asked_as_they_were() -> None:
    names = [f"expert {place}" for place in range(10)]
    log = Log(
        Outcome(f"full {row}", name, 1.0, 0.0, propensity=given) for row in range(200) for name in names for given in (1.0,)
    )
    generator = np.random.default_rng(0)
    for row in range(200):
        log.append(Outcome(f"traffic {row}", names[generator.integers(10)], 1.0, 0.0, propensity=0.1))
    before = observed(log.table())
    log.append(log[len(log) - 1])
    after = observed(log.table())
    np.testing.assert_allclose(after[:200] / after[0, 0], 1)
    np.testing.assert_allclose(after[200:-1] / after[0, 0], before[200:-1] / before[0, 0], rtol=1e-5)
    np.testing.assert_allclose(after[-1].max() / after[0, 0], 10, rtol=1e-5)


def test_a_line_that_stands_twice_in_a_log_of_experts_asked_at_once_is_one_line_more() -> None:
    generator = np.random.default_rng(0)
    log = Log()
    for number in range(600):
        hard = number % 2
        for name, chance, right in (("a", 1.0, 0.6), ("b", (0.1, 0.9)[hard], (0.9, 0.5)[hard])):
            if generator.random() < chance:
                log.append(Outcome(f"query {number}", name, float(generator.random() < right), 0.0, propensity=chance))
    means = []
    for _ in range(2):
        table = log.table()
        weights = observed(table)
        means.append((weights * table.quality).sum(0) / weights.sum(0))
        with pytest.raises(ValueError, match="expected those of single decisions, which add up to 1"):
            events_of(log, ["a", "b"])
        log.append(log[0])
    np.testing.assert_allclose(means[1], means[0], atol=0.005)
    np.testing.assert_allclose(means[0], [0.6, 0.7], atol=0.06)


def test_a_query_that_came_to_another_router_or_without_propensities_is_no_sign_of_experts_asked_at_once() -> None:
    generator = np.random.default_rng(0)
    decisions = [Outcome(f"query {number}", "a", 1.0, 0.0, propensity=0.99) for number in range(1000)]
    changed = Log([*decisions, *(Outcome(f"query {number}", "b", 1.0, 0.0, propensity=0.99) for number in range(10))])
    assert len(events_of(changed, ["a", "b"]).query) == 1010
    some = Log(
        Outcome(f"old {number}", name, 1.0, 0.0)
        for number in range(100)
        for name in generator.choice(["a", "b", "c"], 2, replace=False)
    )
    assert len(events_of(some, ["a", "b", "c"]).query) == 200
    again = [Outcome(f"again {n}", "a", 1.0, 0.0, propensity=0.9) for n in range(20) for _ in range(9)]
    drawn = [Outcome(f"again {n}", "b", 1.0, 0.0, propensity=0.05) for n in range(20)]
    ratios = []
    for rows in ([], [some[place] for place in range(len(some))]):
        table = Log([*rows, *again, *drawn, *decisions]).table()
        weights = observed(table)[[table.queries.index(f"again {n}") for n in range(20)]]
        ratios.append(weights[:, table.experts.index("b")] / weights[:, table.experts.index("a")])
    np.testing.assert_allclose(ratios[1], ratios[0], rtol=1e-5)


def test_an_expert_that_only_logged_rows_have_is_weighed_by_its_share_of_them() -> None:
    mask = np.zeros((1000, 3), bool)
    mask[np.arange(1000), np.arange(1000) % 2] = True
    mask[::10, 2] = True
    propensity = np.where(mask, 0.5, np.nan).astype(np.float32)
    propensity[:, 2] = propensity[0] = np.nan
    mask[0] = [True, False, False]
    nothing = np.full(mask.shape, np.nan, np.float32)
    quality = np.ones(mask.shape, np.float32)
    table = Table([str(row) for row in range(1000)], ["a", "b", "c"], quality, np.zeros(mask.shape), mask, nothing, propensity)
    weights = observed(table)
    np.testing.assert_allclose(weights[10, 2] / weights[1, 1], (1 / 0.099) / 2, rtol=1e-3)


def test_queries_that_all_were_asked_weigh_once_beside_a_log_of_single_answers() -> None:
    quality = np.ones((400, 2), np.float32)
    mask = np.ones((400, 2), bool)
    mask[100:] = np.random.default_rng(0).random(300)[:, None] < [0.05, -1]
    mask[100:, 1] = ~mask[100:, 0]
    propensity = np.where(mask, [0.05, 0.95], np.nan).astype(np.float32)
    propensity[:100] = np.nan
    nothing = np.full(mask.shape, np.nan, np.float32)
    table = Table([str(row) for row in range(400)], ["a", "b"], quality, np.zeros(mask.shape), mask, nothing, propensity)
    weights = observed(table)
    np.testing.assert_allclose(weights[:100] / weights[0, 0], 1)
    np.testing.assert_allclose(weights[100:][mask[100:, 0], 0] / weights[0, 0], 20, rtol=1e-5)
    # Of queries without any propensity, only those like them say how often an expert is asked.
    halves = replace(table, propensity=propensity.copy(), mask=mask.copy())
    halves.mask[:100] = np.arange(100)[:, None] % 2 == [0, 1]
    found = observed(halves)
    np.testing.assert_allclose(found[0, 0] / found[100:][mask[100:, 1], 1][0], 2 * 0.95, rtol=1e-5)
