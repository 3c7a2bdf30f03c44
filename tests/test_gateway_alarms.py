"""Alarms of drift: each rings for what it is meant for, and none for anything else."""

import asyncio
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sqlalchemy import literal, null, select, update

from deferral.gateway import drift
from deferral.gateway.alarms import MEANINGS, Alarms
from deferral.gateway.database import connect
from deferral.gateway.deciding import Decider
from deferral.gateway.dialects import insert_rows
from deferral.gateway.drift import ALLOWED, EVERY, Expected, Seen, confidence, interval, looked_at, rings
from deferral.gateway.eligible import Limited
from deferral.gateway.experts_file import Expert
from deferral.gateway.metrics import Metrics
from deferral.gateway.preparing import prepare
from deferral.gateway.requests import Asked, Hints
from deferral.gateway.rows import values
from deferral.gateway.schema import cascades, decisions, feedback
from deferral.routing import Router
from tests.gateway_rows import row
from tests.running_gateway import EASY, HARD, small_router

NOW = 1_000_000.0
SHARES = np.array([0.5, 0.3, 0.2])
EXPECTED = Expected(["small", "large"], ["r-0", "r-1", "r-2"], SHARES)
LEVEL = confidence(2)
DAY = 86400.0


@pytest.fixture(scope="module")
def router() -> Router:
    return small_router()


