"""What a router decides, and why."""

import copy

import numpy as np
import pytest

from deferral.routing import Log, Needs, Outcome, Router, list_prices, log_of_table
from deferral.routing.policies import Linear
from deferral.routing.prices import LEAST_SHARE
from deferral.routing.verdicts import report
from tests.routing_world import EXPERTS, QUICK, router, world

pytestmark = pytest.mark.ci_slow


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


def test_the_report_is_of_the_price_of_an_error_that_was_asked_for() -> None:
    learned = router().fitted
    for error in (1e-5, 0.03, 0.0301, 1e4):
        first, at, *more = report(learned, error).splitlines()
        assert first.startswith("Held-out cost over all trade-offs")
        assert at.startswith(f"At ${error:.3g} an error: routed ")
        alone = "saved 0.0000 ± 0.0000" in at
        assert alone == (more[0] == "At this price of an error, which is in dollars, every query goes to one expert.")
        assert alone or error > 1e-5, "no answer is worth more than asking the cheapest"


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
    for share in (1.0, "a", None, True):
        with pytest.raises(ValueError, match="explore: expected a share of the queries"):
            Router(0.1, explore=share)
    for seed in (-1, 1.5, "a", True):
        with pytest.raises(ValueError, match="seed: expected a whole number >= 0, got"):
            Router(0.1, seed=seed)
    assert Router(0.1, seed=np.int64(3)).seed == 3
    for policies in (None, Linear):
        with pytest.raises(TypeError, match="policies: expected a list of classes such as"):
            Router(0.1, policies=policies)
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
    for queries in (5, (text for text in ("a", "b"))):
        with pytest.raises(TypeError, match="queries: expected a list of texts, got "):
            router().route_batch(queries)
    for queries, words in (("text", "got one text"), ([1], "got int in row 1")):
        with pytest.raises(TypeError, match=words):
            router().chances(queries)
    for change in (router().certify, router().add_expert):
        with pytest.raises(TypeError, match=r"expected a Log, got str; read_log\(path\) reads a file"):
            change("outcomes.jsonl")  # type: ignore[arg-type]
    texts, _, quality, price = world(1)
    log = log_of_table(texts, EXPERTS, quality, price)
    for change in (router().with_prices, lambda prices: Router(0.1).fit(log, prices=prices)):
        with pytest.raises(TypeError, match="prices: expected a PriceModel, as token_prices and list_prices make it, got dict"):
            change({"small": 1.0})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="quality: expected a number, got '1'"):
        router().describe_expert("new", quality="1", price=1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="learned: expected True, False or None, got 'no'"):
        router().route("a", learned="no")  # type: ignore[typeddict-item]
    with pytest.raises(TypeError, match="query: expected a text, got int"):
        router().explain(5)  # type: ignore[arg-type]
    for count in (-1, "3", 1.5):
        with pytest.raises(ValueError, match="count: expected a whole number >= 0, got"):
            router().explain("a", count=count)


def test_no_query_costs_less_than_a_tenth_of_what_its_length_says() -> None:
    state, length = router().fitted, np.array([100.0])
    np.testing.assert_allclose(state.priced(length, np.full((1, 3), -5.0)), LEAST_SHARE * state.by_length(length))
