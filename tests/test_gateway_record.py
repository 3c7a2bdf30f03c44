import asyncio
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import event, insert, select
from sqlalchemy.exc import OperationalError
from starlette.applications import Starlette
from starlette.testclient import TestClient

from deferral.gateway import record as record_module
from deferral.gateway import retention as retention_module
from deferral.gateway.batch import Feedback, _kept
from deferral.gateway.database import connect
from deferral.gateway.dialects import alone
from deferral.gateway.endpoints import error_handlers, routes
from deferral.gateway.forgetting import forget_some
from deferral.gateway.keys import ANYONE, Key
from deferral.gateway.preparing import prepare
from deferral.gateway.record import Record
from deferral.gateway.replies import Replies
from deferral.gateway.schema import alarms, decisions, feedback, texts
from deferral.gateway.status import status
from tests.gateway_rows import row
from tests.postgres_server import fresh_database


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gateway.db"


@pytest.fixture
def record(database: str) -> Iterator[Record]:
    made = Record(database)
    made.start()
    yield made
    made.stop()


def rows_of(where: Path | str, table=decisions) -> list:
    engine = connect(str(where))
    prepare(engine)
    with engine.connect() as connection:
        found = connection.execute(select(table)).all()
    engine.dispose()
    return found


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def test_a_row_comes_back_as_it_was(record: Record, database: str) -> None:
    written = row(
        1,
        reply_id="chatcmpl-1",
        best_price=1e-3,
        kind="r-3",
        draw=0.25,
        expected_cost={"small": 0.6, "large": math.inf},
        streamed=True,
    )
    record.add(written)
    record.stop()
    (found,) = rows_of(database)
    same = set(decisions.c.keys()) - {"expected"}
    assert {name: getattr(found, name) for name in same} == {name: getattr(written, name) for name in same}
    assert json.loads(found.expected) == {"small": [0.5, 1e-4, 0.6], "large": [0.9, 1e-3, None]}
    assert rows_of(database, texts) == []


def test_who_gave_a_reply_is_known_where_one_expert_gave_it(record: Record) -> None:
    for number, (name, key) in enumerate([("small", "a"), ("large", "b"), ("small", "c"), ("small", "c")]):
        record.add(row(number, reply_id="r1", expert=name, key=key))
    record.add(row(9, reply_id="", expert="small", key="a"))
    until(lambda: not record.waiting)

    replies = Replies(record.engine)

    async def ask() -> list[str | None]:
        asked = [("r1", "a"), ("r1", "b"), ("r1", "c"), ("r1", ""), ("r2", "a"), ("r1\ud800\0", "a")]
        return await asyncio.gather(*(replies.answered_by(identity, key=key) for identity, key in asked))

    assert asyncio.run(ask()) == ["small", "large", "small", None, None, None]
    replies.close()


def test_what_clients_and_upstreams_send_cannot_spoil_a_row(record: Record, database: str) -> None:
    record.add(
        row(
            1,
            requested="\ud800\0" * 500,
            reply_id="x" * 900,
            reason="naïve \udfff",
            input_tokens=10**40,
            output_tokens=-5,
            price=math.nan,
            propensity=math.nan,
            best_price=math.inf,
            first_byte_s=math.nan,
            expected_quality={'a "b"': 0.5},
        )
    )
    record.stop()
    (found,) = rows_of(database)
    assert found.requested == "?\ufffd" * 100
    assert (found.reason, len(found.reply_id)) == ("naïve ?", 200)
    assert (found.input_tokens, found.output_tokens, found.price) == (2**53, 0, 0.0)
    assert (found.propensity, found.best_price, found.first_byte_s) == (None, None, None)
    assert json.loads(found.expected) == {'a "b"': [0.5, None, None]}


def test_closing_writes_all_that_is_waiting(database: str) -> None:
    made = Record(database)
    for number in range(450):
        made.add(row(number))
    made.start()
    for number in range(450, 900):
        made.add(row(number))
    asyncio.run(made.close())
    assert {found.id for found in rows_of(database)} == {f"id-{number}" for number in range(900)}


def test_a_row_that_cannot_be_written_takes_no_other_with_it(database: str, caplog: pytest.LogCaptureFixture) -> None:
    made = Record(database, store_text=True, retention_days=1e6)
    for number in [*range(7), 3, *range(7, 12)]:
        made.add(row(number))
    made.add(row(12, price="much"))
    made.add(row(13))
    made.start()
    made.stop()
    assert len(rows_of(database)) == 13
    assert sum("a row is left out" in entry.message for entry in caplog.records) == 2
    assert "question" not in caplog.text


