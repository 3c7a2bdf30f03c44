"""Decisions whose time is over go, with all that hangs on them; budgets, sums and younger rows stay."""

import asyncio
import time

import pytest
from sqlalchemy import func, insert, select

from deferral.gateway import retention as module
from deferral.gateway.dialects import alone
from deferral.gateway.keys import Key
from deferral.gateway.limits import Limits
from deferral.gateway.record import Record
from deferral.gateway.retention import Retention
from deferral.gateway.rows import CascadeRow
from deferral.gateway.schema import cascades, decisions, feedback, minutes, shadows, texts
from tests.gateway_rows import row

NOW, DAY = time.time(), 86400.0


def filled(database: str) -> Record:
    """20 decisions of the key "a", from 20 hours ago to one; judged, with texts, shadowed, and asked first."""
    made = Record(database, store_text=True, retention_days=30.0, clock=lambda: NOW)
    made.start()
    for number in range(20):
        made.add(row(number, time=NOW - (20 - number) * 3600 + 1, key="a", price=0.25, cascade=CascadeRow("small", "kept")))

    async def judge() -> None:
        for number in range(20):
            assert await made.feedback(f"id-{number}", 0.5, source_key="a")

    asyncio.run(judge())
    with made.engine.begin() as connection:
        for number in range(20):
            values = {"decision": f"id-{number}", "time": NOW, "candidate": "c", "chosen": "small", "expected": "{}"}
            connection.execute(insert(shadows).values(values))
    return made


def counts(record: Record) -> list[int]:
    with record.engine.connect() as connection:
        tables = (decisions, feedback, texts, shadows, cascades)
        return [connection.execute(select(func.count()).select_from(table)).scalar_one() for table in tables]


def test_decisions_go_when_their_time_is_over_with_all_that_hangs_on_them(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 4)
    record = filled(database)
    spent = record.spent("a", 0.0)
    kept = Retention(record.engine, text_days=None, record_days=None, clock=lambda: NOW)
    assert kept.step() == module._EVERY
    assert counts(record) == [20] * 5
    half = Retention(record.engine, text_days=None, record_days=0.5, clock=lambda: NOW)
    steps = 0
    while half.step() < 1.0:
        steps += 1
    assert steps == 2
    assert counts(record) == [12] * 5
    with record.engine.connect() as connection:
        oldest = connection.execute(select(func.min(decisions.c.time))).scalar_one()
        assert connection.execute(select(func.sum(minutes.c.requests))).scalar_one() == 20
    assert oldest > NOW - 0.5 * DAY
    assert record.spent("a", 0.0) == spent == 5.0
    assert Limits(record).left(Key("a", "a", budget=6.0, window="month")) <= 6.0
    record.stop()


def test_texts_go_when_their_time_is_over_and_younger_ones_stay(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 4)
    record = filled(database)
    half = Retention(record.engine, text_days=0.5, record_days=None, clock=lambda: NOW)
    for left in (16, 12):
        assert half.step() < 1.0
        assert half.to_scrub
        assert counts(record) == [20, 20, left, 20, 20]
    while half.step() < module._EVERY:
        pass
    assert not half.to_scrub
    assert counts(record) == [20, 20, 12, 20, 20]
    with record.engine.connect() as connection:
        assert connection.execute(select(func.min(texts.c.time))).scalar_one() > NOW - 0.5 * DAY
    record.stop()


def test_what_was_said_while_its_decision_went_goes_too(database: str) -> None:
    record = filled(database)
    all_of_it = Retention(record.engine, text_days=None, record_days=0.01, clock=lambda: NOW)
    while all_of_it.step() < 1.0:
        pass
    assert counts(record) == [0] * 5
    with record.engine.begin() as connection:
        connection.execute(insert(feedback).values(decision="id-3", key="a", quality=1.0, time=NOW - 3600))
        connection.execute(insert(feedback).values(decision="id-4", key="a", quality=1.0, time=NOW))
    all_of_it.step()
    assert counts(record) == [0, 1, 0, 0, 0]
    record.stop()


def test_the_record_deletes_by_itself_while_it_writes(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 3)
    record = filled(database)
    record.stop()
    late = [Record(database, record_days=30.0, clock=lambda: NOW + 29.5 * DAY) for _ in range(2)]
    for one in late:
        one.start()
    end = time.monotonic() + 20
    number = 100
    while counts(late[0])[1] > 12:
        assert time.monotonic() < end
        late[0].add(row(number, time=NOW + 29 * DAY))
        number += 1
        time.sleep(0.01)
    for one in late:
        one.stop()
        assert not one.trouble
    assert counts(late[0])[:2] == [12 + number - 100, 12]
    late[0].engine.dispose()


def test_one_worker_deletes_decisions_and_the_others_do_not_wait(database: str) -> None:
    if not database.startswith("postgresql"):
        pytest.skip("an SQLite file has one writer at a time, who waits for its turn")
    record = filled(database)
    retention = Retention(record.engine, text_days=None, record_days=0.5, clock=lambda: NOW)
    with record.engine.connect() as connection, alone(connection, "forget"):
        assert retention.step() == module._EVERY
    assert counts(record) == [20] * 5
    retention.step()
    assert counts(record) == [12] * 5
    record.stop()


@pytest.mark.parametrize("days", [0.0, -1.0, float("inf"), float("nan")])
def test_a_time_that_is_none_is_refused(days: float, tmp_path) -> None:
    with pytest.raises(ValueError, match="record_days: expected days above 0"):
        Record(str(tmp_path / "g.db"), record_days=days)
