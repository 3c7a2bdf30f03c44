"""A setting of the trade-off, as it is asked for: prices of an error, budgets, floors, constraints, caps."""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from deferral.routing import Abilities, Log, Needs, Outcome, Router, log_of_table
from tests.routing_world import EXPERTS, QUICK, router, world

pytestmark = pytest.mark.ci_slow


def test_the_price_of_an_error_is_turned_at_serving_time() -> None:
    texts, *_ = world(200, seed=3)
    spent = [
        np.mean([row["price"][row["expert"]] for row in map(vars, router().route_batch(texts, price_of_error=error))])
        for error in (1e-5, 0.02, 0.1, 1.0)
    ]
    assert (np.diff(spent) >= 0).all()
    assert spent[0] == pytest.approx(0.001)
    assert spent[-1] > 0.008


def test_a_budget_is_kept_and_a_floor_reached() -> None:
    texts, _, quality, price = world(2000, seed=4)
    rows = np.arange(2000)
    for budget in (1.5, 4.0, 8.0):
        actions = router().route_batch(texts, budget=budget).actions
        assert 1000 * price[rows, actions].mean() <= 1.15 * budget
    for floor in (0.5, 0.7, 0.85):
        actions = router().route_batch(texts, min_quality=floor).actions
        assert quality[rows, actions].mean() >= floor - 0.04
    with pytest.raises(ValueError, match="the cheapest expert costs"):
        router().plan(budget=0.1)
    with pytest.raises(ValueError, match="at most"):
        router().plan(min_quality=0.99)
    with pytest.raises(ValueError, match="one of price_of_error, budget, min_quality and certified_quality"):
        router().plan(budget=1.0, min_quality=0.5)
    for wrong in ("5", [5.0]):
        for name in ("price_of_error", "budget", "min_quality", "max_latency", "certified_quality", "confidence"):
            with pytest.raises(TypeError, match=f"{name}: expected a number, got"):
                router().plan(**{name: wrong})


def test_a_budget_and_a_floor_hold_with_what_is_drawn_at_random() -> None:
    texts, _, quality, price = world(2000, seed=4)
    curious = copy.copy(router())
    curious._plans, curious.explore = {}, 0.2
    for setting in ({"budget": 6.0}, {"budget": 9.0, "learned": False}):
        chances, _, _ = curious.chances(texts, **setting)
        assert 1000 * (chances * price).sum(1).mean() <= 1.15 * setting["budget"]
    for floor in (0.6, 0.75):
        chances, _, _ = curious.chances(texts, min_quality=floor)
        assert (chances * quality).sum(1).mean() >= floor - 0.04
    with pytest.raises(
        ValueError, match=r"with 20% of the queries asked at random, to learn, at least \$2.333 per 1,000 queries"
    ):
        curious.plan(budget=2.0)
    with pytest.raises(ValueError, match=r"at most 0.8\d\d was reached on held-out queries, 20% of them asked at random"):
        curious.plan(min_quality=0.9)


def test_a_floor_is_looked_for_along_the_whole_curve_and_left_to_the_single_expert_that_alone_reaches_it() -> None:
    one, rows = copy.copy(router()), len(router().fitted.held.price)
    # The dear one is thought to be a little better, and is not: where quality counts most, it is highest nowhere.
    estimate, truth = np.tile(np.float32([0.1, 0.8, 0.81]), (rows, 1)), np.tile(np.float32([0.1, 0.9, 0.3]), (rows, 1))
    half, held = np.full(3, 0.5), replace(router().fitted.held, estimate=estimate, quality=truth)
    one._plans, one._fitted = {}, replace(router().fitted, held=held, means=half)
    assert 0.001 < one.plan(min_quality=0.85).price_of_error < 1.8
    with pytest.raises(ValueError, match=r"at most 0.900 was reached"):
        one.plan(min_quality=0.95)
    one._plans, one._fitted = {}, replace(one.fitted, means=np.array([0.1, 0.5, 0.96]))
    plan = one.plan(min_quality=0.95)
    assert "reached a quality of 0.900, the best single expert more" in plan.why_fallback
    assert plan.mix @ one.fitted.means == pytest.approx(0.95)
    with pytest.raises(ValueError, match=r"routing reached at most 0.900, got 0.95"):
        one.plan(min_quality=0.95, learned=True)


def test_what_the_static_mix_does_better_at_a_budget_or_a_floor_is_left_to_it() -> None:
    one, held = copy.copy(router()), router().fitted.held
    # Estimates of other rows are noise.
    wrong = replace(held, estimate=np.random.default_rng(0).permutation(held.estimate))
    one._fitted = replace(router().fitted, held=wrong)
    for explore in (0.0, 0.2):
        one._plans, one.explore = {}, explore
        for setting, why in (
            ({"budget": 9.0}, "for this budget a quality of 0."),
            ({"min_quality": 0.6}, "this quality for $0."),
        ):
            plan = one.plan(**setting)
            assert f"routing reached {why}" in plan.why_fallback
            assert (plan.mix > 0).sum() == 2
            assert one.plan(**setting, learned=True).why_fallback == ""
            assert one.plan(**setting, learned=False).why_fallback == "asked for"
        # Where both ask one expert always, neither is better.
        most = 1000 * float((1 - explore) * one.fitted.mean_price.max() + explore * one.fitted.mean_price.mean())
        one._fitted = replace(one.fitted, held=replace(wrong, estimate=np.tile(np.float32([0.1, 0.1, 0.9]), (len(wrong), 1))))
        assert "routing reached" not in one.plan(budget=most + 1e-6).why_fallback
        one._fitted = replace(one.fitted, held=wrong)


