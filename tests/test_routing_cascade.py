"""The cascade: what log-probabilities say, when to keep an answer, and that nobody is asked first where that does not pay."""

import json
import math
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from deferral.cli import main
from deferral.errors import DataError
from deferral.losses import two_stage_deferral
from deferral.routing import (
    Confidence,
    Log,
    Outcome,
    PriceModel,
    Router,
    answers_in,
    confidence_of,
    confidence_of_reply,
    fit_cascade,
    list_prices,
    read_log,
    write_log,
)
from deferral.routing.cascade import Cascade, features
from deferral.routing.cascade_fitting import Answered, _costs, _guess, _judged, gain_over
from deferral.routing.policies import Linear
from tests.handmade_cascade import GUESS, handmade, unsure_router
from tests.running_gateway import EASY, HARD

SURE = confidence_of([-0.01, -0.02, -0.01])
UNSURE = confidence_of([-2.0, -3.0, -2.5])
LARGE = 0.9
RIGHT = {True: 0.95, False: 0.3}  # of the small expert, by whether it is sure
PRICE = np.array([1e-4, 1e-3])


def two_points(count: int, *, seed: int, telling: bool = True) -> Answered:
    """The small expert is sure of half of its answers, and then right more often (or, not `telling`, as often as else)."""
    generator = np.random.default_rng(seed)
    sure = generator.random(count) < 0.5
    chance = np.where(sure, RIGHT[True], RIGHT[False]) if telling else np.full(count, 0.625)
    quality = np.column_stack([generator.random(count) < chance, generator.random(count) < LARGE]).astype(float)
    estimate, price = np.tile([0.625, LARGE], (count, 1)), np.tile(PRICE, (count, 1))
    known = np.ones((count, 2))
    confidence = features([SURE if one else UNSURE for one in sure])
    return Answered(("small", "large"), "small", confidence, estimate, price, quality, price, known > 0, known, np.arange(count))


@pytest.fixture(scope="module")
def learned() -> Cascade:
    return fit_cascade(two_points(3000, seed=0))


def test_answers_to_few_queries_prove_nothing_however_many_they_are() -> None:
    def judged(queries: int) -> float:
        query = np.repeat(np.arange(queries), 100)
        alone, always, cascaded = (np.full((1, len(query)), cost) for cost in (0.4, 0.3, 0.1))
        alone[0, ::2] = 0.5
        asked = np.ones((1, len(query)), bool)
        single = np.full((1, len(query), 2), 0.3)
        return float(_judged(np.ones(1), query, alone, always, cascaded, asked, ~asked, single).half_width[0])

    assert judged(1) == judged(2) == judged(19) == math.inf
    assert judged(20) < math.inf
    for queries in (1, 19):
        few = replace(two_points(200, seed=0), query=np.arange(200) % queries)
        with pytest.raises(DataError, match=f"are to {queries} different queries, expected at least 20"):
            fit_cascade(few)


def test_numbers_of_log_probabilities() -> None:
    told = confidence_of([math.log(0.5), math.log(0.25)], [[math.log(0.5), math.log(0.5)], [math.log(0.25)] * 3])
    assert told is not None
    assert told.tokens == 2
    assert told.mean == pytest.approx(1.5 * math.log(0.5))
    assert told.least == pytest.approx(math.log(0.25))
    # Two halves, and four quarters of which one was not told.
    assert told.entropy == pytest.approx((math.log(2) + math.log(4)) / 2)
    odd = confidence_of([float("nan"), None, "a", True, -math.inf, -9999, 1e-9, -(10**400)])  # type: ignore[list-item]
    assert odd is not None
    assert (odd.tokens, odd.least, odd.median) == (4, -30.0, -30.0)
    assert math.isnan(odd.entropy)
    assert confidence_of([]) is None
    assert confidence_of([float("nan")]) is None
    assert features([]).shape == (0, 8)


