"""Keys in their database: seen by others, kept when it fails, and nobody's when it is another."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from deferral.errors import DataError
from deferral.gateway import keys as keys_module
from deferral.gateway.database import connect
from deferral.gateway.keys import Key, Keys
from deferral.gateway.preparing import prepare
from deferral.gateway.schema import VERSION

GONE = "the file is gone, or is another; put it back, or start the gateway again"


def test_a_new_token_is_not_lost_where_the_database_fails_a_moment_later(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.create("bob")
    with monkeypatch.context() as away:
        away.setattr(keys, "refresh", lambda: (_ for _ in ()).throw(SQLAlchemyError()))
        token, issued = keys.rotate("bob")
    keys.refresh()
    assert keys.find(token) == issued.key


def test_a_key_is_not_lost_where_the_database_fails_right_after_it_was_made(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as away:
        away.setattr(keys, "refresh", lambda: (_ for _ in ()).throw(OperationalError("select", {}, Exception("away"))))
        token, key = keys.create("bob")
    keys.refresh()
    assert keys.find(token) == key


def test_changes_at_the_same_time_are_all_kept(shared_keys: Keys) -> None:
    _, key = shared_keys.create("bob", budget=1.0)
    settings = [{"budget": 5.0}, {"requests_per_minute": 7}, {"window": "day"}, {"experts": frozenset({"a"})}]
    with ThreadPoolExecutor(len(settings)) as pool:
        for made in [pool.submit(shared_keys.change, key.id, **setting) for setting in settings]:
            made.result()
    assert list(shared_keys) == [Key(key.id, "bob", frozenset({"a"}), 7, 5.0, "day")]


def test_no_file_holds_a_token_or_its_secret(keys: Keys, tmp_path: Path) -> None:
    token, _ = keys.create("bob")
    secret = token.split("-", 2)[2].encode()
    files = list(tmp_path.iterdir())
    assert sum(b"bob" in path.read_bytes() for path in files) >= 1
    assert not any(secret in path.read_bytes() for path in files)
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    assert token not in repr(keys.list())


def test_another_process_sees_new_and_revoked_keys(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deferral.gateway.keys._REFRESH", 0.01)
    serving = Keys(str(tmp_path / "gateway.db"))
    serving.start()
    try:
        token, key = keys.create("bob")
        refreshed = _count_reads(serving)
        refreshed.acquire_after(3)
        assert serving.find(token) == key
        keys.revoke(key.id)
        refreshed.acquire_after(3)
        assert serving.find(token) is None
    finally:
        serving.close()


def test_keys_stay_valid_while_the_database_is_away(keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    token, key = keys.create("bob")
    with keys.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE keys RENAME TO away")
    rounds = iter([False, False, True])
    keys._end.wait = lambda seconds: next(rounds)  # type: ignore[method-assign]
    keys._run()
    assert keys.find(token) == key
    assert len(caplog.records) == 1


def test_keys_of_another_file_are_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keys_module, "_REFRESH", 0.01)
    path = tmp_path / "gateway.db"
    serving = Keys(str(path))
    serving.start()
    token, key = serving.create("alice")
    path.unlink()
    other = Keys(str(path))
    prepare(other.engine)
    strange, _ = other.create("mallory")
    until = time.monotonic() + 10
    while not caplog.records and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    assert [record.message for record in caplog.records] == [f"the keys cannot be read again: Replaced: sqlite:///{path}: {GONE}"]
    assert (serving.find(token), serving.find(strange)) == (key, None)
    serving.close()
    other.close()


def test_what_is_no_database_is_said_so(tmp_path: Path) -> None:
    for url in (
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory",
        "nonsense://x",
        "mysql+nothing://u:secret@h/x",
    ):
        with pytest.raises(ValueError, match="database: expected the path of a file") as error:
            connect(url)
        assert "secret" not in str(error.value)
    (tmp_path / "text").write_text("no database, but text that is long enough to be looked at\n" * 20)
    with pytest.raises(DataError, match="file is not a database"):
        prepare(connect(str(tmp_path / "text")))
    with pytest.raises(DataError, match="create it first"):
        prepare(connect(str(tmp_path / "nowhere" / "gateway.db")))
    with pytest.raises(DataError, match="there is no database"):
        prepare(connect(str(tmp_path / "misspelt.db")), create=False)
    assert not (tmp_path / "misspelt.db").exists()


def test_many_may_open_a_new_database_at_once(tmp_path: Path) -> None:
    engines = [connect(str(tmp_path / "gateway.db")) for _ in range(8)]
    barrier = threading.Barrier(len(engines))

    def open_it(engine: Engine) -> None:
        barrier.wait()
        prepare(engine)

    with ThreadPoolExecutor(len(engines)) as pool:
        assert list(pool.map(open_it, engines)) == [None] * len(engines)
    for engine in engines:
        engine.dispose()


def test_tables_of_another_version_are_left_alone(keys: Keys, tmp_path: Path) -> None:
    with keys.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE schema_version SET version = 99")
        connection.exec_driver_sql("DROP TABLE texts")
    with pytest.raises(DataError, match=f"expected tables of version {VERSION} or older, got 99"):
        prepare(connect(str(tmp_path / "gateway.db")))
    with keys.engine.connect() as connection:
        assert not connection.dialect.has_table(connection, "texts")


class _count_reads:
    """Waits for refreshes that began after it was asked."""

    def __init__(self, store: Keys) -> None:
        self._read = threading.Semaphore(0)
        event.listen(store.engine, "after_cursor_execute", lambda *_: self._read.release())

    def acquire_after(self, count: int) -> None:
        while self._read.acquire(blocking=False):
            pass
        for _ in range(count):
            assert self._read.acquire(timeout=10)
