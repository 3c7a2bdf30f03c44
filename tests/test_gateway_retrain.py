import asyncio
import copy
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sqlalchemy.exc import OperationalError

from deferral.cli import main
from deferral.errors import DataError
from deferral.gateway.database import connect
from deferral.gateway.export import FAILED, FELL_BACK, NAMED, NO_CHANCE, NO_QUALITY, NO_TEXT, Logged, export, logged
from deferral.gateway.off_policy import (
    Comparison,
    Draws,
)
from deferral.gateway.preparing import prepare
from deferral.gateway.record import Record
from deferral.gateway.reloads import Reloads
from deferral.gateway.retrain import Verdict, _why_not, draws_of, learned, promote, retrain
from deferral.gateway.rows import DecisionRow
from deferral.intervals import Interval
from deferral.routing import Log, Outcome, Router, log_of_table, read_log
from deferral.routing.persistence import written
from deferral.routing.policies import Linear
from deferral.routing.static import fingerprints
from tests.gateway_rows import row
from tests.handmade_cascade import unsure_router


async def recorded(path: Path | str, rows: list[DecisionRow], quality: dict[str, float]) -> None:
    record = Record(str(path), store_text=True, retention_days=1e6)
    record.start()
    for one in rows:
        record.add(one)
    answers = [record.feedback(one, good, source_key="") for one, good in quality.items()]
    assert all(await asyncio.gather(*answers))
    await record.close()


WORDS = ["limit", "prime", "graph", "field", "ring", "matrix", "kernel", "measure", "lattice", "tensor", "group", "norm"]
PRICES = np.array([1e-4, 1e-3])
ERROR = 0.002


def traffic(count: int, *, seed: int) -> tuple[list[str], np.ndarray]:
    """Sums, which the small expert knows, and proofs, which it does not.  -> queries, P(right) (N, 2)"""
    rng = np.random.default_rng(seed)
    hard = rng.random(count) < 0.5
    numbers, words = rng.integers(0, 1000, (count, 2)), rng.choice(WORDS, (count, 3))
    queries = [
        f"prove that the {one} of the {two} is a {three}" if proof else f"add {first} and {second}"
        for proof, (first, second), (one, two, three) in zip(hard, numbers, words, strict=True)
    ]
    return queries, np.stack([np.where(hard, 0.1, 0.95), np.full(count, 0.95)], 1)


def full_log(count: int, *, seed: int, swapped: bool = False) -> Log:
    queries, chance = traffic(count, seed=seed)
    if swapped:
        chance = np.stack([1.05 - chance[:, 0], chance[:, 1]], 1)
    quality = np.random.default_rng(seed).random(chance.shape) < chance
    return log_of_table(queries, ["small", "large"], quality, PRICES)


def served(router: Router, count: int, *, seed: int) -> tuple[list[DecisionRow], dict[str, float]]:
    """What a gateway writes down that draws from `router`."""
    queries, chance = traffic(count, seed=seed)
    decisions = router.route_batch(queries)
    right = np.random.default_rng(seed + 1).random(chance.shape) < chance
    rows, quality = [], {}
    for place, query in enumerate(queries):
        one = decisions[place]
        action = ["small", "large"].index(one.expert)
        drawn = {"expert": one.expert, "chosen": one.expert, "propensity": one.propensity, "price": float(PRICES[action])}
        rows.append(row(place, query=query, price_of_error=ERROR, expected_cost=one.cost, **drawn))
        quality[f"id-{place}"] = float(right[place, action])
    return rows, quality


def linear(folder: Path) -> Router:
    router = Router.load(folder)
    router.policies = (Linear,)
    return router


