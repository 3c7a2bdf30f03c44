"""What is deleted is gone, from the files too, and what it cost is still spent."""

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import event, func, insert, select
from starlette.applications import Starlette
from starlette.testclient import TestClient

from deferral.cli import main
from deferral.gateway import forgetting as module
from deferral.gateway import ledger, state
from deferral.gateway import retention as retention_module
from deferral.gateway.admin import routes
from deferral.gateway.app import gateway
from deferral.gateway.database import connect
from deferral.gateway.endpoints import error_handlers
from deferral.gateway.experts_file import Expert
from deferral.gateway.forgetting import Forgotten, forget
from deferral.gateway.keys import Key, Keys
from deferral.gateway.ledger import recorded
from deferral.gateway.limits import Limits
from deferral.gateway.record import Record
from deferral.gateway.schema import decisions, feedback, forgotten, texts
from deferral.gateway.settings import Settings
from deferral.gateway.windows import span, time_zone
from tests.gateway_rows import row
from tests.running_gateway import small_router

NOW = time.time()


def filled(database: str, count: int = 20) -> Record:
    """Rows of the keys "a" and "b" in turn, each with its text, and judged by its key."""
    made = Record(database, store_text=True, retention_days=30.0)
    made.start()
    for number in range(count):
        key = "ab"[number % 2]
        made.add(row(number, time=NOW, key=key, price=0.25, query=f"my secret {number}!", reply_id=f"reply-{number}"))

    async def judge() -> None:
        for number in range(4):
            assert await made.feedback(f"id-{number}", 0.5, source_key="ab"[number % 2])

    asyncio.run(judge())
    return made


def gateway_of(record: Record, **more: Any) -> Any:
    async def forgotten_by(**which: Any) -> Forgotten:
        return await asyncio.to_thread(forget, record.engine, **which)

    return SimpleNamespace(record=record, query=asyncio.to_thread, forget=forgotten_by, **more)


def counts(record: Record) -> list[int]:
    with record.engine.connect() as connection:
        return [connection.execute(select(func.count()).select_from(t)).scalar_one() for t in (decisions, feedback, texts)]


