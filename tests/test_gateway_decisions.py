"""Decisions on record are found by what an operator knows of them, by command and by endpoint."""

import asyncio
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from deferral.cli import main
from deferral.gateway.dashboard import routes
from deferral.gateway.endpoints import error_handlers
from deferral.gateway.history import said
from deferral.gateway.keys import Keys
from deferral.gateway.record import Record
from tests.gateway_rows import row

NOW = time.time()


def test_what_a_client_wrote_is_shown_and_not_obeyed() -> None:
    one = {
        "time": 0.0,
        "id": "id-0",
        "requested": "\x1b[2J\r2026 alice asked\n\ud800é",
        "expert": "",
        "outcome": "refused",
        "status": 404,
    }
    line = said({**one, "latency_s": None, "propensity": None, "price": 0.0, "reason": ""}, "mallory")
    assert line.isprintable()
    assert "mallory asked \\x1b[2J\\r2026 alice asked\\n\\ud800é, nobody answered: refused (404)" in line


def test_an_operator_finds_decisions(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    record, store = Record(database), Keys(database)
    record.start()
    alice, twin = (store.create(name)[1] for name in ("alice", "twin"))
    store.create("twin")
    for number, values in enumerate(
        (
            {"key": alice.id, "reason": "the cheapest", "propensity": 0.02},
            {"key": alice.id, "expert": "", "outcome": "error", "status": 502, "reply_id": "chatcmpl-1"},
            {"key": twin.id, "expert": "large", "time": NOW - 30 * 3600, "latency_s": float("nan")},
            {"expert": "large", "requested": "large"},
        )
    ):
        record.add(row(number, **{"time": NOW - 9 + number, **values}))
    record.stop()

    def found(*options: str) -> list[str]:
        main(["gateway", "decisions", "--database", database, "--json", *options])
        return [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()]

    assert found() == ["id-3", "id-1", "id-0"]
    assert found("--hours", "48", "--expert", "large") == ["id-3", "id-2"]
    assert found("--key", "alice") == found("--key", f"dk-{alice.id}") == ["id-1", "id-0"]
    assert found("--outcome", "error", "--expert", "") == ["id-1"]
    assert found("--response", "chatcmpl-1") == ["id-1"]
    assert found("--response", "id-2") == ["id-2"], "however old"
    assert found("--count", "1") == ["id-3"]
    assert found("--response", "\0") == []
    capsys.readouterr()
    main(["gateway", "decisions", "--database", database, "--expert", "lrage"])
    assert "'lrage' answered nothing in that time; those who did: (nobody), large, small" in capsys.readouterr().err
    main(["gateway", "decisions", "--database", database, "--key", "alice"])
    first, second = capsys.readouterr().out.splitlines()
    assert "id-1 alice asked auto, nobody answered: error (502) in 0.25 s, $0.0001; " in first
    assert second.endswith("ok (200) in 0.25 s, $0.0001; the cheapest (with probability 0.02)")
    main(["gateway", "decisions", "--database", database, "--json", "--response", "id-0"])
    assert json.loads(capsys.readouterr().out)["propensity"] == 0.02
    for key, words in (("twin", "is the name of 2 keys"), ("bob", "is not a key")):
        with pytest.raises(SystemExit):
            main(["gateway", "decisions", "--database", database, "--key", key])
        assert words in capsys.readouterr().err

    gateway: Any = SimpleNamespace(record=record, query=asyncio.to_thread)
    app = Starlette(routes=routes(gateway), exception_handlers=error_handlers())
    with TestClient(app) as client:
        for asked, expected in (
            ("", ["id-3", "id-1", "id-0", "id-2"]),
            (f"?key=dk-{alice.id}&outcome=ok", ["id-0"]),
            ("?expert=large&hours=24", ["id-3"]),
            ("?response=chatcmpl-1", ["id-1"]),
        ):
            assert [one["id"] for one in client.get(f"/decisions{asked}").json()["data"]] == expected
        assert client.get("/decisions?hours=x").status_code == 400
    store.close()
    record.patient.dispose()
    record.engine.dispose()
