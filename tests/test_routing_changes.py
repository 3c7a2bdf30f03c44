"""What changes after a fit: newcomers, prices, floors, and a router that is loaded to learn again."""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from deferral.routing import Log, Needs, Outcome, PriceModel, Router, log_of_table, token_prices
from deferral.routing.changes import with_prices
from deferral.routing.policies import Linear, Neighbours
from deferral.routing.table import Table
from deferral.routing.verdicts import verdict, why_not
from tests.routing_world import EXPERTS, QUICK, SUBJECTS, queries, router, world

pytestmark = pytest.mark.ci_slow


def test_a_new_expert_is_not_taken_for_better_because_its_queries_were_easy() -> None:
    """As good as "small" on everything, with outcomes on the easier of two subjects alone, or mostly."""
    _, subject, quality, _ = world(600)
    easy = int(np.argmax([quality[subject == kind, 0].mean() for kind in range(3)]))
    fresh, kinds, *_ = world(2000, seed=7)
    chance = np.array([quality[subject == kind, 0].mean() for kind in range(3)])
    right = (np.random.default_rng(8).random(2000) < chance[kinds]).astype(float)
    often = np.where(kinds == easy, 0.5, 0.05)
    seen = np.flatnonzero(np.random.default_rng(9).random(2000) < often)

    def mean_of(propensities: np.ndarray) -> float:
        log = Log(
            Outcome(fresh[row], "tiny", right[row], 1e-4, propensity=given) for row, given in zip(seen, propensities, strict=True)
        )
        return float(copy.copy(router()).add_expert(log).fitted.means[-1])

    truth, naive = right.mean(), right[seen].mean()
    without, logged = mean_of(np.full(len(seen), np.nan)), mean_of(often[seen])
    assert naive > truth + 0.1
    assert abs(without - truth) < (naive - truth) / 2
    assert abs(logged - truth) < 0.06
    rare = np.full(100, 0.9)
    rare[7] = 0.01
    lucky = Log(Outcome(fresh[row], "lucky", float(row == 7), 1e-4, propensity=rare[row]) for row in range(100))
    assert copy.copy(router()).add_expert(lucky).fitted.means[-1] < 0.4, "one answer does not decide it"
    assert copy.copy(router()).add_expert(Log([Outcome("at all", "tiny", 1.0, 0.0)])).fitted.means[-1] <= 1


def test_a_newcomer_after_a_removal_is_planned_by_what_is_served(tmp_path: Path) -> None:
    some = copy.copy(router())
    before = some.fitted.held.estimate - some.fitted.means
    some.remove_expert("small").describe_expert("planned", quality=0.6, price=0.005)
    state = some.fitted
    expected = before @ state.extension[:, -1]
    assert expected.std() > 0.05
    np.testing.assert_allclose(state.held.estimate[:, -1] - state.means[-1], expected, atol=1e-5)
    other = copy.copy(router()).describe_expert("planned", quality=0.6, price=0.005).remove_expert("small")
    np.testing.assert_allclose(other.fitted.held.estimate, state.held.estimate, atol=1e-6)
    copy.copy(router()).remove_expert("small").save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router").describe_expert("planned", quality=0.6, price=0.005)
    np.testing.assert_array_equal(loaded.fitted.held.estimate, state.held.estimate)


def test_a_newcomer_that_answered_the_queries_of_the_fit_is_as_sure_as_the_experts_whose_twin_it_is(tmp_path: Path) -> None:
    def asked(rows: int, seed: int) -> tuple[list[str], np.ndarray, np.ndarray]:
        generator = np.random.default_rng(seed)
        kind = generator.integers(0, 2, rows)
        texts = [f"{' '.join(generator.choice(list(SUBJECTS.values())[one], 6))} {seed}-{row}" for row, one in enumerate(kind)]
        quality = (generator.random((rows, 2)) < np.where(kind[:, None] == [0, 1], 0.6, 0.4)).astype(float)
        return texts, quality, np.tile([[0.001, 0.01]], (rows, 1))

    slopes = []
    for seed in range(3):
        texts, quality, price = asked(300, seed)
        some = Router(0.1, policies=QUICK).fit(log_of_table(texts, ["one", "other"], quality, price))
        some.save(tmp_path / "router")
        for pair in (some, Router.load(tmp_path / "router")):
            pair.add_expert(log_of_table(texts, ["twin"], quality[:, :1], price[:, :1]).table())
        np.testing.assert_array_equal(pair.fitted.extension, some.fitted.extension)
        fresh = some.route_batch(asked(500, seed + 50)[0]).quality
        one, _, twin = (fresh - fresh.mean(0)).T
        slopes.append(one @ twin / (one @ one))
    assert 0.7 < np.mean(slopes) <= 1.1


