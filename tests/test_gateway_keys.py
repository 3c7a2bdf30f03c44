import asyncio
import hmac
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from starlette.applications import Starlette
from starlette.testclient import TestClient

from deferral.cli import main
from deferral.errors import DataError
from deferral.gateway import keys as keys_module
from deferral.gateway.admin import routes
from deferral.gateway.database import connect
from deferral.gateway.endpoints import error_handlers
from deferral.gateway.keys import Key, Keys, UnknownKey
from deferral.gateway.preparing import prepare
from deferral.gateway.probe import probe
from deferral.gateway.record import Record
from deferral.gateway.schema import VERSION


@pytest.fixture
def keys(tmp_path: Path):
    store = Keys(str(tmp_path / "gateway.db"))
    prepare(store.engine)
    yield store
    store.close()


@pytest.fixture
def shared_keys(database: str):
    store = Keys(database)
    prepare(store.engine)
    yield store
    store.close()


def test_a_token_opens_what_it_was_made_for(shared_keys: Keys) -> None:
    keys = shared_keys
    assert len(keys) == 0
    token, key = keys.create(
        "bob", experts=["b", "a"], requests_per_minute=60, budget=2, window="week", zone="Europe/Berlin", admin=True
    )
    assert key == Key(key.id, "bob", frozenset({"a", "b"}), 60, 2.0, "week", "Europe/Berlin", True)
    other, plain = keys.create("eve")
    assert plain == Key(plain.id, "eve")
    assert keys.find(token) == key
    assert keys.find(other) == plain
    assert list(keys) == [key, plain]
    assert token.startswith(f"dk-{key.id}-")


def test_only_the_whole_token_opens(keys: Keys) -> None:
    token, key = keys.create("bob")
    other, _ = keys.create("eve")
    mixed = f"dk-{key.id}-{other.split('-', 2)[2]}"
    changed = token[:-1] + ("A" if token[-1] != "A" else "B")
    for wrong in (
        mixed,
        changed,
        token[:-1],
        token + "x",
        token.upper(),
        key.id,
        f"dk-{key.id}",
        "",
        "-",
        "--",
        "dk--",
        "é\ud800",
    ):
        assert keys.find(wrong) is None


