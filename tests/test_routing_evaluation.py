import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deferral.intervals import bootstrap
from deferral.routing import log_of_table
from deferral.routing.evaluation import (
    PriceQualityCurve,
    aiq,
    apgr,
    best_expert,
    cpt,
    curve,
    hull,
    intervals_of,
    routability,
    saving,
    static_curve,
    trade_offs,
)
from deferral.routing.held_rows import HeldRows, Search
from deferral.routing.judging import evaluation, held
from deferral.routing.prices import error_range
from deferral.routing.showing import save_evaluation
from deferral.routing.static import chances, draw_of, draws, explored, mix_at_error, mix_at_price, mix_at_quality
from tests.routing_world import EXPERTS, router, world


def tables(rows: int = 200, experts: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Qualities and prices; the dearer expert is better on average."""
    generator = np.random.default_rng(0)
    price = np.arange(1, experts + 1) * (0.5 + generator.random((rows, 1)))
    quality = (generator.random((rows, experts)) < 0.3 + 0.12 * np.arange(experts)).astype(float)
    return quality, price


def test_apgr_is_the_mean_of_the_recovered_gap_over_all_shares_of_calls() -> None:
    generator = np.random.default_rng(0)
    score, gain = generator.normal(size=30), generator.choice([-1.0, 0.0, 1.0], 30) + 0.4
    recovered = [0.0, *np.cumsum(gain[np.argsort(-score)]) / gain.sum()]
    expected = np.mean([(a + b) / 2 for a, b in itertools.pairwise(recovered)])
    assert apgr(score, gain) == pytest.approx(expected)


def test_a_score_that_says_nothing_recovers_half_the_gap() -> None:
    gain = np.random.default_rng(0).normal(size=50) + 1
    assert apgr(np.zeros(50), gain) == pytest.approx(0.5)
    assert cpt(np.zeros(50), gain, 0.8) == pytest.approx(0.8)


def test_ties_are_called_in_equal_parts() -> None:
    generator = np.random.default_rng(0)
    score, gain = generator.integers(0, 3, 12).astype(float), generator.normal(size=12) + 1
    orders = [generator.permutation(12) for _ in range(4000)]
    # The mean over random orders of the tied rows.
    shuffled = np.mean([apgr(score + 1e-6 * np.argsort(order), gain) for order in orders])
    assert apgr(score, gain) == pytest.approx(shuffled, abs=1e-2)
    order = orders[0]
    assert apgr(score[order], gain[order]) == pytest.approx(apgr(score, gain))


def test_weights_count_rows() -> None:
    generator = np.random.default_rng(0)
    score, gain = generator.integers(0, 6, 40).astype(float), generator.normal(size=40) + 0.5
    counts = generator.integers(0, 3, (5, 40))
    for row, one in enumerate(counts):
        again = np.repeat(score, one), np.repeat(gain, one)
        assert apgr(score, gain, counts)[row] == pytest.approx(apgr(*again))
        assert cpt(score, gain, 0.5, counts)[row] == pytest.approx(cpt(*again, 0.5))
    quality, price = tables()
    weights = generator.integers(0, 3, (2, 200))
    points = static_curve(price, quality).points(weights)
    again = np.repeat(np.arange(200), weights[1])
    np.testing.assert_allclose(points[1], static_curve(price[again], quality[again]).points())


def test_cpt_is_the_first_share_of_calls_that_recovers_enough() -> None:
    score, gain = np.arange(10.0)[::-1], np.array([3.0, 1, 1, 0, 0, 0, 0, 0, 0, -1])
    # Recovered after k calls: 0, .75, 1, 1.25, ...
    assert cpt(score, gain, 0.5) == pytest.approx(0.1 * 0.5 / 0.75)
    assert cpt(score, gain, 0.8) == pytest.approx(0.1 + 0.1 * 0.05 / 0.25)
    assert np.isnan(apgr(score, -gain))


def test_the_hull_is_what_mixing_two_settings_can_reach() -> None:
    points = np.random.default_rng(0).random((30, 2))
    corners = hull(points)
    for price in np.linspace(points[:, 0].min() + 1e-9, 1, 50):
        reach = points[points[:, 0] <= price][:, 1].max()
        for a, b in itertools.permutations(points, 2):
            if a[0] <= price < b[0]:
                reach = max(reach, a[1] + (price - a[0]) / (b[0] - a[0]) * (b[1] - a[1]))
        assert np.interp(price, corners[:, 0], corners[:, 1]) == pytest.approx(reach)


def test_aiq_and_saving_of_a_line() -> None:
    points = np.array([[1.0, 0.4], [3.0, 0.8], [2.0, 0.1], [3.0, 0.5]])
    assert aiq(points, 1.0, 3.0) == pytest.approx(0.6)
    assert aiq(points, 1.0, 5.0) == pytest.approx((0.6 * 2 + 0.8 * 2) / 4)
    assert aiq(points, 2.0, 2.0) == pytest.approx(0.8)
    assert saving(points, 0.6, 4.0) == pytest.approx(1 - 2 / 4)
    assert saving(points, 0.75, 4.0, 0.8) == pytest.approx(0.5)
    assert np.isnan(saving(points, 0.9, 4.0))
    assert saving(points, 0.8 + 1e-12, 3.0) == 0, "the same mean, summed in another order"
    assert np.isnan(saving(np.array([[0.0, 0.8]]), 0.8, 0.0))


def test_a_curve_goes_from_the_cheapest_expert_to_the_best_estimate() -> None:
    quality, price = tables()
    estimate = np.random.default_rng(1).random(quality.shape)
    points = curve(estimate, price, quality).points()
    rows = np.arange(len(price))
    np.testing.assert_allclose(points[0], [price[rows, estimate.argmax(1)].mean(), quality[rows, estimate.argmax(1)].mean()])
    np.testing.assert_allclose(points[-1], [price[:, 0].mean(), quality[:, 0].mean()])
    assert (np.diff(points[:, 0]) <= 1e-12).all()
    assert len(trade_offs(price)) == len(points)


def test_a_router_without_information_is_the_static_mix_and_one_that_knows_is_the_oracle() -> None:
    quality, price = tables()
    means = np.broadcast_to(quality.mean(0), quality.shape)
    flat = routability(means, np.broadcast_to(price.mean(0), price.shape), quality)
    assert flat.predicted == pytest.approx(flat.static_mix, abs=1e-9)
    known = routability(quality, price, quality)
    assert known.predictable == pytest.approx(1, abs=1e-6)
    assert known.room > 0.1
    same = routability(means[:, :1].repeat(4, 1), price, quality[:, :1].repeat(4, 1))
    assert same.room == pytest.approx(0, abs=1e-9)
    assert "next to nothing" in str(same)


def test_the_best_expert_is_the_cheaper_of_two_equals() -> None:
    assert best_expert(np.array([[1.0, 0, 1]]), np.array([[3.0, 1, 2]])) == 2


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    covered = 0
    for seed in range(150):
        values = np.random.default_rng(seed).random(100) < 0.3

        def mean(weights: np.ndarray, values: np.ndarray = values) -> np.ndarray:
            return np.array([weights @ values / weights.sum()])

        (found,) = intervals_of(mean, 100, resamples=300)
        covered += found.low <= 0.3 <= found.high
    assert 0.88 < covered / 150 < 0.99
    assert bootstrap(lambda weights: weights.sum(-1), 3, resamples=4).eq(3).all()


def test_rows_of_a_group_are_drawn_together() -> None:
    values = np.random.default_rng(0).random(10)

    def mean_of(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        return lambda weights: np.array([weights @ values / weights.sum()])

    (alone,) = intervals_of(mean_of(values), 10, resamples=50)
    (together,) = intervals_of(mean_of(values.repeat(4)), 40, group=np.arange(10).repeat(4), resamples=50)
    assert tuple(vars(alone).values()) == pytest.approx(tuple(vars(together).values()))


def test_the_static_mix_is_optimal_among_mixes() -> None:
    generator = np.random.default_rng(0)
    mixes = generator.dirichlet(np.full(5, 0.3), 20_000)
    for _ in range(5):
        quality, price = generator.random(5), generator.random(5)
        mask = np.array([True, True, True, True, False])
        allowed = mixes[:, :4].copy()
        allowed /= allowed.sum(1, keepdims=True)
        level = price[:4].min() + 0.5 * np.ptp(price[:4])
        mix = mix_at_price(quality, price, mask, level)
        assert mix.sum() == pytest.approx(1)
        assert mix[4] == 0
        assert mix @ price <= level + 1e-12
        affordable = allowed[allowed @ price[:4] <= level]
        assert mix @ quality >= (affordable @ quality[:4]).max() - 1e-9
        cheapest = mix_at_quality(quality, price, mask, float(mix @ quality))
        assert cheapest @ price == pytest.approx(mix @ price, abs=1e-9)
        single = mix_at_error(quality, price, mask, 0.5)
        assert single.argmax() == np.argmin(np.where(mask, 1 - quality + price / 0.5, np.inf))
    with pytest.raises(ValueError, match="the cheapest expert costs"):
        mix_at_price(np.ones(2), np.ones(2), np.ones(2, bool), 0.5)
    # What is the same but for rounding is no cheaper.
    assert mix_at_price(np.ones(2), np.array([0.3, 1.0]), np.ones(2, bool), 0.1 * 3 - 1e-12).tolist() == [1.0, 0.0]


def test_what_is_dearer_and_no_better_is_no_corner() -> None:
    assert hull(np.array([[2.0, 0.5], [1.0, 0.5]])).tolist() == [[1.0, 0.5]]


def test_the_least_share_of_calls_is_that_at_which_the_gap_is_first_recovered() -> None:
    score, gain = np.array([3.0, 2.0, 1.0]), np.array([1.0, 0.0, 1.0])
    assert [float(cpt(score, gain, share)) for share in (0.5, 1.0)] == pytest.approx([1 / 3, 1.0])


def test_decisions_go_by_expected_prices_and_pay_what_was_asked() -> None:
    one = np.ones((1, 2))
    found = curve(one, np.array([[1.0, 0.0]]), one, np.array([1.0]), expected=np.array([[0.0, 1.0]]))
    assert found.points().tolist() == [[1.0, 1.0]]


def test_the_room_is_over_the_mean_prices_of_the_experts() -> None:
    generator = np.random.default_rng(0)
    price, quality = generator.random((50, 2)) + np.array([0.5, 2.0]), generator.random((50, 2)) * [0.5, 1.0]
    means = price.mean(0)
    expected = aiq(static_curve(price, quality).points(), means[0], means[1])
    assert routability(quality, price, quality).static_mix == pytest.approx(expected)


def test_a_figure_that_a_third_of_the_samples_do_not_define_has_no_interval() -> None:
    def figures(weights: np.ndarray) -> np.ndarray:
        return np.array([1.0, 1.0 if weights[0] else np.nan])

    sure, unsure = intervals_of(figures, 3, resamples=100)
    assert (sure.low, sure.high, unsure.estimate) == (1.0, 1.0, 1.0)
    assert np.isnan([unsure.low, unsure.high]).all()


def test_a_budget_and_a_floor_are_looked_for_among_those_who_may_be_asked() -> None:
    good, price = np.tile([0.0, 1.0], (4, 1)), np.tile([1.0, 10.0], (4, 1))
    rows = replace(HeldRows.none(2), quality=good, estimate=good, price=price)
    search, cheap = Search(rows, price, good[0], price[0]), np.array([True, False])
    dearest, quality = search.error_at_price(cheap, 1.0)
    assert (dearest, quality) == (pytest.approx(450e3), 0.0), "a budget that is just enough is enough"
    assert search.error_at_price(np.ones(2, bool), 10.0)[1] == 1.0
    with pytest.raises(ValueError, match=r"at most 0\.000 was reached"):
        search.error_at_quality(cheap, 0.5)
    # Half the queries go to whoever is drawn.
    assert search.of_mix(np.array([1.0, 0.0]), np.ones(2, bool), 0.5) == (3.25, 0.25)


def test_a_draw_is_below_one_whatever_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deferral.routing.static._digest", lambda query, key: b"\xff" * 8)
    assert draws(["q"], "s").tolist() == [draw_of("q", "s")]
    assert draw_of("q", "s") < 1


def test_who_is_explored_does_not_hang_on_what_the_mix_draws() -> None:
    queries = [f"q{number}" for number in range(400)]
    by_chance = explored(np.ones(2, bool), 0.5, queries, "salt") >= 0
    assert (by_chance == (draws(queries, "salt") < 0.5)).mean() == pytest.approx(0.5, abs=0.1)


def test_who_may_not_be_asked_is_not_drawn_at_random_and_the_chances_add_up_to_one() -> None:
    found = chances(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), np.array([True, True, False]), 0.2)
    np.testing.assert_allclose(found, [[0.9, 0.1, 0.0], [0.1, 0.9, 0.0]])


def test_draws_are_uniform_and_the_same_for_the_same_query_and_salt() -> None:
    queries = [f"query {number}" for number in range(4000)]
    drawn = draws(queries, "salt")
    np.testing.assert_array_equal(drawn, draws(queries, "salt"))
    other = draws(queries, "another")
    assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.05
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert np.abs(np.sort(drawn) - np.linspace(0, 1, 4000)).max() < 1.63 / np.sqrt(4000)  # Kolmogorov-Smirnov, 1%
    assert torch.tensor(drawn).dtype == torch.float64


def test_prices_that_differ_by_rounding_are_one_price() -> None:
    rounded, exact = (trade_offs(np.array([[0.001, 0.3, third]])) for third in (0.1 + 0.2, 0.3))
    np.testing.assert_allclose(rounded, exact, rtol=1e-6)
    assert (np.diff(trade_offs(np.array([[0.3, 0.1 + 0.2]]))) < 0).all()


def test_the_learned_curve_is_of_the_estimates_where_the_static_mix_decides_and_at_random() -> None:
    texts, _, quality, price = world(200, seed=21)
    table = log_of_table(texts, EXPERTS, quality, price).table()
    unsure = copy.copy(router())
    similarity, chance = router().fitted.familiar
    unsure._fitted = replace(router().fitted, familiar=(similarity, 1e-6 * chance), reliance=0.0, abroad=router().fitted.weights)
    unsure._plans, unsure.explore = {}, 0.5
    found, errors = held(unsure, table), trade_offs(table.price)
    assert found.fallback.all()
    expected = curve(unsure.fitted.estimate(unsure.encoder(texts)).quality.astype(float), price, quality, errors)
    np.testing.assert_allclose(np.take_along_axis(price.T, found.learned, 0), expected.price)
    assert (found.learned != found.routed).mean() > 0.2


def test_a_figure_that_does_not_exist_is_null(tmp_path: Path) -> None:
    texts, _, quality, price = world(100, seed=22)
    rows = held(router(), log_of_table(texts, EXPERTS, quality, price).table())
    cheap = np.zeros_like(rows.routed)
    found = evaluation(replace(rows, routed=cheap), resamples=100)
    assert np.isnan(found.figures["routed"]["saving at 100%"].estimate)
    save_evaluation(found, tmp_path / "evaluation.json")
    read = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert read["figures"]["routed"]["saving at 100%"]["estimate"] is None
    assert read["figures"]["routed"]["AIQ"]["estimate"] == found.figures["routed"]["AIQ"].estimate


def test_prices_that_hardly_differ_are_one_price() -> None:
    """Else trade-offs at which a ten thousandth of a cent counted would decide which estimator is used."""
    price = np.array([[0.001, 0.001 * (1 + 1e-5), 0.02]])
    assert error_range(price) == pytest.approx(error_range(price[:, [0, 2]]), rel=1e-4)
    assert error_range(price) == pytest.approx((0.038, 0.95), rel=1e-4)
    assert trade_offs(price)[-1] > 1e-9
    assert error_range(np.array([[1.0, 2.0, 10.0]])) == pytest.approx((2.0, 450.0))
    assert error_range(np.array([[0.001, 0.0011]]))[0] == pytest.approx(0.0002)
    # Of two there is no other price to choose by; lengths may tell them apart.
    assert error_range(price[:, :2])[0] == pytest.approx(2e-8)


ONE, THREE, TEXT = np.ones((1, 2)), np.ones(3), np.array([["a", "b"]])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: apgr(TEXT[0], THREE), TypeError, "score: expected an array of numbers, got an array of <U1"),
        (lambda: apgr(None, THREE), TypeError, "score: expected an array of numbers, got NoneType"),
        (lambda: apgr(THREE, np.array([1.0, np.nan, 1.0])), ValueError, "gain: expected numbers, got NaN in 1 of 3 places"),
        (lambda: apgr(THREE, np.array([1.0, np.inf, 1.0])), ValueError, "gain: expected finite numbers, got infinity"),
        (lambda: apgr(THREE, ONE[0]), ValueError, "score, gain: expected two vectors of one length"),
        (lambda: apgr(np.empty(0), np.empty(0)), ValueError, "score: expected 1 dimensions, none of them empty"),
        (lambda: apgr(THREE, THREE, ONE), ValueError, r"weights: expected one per row, shape \(\.\.\., 3\), got \(1, 2\)"),
        (lambda: apgr(THREE, THREE, -THREE), ValueError, "weights: expected finite numbers >= 0$"),
        (lambda: apgr(THREE, THREE, THREE * np.inf), ValueError, "weights: expected finite numbers >= 0$"),
        (lambda: cpt(THREE, THREE, 50), ValueError, r"share: expected a share in \(0, 1\], got 50"),
        (lambda: cpt(THREE, THREE, "0.5"), TypeError, "share: expected a number, got '0.5'"),
        (lambda: hull(np.empty((0, 2))), ValueError, "points: expected 2 dimensions, none of them empty"),
        (lambda: hull([[1, 2], [3]]), ValueError, "points: expected rows of one length"),
        (lambda: hull(np.ones((4, 3))), ValueError, "points: expected a finite price and quality in each row"),
        (lambda: hull(np.array([[1.0, np.nan]])), ValueError, "points: expected numbers, got NaN"),
        (lambda: hull(np.ma.masked_array(ONE, [[False, True]])), ValueError, "points: expected numbers, got NaN"),
        (lambda: aiq(ONE, 2.0, 1.0), ValueError, "low, high: expected rising prices, got 2.0 and 1.0"),
        (lambda: aiq(ONE, "1", 2), TypeError, "low: expected a number, got '1'"),
        (lambda: saving(ONE, 0.9, 1.0, 95), ValueError, r"share: expected a share in \(0, 1\], got 95"),
        (lambda: saving(ONE, np.nan, 1.0), ValueError, "quality: expected a finite number, got nan"),
        (lambda: curve(TEXT, ONE, ONE), TypeError, "estimate: expected an array of numbers"),
        (lambda: curve(THREE, THREE, THREE), ValueError, "estimate: expected 2 dimensions"),
        (lambda: curve(ONE * np.nan, ONE, ONE), ValueError, "estimate: expected numbers, got NaN in 2 of 2 places"),
        (lambda: curve(ONE, ONE, ONE, np.array([1.0, 0.0])), ValueError, "errors: expected prices of an error above 0"),
        (lambda: static_curve(ONE, ONE.T), ValueError, "price, quality: expected tables of one shape"),
        (lambda: PriceQualityCurve(ONE, ONE).points(THREE), ValueError, "weights: expected one per row"),
        (lambda: trade_offs(TEXT), TypeError, "price: expected an array of numbers"),
        (lambda: trade_offs(ONE, 0), ValueError, "count: expected a whole number >= 1, got 0"),
        (lambda: best_expert(ONE * np.nan, ONE), ValueError, "quality: expected numbers, got NaN"),
        (lambda: routability(ONE, ONE, ONE.T), ValueError, "expected tables of one shape"),
        (lambda: intervals_of(np.sum, 3, group=np.zeros(2)), ValueError, "group: expected one for each of 3 rows, got shape"),
        (lambda: intervals_of(lambda weights: "a", 3), TypeError, "figure: expected a vector of numbers"),
    ],
)
def test_what_is_no_table_of_numbers_is_told(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_lists_and_whole_numbers_are_judged_as_arrays_are() -> None:
    score, gain = np.array([0, 1, 2], np.uint8), np.array([1, 0, 1])
    assert apgr(score, gain) == apgr([0, 1, 2], [1, 0, 1]) == apgr(score.astype(float), gain.astype(float))
    assert hull([[1, 0], [2, 1]]).tolist() == [[1.0, 0.0], [2.0, 1.0]]
    assert curve([[1, 0]], [[2, 1]], [[1, 0]], [np.inf]).points().tolist() == [[2.0, 1.0]]
    assert best_expert([[0, 1]], [[1, 2]]) == 1
    assert best_expert(np.array([[0.5, True]], object), np.array([[1, 2]], object)) == 1


def test_figures_of_a_part_are_not_defined_in_resamples_without_it() -> None:
    score, gain, part = np.arange(6.0), np.array([1.0, 0.0, 1.0, 0.0, 1.0, 1.0]), np.zeros(3)
    assert np.isnan([apgr(score[:3], gain[:3], part), cpt(score[:3], gain[:3], 0.5, part)]).all()
    assert np.isnan(apgr(score[:3], gain[:3], np.stack([part, THREE]))).tolist() == [True, False]
    assert np.isnan(static_curve(np.ones((3, 2)), np.ones((3, 2))).points(part)).all()
    [found] = intervals_of(lambda weights: [apgr(score[:3], gain[:3], weights[:3])], 6, group=[0, 0, 0, 1, 1, 1], resamples=50)
    assert np.isfinite(found.estimate)
    assert np.isnan(found.low)


def test_groups_may_have_any_names() -> None:
    values = np.random.default_rng(0).random(6)

    def figure(weights: np.ndarray) -> float:
        return weights @ values / weights.sum()

    numbered, named, apart = (
        intervals_of(figure, 6, group=np.array(group)[[0, 0, 1, 1, 2, 2]], resamples=50)
        for group in ([0, 1, 2], ["a", "b", "c"], [3, 7, 9])
    )
    assert numbered == named == apart