ODD = (
    None, True, 0, -1, 10**400, -(10**400), 0.5, -math.inf, math.inf, math.nan, "", "text", [], [[]], [None], ["a"], {}, {"a": 1},
    {"logprob": -1}, [{"logprob": "a"}], [{"logprob": {}}], [{"logprob": []}], [{"logprob": -1, "top_logprobs": 3}],
    [{"logprob": -1, "top_logprobs": [{"logprob": None}]}], [{"logprob": -1, "top_logprobs": [None]}],
)  # fmt: skip


@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_no_reply_is_too_odd_to_be_read(value: object) -> None:
    for reply in (value, {"choices": value}, {"choices": [{"logprobs": value}]}, {"choices": [{"logprobs": {"content": value}}]}):
        assert confidence_of_reply(reply) is None or isinstance(confidence_of_reply(reply), Confidence)
    content = [{"logprob": value, "top_logprobs": value}]
    found = confidence_of_reply({"choices": [{"logprobs": {"content": content}}]})
    assert found is None or np.isfinite(features([found])[:, :-1]).all()


@pytest.mark.parametrize("name", ["log.jsonl", "log.parquet"])
def test_a_confidence_comes_back_from_a_file(tmp_path: Path, name: str) -> None:
    with_entropy = confidence_of([-0.5], [[-0.5, -1.5]])
    log = Log(
        [
            Outcome("a", "small", 1, 0.1, confidence=SURE),
            Outcome("a", "large", 1, 0.2),
            Outcome("b", "small", 0, 0.1, confidence=with_entropy),
        ]
    )
    write_log(log, tmp_path / name)
    back = read_log(tmp_path / name)
    assert [back[row].confidence for row in range(3)][1:] == [None, with_entropy]
    np.testing.assert_array_equal(back[0].confidence, SURE)
    assert back[-1].confidence == with_entropy


