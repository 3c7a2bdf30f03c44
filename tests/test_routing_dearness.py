"""What an answer will cost beyond what the length of its query says: some queries ask for long answers, others do not."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from deferral.routing import Log, Outcome, PriceModel, Router, log_of_table
from deferral.routing.changes import without
from deferral.routing.encoders import FunctionEncoder
from deferral.routing.held_out import random_folds
from deferral.routing.one_query import price_of_one
from deferral.routing.partial_logs import observed
from deferral.routing.policies import Clusters, Neighbours
from deferral.routing.prices import dearness

QUICK = (Neighbours, Clusters)
EXPERTS = ["terse", "talker"]
KINDS = {
    "proof": ["integral", "derivative", "equation", "polynomial", "matrix", "theorem", "sum", "root", "prime", "limit"],
    "fact": ["emperor", "treaty", "revolution", "century", "dynasty", "war", "parliament", "colony", "crown", "empire"],
}


def counts(texts: list[str]) -> np.ndarray:
    """How often each word is in each text."""
    words = [word for some in KINDS.values() for word in some]
    return np.array([[text.split().count(word) for word in words] for text in texts], float)


def asked(rows: int, seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """The talker writes ten times as much where a proof is asked for; it is always right, the terse one in half of the cases."""
    generator = np.random.default_rng(seed)
    proof = generator.random(rows) < 0.5
    words = [KINDS["proof" if one else "fact"] for one in proof]
    texts = [f"{' '.join(generator.choice(some, 6))} {seed}-{number}" for number, some in enumerate(words)]
    quality = np.stack([generator.random(rows) < 0.5, np.ones(rows)], -1).astype(float)
    price = np.stack([np.full(rows, 0.001), np.where(proof, 0.02, 0.002)], -1) * generator.uniform(0.9, 1.1, (rows, 1))
    return texts, proof, quality, price


def single_answers(rows: int = 600, *, proofs_to_talker: float = 0.5, seed: int = 0) -> Log:
    """Queries that one of the two answered each; the talker is drawn for a proof with this probability, else with the other."""
    texts, proof, quality, price = asked(rows, seed)
    chance = np.where(proof, proofs_to_talker, 1 - proofs_to_talker)
    chosen = (np.random.default_rng(3).random(rows) < chance).astype(int)
    return Log(
        Outcome(
            text, EXPERTS[place], quality[row, place], price[row, place], propensity=chance[row] if place else 1 - chance[row]
        )
        for row, (text, place) in enumerate(zip(texts, chosen, strict=True))
    )


@cache
def router() -> Router:
    texts, _, quality, price = asked(400)
    return Router(0.02, encoder=counts, policies=QUICK).fit(log_of_table(texts, EXPERTS, quality, price))


def test_a_price_is_foreseen_from_what_queries_like_it_cost() -> None:
    texts, proof, _, price = asked(200, seed=1)
    foreseen = router().route_batch(texts).price
    by_length = router().fitted.prices(np.array([len(text) for text in texts], float))
    assert np.abs(foreseen - price).mean() < 0.25 * np.abs(by_length - price).mean()
    np.testing.assert_allclose(foreseen[proof, 1].mean(), price[proof, 1].mean(), rtol=0.1)
    np.testing.assert_allclose(foreseen[~proof, 1].mean(), price[~proof, 1].mean(), rtol=0.3)


def test_whoever_is_dear_for_a_query_is_not_asked_and_that_saves() -> None:
    texts, proof, quality, price = asked(200, seed=1)
    # Half an error is worth 0.01: less than a proof of the talker costs, more than its facts.
    decisions = router().route_batch(texts)
    assert (decisions.actions == np.where(proof, 0, 1)).mean() > 0.95
    costs = 1 - quality + price / 0.02
    rows = np.arange(len(texts))
    assert costs[rows, decisions.actions].mean() < 0.8 * costs.mean(0).min()
    for row in (int(proof.argmax()), int(proof.argmin())):
        one = router().route(texts[row])
        assert one.expert == EXPERTS[decisions.actions[row]]
        np.testing.assert_allclose(list(one.price.values()), decisions.price[row], rtol=1e-4)


def test_where_length_says_it_all_nothing_else_is_remembered() -> None:
    texts, _, quality, _ = asked(400)
    price = np.array([[len(text)] for text in texts]) * [[1e-5, 1e-4]]
    table = log_of_table(texts, EXPERTS, quality, price).table()
    assert dearness(table, np.ones(price.shape)) is None
    learned = Router(0.02, encoder=counts, policies=QUICK).fit(table)
    assert learned.fitted.memory.beside == 0
    np.testing.assert_allclose(learned.route_batch(texts).price, price, rtol=1e-6)


def test_prices_that_follow_nothing_are_foreseen_by_length_alone() -> None:
    texts, _, quality, price = asked(400)
    noise = np.random.default_rng(7).permutation(price)
    learned = Router(0.02, encoder=counts, policies=QUICK).fit(log_of_table(texts, EXPERTS, quality, noise))
    assert learned.fitted.memory.beside == 0
    assert not learned.fitted.held.dearness.any()


def test_other_prices_keep_what_was_learned_of_the_length_of_answers() -> None:
    texts, proof, _, _ = asked(50, seed=1)
    before = router().route_batch(texts).price
    other = Router(0.02, encoder=counts)
    other.encoder, other._fitted = router().encoder, router().fitted
    prices = router().fitted.prices
    other.with_prices(PriceModel(3 * prices.base, 3 * prices.per_character))
    after = other.route_batch(texts).price
    # Three times the line, and three times what is above it but for the rounding of the mean length.
    np.testing.assert_allclose(after, 3 * before, rtol=0.02)
    assert after[proof, 1].min() > 2 * after[~proof, 1].max()
    held = other.fitted.held.price[:, 1]
    assert held.max() > 5 * held.min()


def test_experts_that_come_and_go_keep_the_others_prices() -> None:
    texts, proof, _, _ = asked(50, seed=1)
    before = router().route_batch(texts).price
    other = Router(0.02, encoder=counts)
    other.encoder, other._fitted = router().encoder, router().fitted
    other.describe_expert("new", quality=0.7, price=0.005)
    both = other.route_batch(texts).price
    np.testing.assert_allclose(both[:, :2], before, rtol=1e-6)
    np.testing.assert_allclose(both[:, 2], 0.005)
    other.remove_expert("terse")
    left = other.route_batch(texts)
    assert left.experts == ["talker", "new"]
    np.testing.assert_allclose(left.price[:, 0], before[:, 1], rtol=1e-6)
    assert [other.route(text).expert for text in texts] == [left.experts[action] for action in left.actions]
    assert left.price[proof, 0].min() > left.price[~proof, 0].max()


def test_of_a_log_of_single_answers_only_what_was_paid_counts() -> None:
    _, _, _, price = asked(600)
    log = single_answers()
    table = log.table()
    found, known = dearness(table, observed(table)) or pytest.fail("length cannot say what these cost")
    np.testing.assert_array_equal(known.sum(1), 1)
    assert not found[~known].any()
    learned = Router(0.02, encoder=counts, policies=QUICK).fit(log)
    unseen, proof, _, price = asked(100, seed=1)
    foreseen = learned.route_batch(unseen).price
    order = learned.experts.index("talker")
    np.testing.assert_allclose(foreseen[proof, order].mean(), price[proof, 1].mean(), rtol=0.2)
    assert foreseen[proof, order].min() > 2 * foreseen[~proof, order].max()


def test_held_out_prices_were_foreseen_by_rows_of_other_folds() -> None:
    texts, _, quality, price = asked(400)
    mine = router().fitted
    fold = random_folds(400, seed=0)
    rest = np.flatnonzero(fold != 2)
    others = log_of_table([texts[row] for row in rest], EXPERTS, quality[rest], price[rest])
    like = Router(0.02, encoder=counts, policies=QUICK).fit(others)
    held = np.flatnonzero(fold == 2)
    again = like.fitted.estimate(like.encoder([texts[row] for row in held])).dearness
    # Its encoder and its line are of fewer rows.
    np.testing.assert_allclose(mine.held.dearness[held], again, atol=0.15)
    assert np.corrcoef(mine.held.dearness[held, 1], again[:, 1])[0, 1] > 0.98


def test_a_router_that_was_saved_foresees_the_same(tmp_path: Path) -> None:
    texts, _, quality, price = asked(60, seed=1)
    mine = Router(0.02, encoder=counts, policies=QUICK)
    mine.encoder, mine._fitted, mine.salt = router().encoder, router().fitted, "salt"
    mine.certify(log_of_table(texts, EXPERTS, quality, price))
    mine.save(tmp_path / "router")
    again = Router.load(tmp_path / "router", encoder=counts)
    np.testing.assert_array_equal(again.route_batch(texts).price, mine.route_batch(texts).price)
    assert [again.route(text) for text in texts] == [mine.route(text) for text in texts]
    assert again.plan(certified_quality=0.4).price_of_error == mine.plan(certified_quality=0.4).price_of_error


def test_prices_that_are_named_are_paid_as_they_are_foreseen() -> None:
    texts, _, quality, price = asked(400)
    log, fitted = log_of_table(texts, EXPERTS, quality, price), router().fitted
    named = Router(0.02, encoder=counts, policies=QUICK).fit(log, prices=fitted.prices)
    # At the prices of the log both are the same log.
    np.testing.assert_allclose(named.fitted.held.price, fitted.held.price, rtol=1e-4, atol=1e-9)
    assert named.fitted.judged is not None
    assert fitted.judged is not None
    np.testing.assert_allclose(named.fitted.judged.gain, fitted.judged.gain, atol=1e-3)
    unseen = asked(100, seed=1)[0]
    assert not named.route_batch(unseen).fallback.any()


def test_what_was_not_logged_is_paid_as_it_is_foreseen_and_what_was_corrects_that() -> None:
    texts, _, _, price = asked(600)
    log = single_answers()
    state = Router(0.02, encoder=counts, policies=QUICK).fit(log).fitted
    column = state.experts.index("talker")
    place = {text: row for row, text in enumerate(texts)}
    paid = {place[one.query]: one.price for one in log if one.expert == "talker"}
    queries = log.table().queries
    foreseen = state.priced(state.held.length, state.held.dearness)[:, column]
    logged = np.array([place[query] in paid for query in queries])
    assert 200 < logged.sum() < 400
    np.testing.assert_allclose(state.held.price[~logged, column], foreseen[~logged])
    truth = price[[place[query] for query in queries], 1]
    corrected = foreseen + (truth - foreseen) * len(logged) / logged.sum()
    np.testing.assert_allclose(state.held.price[logged, column], corrected[logged], rtol=1e-5)
    # Of a proof and of a fact, and not of the mean of both.
    assert np.quantile(foreseen, 0.75) > 3 * np.quantile(foreseen, 0.25)


def test_an_expert_whose_prices_nothing_tells_goes_by_length_beside_one_whose_prices_are_told() -> None:
    texts, proof, quality, _ = asked(400)
    noise = np.random.default_rng(5).lognormal(0, 2, 400)
    both = np.stack([np.where(proof, 1e-4, 1e-5), 0.02 * noise / noise.mean()], -1)
    state = Router(0.02, encoder=counts, policies=QUICK).fit(log_of_table(texts, EXPERTS, quality, both)).fitted
    assert state.memory.beside == 2
    unseen, proof, _, _ = asked(100, seed=1)
    estimated = state.estimate(counts_encoder(texts)(unseen))
    assert not estimated.dearness[:, 1].any()
    assert not state.held.dearness[:, 1].any()
    assert estimated.dearness[proof, 0].min() > estimated.dearness[~proof, 0].max()


def test_a_query_shorter_than_all_of_the_log_is_not_foreseen_cheaper_than_those_like_it() -> None:
    texts, proof, quality, price = asked(400)
    # Proofs are long, so that the line through both kinds is steep, though within a kind length says nothing.
    longer = [text + " of which every step is to be shown" * 4 if one else text for text, one in zip(texts, proof, strict=True)]
    fitted = Router(0.02, encoder=counts, policies=QUICK).fit(log_of_table(longer, EXPERTS, quality, price))
    assert fitted.fitted.memory.beside
    facts = price[~proof, 1].mean()
    for query in ("emperor war", "war"):
        one = fitted.route(query).price["talker"]
        assert 0.6 * facts < one < 1.5 * facts
        np.testing.assert_allclose(fitted.route_batch([query, longer[0]]).price[0, 1], one, rtol=1e-4)


def test_only_experts_whose_prices_are_told_cost_no_less_below_the_shortest_queries() -> None:
    texts, proof, quality, price = asked(400)
    longer = [text + " of which every step is to be shown" * 4 if one else text for text, one in zip(texts, proof, strict=True)]
    both = np.stack([[1e-5 * len(text) for text in longer], price[:, 1]], -1)
    fitted = Router(0.02, encoder=counts, policies=QUICK).fit(log_of_table(longer, EXPERTS, quality, both))
    assert fitted.fitted.floor[0] == 0
    assert fitted.fitted.floor[1] > 10
    assert fitted.route("war").price["terse"] == pytest.approx(3e-5, rel=1e-3)
    alone = without(fitted.fitted, "talker")
    assert price_of_one(alone, "war", np.zeros(1)) == pytest.approx([3e-5], rel=1e-3)


def counts_encoder(texts: list[str]) -> FunctionEncoder:
    """As a router fits it."""
    encoder = FunctionEncoder(counts)
    encoder.fit(texts)
    return encoder


@pytest.mark.parametrize("proofs_to_talker", [0.1, pytest.param(0.9, marks=pytest.mark.slow)])
def test_what_an_expert_costs_is_not_what_it_cost_on_the_queries_it_was_mostly_asked(proofs_to_talker: float) -> None:
    log = single_answers(1500, proofs_to_talker=proofs_to_talker)
    learned = Router(0.02, encoder=counts, policies=QUICK).fit(log)
    unseen, _, _, price = asked(2000, seed=1)
    order = [EXPERTS.index(name) for name in learned.experts]
    truth = price[:, order].mean(0)
    logged = [one.price for one in log if one.expert == "talker"]
    assert abs(np.mean(logged) / truth[order.index(1)] - 1) > 0.5
    np.testing.assert_allclose(learned.fitted.mean_price, truth, rtol=0.1)
    np.testing.assert_allclose(learned.fitted.held.price.mean(0), truth, rtol=0.1)
    for budget in (4.0, 8.0):
        for by_mix in (None, False):
            actions = learned.route_batch(unseen, budget=budget, learned=by_mix).actions
            assert 1000 * price[:, order][np.arange(len(unseen)), actions].mean() < 1.15 * budget


def test_a_newcomers_price_is_that_of_all_queries() -> None:
    other = Router(0.02, encoder=counts)
    other.encoder, other._fitted = router().encoder, router().fitted
    newcomer = Log(
        Outcome(one.query, "new", one.quality, one.price, propensity=one.propensity)
        for one in single_answers(1500, proofs_to_talker=0.9, seed=2)
        if one.expert == "talker"
    )
    other.add_expert(newcomer)
    assert np.mean([one.price for one in newcomer]) > 0.016
    np.testing.assert_allclose(other.fitted.mean_price[-1], 0.011, rtol=0.15)
