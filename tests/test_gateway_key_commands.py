"""Keys from the command line and over HTTP, and a running gateway asked how it is doing."""

import asyncio
import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from deferral.cli import main
from deferral.errors import DataError
from deferral.gateway.admin import routes
from deferral.gateway.endpoints import error_handlers
from deferral.gateway.keys import Key, Keys
from deferral.gateway.probe import probe
from deferral.gateway.record import Record
from deferral.gateway.windows import minute_of


def test_keys_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    database = ["--database", str(tmp_path / "gateway.db")]

    def run(*arguments: str) -> str:
        main(["gateway", *arguments, *database])
        return capsys.readouterr().out

    with pytest.raises(SystemExit):
        run("keys", "list")
    said = capsys.readouterr().err
    assert "there is no database; expected the one that the gateway writes; --database or DEFERRAL_DATABASE names it" in said
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
    assert "ends" not in run("keys", "list")
    assert "ends none -> 20" in run("keys", "set", "rob", "--days", "1.5")
    assert next(one.key.ends for one in keys.list() if one.key.id == key.id) == pytest.approx(time.time() + 1.5 * 86400, abs=60)
    assert "ends" in run("keys", "list")
    assert "-> none" in run("keys", "set", "rob", "--no-end")
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
        "expected either --days or --no-end": ("eve", "--days", "3", "--no-end"),
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


HUGE = b'{"budget": 1%s}' % (b"0" * 400)


def test_what_is_said_of_a_key_that_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = Keys(str(tmp_path / "gateway.db"))
    keys.start()
    _, key = keys.create("bob", ends=time.time() + 3600)
    keys.close()

    def said(*arguments: str) -> str:
        main(["gateway", "keys", *arguments, "--database", str(tmp_path / "gateway.db")])
        return " ".join("".join(capsys.readouterr()).split())

    assert "the key has ended" not in said("rotate", "bob")
    assert f"the previous token is valid until {minute_of(key.ends)};" in said("rotate", "bob", "--grace-hours", "48")
    with monkeypatch.context() as later:
        later.setattr("deferral.gateway.keys.time.time", lambda: key.ends)
        told = said("rotate", "bob", "--grace-hours", "48")
        assert "the previous token ends now, but the key has ended: no token of it is valid" in told
        assert "stays valid" not in said("create", "bob")
        assert "stays valid" in said("create", "bob")
    # In one and the same minute, and still another end.
    given = [said("set", key.id, "--days", days) for days in ("36500", "36499.9999999")]
    assert " -> " in given[1]


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
        path, body = f"/keys/{key.id}", {"budget": 5, "experts": None, "window": "day", "ends": time.time() + 60}
        changed = client.patch(path, json=body)
        assert (changed.status_code, "token" in changed.json()) == (200, False)
        assert {name: changed.json()[name] for name in ("id", "name", *body)} == {"id": key.id, "name": "bob", **body}
        assert store.find(made.json()["token"]) == replace(key, budget=5.0, experts=None, window="day", ends=body["ends"])
        for wrong in (
            b"{}",
            b'{"admin": true}',
            b'{"budget": -1}',
            b'{"zone": null}',
            b'{"ends": 60}',
            b'{"experts": "a"}',
            HUGE,
        ):
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