def test_what_a_newcomer_was_learned_from_proves_nothing() -> None:
    some = copy.copy(router())
    fresh, _, outcomes, paid = world(100, seed=7)
    some.add_expert(log_of_table(fresh, ["tiny"], outcomes[:, :1], paid[:, :1]))
    assert some.knows(fresh).all()
    four = log_of_table(
        fresh, [*EXPERTS, "tiny"], np.column_stack([outcomes, outcomes[:, 0]]), np.column_stack([paid, paid[:, 0]])
    )
    with pytest.raises(ValueError, match="were in the log of the fit"):
        some.certify(four)
    unseen = [f"{text} again" for text in fresh]
    beyond = Table(
        unseen,
        EXPERTS,
        2 * np.ones_like(outcomes, np.float32),
        paid,
        np.ones(paid.shape, bool),
        *2 * [np.full(paid.shape, np.nan)],
    )
    with pytest.raises(ValueError, match="expected a quality in"):
        copy.copy(router()).certify(beyond)


def test_a_floor_is_refused_where_the_mix_that_decides_does_not_reach_it() -> None:
    some = copy.copy(router()).remove_expert("large")
    single = float(some.fitted.means.max())
    floor = single + 0.1
    assert some.plan(min_quality=floor).why_fallback == ""
    with pytest.raises(ValueError, match=r"the static mix, which decides \(asked for\), reaches at most"):
        some.plan(min_quality=floor, learned=False)
    assert some.plan(min_quality=single - 0.01, learned=False).why_fallback == "asked for"
    # Numbers that float32 rounds down, strictly between two experts.
    small, large = sorted(copy.copy(router()).remove_expert("coder").fitted.means.tolist())
    for explore in (0.0, 0.05):
        pair = copy.copy(router()).remove_expert("coder")
        pair.explore = explore
        for floor in (0.5, 0.6, 0.7, 0.8, 0.85):
            assert small < floor < large
            mix = pair.plan(min_quality=floor, learned=False).mix
            assert (mix > 0).sum() == 2


def test_a_loaded_router_learns_as_the_one_that_was_saved(tmp_path: Path) -> None:
    texts, _, quality, price = world(60)
    small = Router(0.1, policies=(Linear, lambda: Neighbours(count=20))).fit(log_of_table(texts, EXPERTS, quality, price))
    small.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    assert [make().kind for make in loaded.policies] == ["linear", "neighbours"]
    assert loaded.encoder.dimensions == 128
    texts, _, quality, price = world(400)
    log = log_of_table(texts, EXPERTS, quality, price)
    one, other = small.fit(log), loaded.fit(log)
    assert other.encoder.arrays["projection"].shape == one.encoder.arrays["projection"].shape
    assert [policy.kind for policy in one.fitted.policies] == [policy.kind for policy in other.fitted.policies]
    assert other.fitted.memory.count == 20


def test_long_queries_of_a_log_too_short_to_judge_keep_their_length(tmp_path: Path) -> None:
    outcomes = [Outcome(f"{number} {'word ' * 1600}", "large", 1.0, 0.02) for number in range(20)]
    some = Router(0.1, policies=QUICK).fit(Log(outcomes))
    some.describe_expert("same", quality=0.9, price=0.0, per_character=0.02 / 8000)
    assert some.fitted.mean_price[1] == pytest.approx(some.fitted.mean_price[0], rel=0.01)
    some.save(tmp_path / "router")
    assert Router.load(tmp_path / "router").fitted.mean_length == some.fitted.mean_length