def test_feedback_is_of_the_response_and_the_key_that_asked(record: Record, database: str) -> None:
    async def say() -> list[bool]:
        said = [("id-1", 0.25, "k"), ("reply-2", 1, "k"), ("id-1", 0.5, ""), ("nothing", 1, "k"), ("", 1, "k"), ("id-3", 1, "k")]
        said += [("\ud800\0", 1, "k"), ("x" * 10_000, 1, "k")]
        said += [("reply-2", 1, "other"), ("twice", 1, "k"), ("id-1", 0.75, "k")]
        return await asyncio.gather(*(record.feedback(one, quality, source_key=key) for one, quality, key in said))

    for number, (key, reply) in enumerate(
        [("k", ""), ("k", ""), ("k", "reply-2"), ("other", ""), ("k", "twice"), ("k", "twice")]
    ):
        record.add(row(number, key=key, reply_id=reply))
    assert asyncio.run(say()) == [True, True, True, *[False] * 7, True]
    kept = {(found.decision, found.key): found.quality for found in rows_of(database, feedback)}
    assert kept == {("id-1", "k"): 0.75, ("id-1", ""): 0.5, ("id-2", "k"): 1.0}
    for wrong in (-0.1, 1.1, math.nan, True, "1"):
        with pytest.raises(ValueError, match="quality: expected a number in"):
            asyncio.run(record.feedback("id-1", wrong, source_key="k"))


def test_feedback_that_no_float_can_hold_is_refused_and_an_id_that_no_text_can_hold_is_answered() -> None:
    async def admitted(key: Key) -> None: ...

    async def kept(identity: str, quality: float, *, source_key: str) -> bool:
        return True

    gateway = SimpleNamespace(
        access=SimpleNamespace(client=lambda scope, headers: ANYONE),
        limits=SimpleNamespace(admitted=admitted),
        record=SimpleNamespace(feedback=kept),
    )
    app = Starlette(routes=routes(gateway), exception_handlers=error_handlers())  # type: ignore[arg-type]
    with TestClient(app) as client:
        for number in ("1" + "0" * 400, "-1" + "0" * 400, "NaN", "1e400"):
            answer = client.post("/v1/feedback", content=f'{{"id": "x", "quality": {number}}}')
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_feedback")
        answer = client.post("/v1/feedback", content=b'{"id": "a\\ud800", "quality": 1}')
        assert (answer.status_code, answer.json()["id"]) == (200, "a?")


def test_feedback_may_come_before_its_row(record: Record, database: str) -> None:
    async def say() -> bool:
        asyncio.get_running_loop().call_later(0.05, record.add, row(1))
        return await record.feedback("id-1", 1.0, source_key="")

    assert asyncio.run(say())
    assert [found.decision for found in rows_of(database, feedback)] == ["id-1"]


def test_text_is_kept_only_where_that_is_switched_on_and_then_for_its_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"store_text": True}, {"retention_days": 0.0}, {"retention_days": math.inf}):
        with pytest.raises(ValueError, match="retention_days"):
            Record(str(path), **wrong)
    now, day = 1e9, 86400.0
    monkeypatch.setattr(retention_module, "_AT_ONCE", 2)
    made = Record(str(path), store_text=True, retention_days=3.0, clock=lambda: now)
    made.start()
    for number, age in enumerate([5, 4, 3.1, 2.9, 1, 0]):
        made.add(row(number, time=now - age * day, query=f"my secret is {number}!"))
    made.add(row(9, time=now, query=None))
    made.stop()
    again = Record(str(path), clock=lambda: now)
    again.start()
    until(lambda: len(rows_of(path, texts)) == 3 and not again._retention.to_scrub)
    assert not any(b"my secret is 0!" in file.read_bytes() for file in path.parent.iterdir())
    assert any(b"my secret is 5!" in file.read_bytes() for file in path.parent.iterdir())
    again.stop()
    shorter = Record(str(path), retention_days=0.5, clock=lambda: now)
    shorter.start()
    until(lambda: [found.query for found in rows_of(path, texts)] == ["my secret is 5!"])
    shorter.stop()
    assert len(rows_of(path)) == 7


def test_a_full_disk_loses_nothing_and_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "_MOST_WAITING", 300)
    made = Record(str(path))
    made.start()
    pages = {"most": 30}
    limit = lambda connection, *_: connection.execute(f"PRAGMA max_page_count = {pages['most']}").close()  # noqa: E731
    event.listen(made.engine, "checkout", limit)
    sent = 0
    while not made.full:
        made.add(row(sent))
        sent += 1
        time.sleep(0.0005)
        assert sent < 5000
    until(lambda: "full" in made.trouble)
    with pytest.raises(TimeoutError, match="not kept"):
        asyncio.run(made.feedback("id-1", 1.0, source_key=""))
    pages["most"] = 10**6
    until(lambda: not made.full and not made.trouble)
    made.stop()
    assert {found.id for found in rows_of(path)} == {f"id-{number}" for number in range(sent)}