def first_alarm(stream: list[np.ndarray], seen, *, window: int, step: int) -> int | None:
    """The look at which it rings for the first time, over a window that moves along; None: never."""
    for number in range((len(stream[0]) - window) // step):
        part = [values[number * step : number * step + window] for values in stream]
        if rings(seen(*part), False):
            return number
    return None


@pytest.mark.parametrize("days", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_healthy_traffic_is_silent_for_months_also_at_the_edge_of_what_is_allowed(days: int) -> None:
    """A look every ten minutes at 2,000 rows of which 60 are new: skewed prices, judgements of right and wrong."""
    generator, looks = np.random.default_rng(5), days * 144
    size = 2000 + 60 * looks
    expected, cost = generator.uniform(0.3, 1, size), generator.lognormal(-7, 0.3, size)
    noise = generator.lognormal(-0.5, 1.0, size)  # of mean 1
    for edge in (False, True):
        kinds = generator.choice(3, size, p=SHARES + ([0, -0.25, 0.25] if edge else 0))
        true = np.clip(expected - 0.05 * edge, 0, 1)
        factor = 1.5 if edge else 1.0
        streams = {
            "unlike": ([kinds], lambda some: drift.unlike(np.bincount(some, minlength=3), SHARES, LEVEL)),
            "quality": (
                [(generator.random(size) < true).astype(float), expected],
                lambda judged, wanted: drift.quality("a", judged, wanted, LEVEL),
            ),
            "price": ([factor * cost * noise, cost], lambda paid, wanted: drift.price("a", paid, wanted, LEVEL)),
        }
        for name, (stream, seen) in streams.items():
            assert first_alarm(stream, seen, window=2000, step=60) is None, (name, edge)


@pytest.mark.parametrize("spread", ["a few long documents", "lognormal"])
def test_queries_of_very_different_prices_ring_only_where_prices_move(spread: str) -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        if spread == "lognormal":
            expected = generator.lognormal(-9, 2.5, 5000)
        else:
            expected = np.where(generator.random(5000) < 0.01, 1e-2, 1e-4)
        paid = expected * generator.lognormal(-0.02, 0.2, 5000)
        steady, doubled, halved = (drift.price("a", factor * paid, expected, LEVEL) for factor in (1, 2, 0.5))
        assert steady.found == pytest.approx(1, abs=0.02)
        assert [rings(seen, False) for seen in (steady, doubled, halved)] == [False, True, True]


@pytest.mark.parametrize(
    ("name", "before", "after"), [("unlike", 0.2, 0.7), ("quality", 0.8, 0.6), ("price", 1.0, 2.0), ("price", 1.0, 0.4)]
)
def test_each_kind_of_drift_is_told_within_the_time_of_its_window_and_ends_with_it(
    name: str, before: float, after: float
) -> None:
    generator = np.random.default_rng(7)
    level = np.repeat([before, after, before], [3000, 6000, 6000])
    if name == "unlike":
        other = generator.random(len(level)) < level
        stream = [np.where(other, 2, generator.choice(2, len(level), p=[0.625, 0.375])), level]
    elif name == "price":
        stream = [level * generator.exponential(1, len(level)), np.ones(len(level))]
    else:
        stream = [(generator.random(len(level)) < level).astype(float), np.full(len(level), before)]
    was, told = False, []
    for start in range(0, len(level) - 3000, 100):
        part = [column[start : start + 3000] for column in stream]
        seen = {
            "unlike": lambda kinds, _: drift.unlike(np.bincount(kinds, minlength=3), SHARES, LEVEL),
            "quality": lambda judged, wanted: drift.quality("a", judged, wanted, LEVEL),
            "price": lambda paid, wanted: drift.price("a", paid, wanted, LEVEL),
        }[name](*part)
        if rings(seen, was) != was:
            was = not was
            told.append(start)
    assert len(told) == 2
    assert 0 < told[0] <= 3000
    assert 6000 <= told[1] <= 9100


def test_the_interval_holds_the_mean_and_narrows_with_the_rows() -> None:
    generator = np.random.default_rng(0)
    widths = []
    for size in (50, 500, 5000):
        misses = 0
        for _ in range(200):
            low, high = interval(generator.random(size) < 0.1, 0.0, 1.0, 0.05)
            misses += not low <= 0.1 <= high
        assert misses <= 10
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2] > 0
    alike = np.full(100, 0.25)
    prices = drift.price("a", alike, alike, 0.05)
    assert (prices.low, prices.high) == interval(np.ones(100), 0.0, 5.0, 0.05), "a price may be nothing, and five times as much"
    doubt, mixed = math.log(4 / 0.05), np.tile([0.0, 1.0], 5000)
    half = math.sqrt(2 * 0.25 * 10_000 / 9999 * doubt / 10_000) + 7 * doubt / (3 * 9999)
    assert interval(mixed, 0.0, 1.0, 0.05) == pytest.approx((0.5 - half, 0.5 + half))
    half = 7 * doubt / (3 * 99)
    assert interval(alike, 0.0, 1.0, 0.05) == pytest.approx((0.25 - half, 0.25 + half))


@pytest.mark.parametrize("experts", [1, 3])
def test_all_looks_of_a_month_at_all_series_share_the_chance_of_one_false_alarm_in_ten_months(experts: int) -> None:
    series = 1 + 2 * experts
    assert confidence(experts) * series * 30 * DAY / EVERY == pytest.approx(0.1)


def test_too_few_rows_say_nothing() -> None:
    nothing = np.array([])
    for seen in (
        drift.unlike(np.array([0, 0, 0]), SHARES, LEVEL),
        drift.unlike(np.array([0, 1, 0]), SHARES, LEVEL),
        drift.unlike(np.array([], int), np.array([]), LEVEL),
        drift.quality("a", nothing, nothing, LEVEL),
        drift.price("a", nothing, nothing, LEVEL),
        drift.price("a", np.ones(10), np.zeros(10), LEVEL),
    ):
        assert seen.found is None
        assert not rings(seen, False)
        assert not rings(seen, True)
    assert not rings(drift.unlike(np.array([0, 0, 10]), SHARES, LEVEL), False)
    # Once it rings, it goes on until the estimate is back inside.
    assert rings(Seen("unlike", "", 100, 0.26, 0.1, 0.32), True)
    assert not rings(Seen("unlike", "", 100, 0.24, 0.1, 0.32), True)


def filled(database: str, count: int, *, end: float = NOW, start: int = 0, other: float = 0.2, price: float = 1.0) -> None:
    """A request every ten seconds, by "small" and "large" in turn, each judged as good as was expected: 0.8 of them right."""
    engine, generator = connect(database), np.random.default_rng(start)
    prepare(engine)
    rows, said = [], []
    for number in range(count):
        expert = ("small", "large")[number % 2]
        cost = {"small": 1e-3, "large": 1e-2}
        made = row(
            start + number, time=end - 10 * (count - number), expert=expert, chosen=expert,
            kind=f"r-{generator.choice(3, p=[(1 - other) * 0.625, (1 - other) * 0.375, other])}",
            expected_quality=dict.fromkeys(cost, 0.8), expected_price=cost, expected_cost=dict.fromkeys(cost, 0.3),
            price=cost[expert] * (price if expert == "large" else 1.0) * float(generator.uniform(0.5, 1.5)),
        )  # fmt: skip
        rows.append(values(made))
        said.append((made.id, "", float(generator.random() < 0.8), made.time))
    with engine.begin() as connection:
        insert_rows(connection, decisions, rows)
        insert_rows(connection, feedback, said)
    engine.dispose()


def test_it_rises_once_and_falls_once_whoever_looks(database: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "deferral.gateway.alarms")
    filled(database, 800)
    engines = [connect(database) for _ in range(2)]
    one, other = (Alarms(engine) for engine in engines)

    def told() -> list[str]:
        return [line.getMessage() for line in caplog.records]

    one.look(EXPECTED, NOW)
    series = {(name, expert) for name in ("quality", "price") for expert in EXPECTED.experts}
    assert {(alarm.seen.name, alarm.seen.expert) for alarm in one.now} == {("unlike", ""), *series}
    assert not any(alarm.ringing for alarm in one.now)
    assert told() == []
    # The price of the large expert trebles, and queries are of another kind.
    later = NOW + DAY
    filled(database, 800, end=later, start=10_000, other=0.9, price=3.0)
    other.look(EXPECTED, later)
    one.look(EXPECTED, later + 1)
    assert {(a.seen.name, a.seen.expert) for a in one.now if a.ringing} == {("unlike", ""), ("price", "large")}
    assert one.now == other.now
    assert {a.since for a in one.now if a.ringing} == {later}
    one.look(EXPECTED, later + EVERY)
    assert [line.split(":")[1].strip() for line in told()] == ["Queries unlike the log", "A price that moved of large"]
    assert all("docs/operating.md" in line for line in told())
    # A day later it is as it was.
    filled(database, 800, end=later + 2 * DAY, start=20_000)
    other.look(EXPECTED, later + 2 * DAY)
    one.look(EXPECTED, later + 2 * DAY + 5)
    assert not any(alarm.ringing for alarm in one.now)
    assert [line for line in told() if line.startswith("alarm over")] == told()[2:]
    assert len(told()) == 4
    for engine in engines:
        engine.dispose()


def test_an_expert_that_is_gone_and_a_clock_that_was_set_back_end_nothing_for_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = str(tmp_path / "g.db")
    filled(database, 800, price=3.0)
    alarms = Alarms(connect(database))
    alarms.look(EXPECTED, NOW)
    assert [a.seen.expert for a in alarms.now if a.ringing] == ["large"]
    alarms.look(replace(EXPECTED, experts=["small"]), NOW - 5 * DAY)
    assert {a.seen.expert for a in alarms.now} == {"", "small"}
    assert "alarm over: A price that moved of large" in caplog.text
    alarms.close()
    alarms.look(EXPECTED, NOW + DAY)
    assert {a.seen.expert for a in alarms.now} == {"", "small"}


def test_kinds_of_another_router_are_not_counted(tmp_path: Path) -> None:
    database = str(tmp_path / "g.db")
    filled(database, 800)
    engine = connect(database)
    with engine.connect() as connection:
        seen = looked_at(connection, replace(EXPECTED, kinds=["s-0", "s-1", "s-2"]), NOW)[0]
    assert (seen.rows, seen.found) == (0, None)
    engine.dispose()


def test_the_kinds_of_a_log_are_those_of_its_traffic_and_not_of_another(tmp_path: Path, router: Router) -> None:
    router.save(tmp_path / "router")
    again = Router.load(tmp_path / "router")
    names, shares = again.fitted.kind_names, again.fitted.kinds[1]
    assert names == router.fitted.kind_names
    assert shares.sum() == pytest.approx(1)

    def seen(texts: list[str]) -> Seen:
        found = [names.index(decision.kind) for decision in again.route_batch(texts)]
        return drift.unlike(np.bincount(found, minlength=len(names)), shares, LEVEL)

    logged = [text for number in range(300) for text in (f"{EASY} {number} and {number + 1}", f"{HARD} number {number} in full")]
    assert not rings(seen(logged), False)
    assert rings(seen([f"{HARD} number {number} in full" for number in range(600)]), False)


def test_the_gateway_keeps_the_kind_of_a_query(router: Router) -> None:
    experts = {name: Expert(name=name, base_url="http://127.0.0.1:9/v1") for name in ("small", "large")}
    decider = Decider(router, experts, deadline_s=1.0)
    choice = asyncio.run(decider.choose(Asked("auto", EASY, 1, 0, False, False, False), Hints(), Limited()))
    assert choice.kind == router.route(EASY).kind != ""
    assert (decider.expected.experts, decider.expected.kinds) == (["small", "large"], router.fitted.kind_names)
    decider.close()


def test_what_a_first_answer_decided_rings_neither_for_the_quality_nor_for_the_price(tmp_path: Path) -> None:
    """Deferred: the queries are harder than was expected before the first answer, which was paid for as well."""
    database = str(tmp_path / "g.db")
    filled(database, 800)
    engine = connect(database)
    with engine.connect() as connection:
        before = looked_at(connection, EXPECTED, NOW)
    with engine.begin() as connection:
        large = select(decisions.c.id).where(decisions.c.expert == "large")
        columns = decisions.c.id, literal("small"), literal("silent"), literal(0.25), null(), null()
        connection.execute(cascades.insert().from_select(list(cascades.c), select(*columns).where(decisions.c.id.in_(large))))
        connection.execute(update(decisions).where(decisions.c.expert == "large").values(price=decisions.c.price + 0.25))
    with engine.connect() as connection:
        after = looked_at(connection, EXPECTED, NOW)
    assert [replace(seen, found=None, low=None, high=None) for seen in after] == [
        replace(seen, found=None, low=None, high=None) for seen in before
    ]
    assert [seen.found for seen in after] == pytest.approx([seen.found for seen in before])
    with engine.begin() as connection:
        connection.execute(update(cascades).values(ending="deferred"))
    with engine.connect() as connection:
        judged = {seen.expert: seen.rows for seen in looked_at(connection, EXPECTED, NOW) if seen.name == "quality"}
    assert judged["small"] > 100
    assert judged["large"] == 0
    engine.dispose()


def test_a_burst_does_not_stand_for_the_day(tmp_path: Path) -> None:
    """Two thousand strange queries in ten seconds are a hundred rows of what is looked at."""
    database = str(tmp_path / "g.db")
    filled(database, 800)
    engine = connect(database)
    rows = [row(50_000 + number, time=NOW - number / 200, kind="r-2", expert="small") for number in range(2000)]
    with engine.begin() as connection:
        insert_rows(connection, decisions, [values(one) for one in rows])
    with engine.connect() as connection:
        seen = looked_at(connection, EXPECTED, NOW)[0]
    assert 860 < seen.rows <= 900
    assert seen.found == pytest.approx(100 / 900 * 0.8, abs=0.03)
    assert not rings(seen, False)
    engine.dispose()


def test_gauges_and_the_page_show_what_the_database_says(tmp_path: Path) -> None:
    database = str(tmp_path / "g.db")
    filled(database, 800, price=3.0)
    alarms, metrics = Alarms(connect(database)), Metrics()
    metrics.watch_alarms(lambda: alarms.now)
    assert b"deferral_alarm{" not in asyncio.run(metrics.text())
    alarms.look(EXPECTED, NOW)
    text = asyncio.run(metrics.text()).decode()
    assert 'deferral_alarm{alarm="price",expert="large"} 1.0' in text
    assert 'deferral_alarm{alarm="price",expert="small"} 0.0' in text
    [share] = [line for line in text.splitlines() if line.startswith('deferral_drift{alarm="unlike"')]
    assert 0 < float(share.split()[-1]) < 0.1
    shown = [json.loads(json.dumps(alarm.as_json(), allow_nan=False)) for alarm in alarms.now]
    assert shown[0] | {"found": 0, "low": 0, "high": 0} == {
        "name": "price", "expert": "large", "rows": 400, "found": 0, "low": 0, "high": 0, "least": 1 / 1.5, "most": 1.5,
        "ringing": True, "since": NOW, "title": "A price that moved", "meaning": MEANINGS["price"][1],
    }  # fmt: skip


def test_the_runbook_has_a_section_for_each() -> None:
    runbook = (Path(__file__).parent.parent / "docs" / "operating.md").read_text(encoding="utf-8")
    assert MEANINGS.keys() == ALLOWED.keys()
    for title, _ in MEANINGS.values():
        assert f"\n### {title}\n" in runbook


def test_looking_at_much_traffic_takes_few_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "_ROWS", 500)
    monkeypatch.setattr(drift, "_IN_A_SLOT", 10)
    asked: list[int] = []
    database = str(tmp_path / "g.db")
    filled(database, 800)
    engine = connect(database)
    with engine.connect() as connection:
        counting = SimpleNamespace(execute=lambda statement: asked.append(1) or connection.execute(statement))
        looked_at(counting, EXPECTED, NOW)  # type: ignore[arg-type]
    assert len(asked) <= 110
    engine.dispose()
