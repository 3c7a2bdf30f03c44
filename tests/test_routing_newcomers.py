"""Experts that come and go, and new prices."""

import copy
from pathlib import Path

import numpy as np
import pytest

from deferral.routing import Abilities, Needs, PriceModel, Router, list_prices, log_of_table
from tests.routing_world import EXPERTS, QUICK, router, world

pytestmark = pytest.mark.ci_slow


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