def test_a_database_that_does_not_answer_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(record_module, "_LONGEST_SILENCE", 0.05)
    made, answers = Record(str(path)), threading.Event()
    made.start()
    transaction = made._transaction
    monkeypatch.setattr(made, "_transaction", lambda batch: answers.wait(20) and transaction(batch))
    made.look()
    assert not made.trouble
    made.add(row(1))
    until(lambda: made.look() or "it has not answered for" in made.trouble)
    assert "1 rows are waiting" in caplog.records[-1].message
    answers.set()
    until(lambda: not made.waiting)
    made.look()
    assert not made.trouble
    made.stop()
    assert not made.lost


def test_rows_wait_while_the_file_is_gone_or_another(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "_FIRST_RETRY", 0.01)
    made, away = Record(str(path)), tmp_path / "away.db"
    made.start()
    made.add(row(1))
    until(lambda: not made.waiting)
    path.rename(away)
    made.look()
    assert "the file is gone, or is another" in made.trouble, "nobody has asked in the meantime"
    made.add(row(2))
    until(lambda: made._writing.why != "")
    path.touch()
    time.sleep(0.05)
    assert made.waiting == 1
    away.replace(path)
    until(lambda: not made.waiting)
    made.look()
    assert not made.trouble
    monkeypatch.setattr(record_module, "_BACK_EVERYWHERE", 600.0)
    with pytest.raises(TimeoutError, match="only just come back"):  # Another process may have its row still in memory.
        asyncio.run(made.feedback("id-3", 1.0, source_key=""))
    assert asyncio.run(made.feedback("id-2", 1.0, source_key=""))
    monkeypatch.setattr(record_module, "_BACK_EVERYWHERE", 0.0)
    assert not asyncio.run(made.feedback("id-3", 1.0, source_key=""))
    made.stop()
    assert {found.id for found in rows_of(path)} == {"id-1", "id-2"}


