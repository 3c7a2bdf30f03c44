"""A floor that is promised is reached as often as it says; off-policy estimates are right on average."""

import numpy as np
import pytest

from deferral.certified import p_value_of_mean
from deferral.routing import Log, Outcome, Router, log_of_table
from deferral.routing.promises import promised_error, shortfall_p_value
from deferral.routing.replay import METHODS, as_logged, events_of, replay
from tests.routing_world import EXPERTS, QUICK, world

LAWS = {
    "bernoulli": lambda generator, shape: (generator.random(shape) < 0.3).astype(float),
    "rare": lambda generator, shape: 0.25 + 0.75 * (generator.random(shape) < 1 / 15),
    "narrow": lambda generator, shape: 0.3 + 0.02 * (generator.random(shape) - 0.5),
    "uniform": lambda generator, shape: 0.6 * generator.random(shape),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("rows", [30, 400])
def test_a_true_mean_at_the_level_is_rejected_at_most_as_often_as_delta(law: str, rows: int) -> None:
    losses = LAWS[law](np.random.default_rng(0), (2000, rows))
    for delta in (0.05, 0.2):
        rejected = (p_value_of_mean(losses, 0.3, delta=delta) <= delta).mean()
        assert rejected <= delta + 3 * np.sqrt(delta * (1 - delta) / 2000)


def test_losses_that_vary_little_prove_more_than_their_mean_alone() -> None:
    losses = 0.49 + 0.02 * np.random.default_rng(0).random(400)
    assert p_value_of_mean(losses, 0.52) < 0.05
    # Hoeffding's bound of the same gap.
    assert np.exp(-2 * 400 * (0.52 - losses.mean()) ** 2) > 0.4
    assert p_value_of_mean(np.ones(10), 0.9) == 1
    for bad, message in ((np.array([1.2]), "in"), (np.empty(0), "at least one row")):
        with pytest.raises(ValueError, match=message):
            p_value_of_mean(bad, 0.5)
    with pytest.raises(ValueError, match="at_most"):
        p_value_of_mean(np.ones(3), 1.0)


def test_what_comes_after_the_first_that_fails_is_promised_to_nobody() -> None:
    reached = {3.0: 0.5, 2.0: 0.0, 1.0: 0.5}
    found = promised_error(lambda error: np.full(400, reached[error]), np.full((400, 1), 0.5), reached, share=0.8, confidence=0.9)
    assert found == 3.0


def test_a_policy_that_takes_half_of_the_draws_is_worth_half_of_them() -> None:
    log = Log(Outcome(f"q{number}", "ab"[number % 2], 1.0, 0.0, propensity=0.5) for number in range(40))
    events, half = events_of(log, ["a", "b"]), np.full((40, 2), 0.5)
    found = replay(events, np.tile([1.0, 0.0], (40, 1)), 1.0, quality=half, price=half, resamples=2)
    assert (found.effective, found.largest_weight) == (20.0, 2.0)


def test_of_a_query_that_everyone_answered_the_logged_propensities_count_beside_other_decisions() -> None:
    drawn = (("q", "a", 0.75), ("q", "b", 0.25), ("r", "a", 0.125))
    log = Log(Outcome(query, expert, 1.0, 0.0, propensity=propensity) for query, expert, propensity in drawn)
    assert events_of(log, ["a", "b"]).propensity.tolist() == [0.75, 0.25, 0.125]


def test_a_promise_is_broken_at_most_as_often_as_it_says() -> None:
    """400 calibrations of a family whose bolder members fall below the floor, the truth known exactly."""
    chance = np.array([0.9, 0.6])  # two experts
    shares = dict(zip((4.0, 3.0, 2.0, 1.0), (0.0, 0.1, 0.17, 0.4), strict=True))
    truth = {error: chance[0] - share * (chance[0] - chance[1]) for error, share in shares.items()}
    floor = 0.95 * chance[0]
    assert [value >= floor for value in truth.values()] == [True, True, False, False]
    broken = made = 0
    for seed in range(400):
        generator = np.random.default_rng(seed)
        quality = (generator.random((400, 2)) < chance).astype(float)
        drawn = generator.random(400)

        def at(error: float, quality: np.ndarray = quality, drawn: np.ndarray = drawn) -> np.ndarray:
            return np.where(drawn < shares[error], quality[:, 1], quality[:, 0])

        try:
            found = promised_error(at, quality, shares, share=0.95, confidence=0.9)
        except ValueError:
            continue
        made += 1
        broken += truth[found] < floor
    assert made > 360
    assert broken / 400 <= 0.1 + 3 * np.sqrt(0.09 / 400)


def test_the_floor_is_that_of_whichever_expert_is_the_best() -> None:
    quality = (np.random.default_rng(0).random((500, 3)) < [0.9, 0.5, 0.2]).astype(float)
    assert shortfall_p_value(quality[:, 0], quality, 0.95, 0.05) < 0.01
    assert shortfall_p_value(quality[:, 1], quality, 0.95, 0.05) > 0.9
    assert shortfall_p_value(quality[:, 1], quality[:, 1:], 0.9, 0.05) < 0.05


@pytest.mark.ci_slow
def test_a_router_proves_its_floor_by_rows_that_were_not_in_the_fit() -> None:
    texts, _, quality, price = world(600)
    router = Router(0.1, policies=QUICK).fit(log_of_table(texts, EXPERTS, quality, price))
    with pytest.raises(ValueError, match="no rows that certify it"):
        router.plan(certified_quality=0.95)
    with pytest.raises(ValueError, match="600 of 600 queries were in the log of the fit"):
        router.certify(log_of_table(texts, EXPERTS, quality, price))
    new, _, outcome, dollars = world(1500, seed=11)
    new = [f"{text}?" for text in new]
    router.certify(log_of_table(new, EXPERTS, outcome, dollars))
    later, _, truth, paid = world(2000, seed=12)
    rows, spent = np.arange(2000), []
    for share in (0.8, 0.95):
        actions = router.route_batch(later, certified_quality=share).actions
        assert truth[rows, actions].mean() >= share * truth.mean(0).max()
        spent.append(paid[rows, actions].mean())
    assert spent[0] <= spent[1] < 0.75 * paid[:, 2].mean()
    with pytest.raises(ValueError, match=r"cannot be promised .* from 1500 rows"):
        router.plan(certified_quality=0.999, confidence=0.999999)
    with pytest.raises(ValueError, match="one of price_of_error"):
        router.plan(certified_quality=0.9, budget=1.0)
    holes = log_of_table(new, EXPERTS, outcome, dollars, np.arange(4500).reshape(1500, 3) != 4)
    with pytest.raises(ValueError, match="coder has none on query 2"):
        router.certify(holes)
    router.remove_expert("coder")
    assert router.plan(certified_quality=0.9).mask.tolist() == [True, True]
    router.describe_expert("new", quality=0.9, price=0.001)
    with pytest.raises(ValueError, match="no rows that certify it"):
        router.plan(certified_quality=0.9)
    with pytest.raises(ValueError, match="certify: expected every expert's outcome"):
        Router(0.1, policies=QUICK).fit(holes, certify=0.1)
    with pytest.raises(ValueError, match="leaves none to learn from"):
        Router(0.1, policies=QUICK).fit(log_of_table(texts[:2], EXPERTS, quality[:2], price[:2]), certify=0.999)
    split = Router(0.1, policies=QUICK).fit(log_of_table(texts, EXPERTS, quality, price), certify=0.4)
    assert 200 <= 600 - split.knows(texts).sum() <= 280
    assert split.plan(certified_quality=0.8).price_of_error > 0


def logged(rows: int, seed: int, *, known: bool = True) -> tuple[Log, np.ndarray, np.ndarray, np.ndarray]:
    """Outcomes of the experts that a biased policy asked: the good one where it is good, mostly."""
    generator = np.random.default_rng(seed)
    kind = generator.integers(0, 2, rows)
    chance = np.where(kind[:, None] == [0, 1], 0.9, 0.3)
    propensity = np.where(kind[:, None] == [0, 1], 0.8, 0.2)
    asked = (generator.random(rows) < propensity[:, 1]).astype(int)
    right = generator.random(rows) < chance[np.arange(rows), asked]
    taken = propensity[np.arange(rows), asked]
    log = Log(
        Outcome(f"{kind[i]} {i}", "ab"[asked[i]], float(right[i]), 0.0, propensity=taken[i] if known else np.nan)
        for i in range(rows)
    )
    return log, kind, chance, propensity


def test_off_policy_estimates_are_right_on_average_and_the_naive_one_is_not() -> None:
    found: dict[str, list[float]] = {name: [] for name in (*METHODS, "logged", "wrong propensities", "covered")}
    for seed in range(40):
        log, _, chance, _ = logged(150, seed)
        events = events_of(log, ["a", "b"])
        always = np.tile([1.0, 0.0], (150, 1))
        guess = np.full((150, 2), 0.5)
        one = replay(events, always, 1.0, quality=guess, price=np.zeros((150, 2)), resamples=60)
        for name in METHODS:
            found[name].append(one.quality[name].estimate)
        ends = one.quality["doubly robust"]
        found["covered"].append(ends.low <= 0.6 <= ends.high)
        found["logged"].append(as_logged(events, 1.0, resamples=2)["quality"].estimate)
        assumed = events_of(logged(150, seed, known=False)[0], ["a", "b"])
        assert assumed.assumed == 1
        right = replay(assumed, always, 1.0, quality=chance, price=np.zeros((150, 2)), resamples=2)
        found["wrong propensities"].append(right.quality["doubly robust"].estimate)
    some = events_of(Log([Outcome("old", "a", 1.0, 0.0), Outcome("new", "b", 1.0, 0.0, propensity=0.5)]), ["a", "b"])
    assert some.assumed == 0.5
    for name in (*METHODS, "wrong propensities"):
        assert np.mean(found[name]) == pytest.approx(0.6, abs=0.05), name
    assert np.mean(found["logged"]) == pytest.approx(0.78, abs=0.03)
    assert np.mean(found["covered"]) > 0.85


def test_propensities_are_those_of_the_decisions_that_are_replayed() -> None:
    """Full queries beside single answers, nine in ten of the cheap expert, of which nothing is logged."""
    generator = np.random.default_rng(0)
    full = [Outcome(f"full {n}", name, float(name == "b"), 0.0) for n in range(200) for name in ("a", "b")]
    single = []
    for number in range(800):
        name = "b" if generator.random() < 0.1 else "a"
        single.append(Outcome(f"one {number}", name, float(name == "b"), 0.0))
    log = Log([*full, *single])
    share = np.mean([row.expert == "b" for row in single])
    both = events_of(log, ["a", "b"])
    expected = np.where(both.query < 200, 0.5, np.where(both.expert == 1, share, 1 - share))
    np.testing.assert_allclose(both.propensity, expected)
    assert both.assumed == 800 / 1200
    rest = events_of(log, ["a", "b"], kept=np.array([text.startswith("one") for text in log.queries]))
    alone = events_of(Log(single), ["a", "b"])
    assert rest.queries == alone.queries
    for name in ("query", "expert", "quality", "price", "propensity", "unlogged"):
        np.testing.assert_array_equal(getattr(rest, name), getattr(alone, name))
    for events in (both, rest):
        size = len(events.queries)
        always = np.tile([0.0, 1.0], (size, 1))
        found = replay(events, always, 1.0, quality=np.full((size, 2), 0.3), price=np.zeros((size, 2)), resamples=200)
        for method in METHODS:
            assert found.quality[method].low <= 1.0 <= found.quality[method].high + 1e-9, method


def test_decisions_between_which_the_router_changed_are_single_ones_by_their_times() -> None:
    """Of most queries one decision of either router: they add up to 1.9, as if both experts had been asked at once."""
    for apart, twice, alone in ((86_400.0, 10, True), (86_400.0, 0, False), (5.0, 2, False), (np.nan, 2, False)):
        log = Log(Outcome(f"to one {number // 2}", "a", 1.0, 0.0, propensity=0.95) for number in range(2 * twice))
        for number in range(60):
            for place, name in enumerate(("a", "b")):
                log.append(Outcome(f"q{number}", name, 1.0 - place, 0.0, propensity=0.95, time=1000.0 + number + place * apart))
        table = log.table()
        assert (table.again is not None and bool(table.again.any())) == (apart > 60 and twice > 0)
        if alone:
            nothing, always = np.zeros((len(log.queries), 2)), np.tile([1.0, 0.0], (len(log.queries), 1))
            worth = replay(events_of(log, ["a", "b"]), always, 1.0, quality=nothing, price=nothing)
            assert worth.quality["self-normalised"].estimate == pytest.approx(1.0)
        else:
            with pytest.raises(ValueError, match="single decisions"):
                events_of(log, ["a", "b"])


def test_a_full_table_is_replayed_exactly() -> None:
    generator = np.random.default_rng(0)
    quality, price = generator.random((40, 3)), generator.random((40, 3))
    chances = generator.dirichlet(np.ones(3), 40)
    events = events_of(log_of_table([f"q{i}" for i in range(40)], ["a", "b", "c"], quality, price), ["a", "b", "c"])
    one = replay(events, chances, 0.5, quality=generator.random((40, 3)), price=price, resamples=10)
    truth = (chances * quality).sum(1).mean()
    for name in METHODS:
        assert one.quality[name].estimate == pytest.approx(truth, rel=1e-6)
    assert one.cost["ips"].estimate == pytest.approx(1 - truth + (chances * price).sum(1).mean() / 0.5, rel=1e-6)
    # Whoever asks everyone may well log that everyone was certain to be asked.
    certain = log_of_table([f"q{i}" for i in range(40)], ["a", "b", "c"], quality, price, propensity=np.ones((40, 3)))
    again = events_of(certain, ["a", "b", "c", "new"])
    np.testing.assert_array_equal(again.propensity, events.propensity)
    assert (again.assumed, events.assumed) == (0, 0)
    with pytest.raises(ValueError, match="none of a, b"):
        events_of(log_of_table(["q"], ["z"], np.ones((1, 1)), np.ones((1, 1))), ["a", "b"])
    with pytest.raises(ValueError, match="chances: expected shape"):
        replay(events, chances[:5], 0.5, quality=quality, price=price)


def test_what_is_no_policy_and_no_log_is_not_replayed() -> None:
    log = Log(Outcome(str(row), "ab"[row % 2], 1.0, 0.0) for row in range(4))
    events, half = events_of(log, ["a", "b"]), np.full((4, 2), 0.5)
    for chances, words in (
        (half * np.nan, "chances: expected numbers, got NaN"),
        (half * 2, "chances: expected probabilities that add up to 1, got .* for query 1"),
        (half[:, :1] * 2, "chances: expected a column for each of 2 experts or more, got 1"),
    ):
        with pytest.raises(ValueError, match=words):
            replay(events, chances, 1.0, quality=half[:, : chances.shape[1]], price=half[:, : chances.shape[1]])
    with pytest.raises(ValueError, match="quality: expected numbers, got NaN"):
        replay(events, half, 1.0, quality=half * np.nan, price=half)
    with pytest.raises(TypeError, match=r"events: expected what events_of\(log, experts\) gives, got Log"):
        replay(log, half, 1.0, quality=half, price=half)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="price_of_error: expected what a wrong answer is worth"):
        as_logged(events, 0.0)
    with pytest.raises(ValueError, match="log: expected at least one outcome on a query that is kept, got none"):
        events_of(log, ["a", "b"], kept=np.zeros(4, bool))
    with pytest.raises(ValueError, match="kept: expected True or False for each of 4 queries"):
        events_of(log, ["a", "b"], kept=np.zeros(3, bool))
    with pytest.raises(TypeError, match="log: expected a Log, got str"):
        events_of("outcomes.jsonl", ["a", "b"])  # type: ignore[arg-type]


def test_chances_that_are_off_by_rounding_are_replayed() -> None:
    events = events_of(Log(Outcome(str(row), "abc"[row % 3], 1.0, 0.0) for row in range(6)), ["a", "b", "c"])
    chances, zero = np.tile([-2.2e-16, 0.75, 0.25], (6, 1)), np.zeros((6, 3))
    assert replay(events, chances, 1.0, quality=zero, price=zero).quality["ips"].estimate == pytest.approx(1.0)
    with pytest.raises(ValueError, match="chances: expected probabilities"):
        replay(events, np.tile([-0.25, 1.0, 0.25], (6, 1)), 1.0, quality=zero, price=zero)