def test_prices_go_by_name_and_are_prices() -> None:
    some = copy.copy(router())
    named = {name: (0.0, 10.0 * (place + 1)) for place, name in enumerate(EXPERTS)}
    backwards = Log(Outcome("a query", name, 1.0, 0.0, output_tokens=100) for name in (*reversed(EXPERTS), "another"))
    some.with_prices(token_prices(backwards, named | {"another": (0.0, 1.0)}))
    np.testing.assert_allclose(some.fitted.mean_price, [1e-3, 2e-3, 3e-3])
    with pytest.raises(ValueError, match=r"expected those of .*; got those of"):
        some.with_prices(token_prices(Log([Outcome("a", "another", 1.0, 0.0, output_tokens=1)]), {"another": (0.0, 1.0)}))
    for base, per_character in (([0.1, np.nan], [0, 0]), ([0.1, -1], [0, 0]), ([0.1, 0.1], [0]), ([[0.1]], [[0.1]])):
        with pytest.raises(ValueError, match="expected one finite number per expert, not negative"):
            PriceModel(np.array(base), np.array(per_character))


@cache
def twins() -> Router:
    """small knows history, coder code; either of two others is right in half of the cases, whatever is asked."""
    rows = 600
    texts, subject = queries(rows)
    chance = np.stack([np.where(subject == 1, 0.9, 0.2), np.where(subject == 2, 0.9, 0.2), *np.full((2, rows), 0.5)], -1)
    quality = (np.random.default_rng(1).random(chance.shape) < chance).astype(float)
    price = np.tile([[0.001, 0.001, 0.001, 0.0015]], (rows, 1))
    return Router(0.05, policies=QUICK).fit(log_of_table(texts, ["small", "coder", "heads", "tails"], quality, price))


TWINS = Needs.of(allow=["heads", "tails"])


def test_among_those_who_may_be_asked_the_verdict_is_theirs() -> None:
    router = twins()
    everybody, some = router.plan(), router.plan(needs=Needs.of(allow=["small", "coder"]))
    alike = router.plan(needs=TWINS)
    assert everybody.why_fallback == some.why_fallback == ""
    assert "among those who may be asked" in alike.why_fallback
    assert router.plan(needs=TWINS, learned=True).why_fallback == ""
    texts, _ = queries(50, seed=3)
    assert router.route_batch(texts, needs=TWINS).fallback.all()