def test_a_key_is_forgotten_and_has_spent_what_it_spent(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 3)
    record, seen = filled(database), []
    assert forget(record.engine, key="a", progress=seen.append) == Forgotten(10, 2, 10)
    assert [so_far.decisions for so_far in seen] == [3, 6, 9, 10]
    assert counts(record) == [10, 2, 10]
    assert forget(record.engine, key="a") == Forgotten()
    assert record.spent("a", span("hour", NOW, time_zone("Asia/Kathmandu")).start) == 2.5
    assert record.spent("a", (NOW // 900 + 1) * 900) == 0, "it counts in the quarter of an hour in which it was spent"
    assert record.spent("b", NOW) == 2.5
    assert Limits(record).left(Key("a", "a", budget=3.0, window="month")) == 0.5
    for wrong in ({}, {"key": "a", "response": "b"}):
        with pytest.raises(ValueError, match="either a key or a response"):
            forget(record.engine, **wrong)
    record.stop()


def test_an_empty_id_is_not_that_of_all_who_have_none(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    record, store = filled(database), Keys(database)
    record.add(row(99, time=NOW, key="", query="mine", reply_id=""))
    record.stop()
    before = counts(record)
    assert before[0] == 21
    with pytest.raises(ValueError, match="got an empty one"):
        forget(record.engine, response="")
    store.start()
    gateway = gateway_of(record, keys=store)
    app = Starlette(routes=routes(gateway), exception_handlers=error_handlers())
    with TestClient(app) as client:
        for path in ("/responses/", "/keys/dk-/record"):
            assert client.delete(path).json()["error"]["code"] == "no_id"
    for option in (["--response", ""], ["--key", "dk-"]):
        with pytest.raises(SystemExit) as ended:
            main(["gateway", "forget", *option, "--yes", "--database", database])
        assert ended.value.code
        assert "got an empty one" in capsys.readouterr().err
    assert counts(record) == before
    store.close()
    record.stop()


def test_a_response_is_forgotten_by_either_id(database: str) -> None:
    record = filled(database)
    assert forget(record.engine, response="id-1") == Forgotten(1, 1, 1)
    assert forget(record.engine, response="reply-3") == Forgotten(1, 1, 1)
    for unknown in ("nothing", "\0"):
        assert forget(record.engine, response=unknown) == Forgotten()
    assert forget(record.engine, key="\0") == Forgotten()
    assert counts(record) == [18, 2, 18]
    assert record.spent("b", 0.0) == 2.5
    record.stop()


def test_what_moves_while_it_is_counted_counts_once(database: str) -> None:
    record, other, moved = filled(database), connect(database), []

    def move(connection: object, cursor: object, statement: str, *_: object) -> None:
        if "FROM forgotten" in statement and not moved:
            moved.append(forget(other, key="a"))

    event.listen(record.engine, "before_cursor_execute", move)
    assert record.spent("a", 0.0) == 2.5
    assert moved == [Forgotten(10, 2, 10)]
    other.dispose()
    record.stop()


def test_the_sums_of_many_keys_are_those_of_each(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_AT_ONCE", 2)
    record = filled(database)
    forget(record.engine, response="id-0")
    for since in (0.0, NOW, NOW + 900):
        assert record.spent_by_key(["a", "nobody", "b"], since) == {
            name: record.spent(name, since) for name in ("a", "nobody", "b")
        }
    assert record.spent_by_key(["a"], 0.0) == {"a": 2.5}
    gate, key = Limits(record), Key("a", "a", budget=3.0, window="month")
    monkeypatch.setattr(record, "spent", lambda *_: pytest.fail("it was read with those of the others"))
    gate.load([key, Key("c", "c", budget=1.0, window="hour"), Key("d", "d")])
    assert gate.left(key) == 0.5
    record.stop()


def test_a_deletion_goes_on_as_long_as_it_takes_and_ends_with_the_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    monkeypatch.setattr(state, "_LONGEST_QUERY", 0.01)
    filled(str(tmp_path / "g.db")).stop()
    experts = {name: Expert(name, "http://127.0.0.1:9/v1") for name in ("small", "large")}
    key = "an-admin-key-of-some-length"
    app = gateway(small_router(), experts, settings=Settings(database=str(tmp_path / "g.db"), admin_key=key))
    with TestClient(app, headers={"authorization": f"Bearer {key}"}) as client:
        gone = client.delete("/admin/keys/a/record")
        assert gone.json() == {"deleted": {"decisions": 10, "feedback": 2, "texts": 10}}
        app.state.gateway._ends.set()
        ended = client.delete("/admin/keys/b/record")
        assert (ended.status_code, ended.json()["error"]["code"]) == (503, "server_ends")
        assert (
            "1 decisions, 1 judgements and 1 texts are deleted, and the same request goes on" in ended.json()["error"]["message"]
        )


def test_an_id_that_several_replies_had_is_not_forgotten_for_all(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = filled(database)
    for number in (50, 51):
        record.add(row(number, time=NOW, key="ab"[number % 2], reply_id="same"))
    record.add(row(52, time=NOW, key="a", reply_id="id-50"))
    record.stop()
    before = counts(record)
    with pytest.raises(ValueError, match="'same' is the id of several replies; say which by its x-deferral-id: id-50, id-51"):
        forget(record.engine, response="same")
    gateway = gateway_of(record)
    app = Starlette(routes=routes(gateway), exception_handlers=error_handlers())
    with TestClient(app) as client:
        answer = client.delete("/responses/same")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "ambiguous_id")
    with pytest.raises(SystemExit) as ended:
        main(["gateway", "forget", "--response", "same", "--database", database])
    assert ended.value.code == 2
    assert "id-50, id-51" in " ".join(capsys.readouterr().err.split())
    assert counts(record) == before
    # The gateway's own id comes first, whatever replies were called.
    assert forget(record.engine, response="id-50").decisions == 1
    assert forget(record.engine, response="same").decisions == 1
    assert forget(record.engine, response="id-50").decisions == 1
    assert counts(record)[0] == 20
    record.patient.dispose()
    record.engine.dispose()


def test_a_name_is_no_id_and_nothing_is_deleted_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    database = str(tmp_path / "gateway.db")
    record, store = filled(database), Keys(database)
    key = store.create("alice")[1]
    record.add(row(90, time=NOW, key=key.id))
    record.stop()
    asked: list[str] = []
    monkeypatch.setattr("click.confirm", lambda text: asked.append(text))
    for options, words in (
        (["--key", "alice"], f"'alice' is the name of a key; expected its id, {key.id}"),
        ([], "expected either --key or --response"),
        (["--key", "dk-"], "got an empty one"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["gateway", "forget", *options, "--database", database])
        assert ended.value.code == 2
        assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
    with pytest.raises(SystemExit) as ended:
        main(["gateway", "forget", "--response", "id-4711", "--database", database])
    assert ended.value.code == 1
    assert "nothing is on record for 'id-4711'" in capsys.readouterr().err
    assert asked == [], "what is not there need not be confirmed"
    with pytest.raises(SystemExit) as ended:
        main(["gateway", "forget", "--key", key.id, "--database", database])
    assert (ended.value.code, capsys.readouterr().err) == (1, "nothing was deleted\n")
    assert asked == ["Delete 1 decisions and everything that belongs to them?  This cannot be undone."]
    assert counts(record)[0] == 21
    monkeypatch.setattr("click.confirm", lambda text: True)
    main(["gateway", "forget", "--key", key.id, "--database", database])
    assert counts(record)[0] == 20
    store.close()
    record.engine.dispose()


def test_what_is_forgotten_is_in_no_file(tmp_path: Path) -> None:
    record = filled(str(tmp_path / "gateway.db"))
    forget(record.engine, key="a")
    record.stop()
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"my secret 1!" in kept
    assert b"my secret 0!" not in kept
    assert b"my secret 18!" not in kept


def test_what_a_command_deleted_leaves_the_journal_though_a_reader_needed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SCRUBBING", 0.0)
    record, journal = filled(str(tmp_path / "gateway.db")), tmp_path / "gateway.db-wal"
    with record.engine.connect() as reader:
        reader.exec_driver_sql("BEGIN")
        reader.execute(select(func.count()).select_from(texts)).scalar_one()
        forget(record.engine, key="a")
    assert b"my secret 0!" in journal.read_bytes()
    cleaning = retention_module.Retention(record.engine, text_days=30.0, record_days=None)
    assert cleaning.step() == retention_module._EVERY
    assert journal.read_bytes() == b""
    record.stop()


def test_sums_of_months_ago_go_and_each_deletion_adds_to_the_rest(tmp_path: Path) -> None:
    record, day = filled(str(tmp_path / "gateway.db")), 86400.0
    with record.engine.begin() as connection:
        for age in (31, 33):
            connection.execute(insert(forgotten).values(key="z", time=NOW - age * day, price=1.0))
    for response in ("id-0", "id-2"):
        forget(record.engine, response=response)
    retention_module.Retention(record.engine, text_days=None, record_days=None).step()
    with record.engine.connect() as connection:
        kept = connection.execute(select(forgotten.c.key, forgotten.c.price).order_by(forgotten.c.key)).all()
    assert kept == [("a", 0.5), ("z", 1.0)]
    record.stop()


def test_rows_are_written_while_others_are_deleted(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 5)
    record = filled(database, 200)
    deleting = [threading.Thread(target=forget, args=[record.engine], kwargs={"key": "a"}) for _ in range(2)]
    for thread in deleting:
        thread.start()
    for number in range(1000, 1100):
        record.add(row(number, time=NOW, key="b", price=0.25))
        time.sleep(0.001)
    for thread in deleting:
        thread.join()
    record.stop()
    assert counts(record) == [200, 2, 200]
    with record.engine.connect() as connection:
        assert connection.execute(select(func.sum(forgotten.c.price))).scalar_one() == 25
        assert recorded(connection, "a", 0.0) == 25
    record.engine.dispose()


def test_texts_whose_time_is_over_go_in_batches(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention_module, "_AT_ONCE", 7)
    record = filled(database)
    record.stop()
    late = [Record(database, clock=lambda: NOW + 30 * 86400 + 1) for _ in range(2)]
    for one in late:
        one.start()
    end = time.monotonic() + 10
    while counts(late[0])[2]:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not any(one.trouble for one in late)
    for one in late:
        one.stop()
    assert counts(late[0]) == [20, 4, 0]
    late[0].engine.dispose()


def test_an_operator_deletes_by_endpoint_and_by_command(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    record, store = filled(database), Keys(database)
    store.start()
    gateway = gateway_of(record, keys=store)
    app = Starlette(routes=routes(gateway), exception_handlers=error_handlers())
    with TestClient(app) as client:
        assert client.delete("/responses/reply-1").json() == {"deleted": {"decisions": 1, "feedback": 1, "texts": 1}}
        assert client.delete("/responses/reply-1").status_code == 404
        assert client.delete("/keys/dk-a/record").json()["deleted"]["decisions"] == 10
        assert client.delete("/keys/nobody/record").json()["error"]["code"] == "nothing_on_record"
    main(["gateway", "forget", "--response", "id-3", "--yes", "--database", database])
    assert "1 decisions, 1 judgements and 1 texts are deleted" in capsys.readouterr().out
    main(["gateway", "forget", "--key", "dk-b", "--yes", "--database", database])
    assert "8 decisions" in capsys.readouterr().out
    for wrong, words in ((["--key", "b"], "nothing is on record"), ([], "either --key or --response")):
        with pytest.raises(SystemExit) as ended:
            main(["gateway", "forget", *wrong, "--yes", "--database", database])
        assert ended.value.code
        assert words in capsys.readouterr().err
    assert counts(record) == [0, 0, 0]
    store.close()
    record.stop()