def test_the_log_of_the_record_is_read_back(tmp_path: Path, database: str) -> None:
    rows = [
        row(0, query="a \ud800 b", propensity=0.25, price=0.5),
        row(1, expert="large", chosen="large", expected_cost={"small": 0.5, "large": math.inf}),
        row(2, requested="small"),
        row(3, outcome="error", expert=""),
        row(4, expert="large"),
        row(5, propensity=math.nan),
        row(6, query=None),
        row(7),
        row(8, expected_cost={"small": 0.5}),
        # What broke off counts if somebody judged it; an assumption says nothing of it.
        row(9, outcome="truncated", expert="large", chosen="large"),
        row(10, outcome="truncated"),
    ]
    asyncio.run(recorded(database, rows, {"id-9": 0.0, "id-0": 0.5, "id-1": 1.0, "id-2": 1.0, "id-4": 1.0, "id-8": 0.0}))
    engine = connect(database)
    for name in ("log.jsonl", "log.parquet"):
        found = export(engine, tmp_path / name)
        assert (found.rows, found.assumed) == (4, 0)
        assert found.left_out == {**dict.fromkeys((NAMED, FELL_BACK, NO_CHANCE, NO_TEXT, NO_QUALITY), 1), FAILED: 2}
        log = read_log(tmp_path / name)
        assert log[0] == Outcome("a ? b", "small", 0.5, 0.5, 10, 20, 0.25, 0.25, 1000.0)
        assert [log[place].expert for place in range(4)] == ["small", "large", "small", "large"]
    assert "1 left out: the query was not stored" in str(found)
    unheard: Counter[str] = Counter()
    assert len(list(logged(engine, Counter(), unheard=unheard))) == 4
    assert unheard == {"small": 4}, "not judged, failed, fell back, broke off"
    assert [one.allowed for one in logged(engine, Counter())] == [
        ("small", "large"),
        ("small", "large"),
        ("small",),
        ("small", "large"),
    ]
    found = export(engine, tmp_path / "log.jsonl", assumed_quality=1.0, since=1001.0, until=1008.0)
    assert (found.rows, found.assumed) == (2, 1)
    assert read_log(tmp_path / "log.jsonl")[1].tags == ("assumed",)
    with pytest.raises(DataError, match=r"no row of the record can be used.*the query was not stored"):
        export(engine, tmp_path / "none.jsonl", since=1006.0, until=1007.0)
    with pytest.raises(DataError, match="holds no request"):
        export(engine, tmp_path / "none.jsonl", since=5000.0)
    assert not (tmp_path / "none.jsonl").exists()
    engine.dispose()


@pytest.mark.parametrize("before", [0.0, 1.0])
def test_how_many_were_judged_before_exploration_began_is_no_matter(
    tmp_path: Path, old_router: Router, monkeypatch: pytest.MonkeyPatch, before: float
) -> None:
    """Since then the small expert's answers are judged one time in two, and those of the large one always."""
    old_router.save(tmp_path / "router")
    certain = {"query": "add 1 and 2", "price_of_error": ERROR, "propensity": 1.0}
    rows = [row(number, **certain) for number in range(100)]
    quality = {one.id: 1.0 for one in rows if before}
    for number in range(100, 600):
        name = "large" if number % 3 else "small"
        rows.append(row(number, query=f"add {number} and 1", expert=name, chosen=name, propensity=0.5, price_of_error=ERROR))
        if number % 2 or name == "large":
            quality[f"id-{number}"] = 1.0
    asyncio.run(recorded(tmp_path / "gateway.db", rows, quality))
    shares = []

    def as_before(model: Router, rows: list, heard: dict) -> Draws:
        shares.append(heard)
        return draws_of(model, rows, heard)

    monkeypatch.setattr("deferral.gateway.retrain.draws_of", as_before)
    monkeypatch.setattr("deferral.gateway.retrain.learned", lambda router, *rest, **more: router)
    assert not retrain(connect(str(tmp_path / "gateway.db")), tmp_path / "router").better
    assert shares == [{"small": pytest.approx(0.5, abs=0.01), "large": 1.0}]