def test_a_plan_hangs_on_what_the_router_says_now() -> None:
    one = copy.copy(router())
    one._plans, one.abilities, needs = {}, {}, Needs.of(tools=True)
    assert one.plan().price_of_error == 0.1
    assert one.plan(needs=needs).mask.all()
    one.price_of_error, one.abilities["large"] = 2.0, Abilities(tools=False)
    assert one.plan().price_of_error == 2.0
    assert one.plan(needs=needs).mask.tolist() == [True, True, False]
    before = one.plan(budget=5.0)
    one.explore = 0.2
    assert one.plan(budget=5.0).mix[2] < before.mix[2]


def test_constraints_come_before_any_score() -> None:
    texts, _, quality, price = world(100)
    abilities = {"small": Abilities(context_tokens=100, tools=False, region="eu"), "large": Abilities(images=False, region="us")}
    limited = Router(0.1, policies=QUICK, abilities=abilities).fit(log_of_table(texts, EXPERTS, quality, price))
    history = "emperor treaty revolution century"
    for needs, allowed in (
        (Needs.of(tokens=1000), {"coder", "large"}),
        (Needs.of(tools=True, images=True), {"coder"}),
        (Needs.of(regions=["us"]), {"large"}),  # where coder is, nobody knows
        (Needs.of(allow=["small"]), {"small"}),
    ):
        decision = limited.route(history, needs=needs)
        assert decision.expert in allowed
        assert {name for name, cost in decision.cost.items() if np.isfinite(cost)} == allowed
    with pytest.raises(
        ValueError, match=r"no expert is left: small: it takes no tools; coder: not allowed; large: it takes no images"
    ):
        limited.route(history, needs=Needs.of(tools=True, images=True, deny=["coder"]))
    with pytest.raises(ValueError, match="'huge' is no expert"):
        limited.route(history, needs=Needs.of(allow=["huge"]))
    with pytest.raises(TypeError, match="put it in a list"):
        Needs.of(allow="small")
    with pytest.raises(ValueError, match="'huge' has no outcome"):
        Router(0.1, abilities={"huge": Abilities()}).fit(log_of_table(texts, EXPERTS, quality, price))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Abilities(context_tokens="8k"), TypeError, "context_tokens: expected a whole number, got '8k'"),
        (lambda: Abilities(context_tokens=-1), ValueError, "context_tokens: expected a whole number >= 1, got -1"),
        (lambda: Abilities(tools="no"), TypeError, "tools: expected True or False, got 'no'"),
        (lambda: Abilities(region=3), TypeError, "region: expected a name or None, got 3"),
        (lambda: Needs(tokens="8"), TypeError, "tokens: expected a whole number, got '8'"),
        (lambda: Needs.of(tokens=-8), ValueError, "tokens: expected a whole number >= 0, got -8"),
        (lambda: Needs.of(images=1), TypeError, "images: expected True or False, got 1"),
        (lambda: Needs.of(allow=5), TypeError, "allow: expected a collection of names, got 5"),
        (lambda: Needs.of(deny=None), TypeError, "deny: expected a collection of names, got None"),
        (lambda: Needs.of(regions=[1]), TypeError, "regions: expected names, got 1"),
        (lambda: Needs(deny=None), TypeError, "deny: expected a frozenset, got NoneType"),
        (lambda: Router(0.1, abilities=["a"]), TypeError, "abilities: expected those of experts by name"),
        (lambda: Router(0.1, abilities={"a": {"tools": True}}), TypeError, r"abilities of a: expected Abilities\(\.\.\.\), got"),
        (lambda: router().add_expert(Log(), abilities="x"), TypeError, "abilities of the new expert: expected Abilities"),
        (lambda: router().describe_expert("b", quality=1, price=1, abilities=3), TypeError, "abilities of b: expected Abilities"),
    ],
)
def test_abilities_and_needs_that_are_none_are_told(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
    assert Abilities(context_tokens=np.int64(8), tools=np.True_).tools


def test_a_latency_cap() -> None:
    texts, _, quality, price = world(60)
    outcomes = [
        Outcome(text, name, quality[i, j], price[i, j], latency_s=[0.2, 0.4, 3.0][j])
        for i, text in enumerate(texts) for j, name in enumerate(EXPERTS)
    ]  # fmt: skip
    timed = Router(0.1, policies=QUICK).fit(Log(outcomes))
    assert "large" not in timed.route_batch(texts, max_latency=1.0).names
    with pytest.raises(ValueError, match="answers within"):
        timed.route(texts[0], max_latency=0.1)
    with pytest.raises(ValueError, match="small has no latency_s in the log"):
        router().route(texts[0], max_latency=1.0)