def test_a_deletion_that_failed_once_is_no_trouble_any_more(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, may_go_on, steps = Record(str(path)), threading.Event(), []
    monkeypatch.setattr(record_module, "_LAST_RETRY", 0.01)

    def step() -> float:
        steps.append(made.trouble)
        if not may_go_on.is_set():
            raise OperationalError("x", {}, Exception("away"))
        return 60.0

    monkeypatch.setattr(made._retention, "step", step)
    made.start()
    until(lambda: "cannot be deleted, Exception: away" in made.trouble)
    made.add(row(1))
    until(lambda: not made.waiting)
    count = len(steps)
    until(lambda: len(steps) > count + 1)
    assert all(steps[1:]), "what was written hides no deletion that fails"
    may_go_on.set()
    until(lambda: not made.trouble)
    made.stop()


def test_feedback_waits_for_nobody_and_is_not_kept_on_what_is_being_deleted(postgres: str) -> None:
    with fresh_database(postgres, "test_feedback_in_the_moment_of_a_deletion") as url:
        made = Record(url)
        made.start()
        made.add(row(1, reply_id="reply-1"))
        made.add(row(2))
        until(lambda: not made.waiting)
        other = connect(url)
        with other.connect() as connection, alone(connection, "forget"):
            assert forget_some(connection, decisions.c.id == "id-1", 1).decisions == 1
            for known in ("id-1", "reply-1"):
                assert not asyncio.run(made.feedback(known, 1.0, source_key=""))
            assert asyncio.run(made.feedback("id-2", 1.0, source_key=""))
        made.add(row(3))
        made.stop()
        assert [found.decision for found in rows_of(url, feedback)] == ["id-2"]
        # The other way round the deletion waits, and finds what was said.
        with other.connect() as connection, other.connect() as deleting:
            assert _kept(connection, [Feedback("id-3", 0.5, "", 1.0, lambda known: None)])[0][1]
            deleting.exec_driver_sql("SET lock_timeout = '100ms'")
            with pytest.raises(OperationalError, match="lock timeout"):
                forget_some(deleting, decisions.c.id == "id-3", 1)
            deleting.rollback()
            connection.commit()
            assert forget_some(deleting, decisions.c.id == "id-3", 1).feedback == 1
        other.dispose()


def test_a_writer_that_has_failed_takes_no_more_requests(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Record(str(path))
    monkeypatch.setattr(made, "_clean", lambda: 1 / 0)
    made.start()
    until(lambda: made.full)
    assert made.trouble == "the writer has ended"
    with pytest.raises(TimeoutError, match="not kept"):
        asyncio.run(made.feedback("id-1", 1.0, source_key=""))
    made.stop()


def test_a_locked_database_that_stays_locked_is_given_up_at_the_end(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = Record(str(path))
    event.listen(made.engine, "checkout", lambda connection, *_: connection.execute("PRAGMA busy_timeout = 0").close())
    made.start()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for number in range(5):
        made.add(row(number))
    until(lambda: "locked" in made.trouble)
    made.stop(timeout=0.0)
    other.execute("ROLLBACK")
    other.close()
    assert rows_of(path) == []
    assert made.lost == 5
    assert "5 rows are lost" in caplog.records[-1].message


def test_status_adds_up(record: Record) -> None:
    for number in range(10):
        large = number % 5 == 0
        name = "large" if large else "small"
        record.add(row(number, expert=name, price=1e-3 if large else 1e-4, best_price=1e-3, latency_s=0.5, fast_path=large))
    record.add(row(10, expert="", outcome="error", price=0.0))
    record.add(row(11, requested="large", expert="large", price=1.0, estimated=True, streamed=True, outcome="truncated"))
    record.add(row(12, time=5.0))
    record.add(row(13, expert="", outcome="refused", price=0.0, estimated=True, status=429))
    record.add(row(14, expert="small", outcome="error", price=0.0, estimated=True, status=400, latency_s=0.5))
    for one, quality in (("id-1", 1.0), ("id-2", 0.0), ("id-5", 1.0)):
        assert asyncio.run(record.feedback(one, quality, source_key=""))
    found = status(record.engine, [], since=10.0)
    assert (found.requests, found.routed, found.streamed, found.estimated, found.fast_path) == (14, 13, 1, 1, 2)
    assert found.price == pytest.approx(8 * 1e-4 + 2 * 1e-3 + 1.0)
    assert (found.saving, found.saving_requests) == (pytest.approx(8 * 9e-4), 10)
    assert found.outcomes == {"ok": 10, "error": 2, "truncated": 1, "refused": 1}
    shares = {share.expert: share for share in found.shares}
    assert {name: share.requests for name, share in shares.items()} == {"small": 9, "large": 3, "": 2}
    assert [shares[name].failed for name in ("small", "large", "")] == [1, 1, 1]
    assert (shares["small"].judged, shares["small"].mean_quality, shares["small"].mean_latency_s) == (2, 0.5, 0.5)
    assert (found.judged, found.mean_quality) == (3, pytest.approx(2 / 3))
    json.dumps(asdict(found))
    assert "$1.00 spent" in found.summary(24)
    assert "$0.00720 saved" in found.summary(24)
    assert "alarm" not in found.summary(24)
    rings = {"name": "quality", "expert": "small", "rows": 200, "found": -0.5, "low": -0.6, "high": -0.4, "since": 60.0}
    with record.engine.begin() as connection:
        connection.execute(insert(alarms), [{**rings, "ringing": True}, {**rings, "expert": "large", "ringing": False}])
    assert (
        status(record.engine, [], since=10.0).summary(24).endswith("alarm: Falling quality of small, since 1970-01-01 00:01 UTC")
    )
    empty = status(record.engine, [], since=1e12)
    assert (empty.requests, empty.price, empty.mean_quality, empty.shares) == (0, 0.0, None, ())


WRITER = """
import asyncio, os, sys, time
from deferral.gateway.record import Record
from tests.gateway_rows import row

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

async def write():
    record = Record(sys.argv[1])
    record.start()
    async def judge(number):
        if await record.feedback(f"id-{number}", 0.5, source_key=""):
            say("judged", number)
    number, tasks = 0, set()
    while True:
        record.add(row(number))
        say("added", number, time.monotonic())
        if number % 20 == 10:
            tasks.add(asyncio.create_task(judge(number - 10)))
        number += 1
        await asyncio.sleep(0.002)

asyncio.run(write())
"""


@pytest.mark.ci_slow
def test_killed_it_loses_the_last_tenth_of_a_second_and_no_feedback(path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            lines.append(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        lines += process.stdout.read().splitlines()
    words = [line.split() for line in lines if line.strip()]
    added = {f"id-{number}": float(at) for kind, number, *rest in words if kind == "added" for at in rest}
    judged = {f"id-{number}" for kind, number, *_ in words if kind == "judged"}
    assert len(added) > 50
    assert len(judged) > 2
    kept = {found.id for found in rows_of(path)}
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    assert judged <= {found.decision for found in rows_of(path, feedback)}
    last = max(added.values())
    missing = {one: last - at for one, at in added.items() if one not in kept}
    assert max(missing.values(), default=0.0) <= 0.1
    # What is there is a beginning without gaps.
    assert kept == {f"id-{number}" for number in range(len(kept))}