def test_pages_leave_no_row_out_and_take_none_twice(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(number, time=1000.0 + number // 5) for number in range(20)]
    asyncio.run(recorded(database, rows, {}))
    monkeypatch.setattr("deferral.gateway.export._PAGE", 4)
    engine = connect(database)
    read = [one.outcome.query for one in logged(engine, Counter(), assumed_quality=1.0)]
    engine.dispose()
    assert sorted(read) == sorted(one.query for one in rows)


@pytest.fixture(scope="module")
def old_router() -> Router:
    """Learned from a log in which the small expert knew proofs and no sums; the world has changed since."""
    router = Router(ERROR, explore=0.3, policies=(Linear,)).fit(full_log(300, seed=0, swapped=True))
    router.salt = "the same draws in every run"
    return router


def test_a_gain_is_none_until_enough_was_seen_of_both_and_all_estimates_agree() -> None:
    sure = Interval(1.0, 0.5, 1.5)
    judged = Comparison(3000, 900, (20, 20), sure, sure, sure, sure, 0.1)
    assert _why_not(judged) == ""
    for seen in ((10, 20), (20, 10)):
        assert "about 20,000 judged answers in all" in _why_not(replace(judged, seen=seen)), (
            "twice as many, of which 3 in 10 judge"
        )
    assert "about 40,000 judged answers in all" in _why_not(replace(judged, gain=Interval(1.0, -1.0, 3.0))), "half the width"
    assert "one more of them failed" in _why_not(replace(judged, cautious=-0.1))
    assert "disagree" in _why_not(replace(judged, gain_weighted=Interval(-0.1, -1.0, 1.0)))


def test_draws_cost_and_are_expected_to_cost_what_the_router_says(old_router: Router) -> None:
    queries = traffic(20, seed=3)[0]
    names, decided = old_router.experts, old_router.route_batch(queries)
    for stake in (1.0, 3.0):
        rows = [Logged(Outcome(query, names[1], 0.75, 1e-3, propensity=0.5), tuple(names), stake * ERROR) for query in queries]
        draws = draws_of(old_router, rows, dict.fromkeys(names, 0.5))
        assert draws.estimate == pytest.approx(stake * (1 - decided.quality.clip(0, 1)) + decided.price / ERROR)
        assert draws.cost == pytest.approx(stake * 0.25 + 0.5)
        assert draws.perfect == pytest.approx(0.5)


@pytest.mark.ci_slow
def test_a_better_router_is_promoted_and_an_equal_one_is_not(tmp_path: Path, old_router: Router) -> None:
    folder = tmp_path / "router"
    old_router.save(folder)
    asyncio.run(recorded(tmp_path / "gateway.db", *served(old_router, 800, seed=5)))
    engine = connect(str(tmp_path / "gateway.db"))
    stages: list[str] = []
    tried = retrain(engine, folder, dry_run=True, load=linear, on_stage=stages.append)
    assert [stage.split()[0] for stage in stages] == ["reading", "fitting", "judging"]
    assert (tried.better, tried.promoted) == (True, False)
    assert "it would be promoted: it saves" in str(tried)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["router"]
    verdict = retrain(engine, folder, load=linear)
    assert verdict.promoted
    queries, chance = traffic(1000, seed=77)
    price = PRICES / ERROR

    def true_cost(router: Router) -> float:
        router.explore = 0.0
        return float((1 - chance + price)[np.arange(1000), router.route_batch(queries).actions].mean())

    promoted, before = Router.load(folder), Router.load(tmp_path / "router.previous")
    assert "prove that the" not in (folder / "router.json").read_text()
    assert "".join(promoted.fitted.texts).isspace()
    assert (promoted.explore, promoted.salt) == (0.3, old_router.salt)
    assert verdict.comparison is not None
    gain = true_cost(before) - true_cost(promoted)
    assert verdict.comparison.gain.low < gain < verdict.comparison.gain.high
    assert verdict.comparison.gain_weighted.low < gain < verdict.comparison.gain_weighted.high
    with pytest.raises(DataError, match="another router was saved there in the meantime"):
        promote(promoted, folder, written(tmp_path / "router.previous"))
    assert Router.load(folder).salt == old_router.salt
    again = retrain(engine, folder, load=linear)
    assert not again.promoted
    assert again.comparison is not None
    assert again.comparison.gain.low <= 0


@pytest.mark.ci_slow
def test_a_cascade_that_pays_is_not_lost_unasked_and_nobody_is_judged_on_what_it_learned(
    tmp_path: Path, old_router: Router
) -> None:
    folder = tmp_path / "router"
    with_cascade = copy.copy(old_router)
    with_cascade.cascade = SimpleNamespace(why_not=lambda error: "")  # type: ignore[assignment]
    old_router.save(folder)
    rows, quality = served(old_router, 800, seed=5)
    asyncio.run(recorded(tmp_path / "gateway.db", rows, quality))
    engine = connect(str(tmp_path / "gateway.db"))
    loaded = iter([with_cascade, linear(folder), with_cascade, linear(folder)])
    before = written(folder)
    kept = retrain(engine, folder, load=lambda _: next(loaded))
    assert (kept.better, kept.promoted) == (False, False)
    assert "--drop-cascade" in kept.why
    assert written(folder) == before
    assert retrain(engine, folder, load=lambda _: next(loaded), drop_cascade=True).promoted
    knowing = linear(folder)
    knowing._seen = np.sort(fingerprints([str(one.query) for one in rows]))
    loaded = iter([knowing, linear(folder)])
    verdict = retrain(engine, folder, load=lambda _: next(loaded))
    assert not verdict.promoted
    assert any("the old router has learned from the query" in reason for reason in verdict.left_out)


@pytest.mark.ci_slow
def test_what_was_not_explored_promotes_nobody(tmp_path: Path, old_router: Router) -> None:
    folder = tmp_path / "router"
    old_router.save(folder)
    certain = Router.load(folder)
    certain.explore = 0.0
    rows, quality = served(certain, 500, seed=5)
    asyncio.run(recorded(tmp_path / "gateway.db", rows, quality))
    verdict = retrain(connect(str(tmp_path / "gateway.db")), folder, load=linear)
    assert not verdict.promoted
    assert "too few" in verdict.why
    assert any("explore was 0" in reason for reason in verdict.left_out)
    always = [row(number, query=one.query, propensity=0.5) for number, one in enumerate(rows)]
    asyncio.run(recorded(tmp_path / "small.db", always, quality))
    with pytest.raises(DataError, match=r"no usable row of the record was answered by large; pass the log"):
        retrain(connect(str(tmp_path / "small.db")), folder, load=linear)
    old_log = full_log(300, seed=0, swapped=True)
    verdict = retrain(connect(str(tmp_path / "small.db")), folder, load=linear, old_log=old_log)
    assert not verdict.promoted
    assert str(verdict).startswith(f"learned from {verdict.trained_on} rows of the record and {verdict.of_log} of the log\n")
    assert verdict.of_log == len(old_log)
    long = "the emperor " * 30
    mine = [Outcome("mine", "small", 1.0, 1e-4), Outcome(f"{long} and I", "small", 1.0, 1e-4)]
    of_log = Log([*old_log, *(Outcome(long, e, 1.0, 1e-4) for e in ("small", "large"))])
    texts = set(learned(linear(folder), mine, of_log).fitted.texts)
    assert texts == {*old_log.queries, long[:200], "    ", " " * 200}, "its own beginning is the log's, its words are not"


def test_of_what_cannot_be_used_only_what_there_is_is_said(tmp_path: Path, old_router: Router) -> None:
    old_router.save(tmp_path / "router")
    asyncio.run(recorded(tmp_path / "gateway.db", served(old_router, 10, seed=5)[0], {}))
    with pytest.raises(DataError, match=r"no row of the record can be used \(10 rows: [^;]*\)\.") as caught:
        retrain(connect(str(tmp_path / "gateway.db")), tmp_path / "router", load=linear)
    assert "0 rows: held out" not in str(caught.value)
    three = dict.fromkeys(("small", "large", "gone"), 0.5)
    said = dict.fromkeys(("expected_quality", "expected_price", "expected_cost"), three)
    rows = [row(number, **said) for number in range(10)]
    asyncio.run(recorded(tmp_path / "other.db", rows, {one.id: 1.0 for one in rows}))
    with pytest.raises(DataError, match="10 rows: it was drawn among experts that the router does not have"):
        retrain(connect(str(tmp_path / "other.db")), tmp_path / "router", load=linear)


def test_what_was_learned_is_said_where_the_gateways_cannot_be_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(reloads: Reloads) -> None:
        raise OperationalError("x", {}, Exception("the disk is full"))

    router, database = unsure_router(), str(tmp_path / "gateway.db")
    router.save(tmp_path / "router")
    prepare(connect(database))
    monkeypatch.setattr(Reloads, "announce", away)
    made = Verdict(True, True, "it saves much", 5, None, {})
    monkeypatch.setattr("deferral.gateway.retrain.retrain", lambda *_, **__: made)
    monkeypatch.setattr("deferral.gateway.cascade_answers.answers_on_record", lambda *_: [])
    better = SimpleNamespace(why_not=lambda error: "", report=lambda error: "promoted: it saves much", **vars(router.cascade))
    monkeypatch.setattr("deferral.routing.cascade_fitting.fit_cascade", lambda *_, **__: better)
    monkeypatch.setattr("deferral.routing.cascade_fitting.gain_over", lambda *_, **__: (1.0, 0.5))
    monkeypatch.setattr(Router, "save", lambda router, folder: None)
    for command in ("retrain", "cascade"):
        with pytest.raises(SystemExit) as ended:
            main(["gateway", command, str(tmp_path / "router"), "--database", database])
        assert ended.value.code == 1
        said = capsys.readouterr()
        assert "promoted: it saves much" in said.out
        assert "is replaced, but the gateways could not be told: Exception: the disk is full; send SIGHUP" in said.err


@pytest.mark.ci_slow
def test_retraining_from_the_command_line(tmp_path: Path, old_router: Router, capsys: pytest.CaptureFixture[str]) -> None:
    folder, database, log = tmp_path / "router", str(tmp_path / "gateway.db"), str(tmp_path / "log.jsonl")
    old_router.save(folder)
    before = (folder / "router.json").read_text()
    asyncio.run(recorded(tmp_path / "gateway.db", *served(old_router, 60, seed=5)))
    with pytest.raises(SystemExit) as ended:
        main(["gateway", "retrain", str(folder), "--database", database])
    assert ended.value.code == 3
    said = capsys.readouterr()
    assert "rows to judge by are too few" in said.out
    # Where nobody watches, a line for each stage and no empty one.
    assert said.err.splitlines() == ["reading the record"]
    main(["gateway", "export", log, "--database", database])
    assert "60 rows written" in capsys.readouterr().out
    assert len(read_log(log)) == 60
    assert (folder / "router.json").read_text() == before
    queries = traffic(20, seed=1)[0]
    own = Router(ERROR, encoder=lambda texts: np.array([[len(text), 1.0] for text in texts]), policies=(Linear,))
    own.fit(log_of_table(queries, ["small", "large"], np.ones((20, 2)), PRICES)).save(tmp_path / "own")
    with pytest.raises(SystemExit) as ended:
        main(["gateway", "retrain", str(tmp_path / "own"), "--database", database])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "this router needs" in said
    assert "in Python, deferral.gateway.retrain.retrain accepts one" in said
    with pytest.raises(SystemExit) as ended:
        main(["gateway", "cascade", str(tmp_path / "own"), "--database", database])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "this router needs" in said
    assert "in Python, deferral.gateway.cascade_retrain.retrain_cascade accepts one" in said


def test_only_what_is_wrong_with_the_encoder_is_told_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_, **__) -> None:
        raise ValueError("expected finite numbers")

    database = str(tmp_path / "gateway.db")
    unsure_router().save(tmp_path / "router")
    prepare(connect(database))
    monkeypatch.setattr("deferral.gateway.retrain.retrain", refused)
    monkeypatch.setattr("deferral.gateway.cascade_retrain.retrain_cascade", refused)
    for command in ("retrain", "cascade"):
        with pytest.raises(SystemExit) as ended:
            main(["gateway", command, str(tmp_path / "router"), "--database", database])
        assert ended.value.code == 1
        assert capsys.readouterr().err == "Error: expected finite numbers\n"