def test_tokens_are_compared_in_constant_time(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash that is compared byte by byte until the first difference would tell how near a guess is."""
    token, key = keys.create("bob")
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda *pair: (compared.append(pair), compare(*pair))[1])
    assert keys.find(token) == key
    assert keys.find(f"dk-{key.id}-guess") is None
    assert keys.find("dk-nobody-guess") is None
    assert len(compared) == 3


def test_a_changed_key_is_the_same_key(shared_keys: Keys) -> None:
    keys = shared_keys
    token, key = keys.create("bob", experts=["a"], requests_per_minute=60, budget=2)
    with pytest.raises(UnknownKey):
        keys.change("b\0b", budget=5)
    assert keys.change(key.id, budget=5) == (key, replace(key, budget=5.0))
    assert keys.find(token) == replace(key, budget=5.0)
    everything = {
        "name": "eve",
        "experts": None,
        "requests_per_minute": None,
        "budget": None,
        "window": "day",
        "zone": "Asia/Tokyo",
    }
    # By its name, and by the prefix that is shown.
    _, after = keys.change("bob", **everything)
    assert after == Key(key.id, "eve", window="day", zone="Asia/Tokyo")
    assert keys.change(f"dk-{key.id}", experts={"b", "c"})[1].experts == frozenset({"b", "c"})
    assert [issued.key for issued in keys.list()] == [keys.find(token)]


def test_a_change_that_makes_no_sense_changes_nothing(keys: Keys) -> None:
    token, key = keys.create("bob", budget=2)
    twins = [keys.create("twin")[1].id for _ in range(2)]
    keys.revoke(keys.create("gone")[1].id)
    before = keys.list()
    for settings, message in WRONG:
        with pytest.raises(ValueError, match=message):
            keys.change("bob", **({"budget": 9} | settings))
    for settings, message in (
        ({}, "nothing to change; expected one of name, experts"),
        ({"admin": True}, "admin: not to be changed"),
    ):
        with pytest.raises(ValueError, match=message):
            keys.change("bob", **settings)
    for name, message in {
        "nobody": "'nobody' is neither the id nor the name",
        "gone": r"\(gone\) is revoked, which is for good",
        "twin": f"'twin' is the name of 2 keys; say which by its id, (?={twins[0]}|{twins[1]})",
    }.items():
        with pytest.raises(UnknownKey, match=message):
            keys.change(name, budget=9)
        with pytest.raises(UnknownKey, match=message):
            keys.rotate(name)
    for hours in (-1, float("nan"), float("inf"), 9000, True, "1"):
        with pytest.raises(ValueError, match="grace_hours: expected hours from 0"):
            keys.rotate("bob", grace_hours=hours)  # type: ignore[arg-type]
    assert keys.list() == before
    assert keys.find(token) == key
    # A name is free again when its key is revoked.
    keys.revoke(twins[0])
    assert keys.change("twin", budget=9)[1].id == twins[1]


def test_a_rotated_key_has_another_token_and_the_old_one_as_long_as_was_said(
    shared_keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = shared_keys
    first, key = keys.create("bob", budget=2)
    second, issued = keys.rotate("bob")
    assert (issued.key, issued.former_until) == (key, None)
    assert (keys.find(first), keys.find(second)) == (None, key)
    third, issued = keys.rotate(key.id, grace_hours=2)
    assert issued.former_until == pytest.approx(time.time() + 7200, abs=60)
    assert keys.list() == [issued]
    assert (keys.find(first), keys.find(second), keys.find(third)) == (None, key, key)
    assert keys.find(f"{second[:-1]}{'A' if second[-1] != 'A' else 'B'}") is None
    # What may change meanwhile holds for both.
    _, key = keys.change("bob", budget=3)
    assert (keys.find(second), keys.find(third)) == (key, key)
    with monkeypatch.context() as later:
        later.setattr("deferral.gateway.keys.time.time", lambda: issued.former_until)
        assert (keys.find(second), keys.find(third)) == (None, key)
    # A third token ends the oldest: two are valid at most.
    fourth, _ = keys.rotate("bob", grace_hours=0.5)
    assert [keys.find(token) for token in (first, second, third, fourth)] == [None, None, key, key]
    fifth, _ = keys.rotate("bob")
    assert [keys.find(token) for token in (third, fourth, fifth)] == [None, None, key]
    keys.rotate("bob", grace_hours=1)
    keys.revoke(key.id)
    assert keys.find(fifth) is None


def test_former_tokens_are_compared_in_constant_time_and_stored_as_hashes(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    first, key = keys.create("bob")
    second, _ = keys.rotate("bob", grace_hours=1)
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda *pair: (compared.append(pair), compare(*pair))[1])
    assert keys.find(first) == key
    assert len(compared) == 2
    for token in (first, second):
        secret = token.split("-", 2)[2]
        assert not any(secret.encode() in path.read_bytes() for path in tmp_path.iterdir())
        assert secret not in caplog.text + repr(keys.list()) + repr(keys._found)


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
    _, key = shared_keys.create("bob")
    settings = [{"budget": 5.0}, {"requests_per_minute": 7}, {"window": "day"}, {"experts": frozenset({"a"})}]
    with ThreadPoolExecutor(len(settings)) as pool:
        for made in [pool.submit(shared_keys.change, key.id, **setting) for setting in settings]:
            made.result()
    assert list(shared_keys) == [Key(key.id, "bob", frozenset({"a"}), 7, 5.0, "day")]


def test_a_revoked_key_opens_nothing_and_stays_on_the_list(shared_keys: Keys) -> None:
    keys = shared_keys
    token, key = keys.create("bob")
    _, other = keys.create("eve")
    assert keys.revoke(f"dk-{key.id}")
    assert keys.find(token) is None
    assert not keys.revoke(key.id)
    assert not keys.revoke("nobody")
    assert not keys.revoke("\0")
    listed = keys.list()
    assert [issued.key for issued in listed] == [key, other]
    assert [issued.revoked is None for issued in listed] == [False, True]
    assert listed[0].prefix == f"dk-{key.id}"


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


WRONG = [
    ({"name": ""}, "name: expected up to 200 printable"),
    ({"name": "a\nb"}, "name: expected up to 200 printable"),
    ({"name": "x" * 201}, "name: expected up to 200 printable"),
    ({"experts": "small"}, "experts: expected names"),
    ({"experts": [1]}, "experts: expected names"),
    ({"experts": ["\ud800"]}, "experts: expected names"),
    ({"experts": []}, "experts: expected at least one"),
    ({"requests_per_minute": 0}, "requests_per_minute: expected a whole"),
    ({"requests_per_minute": True}, "requests_per_minute: expected a whole"),
    ({"requests_per_minute": 1.5}, "requests_per_minute: expected a whole"),
    ({"budget": 0.0}, "budget: expected dollars above 0"),
    ({"budget": float("nan")}, "budget: expected dollars above 0"),
    ({"budget": float("inf")}, "budget: expected dollars above 0"),
    ({"budget": 10**400}, "budget: expected dollars above 0"),
    ({"window": "year"}, "window: expected one of hour, day, week, month"),
    ({"zone": "Mars/Olympus"}, "time zone: expected a name"),
]


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
    assert [record.message for record in caplog.records] == [f"the keys cannot be read again: sqlite:///{path}: {GONE}"]
    assert (serving.find(token), serving.find(strange)) == (key, None)
    serving.close()
    other.close()


def test_settings_that_make_no_sense_are_refused(keys: Keys) -> None:
    for settings, message in WRONG:
        with pytest.raises(ValueError, match=message):
            keys.create(**{"name": "bob", **settings})
    assert keys.list() == []


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


def test_keys_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    database = ["--database", str(tmp_path / "gateway.db")]

    def run(*arguments: str) -> str:
        main(["gateway", *arguments, *database])
        return capsys.readouterr().out

    with pytest.raises(SystemExit):
        run("keys", "list")
    assert "there is no database" in capsys.readouterr().err
    token = run(
        "keys", "create", "bob [/red]", "--budget", "2.5", "--window", "day", "--zone", "Asia/Tokyo", "--expert", "small"
    ).strip()
    keys = Keys(str(tmp_path / "gateway.db"))
    keys.refresh()
    key = keys.find(token)
    assert key is not None
    assert (key.name, key.budget, key.window, key.zone, key.experts) == (
        "bob [/red]",
        2.5,
        "day",
        "Asia/Tokyo",
        frozenset({"small"}),
    )
    listed = run("keys", "list")
    assert key.id in listed
    assert "$2.5 a day, Asia/Tokyo" in listed
    assert token not in listed
    assert "bob [/red]" in run("status")
    ended_key = keys.create("short")[1].id
    assert "revoked" in run("keys", "revoke", ended_key)
    with pytest.raises(SystemExit) as ended:
        run("keys", "revoke", ended_key)
    assert ended.value.code == 2
    kept = keys.create("twice")[1].id
    with pytest.raises(SystemExit):
        run("keys", "revoke", "twice")
    assert f"'twice' is not a valid key; it is a name, and keys are revoked by their id, {kept}" in " ".join(
        capsys.readouterr().err.split()
    )
    (tmp_path / "experts.toml").write_text('[experts.small]\nbase_url = "http://127.0.0.1:1"\nkey_env = "UNSET"\n', "utf-8")
    with pytest.raises(SystemExit):
        run("keys", "create", "eve", "--expert", "smal", "--experts", str(tmp_path / "experts.toml"))
    assert "has no 'smal'; it has small" in " ".join(capsys.readouterr().err.split())
    assert run("keys", "create", "eve", "--expert", "small", "--experts", str(tmp_path / "experts.toml")).startswith("dk-")
    with pytest.raises(SystemExit):
        run("keys", "create", "eve", "--budget", "1", "--zone", "Mars/Olympus")
    assert "time zone: expected a name" in capsys.readouterr().err
    for option, value in (("--window", "week"), ("--zone", "Asia/Tokyo")):
        with pytest.raises(SystemExit) as ended:
            run("keys", "create", "carol", option, value)
        assert ended.value.code == 2
        assert f"{option} needs --budget" in capsys.readouterr().err
    main(["gateway", "keys", "create", "twice", *database])
    said = capsys.readouterr()
    assert said.out.startswith("dk-")
    assert f"twice had a valid key before, {kept}, which stays valid; `deferral gateway keys set` and `rotate`" in said.err
    main(["gateway", "keys", "create", "short", *database])
    assert "had a valid key before" not in capsys.readouterr().err, "it is revoked"
    assert "window day -> week; budget $2.5 -> $4; a running" in run("keys", "set", key.id, "--budget", "4", "--window", "week")
    assert "already has these settings" in run("keys", "set", key.id, "--budget", "4")
    run("keys", "set", "bob [/red]", "--no-budget", "--any-rate", "--all-experts", "--name", "rob", "--zone", "UTC")
    keys.refresh()
    assert keys.find(token) == Key(key.id, "rob", window="week")
    other = run("keys", "rotate", "rob", "--grace-hours", "2").strip()
    keys.refresh()
    assert keys.find(token) == keys.find(other) == Key(key.id, "rob", window="week")
    listed = run("keys", "list")
    assert "former token until" in listed
    assert token not in listed
    assert other not in listed
    run("keys", "rotate", "rob")
    assert "former" not in run("keys", "list")
    keys.refresh()
    mistakes = {
        "neither the id nor the name of a key; see": ("nobody", "--budget", "3"),
        "is revoked, which is for good": (ended_key, "--budget", "3"),
        "nothing to change": ("eve",),
        "-3.0 is not in the range x>0": ("eve", "--budget", "-3"),
        "0 is not in the range": ("eve", "--requests-per-minute", "0"),
        "expected either --budget or --no-budget": ("eve", "--budget", "3", "--no-budget"),
        "expected either --expert or --all-experts": ("eve", "--expert", "small", "--all-experts"),
        "has no 'smal'; it has small": ("eve", "--expert", "smal", "--experts", str(tmp_path / "experts.toml")),
        "time zone: expected a name": ("eve", "--zone", "Mars/Olympus"),
        "'year' is not one of": ("eve", "--window", "year"),
        "name: expected up to 200 printable": ("eve", "--name", ""),
        "window: this key has no budget": ("rob", "--window", "day"),
        "zone: this key has no budget": ("rob", "--zone", "Asia/Tokyo"),
    }
    before = keys.list()
    for message, arguments in mistakes.items():
        with pytest.raises(SystemExit) as ended:
            run("keys", "set", *arguments)
        assert ended.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
    for arguments in (("nobody",), (ended_key,), ("eve", "--grace-hours", "-1"), ("eve", "--grace-hours", "inf")):
        with pytest.raises(SystemExit):
            run("keys", "rotate", *arguments)
        assert capsys.readouterr().out == ""
    assert keys.list() == before
    assert json.loads(run("status", "--json"))["requests"] == 0
    for url in ("http://127.0.0.1:9", "http://[::1"):
        with pytest.raises(SystemExit) as ended:
            run("status", "--url", url)
        assert ended.value.code == 1
        assert f"{url}/ready: no gateway answers" in capsys.readouterr().err
    monkeypatch.setattr("deferral.gateway.probe.probe", lambda url, admin_key: {"ready": "ready", "metrics": {}})
    for key_of, words in (([], "need the admin key"), (["--admin-key", "wrong"], "were refused for this admin key")):
        main(["gateway", "status", "--url", "http://127.0.0.1:9", *key_of, *database])
        assert f"its metrics {words}: --admin-key, or DEFERRAL_ADMIN_KEY" in capsys.readouterr().err


GONE = "the file is gone, or is another; put it back, or start the gateway again"
HUGE = b'{"budget": 1%s}' % (b"0" * 400)


def test_admin_endpoints_make_and_end_keys(tmp_path: Path) -> None:
    record, store = Record(str(tmp_path / "gateway.db")), Keys(str(tmp_path / "gateway.db"))
    record.start()
    store.start()
    gateway: Any = SimpleNamespace(record=record, keys=store, query=asyncio.to_thread)
    app = Starlette(routes=routes(gateway), exception_handlers=error_handlers())
    with TestClient(app) as client:
        made = client.post("/keys", json={"name": "bob", "budget": 2, "experts": ["small"]})
        assert made.status_code == 201
        key = store.find(made.json()["token"])
        assert key is not None
        assert (key.id, key.budget, key.experts) == (made.json()["id"], 2.0, frozenset({"small"}))
        (listed,) = client.get("/keys").json()["data"]
        assert (listed["name"], listed["revoked"], "token" in listed) == ("bob", None, False)
        (budget,) = client.get("/status", params={"hours": 1}).json()["budgets"]
        assert (budget["key"], budget["spent"]) == (key.id, 0.0)
        path, body = f"/keys/{key.id}", {"budget": 5, "experts": None, "window": "day"}
        changed = client.patch(path, json=body)
        assert (changed.status_code, "token" in changed.json()) == (200, False)
        assert {name: changed.json()[name] for name in ("id", "name", *body)} == {"id": key.id, "name": "bob", **body}
        assert store.find(made.json()["token"]) == replace(key, budget=5.0, experts=None, window="day")
        for wrong in (b"{}", b'{"admin": true}', b'{"budget": -1}', b'{"zone": null}', b'{"experts": "a"}', HUGE):
            assert client.patch(path, content=wrong).status_code == 400, wrong
        assert client.patch("/keys/nobody", json=body).status_code == 404
        rotated = client.post(f"{path}/token", json={"grace_hours": 1})
        assert (rotated.status_code, rotated.json()["former_until"] > time.time()) == (201, True)
        for token in (made.json()["token"], rotated.json()["token"]):
            assert store.find(token) is not None
        for wrong in (b'{"grace_hours": -1}', b'{"grace_hours": "1"}', b'{"hours": 1}', b"[]"):
            assert client.post(f"{path}/token", content=wrong).status_code == 400, wrong
        assert client.post("/keys/nobody/token").status_code == 404
        assert client.post(f"{path}/token").json()["former_until"] is None
        assert store.find(made.json()["token"]) is None
        assert client.delete(f"/keys/{key.id}").status_code == 200
        assert client.patch(path, json=body).status_code == 404
        assert client.delete(f"/keys/{key.id}").status_code == 404
        assert store.find(made.json()["token"]) is None
        wrong = [
            b"",
            b"[]",
            b"{",
            b"[" * 50_000,
            b'{"budget": 1}',
            b'{"name": "x", "color": 1}',
            b'{"name": 5}',
            b'{"name": "x", "zone": 5}',
        ]
        wrong += [b'{"name": "x", "experts": "small"}', b'{"name": "x", "admin": "yes"}', b'{"name": "x", "budget": NaN}']
        wrong += [b'{"name": "x", "window": ["day"]}', b'{"name": "\\ud800"}', HUGE[:-1] + b', "name": "x"}']
        for body in wrong:
            answer = client.post("/keys", content=body)
            assert answer.status_code == 400, body
            assert answer.json()["error"]["message"]
        for hours in ("0", "-1", "nan", "x", "1e9", "1_0", "١٠"):
            assert client.get("/status", params={"hours": hours}).status_code == 400
    store.close()
    record.stop()


def test_a_running_gateway_is_asked_how_it_is_doing() -> None:
    page = '# TYPE x_total counter\nx_total{expert="a"} 3.0\n# TYPE y gauge\ny 0.5\n# TYPE z histogram\nz_bucket{le="+Inf"} 1.0\n'

    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.headers.get("authorization") == "Bearer admin" or self.path == "/ready"
            body = {"/ready": b'{"status": "all experts are down"}', "/metrics": page.encode()}[self.path]
            self.send_response({"/ready": 503, "/metrics": 200}[self.path] if allowed else 401)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        assert probe(url, "admin") == {"ready": "all experts are down", "metrics": {'x_total{expert="a"}': 3.0, "y": 0.5}}
        assert probe(url, "guess") == {"ready": "all experts are down", "metrics": {}}
        server.shutdown()
    with pytest.raises(DataError, match="expected the address of a gateway"):
        probe("file:///etc/passwd")