@pytest.mark.parametrize(
    ("confidence", "words"),
    [
        ({"tokens": 3}, "expected the numbers tokens, mean"),
        (SURE._asdict() | {"mean": 0.5}, "mean: expected a finite number <= 0, got 0.5"),  # type: ignore[union-attr]
        (SURE._asdict() | {"least": None}, "least: expected"),  # type: ignore[union-attr]
        (SURE._asdict() | {"tokens": 0}, "tokens: expected 1 or more"),  # type: ignore[union-attr]
        ([-0.1, -0.2], "expected the numbers"),
    ],
)
def test_a_bad_confidence_is_an_error_that_names_the_row(tmp_path: Path, confidence: object, words: str) -> None:
    rows = [{"query": "a", "expert": "small", "quality": 1, "price": 0.1}] * 2
    lines = [json.dumps(rows[0]), json.dumps(rows[1] | {"confidence": confidence})]
    (tmp_path / "log.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=f"row 2, confidence: .*{words}"):
        read_log(tmp_path / "log.jsonl")


def test_the_least_of_the_loss_on_two_points_is_to_defer_as_bayes_does() -> None:
    """At each of two points the loss, convex in the scores, is least where softmax is in proportion to ceiling - cost."""
    errors = torch.logspace(-3, 0, 40, dtype=torch.float64)
    right = torch.tensor([[RIGHT[True]], [RIGHT[False]]], dtype=torch.float64)
    costs = torch.stack([(1 - right).expand(2, 40), 1 - LARGE + PRICE[1] / errors.expand(2, 40)], -1)
    ceiling = 1 + (PRICE[1] / errors)[None, :, None]
    scores = (ceiling - costs + 1e-9).log().requires_grad_()
    two_stage_deferral(scores, costs, ceiling=ceiling).sum().backward()
    assert scores.grad is not None
    assert scores.grad.abs().max() < 1e-6
    clear = (costs[..., 0] - costs[..., 1]).abs() > 1e-6
    assert torch.equal(scores.argmax(-1)[clear], costs.argmin(-1)[clear])
    assert {0, 1} == set(costs.argmin(-1)[clear].tolist())


@pytest.mark.ci_slow
def test_what_is_learned_defers_as_bayes_does_at_every_price_of_an_error(learned: Cascade) -> None:
    estimate, price = np.tile([0.625, LARGE], (2, 1)), np.tile(PRICE, (2, 1))
    kept = set()
    for error in np.geomspace(*learned.paid.errors[[0, -1]], 40):
        actions, quality, _ = learned.after(features([SURE, UNSURE]), estimate, price, error)
        np.testing.assert_allclose(quality[:, 0], [RIGHT[True], RIGHT[False]], atol=0.05)
        for action, right in zip(actions, (RIGHT[True], RIGHT[False]), strict=True):
            regret = (1 - right) - (1 - LARGE + PRICE[1] / error)
            if abs(regret) > 0.1:
                assert action == (regret > 0), f"at ${error:.3g} an error"
                kept.add(int(action))
    assert kept == {0, 1}


@pytest.mark.ci_slow
def test_the_value_of_an_answer_to_come_is_its_closed_form(learned: Cascade) -> None:
    estimate, price = np.array([[0.625, LARGE]]), PRICE[None]
    for error in (0.002, 0.005, 0.02):
        asking, going = learned.before(estimate, price, error)
        other = 1 - LARGE + PRICE[1] / error
        bayes = PRICE[0] / error + np.mean([min(1 - right, other) for right in RIGHT.values()])
        assert asking[0] == pytest.approx(bayes, abs=0.07)  # 4 deviations of the mean of 256
        assert going[0] == pytest.approx(min(other, 1 - 0.625 + PRICE[0] / error))


@pytest.mark.ci_slow
def test_it_pays_where_log_probabilities_tell_and_nowhere_else(learned: Cascade) -> None:
    assert learned.why_not(0.005) == ""
    assert "It pays at $" in learned.report(0.005)
    assert "judged from" in learned.why_not(1e3)
    blind = fit_cascade(two_points(1500, seed=1, telling=False))
    assert not blind.paid.better.any()
    assert "maybe nothing" in blind.why_not(0.005) or "too few" in blind.why_not(0.005)
    assert "It pays at no price of an error" in blind.report(0.005)


def test_where_no_propensity_is_logged_it_is_the_share_of_the_answers_that_have_one_beside_them() -> None:
    """Else what nobody corrects is judged by the very guesses that the cascade was learned from."""
    rows = []
    for number in range(400):
        rows.append(Outcome(f"query {number}", "small", float(number % 2), 0.0001, confidence=SURE))
        if number % 4 == 0:
            rows.append(Outcome(f"query {number}", "large", 1.0, 0.01))
    others = Log(Outcome(f"other {number}", name, 1.0, 0.01) for number in range(60) for name in ("small", "large"))
    router = Router(0.01, policies=(Linear,)).fit(others)
    answers = answers_in(Log(rows), router, "small")
    place = list(answers.experts).index("large")
    assert answers.mask[:, place].mean() == 0.25
    np.testing.assert_allclose(answers.propensity[answers.mask[:, place], place], 0.25)
    assert (answers.propensity[:, 1 - place] == 1).all()
    logged = answers_in(Log(replace(row, propensity=0.3) if row.expert == "large" else row for row in rows), router, "small")
    np.testing.assert_allclose(logged.propensity[logged.mask[:, place], place], 0.3, rtol=1e-6)
    everyone = [row for row in rows if int(row.query.split()[1]) % 4 == 0]
    assert (answers_in(Log(everyone), router, "small").propensity == 1).all()


@pytest.mark.ci_slow
def test_partial_answers_with_known_propensities_are_judged_as_full_ones(learned: Cascade) -> None:
    full = two_points(4000, seed=3)
    generator = np.random.default_rng(4)
    chance = np.where(full.confidence[:, 2] < 0.5, 0.8, 0.3)  # of keeping; whom it hits depends on the confidence
    kept = generator.random(len(full)) < chance
    partial = replace(full, mask=np.column_stack([kept, ~kept]), propensity=np.column_stack([chance, 1 - chance]))
    errors = np.array([0.005])
    _, _, truth, *_ = _costs(learned, full, full.estimate, errors)
    _, _, found, *_ = _costs(learned, partial, _guess(partial, partial), errors)
    spread = found.std() / math.sqrt(len(full))
    assert abs(found.mean() - truth.mean()) < 4 * spread
    # Who takes what was seen at its word is wrong by much more.
    naive = np.where(partial.mask, full.quality, full.estimate)
    assert abs((1 - naive[~kept, 0]).mean() - (1 - full.quality[~kept, 0]).mean()) > 8 * spread


def test_where_few_answers_are_known_a_guess_is_the_estimate() -> None:
    some = two_points(200, seed=0)
    mask = some.mask.copy()
    mask[10:, 1] = False
    np.testing.assert_array_equal(_guess(replace(some, mask=mask), some)[:, 1], some.estimate[:, 1])


def test_too_few_answers_and_too_few_experts_are_errors() -> None:
    with pytest.raises(DataError, match="199 answers with a confidence are too few"):
        fit_cascade(two_points(199, seed=0))
    one = two_points(200, seed=0)
    with pytest.raises(DataError, match="small is the only expert"):
        fit_cascade(replace(one, experts=("small",)))


def test_only_where_the_router_is_unsure_somebody_is_asked_first() -> None:
    router = unsure_router()
    queries = [f"{EASY} 61", f"{HARD} 61 in full", f"{GUESS} 61"]
    estimate = np.clip(router.fitted.estimate(router.encoder(queries))[0], 0, 1).astype(float)
    price = router.fitted.prices(np.array([30.0] * 3))
    asking, going = handmade().before(estimate, price, 0.05)
    assert (asking < going).tolist() == [False, False, True]
    asking, _ = handmade().before(estimate, price, 0.05, np.array([False, True]))
    assert (asking > going - 1e-9)[:2].all(), "with nobody to defer to there is nothing to gain"


@pytest.mark.ci_slow
def test_a_cascade_is_saved_with_its_router_and_dropped_with_what_it_was_learned_for(tmp_path: Path, learned: Cascade) -> None:
    router = unsure_router()
    router.cascade = learned
    router.save(tmp_path / "router")
    back = Router.load(tmp_path / "router")
    assert back.cascade is not None
    estimate, price = np.array([[0.6, 0.9]]), PRICE[None]
    for one, other in zip(
        learned.after(features([SURE]), estimate, price, 0.004),
        back.cascade.after(features([SURE]), estimate, price, 0.004),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    assert back.cascade.report(0.004) == learned.report(0.004)
    back.remove_expert("large")
    assert back.cascade is None
    for change in (
        lambda one: one.with_prices(list_prices([1, 2], [1, 2], 100)),
        lambda one: one.describe_expert("new", quality=0.5, price=0.1),
        lambda one: one.fit(Log([Outcome("a", "small", 1, 0.1)])),
    ):
        loaded = Router.load(tmp_path / "router")
        change(loaded)
        assert loaded.cascade is None
    router.cascade = None
    router.save(tmp_path / "router")
    assert Router.load(tmp_path / "router").cascade is None
    names = json.loads((tmp_path / "router" / "router.json").read_text(encoding="utf-8"))
    names["cascade"] = {"experts": ["x"], "first": "x"}
    del names["names_sha256"]
    names["names_sha256"] = sha256(json.dumps(names).encode()).hexdigest()
    (tmp_path / "router" / "router.json").write_text(json.dumps(names), encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        Router.load(tmp_path / "router")


def guesses(count: int, *, start: int) -> Log:
    """Guesses, which the small expert has right where it is sure."""
    rows = []
    for number in range(start, start + count):
        right = number % 2
        rows.append(Outcome(f"{GUESS} {number}", "small", float(right), 0.0001, confidence=SURE if right else UNSURE))
        rows.append(Outcome(f"{GUESS} {number}", "large", 1.0, 0.01))
    return Log(rows)


def test_the_routers_own_queries_are_foreseen_by_routers_that_did_not_see_them() -> None:
    log = guesses(60, start=0)
    router = Router(0.05, policies=(Linear,)).fit(log)
    own = np.clip(router.fitted.estimate(router.encoder(log.queries))[0], 0, 1)
    told: list[tuple[int, int]] = []
    answers = answers_in(log, router, "small", on_fold=lambda done, of: told.append((done, of)))
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert np.abs(answers.estimate - own).max() > 0.01
    others = guesses(60, start=100)
    expected = np.clip(router.fitted.estimate(router.encoder(others.queries))[0], 0, 1)
    np.testing.assert_allclose(answers_in(others, router, "small").estimate, expected)


def test_answers_of_a_log_are_each_what_was_logged() -> None:
    log = guesses(4, start=0)
    log.append(Outcome(f"{GUESS} 0", "small", 1.0, 0.0003, confidence=UNSURE))
    log.append(Outcome("another", "small", 1.0, 0.0003))
    answers = answers_in(log, unsure_router(), "small")
    assert len(answers) == 5
    assert answers.quality[:, 0].tolist() == [0, 1, 0, 1, 1]
    # In proportion to what the router says that they cost today: here the mean of the log, thrice the price of an answer.
    router = unsure_router()
    today, logged = router.fitted.mean_price, [(4 * 0.0001 + 0.0003 + 0.0003) / 6, 0.01]
    assert answers.price[-1] == pytest.approx([today[0] * 0.0003 / logged[0], 0.01], rel=0.05)
    router.with_prices(PriceModel(np.array([0.002, 0.05]), np.zeros(2), ("small", "large")))
    dear = answers_in(log, router, "small")
    np.testing.assert_allclose(dear.price, answers.price * [0.002 / today[0], 5.0], rtol=0.05)
    assert answers.query[0] == answers.query[-1]
    with pytest.raises(ValueError, match="'tiny' is no expert of this router"):
        answers_in(log, unsure_router(), "tiny")
    with pytest.raises(DataError, match="no answer of 'large' in the log has a confidence"):
        answers_in(log, unsure_router(), "large")


@pytest.mark.parametrize(
    ("old_right", "new_right", "explored_is", "least", "most"),
    [(0.95, 0.95, "new", 0, 0.03), (0.05, 0.05, "old", 0, 0.03), (0.4, 0.95, "new", 0.9, 1)],
)
def test_what_was_not_seen_by_luck_is_no_gain(
    monkeypatch: pytest.MonkeyPatch, old_right: float, new_right: float, explored_is: str, least: float, most: float
) -> None:
    """Two cascades that differ on three in ten of 2,000 answers, of which the one's choice is drawn one time in forty."""
    rng, size, better, naive = np.random.default_rng(0), 2000, [], []
    same = np.arange(size) < 0.7 * size
    for _ in range(200):
        explored = rng.random(size) < 0.025
        parts = []
        for right, is_explored in ((new_right, explored_is == "new"), (old_right, explored_is == "old")):
            drawn = explored == is_explored
            weight = np.where(drawn, 1 / (0.025 if is_explored else 0.975), 0.0)
            cost = 1 - right - weight * ((rng.random(size) < right) - right)
            parts.append(np.stack([np.where(same, 0.0, cost), np.where(same, 0.0, len(parts)), weight, np.full(size, right)]))
        monkeypatch.setattr("deferral.routing.cascade_fitting._cross_fitted", lambda *_, parts=parts: (np.arange(size), parts))
        gain, half = gain_over(None, None, 0.005)  # type: ignore[arg-type]
        better.append(gain > half)
        values = parts[1][0] - parts[0][0]
        naive.append(values.mean() > 1.96 * values.std(ddof=1) / size**0.5)
    assert least <= np.mean(better) <= most
    assert np.mean(naive) > 0.2, "which is why"
    unseen = [part * [[1], [1], [0], [1]] for part in parts]
    monkeypatch.setattr("deferral.routing.cascade_fitting._cross_fitted", lambda *_: (np.arange(size), unseen))
    assert gain_over(None, None, 0.005)[1] == np.inf  # type: ignore[arg-type]


@pytest.mark.slow
def test_what_knows_nothing_is_surpassed_by_what_knows(learned: Cascade) -> None:
    flat = {name: 0 * value if name in ("4.weight", "4.bias", "shifts") else value for name, value in learned.arrays.items()}
    gain, half = gain_over(replace(learned, arrays=flat), two_points(1500, seed=2), 0.005)
    assert gain > 2 * half > 0
    gain, half = gain_over(learned, two_points(1500, seed=2), 0.005)
    assert gain <= half


def test_a_router_that_was_saved_in_the_meantime_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(Outcome("a query", name, 1.0, price) for name, price in (("small", 1e-4), ("large", 1e-3)))
    write_log(log, tmp_path / "log.jsonl")
    Router(0.005).fit(log).save(tmp_path / "router")

    def meanwhile(*_: object, **__: object) -> Cascade:
        Router(9.0).fit(log).save(tmp_path / "router")
        return handmade()

    monkeypatch.setattr("deferral.routing.cascade_fitting.answers_in", lambda *_, **__: ())
    monkeypatch.setattr("deferral.routing.cascade_fitting.fit_cascade", meanwhile)
    with pytest.raises(SystemExit):
        main(["route", "cascade", str(tmp_path / "log.jsonl"), "-r", str(tmp_path / "router"), "--first", "small"])
    assert "another router was saved there in the meantime" in capsys.readouterr().err
    assert Router.load(tmp_path / "router").price_of_error == 9.0


@pytest.mark.slow
def test_the_command_adds_a_cascade_only_where_it_pays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    router = unsure_router()
    router.cascade = None
    router.save(tmp_path / "router")
    write_log(guesses(240, start=1000), tmp_path / "log.jsonl")
    arguments = ["route", "cascade", str(tmp_path / "log.jsonl"), "-r", str(tmp_path / "router"), "--first", "small"]
    main(arguments)
    assert "saved" in capsys.readouterr().out
    found = Router.load(tmp_path / "router").cascade
    assert found is not None
    assert found.why_not(0.05) == ""
    telling = guesses(240, start=1000)
    rows = [telling[row] for row in range(len(telling))]
    blind = Log(replace(row, confidence=SURE if row.confidence else None) for row in rows)
    write_log(blind, tmp_path / "log.jsonl")
    before = (tmp_path / "router" / "router.json").read_bytes()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 3
    assert "stays as it was" in capsys.readouterr().out
    assert (tmp_path / "router" / "router.json").read_bytes() == before


@pytest.mark.ci_slow
def test_it_pays_between_neighbours_that_both_pay_and_nowhere_between_distant_ones(learned: Cascade) -> None:
    def at(*places: int) -> Cascade:
        gain = np.full(25, -0.01)
        gain[list(places)] = 0.01
        paid = replace(learned.paid, errors=np.geomspace(0.001, 1.0, 25), gain=gain, half_width=np.full(25, 0.005))
        return replace(learned, paid=paid)

    apart, ranges = at(3, 20), at(3, 4, 5, 10, 11)
    assert apart.paid.pays == []
    assert "It pays at no price of an error" in apart.report(0.05)
    errors = ranges.paid.errors
    assert ranges.paid.pays == [(errors[3], errors[5]), (errors[10], errors[11])]
    for error in np.geomspace(0.001, 1.0, 200):
        assert (ranges.why_not(error) == "") == any(low <= error <= high for low, high in ranges.paid.pays)
