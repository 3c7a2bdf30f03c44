import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from deferral.routing import Abilities, Log, Needs, Outcome, PriceModel, Router, list_prices, log_of_table
from deferral.routing.policies import Clusters, Linear, Neighbours
from deferral.routing.verdicts import report

pytestmark = pytest.mark.ci_slow

QUICK = (Linear, Neighbours, Clusters)
SUBJECTS = {
    "maths": ["integral", "derivative", "equation", "polynomial", "matrix", "theorem", "sum", "root", "prime", "limit"],
    "history": ["emperor", "treaty", "revolution", "century", "dynasty", "war", "parliament", "colony", "crown", "empire"],
    "code": ["function", "return", "loop", "array", "pointer", "compile", "string", "class", "import", "variable"],
}


def queries(rows: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    generator = np.random.default_rng(seed)
    subject = generator.integers(0, 3, rows)
    words = list(SUBJECTS.values())
    texts = [f"{' '.join(generator.choice(words[kind], 6))} {number}" for number, kind in enumerate(subject)]
    return texts, subject


def world(rows: int, seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """small knows history, coder code, large everything but is dear; nobody is right in a tenth of the cases."""
    texts, subject = queries(rows, seed)
    chance = np.where(np.stack([subject == 1, subject == 2, subject >= 0], -1), 0.9, 0.2)
    quality = (np.random.default_rng(seed + 100).random(chance.shape) < chance).astype(float)
    return texts, subject, quality, np.tile([[0.001, 0.002, 0.02]], (rows, 1))


EXPERTS = ["small", "coder", "large"]


@cache
def router() -> Router:
    texts, _, quality, price = world(600)
    return Router(0.1, policies=QUICK).fit(log_of_table(texts, EXPERTS, quality, price))


def test_every_subject_goes_to_the_cheapest_expert_who_knows_it() -> None:
    texts, subject, quality, price = world(300, seed=1)
    decisions = router().route_batch(texts)
    assert (decisions.actions == np.array([2, 0, 1])[subject]).mean() > 0.97
    rows = np.arange(300)
    cost = (1 - quality + price / 0.1)[rows, decisions.actions].mean()
    assert cost < 0.75 * (1 - quality + price / 0.1).mean(0).min()
    assert not decisions.fallback.any()


def test_one_query_is_decided_like_many() -> None:
    texts, *_ = world(20, seed=2)
    together = router().route_batch(texts)
    for row, text in enumerate(texts):
        one, same = router().route(text), together[row]
        assert one.expert == same.expert == together.names[row]
        assert list(one.cost.values()) == pytest.approx(list(same.cost.values()), abs=1e-5)
    assert list(together) == [together[row] for row in range(len(texts))]
    assert together[-1] == together[len(texts) - 1]


def test_a_decision_alone_is_that_of_the_arrays() -> None:
    curious = copy.copy(router())
    curious.explore, curious.salt, curious._plans = 0.5, "the same draws in every run", {}
    settings = ({}, {"price_of_error": 0.003}, {"learned": False}, {"needs": Needs.of(deny=["large"])})
    for text in (*world(20, seed=2)[0], "", "xyzzy"):
        for setting in settings:
            for one in (router(), curious):
                vectors = one.encoder([text])
                assert one.route(text, **setting) == one.decide(one.plan(**setting), vectors, [text])[0]
    with pytest.raises(TypeError, match="expected a text, got list"):
        router().route([text])  # type: ignore[arg-type]


def small_log(rows: int, seed: int = 0) -> Log:
    """The beginning says whether the small expert knows the answer, eight drawn words say nothing; the large one always does."""
    generator = np.random.default_rng(seed)
    nouns = ["apple", "river", "stone", "cloud", "garden", "table", "winter", "music", "paper", "horse", "bridge", "candle"]
    outcomes = []
    for row in range(rows):
        easy = row % 2 == 0
        text = f"{'add the two numbers' if easy else 'prove the theorem'} of {' '.join(generator.choice(nouns, 8))}"
        outcomes += [Outcome(text, "small", float(easy), 0.0001), Outcome(text, "large", 1.0, 0.01)]
    return Log(outcomes)


@pytest.mark.parametrize("rows", [20, 60, pytest.param(200, marks=pytest.mark.slow)])
def test_a_small_log_is_trusted_as_far_as_it_goes(rows: int) -> None:
    learned = Router(0.05).fit(small_log(rows))
    fresh = learned.route_batch(small_log(40, seed=1).queries)
    if rows < 40:
        assert fresh.fallback.all()
        assert "too little" in fresh[0].why
        return
    assert np.mean(np.array(fresh.names) == ["small", "large"] * 20) > 0.9
    judged, held = learned.fitted.judged, learned.fitted.held_costs
    assert judged is not None
    # Trust in its own rows takes next to nothing of what cross-fitting finds.
    assert judged.learned.mean() - min(held.values()) < 0.05 * (judged.static.mean() - min(held.values()))


def test_the_cost_is_what_the_formula_says_and_the_least_is_chosen() -> None:
    decision = router().route("treaty of the emperor", price_of_error=0.05)
    for name in EXPERTS:
        assert decision.cost[name] == pytest.approx(1 - decision.quality[name] + decision.price[name] / 0.05, abs=1e-5)
    assert decision.expert == min(decision.cost, key=lambda name: decision.cost[name])
    assert decision.propensity == 1
    assert "expected quality" in decision.why


def test_the_price_of_an_error_is_turned_at_serving_time() -> None:
    texts, *_ = world(200, seed=3)
    spent = [
        np.mean([row["price"][row["expert"]] for row in map(vars, router().route_batch(texts, price_of_error=error))])
        for error in (1e-5, 0.02, 0.1, 1.0)
    ]
    assert (np.diff(spent) >= 0).all()
    assert spent[0] == pytest.approx(0.001)
    assert spent[-1] > 0.008


def test_the_report_is_of_the_price_of_an_error_that_was_asked_for() -> None:
    learned = router().fitted
    for error in (1e-5, 0.03, 0.0301, 1e4):
        first, at, *more = report(learned, error).splitlines()
        assert first.startswith("Held-out cost over all trade-offs")
        assert at.startswith(f"At ${error:.3g} an error: routed ")
        alone = "saved 0.0000 ± 0.0000" in at
        assert alone == (more[0] == "At this price of an error, which is in dollars, every query goes to one expert.")
        assert alone or error > 1e-5, "no answer is worth more than asking the cheapest"


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


def test_without_anything_to_learn_the_static_mix_decides_and_says_so() -> None:
    texts, *_ = world(400)
    noise = (np.random.default_rng(0).random((400, 3)) < [0.4, 0.5, 0.9]).astype(float)
    flat = Router(0.1, policies=QUICK).fit(log_of_table(texts, EXPERTS, noise, np.tile([[0.001, 0.002, 0.02]], (400, 1))))
    decision = flat.route(texts[0])
    assert decision.fallback
    assert decision.expert == "large"
    assert "maybe nothing" in decision.why
    assert "The static mix is used" in flat.report
    assert router().report.splitlines()[-1] == "The router is used: it saves with confidence."


def test_equal_qualities_one_expert_and_short_logs_are_the_cheapest_best_expert() -> None:
    texts, *_ = world(60)
    price = np.tile([[0.02, 0.001]], (60, 1))
    equal = Router(0.1, policies=QUICK).fit(log_of_table(texts, ["dear", "cheap"], np.ones((60, 2)), price))
    assert equal.route("anything").expert == "cheap"
    alone = Router(0.1, policies=QUICK).fit(log_of_table(texts, ["only"], np.ones((60, 1)), price[:, :1]))
    assert alone.route("anything").expert == "only"
    short = Router(0.1).fit(Log([Outcome("a", "x", 1.0, 0.1), Outcome("b", "y", 1.0, 0.01)]))
    assert short.route("").expert == "y"
    assert "too little" in short.route("").why


@pytest.mark.parametrize("query", ["", "\n", "x" * 100_000, "🎉" * 3000, "日本語のテキスト", "\ud800"])
def test_any_text_gets_an_answer_and_unlike_ones_the_static_mix(query: str) -> None:
    decision = router().route(query)
    assert decision.expert in EXPERTS
    assert all(np.isfinite(value) for value in decision.cost.values())


def test_a_mix_is_drawn_as_often_as_it_says_and_the_same_query_is_answered_alike() -> None:
    texts, *_ = world(3000, seed=5)
    plan = router().plan(budget=9.0, learned=False)
    assert (plan.mix > 0).sum() == 2
    decisions = router().route_batch(texts, budget=9.0, learned=False)
    shares = np.bincount(decisions.actions, minlength=3) / 3000
    np.testing.assert_allclose(shares, plan.mix, atol=0.03)
    np.testing.assert_allclose(decisions.propensity, plan.mix[decisions.actions])
    np.testing.assert_array_equal(decisions.actions, router().route_batch(texts, budget=9.0, learned=False).actions)


def test_exploration_is_as_frequent_as_its_propensity() -> None:
    texts, _, quality, price = world(300)
    curious = Router(0.1, policies=QUICK, explore=0.3).fit(log_of_table(texts, EXPERTS, quality, price))
    curious.salt = "the same draws in every run"
    decisions = curious.route_batch(world(3000, seed=6)[0])
    best = decisions.cost.argmin(1)
    np.testing.assert_allclose(decisions.propensity, np.where(decisions.actions == best, 0.7 + 0.1, 0.1))
    assert (decisions.actions == best).mean() == pytest.approx(0.8, abs=0.03)
    for one in decisions:
        usual = min(one.cost, key=lambda name: one.cost[name])
        if one.expert == usual:
            assert one.why.startswith(f"{usual}: expected quality")
        else:
            assert one.why.startswith(f"{one.expert}, drawn at random to learn: expected quality {one.quality[one.expert]:.2f}")
            assert f"cost {one.cost[one.expert]:.3f} errors; {usual} would cost {one.cost[usual]:.3f}, at $0.1" in one.why
    mixed = curious.route_batch(world(300, seed=6)[0], learned=False)
    said = [one.why for one in mixed if one.expert != EXPERTS[curious.plan(learned=False).mix.argmax()]]
    assert 40 < len(said) < 80
    assert all(why.partition(", ")[2] == "drawn at random to learn, else by the static mix: asked for" for why in said)
    # Inverse propensities count every expert as often as there are queries.
    for expert in range(3):
        assert (1 / decisions.propensity)[decisions.actions == expert].sum() / 3000 == pytest.approx(1, abs=0.2)


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


def test_a_new_expert_from_a_hundred_outcomes_is_asked_where_it_is_good() -> None:
    texts, subject, quality, price = world(100, seed=7)
    known = (np.random.default_rng(8).random(100) < np.where(subject == 1, 0.95, 0.1)).astype(float)[:, None]
    texts_of_fit, _, quality_of_fit, price_of_fit = world(600)
    wider = Router(0.1, policies=QUICK).fit(log_of_table(texts_of_fit, EXPERTS, quality_of_fit, price_of_fit))
    before = wider.route_batch(texts).quality
    wider.add_expert(log_of_table(texts, ["tiny"], known, np.full((100, 1), 1e-4)))
    assert wider.experts == [*EXPERTS, "tiny"]
    queries_after, subject_after, *_ = world(300, seed=9)
    decisions = wider.route_batch(queries_after)
    assert (decisions.actions[subject_after == 1] == 3).mean() > 0.9
    assert (decisions.actions[subject_after != 1] == 3).mean() < 0.1
    np.testing.assert_allclose(wider.route_batch(texts).quality[:, :3], before, atol=1e-6)
    wider.plan(budget=2.0)
    with pytest.raises(ValueError, match="an expert already"):
        wider.add_expert(log_of_table(texts, ["tiny"], known, np.full((100, 1), 1e-4)))
    with pytest.raises(ValueError, match="outcomes of one new expert"):
        wider.add_expert(log_of_table(texts, EXPERTS, quality, price))
    wider.remove_expert("tiny")
    np.testing.assert_allclose(wider.route_batch(texts).quality, before, atol=1e-6)


def test_experts_come_by_description_and_go() -> None:
    texts, _, quality, price = world(200)
    some = Router(0.1, policies=QUICK).fit(log_of_table(texts, EXPERTS, quality, price))
    some.describe_expert("perfect", quality=1.0, price=0.0, abilities=Abilities(images=False))
    assert set(some.route_batch(texts).names) == {"perfect"}
    assert some.route(texts[0], needs=Needs.of(images=True)).expert != "perfect"
    for name in ("perfect", "large", "coder"):
        some.remove_expert(name)
    assert set(some.route_batch(texts).names) == {"small"}
    for name, message in (("small", "only expert left"), ("huge", "no expert of this router")):
        with pytest.raises(ValueError, match=message):
            some.remove_expert(name)


def test_a_copy_goes_its_own_way() -> None:
    one = copy.copy(router())
    assert len(one.plan().mask) == 3
    one.remove_expert("large")
    one.describe_expert("curt", quality=0.5, price=0.001, abilities=Abilities(tools=False))
    assert one.remove_expert("small").plan().mask.tolist() == [True, True]
    assert router().plan().mask.tolist() == [True] * 3
    assert router().abilities == {}


def test_new_prices_need_no_refitting() -> None:
    texts, _, quality, price = world(300)
    some = Router(0.1, policies=QUICK).fit(log_of_table(texts, EXPERTS, quality, price))
    some.with_prices(list_prices([0, 0, 0], [1.0, 1.0, 1.0], 10))
    assert (some.route_batch(texts).actions == 2).mean() > 0.3
    with pytest.raises(ValueError, match="one per expert"):
        some.with_prices(list_prices([0], [1.0], 10))


def test_new_prices_turn_budget_and_mix() -> None:
    texts, _, quality, price = world(300)
    before = Router(0.1, policies=QUICK).fit(log_of_table(texts, EXPERTS, quality, price))
    fitted = before.fitted.prices
    dearer = Router(0.1, policies=QUICK).fit(log_of_table(texts, EXPERTS, quality, price))
    dearer.with_prices(PriceModel(10 * fitted.base, 10 * fitted.per_character))
    for budget in (5.0, 12.0):
        one, ten = before.plan(budget=budget), dearer.plan(budget=10 * budget)
        assert ten.price_of_error == pytest.approx(10 * one.price_of_error)
        np.testing.assert_allclose(ten.mix, one.mix)
        spent = dearer.route_batch(texts, budget=10 * budget)
        assert spent.price[np.arange(300), spent.actions].mean() <= 0.0101 * budget
    with pytest.raises(ValueError, match="the cheapest expert costs"):
        dearer.plan(budget=5.0)
    assert dearer.plan(price_of_error=0.1, learned=False).mix.argmax() == 0


def test_a_newcomer_is_as_dear_as_long_queries_make_it(tmp_path: Path) -> None:
    texts, _, quality, price = world(100)
    long = [text + 50 * " and so on" for text in texts]
    some = Router(0.1, policies=QUICK).fit(log_of_table(long, EXPERTS, quality, price))
    some.describe_expert("planned", quality=0.9, price=0.0, per_character=1e-4)
    some.save(tmp_path / "router")
    for one in (some, Router.load(tmp_path / "router")):
        assert one.fitted.mean_price[-1] == pytest.approx(1e-4 * np.mean([len(text) for text in long]))


def test_an_explanation_names_the_nearest_logged_queries() -> None:
    texts, *_ = world(600)
    decision, nearest = router().explain(texts[17], count=3)
    assert decision == router().route(texts[17])
    assert nearest[0] == (texts[17], pytest.approx(1, abs=1e-5))
    assert len(nearest) == 3


def test_no_query_is_no_decision() -> None:
    decisions = router().route_batch([])
    assert (len(decisions), decisions.names, decisions.quality.shape) == (0, [], (0, 3))
    texts, _, quality, price = world(60)
    own = Router(0.1, encoder=lambda queries: [[len(query), 1.0] for query in queries], policies=QUICK)
    assert own.fit(log_of_table(texts, EXPERTS, quality, price)).route_batch([]).names == []


def test_settings_may_be_asked_for_by_many_threads() -> None:
    some = copy.copy(router())
    some._plans = {}

    class Cleared(dict):
        def __getitem__(self, key: object) -> object:
            self.clear()
            return super().__getitem__(key)

        def __contains__(self, key: object) -> bool:
            found = super().__contains__(key)
            self.clear()
            return found

    some._plans = Cleared()
    for _ in range(2):
        assert some.plan(price_of_error=np.float32(0.25)).price_of_error == 0.25


def test_a_table_with_a_bad_cell_is_an_error() -> None:
    texts, _, quality, price = world(60)
    for row, column, value in ((3, 1, np.nan), (4, 2, 1.5)):
        table = log_of_table(texts, EXPERTS, quality, price).table()
        table.quality[row, column] = value
        with pytest.raises(ValueError, match=f"query {row + 1}, {EXPERTS[column]}: expected a quality"):
            Router(0.1, policies=QUICK).fit(table)
    with pytest.raises(ValueError, match="of the new expert, expert: expected a name"):
        copy.copy(router()).describe_expert(" ", quality=0.5, price=0.1)


def test_a_fit_that_fails_leaves_the_router_as_it_was() -> None:
    one = copy.copy(router())
    before = one.route_batch(world(20, seed=5)[0]).cost
    texts, _, quality, price = world(60, seed=6)
    with pytest.raises(ValueError, match="one per expert"):
        one.fit(log_of_table(texts, EXPERTS, quality, price), prices=list_prices([1.0], [1.0], 100))
    np.testing.assert_array_equal(one.route_batch(world(20, seed=5)[0]).cost, before)


def test_an_expert_with_one_outcome_is_taken_to_be_near_the_others() -> None:
    texts, _, quality, price = world(200)
    mask = np.ones((200, 3), bool)
    mask[1:, 1] = False
    some = Router(0.1, policies=QUICK).fit(log_of_table(texts, EXPERTS, quality, price, mask))
    others = np.delete(some.fitted.means, 1)
    assert "oracle" not in some.report
    assert "how much more there is to gain cannot be known" in some.report
    assert others.min() - 0.1 < some.fitted.means[1] < others.max() + 0.1
    assert some.route(texts[0]).expert in EXPERTS


@pytest.mark.slow
def test_a_partial_log_is_learned_from() -> None:
    texts, _, quality, price = world(1500)
    asked = np.random.default_rng(0).random((1500, 3)) < 0.34
    asked[~asked.any(1), 0] = True
    partial = Router(0.1, policies=QUICK).fit(log_of_table(texts, EXPERTS, quality, price, asked))
    new, subject, *_ = world(300, seed=1)
    decisions = partial.route_batch(new)
    assert (np.array(decisions.names) == np.array(["large", "small", "coder"])[subject]).mean() > 0.9


def test_wrong_arguments() -> None:
    for bad in (0, -1, float("nan"), True, "1"):
        with pytest.raises(ValueError, match="price_of_error"):
            Router(bad)
    with pytest.raises(ValueError, match="explore"):
        Router(0.1, explore=1.0)
    with pytest.raises(ValueError, match="not fitted"):
        Router(0.1).fitted  # noqa: B018
    for policies in ((), (Linear, Linear)):
        with pytest.raises(ValueError, match="policies: expected different ones, at least one"):
            Router(0.1, policies=policies)
    with pytest.raises(TypeError, match=r"policies: expected classes such as .*Linear, got 'linear'"):
        Router(0.1, policies=("linear",))
    with pytest.raises(TypeError, match=r"expected a Log, got str; read_log\(path\) reads a file"):
        Router(0.1).fit("outcomes.jsonl")  # type: ignore[arg-type]
    for needs in ({"tools": True}, ["small"]):
        with pytest.raises(TypeError, match=r"needs: expected Needs.of"):
            router().plan(needs=needs)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"allow: expected a frozenset, got list; use Needs.of"):
        Needs(allow=["small"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="use route for one query"):
        router().route_batch("text")
    with pytest.raises(TypeError, match="row 2"):
        router().route_batch(["a", None])