def test_the_verdict_on_everybody_is_found_again_in_the_rows_that_were_held_out() -> None:
    fitted = twins().fitted
    again = fitted.search.judged(np.ones(4, bool))
    for name in ("errors", "learned", "static", "random", "oracle", "gain", "half_width"):
        np.testing.assert_allclose(getattr(again, name), getattr(fitted.judged, name), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(again.better, fitted.judged.better)


def test_after_a_removal_and_at_other_prices_it_is_judged_anew(tmp_path: Path) -> None:
    router = copy.copy(twins())
    left = verdict(router.fitted, np.array([False, False, True, True]))
    dear = PriceModel(np.full(4, 0.04), np.array([0.0, 0.0, 0.0, 1e-4]), ("small", "coder", "heads", "tails"))
    for name in ("small", "coder"):
        router.remove_expert(name)
    assert "maybe nothing" in router.plan().why_fallback
    assert "maybe nothing" in router.report
    np.testing.assert_array_equal(router.fitted.judged.gain, left.gain)
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    np.testing.assert_array_equal(loaded.fitted.judged.gain, left.gain)
    other = copy.copy(twins())
    before = other.fitted.judged
    other.with_prices(dear)
    assert other.fitted.judged.errors[-1] > before.errors[-1], "prices of an error at which decisions change are others"
    assert other.plan(price_of_error=0.5).why_fallback == ""


def test_a_newcomer_is_not_judged_by_what_is_expected_of_it() -> None:
    router = copy.copy(twins())
    before = router.fitted.judged
    router.describe_expert("new", quality=0.6, price=0.002)
    assert router.fitted.judged is before
    beside, without = np.array([False, False, True, True, True]), np.array([False, False, True, True, False])
    np.testing.assert_array_equal(verdict(router.fitted, beside).gain, verdict(router.fitted, without).gain)
    np.testing.assert_array_equal(verdict(router.fitted, without).gain, verdict(twins().fitted, without[:4]).gain)


def test_the_same_prices_change_nothing_where_answers_cost_more_than_their_length_says() -> None:
    """Held-out rows pay what they paid, and not what was foreseen: an interval without that noise would prove too much."""
    generator = np.random.default_rng(0)
    texts, subject = queries(800, seed=5)
    quality = (generator.random((800, 2)) < np.stack([np.where(subject == 1, 0.9, 0.3), np.full(800, 0.9)], -1)).astype(float)
    written = np.where(subject == 0, 8.0, 1.0)[:, None] * generator.exponential(1.0, (800, 2))
    router = Router(0.1, policies=QUICK).fit(log_of_table(texts, ["small", "large"], quality, written * [0.001, 0.01]))
    fitted = router.fitted
    assert (fitted.held.dearness != 0).any(), "neighbours foresee what is paid"
    same = with_prices(fitted, fitted.prices)
    np.testing.assert_allclose(same.held.price, fitted.held.price)
    np.testing.assert_allclose(same.judged.gain, fitted.judged.gain, atol=1e-9)
    np.testing.assert_allclose(same.judged.half_width, fitted.judged.half_width, atol=1e-9)
    twice = with_prices(fitted, PriceModel(2 * fitted.prices.base, 2 * fitted.prices.per_character))
    np.testing.assert_allclose(twice.judged.errors, 2 * fitted.judged.errors)
    np.testing.assert_allclose(twice.judged.gain, fitted.judged.gain, atol=1e-9)


def test_a_newcomer_that_leaves_again_leaves_all_as_it_was() -> None:
    router = copy.copy(twins())
    before = router.fitted
    router.describe_expert("new", quality=0.6, price=0.002).remove_expert("new")
    assert router.fitted.judged is before.judged
    assert router.report == twins().report


def test_what_was_learned_of_nothing_is_not_proved_by_rounding() -> None:
    texts, _ = queries(60, seed=8)
    quality = (np.random.default_rng(3).random((60, 3)) < 0.5).astype(float)
    router = Router(0.1, policies=QUICK).fit(log_of_table(texts, EXPERTS, quality, np.tile([[0.001, 0.002, 0.02]], (60, 1))))
    fitted = router.fitted
    flat = replace(fitted, held=replace(fitted.held, estimate=fitted.held.means[fitted.held.fold]))
    for mask in (np.array([True, True, False]), np.array([True, False, True])):
        np.testing.assert_array_equal(verdict(flat, mask).overall, 0)
        assert why_not(flat, 0.1, mask)


def test_where_means_are_close_and_prices_are_not_the_asked_price_itself_is_judged() -> None:
    texts, _ = queries(600, seed=9)
    generator = np.random.default_rng(4)
    quality = (generator.random((600, 2)) < [0.85, 0.8]).astype(float)
    lengths = np.array([len(text) for text in texts])
    price = np.stack([np.full(600, 0.0100001), 0.01 * lengths / lengths.mean()], -1)
    fitted = Router(0.1, policies=QUICK).fit(log_of_table(texts, ["flat", "metered"], quality, price)).fitted
    assert fitted.judged.errors[-1] < 1e-3
    for error in (0.1, 0.3):
        here = fitted.search.judged(np.ones(2, bool), np.array([error]))
        assert (why_not(fitted, error) == "") == bool(here.better[0])
        assert bool(here.better[0]) or f"at ${error:.3g} an error" in why_not(fitted, error)


def test_the_report_speaks_of_those_who_are_left() -> None:
    router = copy.copy(twins()).remove_expert("coder")
    assert "Judged anew" in router.report
    assert router.report != copy.copy(router).remove_expert("small").report
    assert "next to nothing" in router.report or "predictable" in router.report
    router.remove_expert("heads").remove_expert("tails")
    assert router.report == "small is the only expert left."
    assert not router.route("treaty").fallback


def test_a_plan_is_searched_once_for_all_queries_of_other_lengths() -> None:
    router = copy.copy(twins())
    router._plans = {}
    plans = {id(router.plan(budget=1.2, needs=Needs.of(tokens=100 + number))) for number in range(5)}
    assert len(plans) == 1
