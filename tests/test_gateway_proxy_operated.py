"""What whoever operates a gateway sees of it, and changes while it runs."""

import json
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from deferral.gateway.app import gateway as build
from deferral.gateway.experts_file import read_experts
from deferral.gateway.state import stamps
from tests.running_gateway import EASY, HARD, small_router
from tests.whole_gateway import ADMIN_KEY, calm, experts_file

pytestmark = [pytest.mark.ci_slow, pytest.mark.usefixtures("nobody_is_down")]


def test_metrics_tell_what_happened(running: Any) -> None:
    for query in (EASY, HARD):
        running.gateway.chat(query, key=running.key)
    text = running.gateway.ask("GET", "/metrics", key=ADMIN_KEY)[2].decode()
    for name in (
        'deferral_requests_total{path="chat",status="200"}',
        'deferral_decisions_total{expert="small",path="full"}',
        'deferral_price_dollars_total{expert="large"}',
        "deferral_saving_dollars",
        'deferral_latency_seconds_bucket{expert="small",le="0.1"}',
        'deferral_breaker_open{expert="small"} 0.0',
    ):
        assert name in text
    assert float(re.search(r"\ndeferral_requests_in_flight (\S+)", text)[1]) == 0  # type: ignore[index]


def test_health_and_readiness(running: Any) -> None:
    gateway = running.gateway
    assert gateway.ask("GET", "/health")[0] == 200
    assert gateway.ask("GET", "/ready")[0] == 200
    for servers in gateway.state.answerers.servers.values():
        for standing in servers.each:
            while not standing.breaker.down:
                standing.breaker.failure(standing.breaker.enter())
    try:
        status, _, said = gateway.ask("GET", "/ready")
        assert (status, json.loads(said)) == (503, {"status": "all experts are down"})
        status, headers, said = gateway.chat(EASY, key=running.key)
        assert (status, said["error"]["code"]) == (503, "experts_down")
        assert int(headers["retry-after"]) >= 1
        assert gateway.ask("GET", "/health")[0] == 200
    finally:
        calm(gateway)


def test_what_changed_while_a_gateway_started_is_read_once_more(running: Any, tmp_path: Path) -> None:
    file = tmp_path / "experts.toml"
    file.write_text(experts_file(running.upstream.port), encoding="utf-8")
    options = replace(running.gateway.state.settings, database=str(tmp_path / "gateway.db"), experts_file=file)
    before, experts = stamps(options), read_experts(file)
    # As a promotion does, by a file of another name.
    (tmp_path / "next").write_text(experts_file(running.upstream.port, "context_tokens = 7000"), encoding="utf-8")
    (tmp_path / "next").replace(file)
    app = build(small_router(), experts, settings=options, read=before)
    with TestClient(app):
        assert app.state.gateway.current.experts["large"].context_tokens == 7000
    file.write_text("[experts", encoding="utf-8")
    app = build(small_router(), experts, settings=options, read=before)
    with TestClient(app):
        assert app.state.gateway.current.experts["large"].context_tokens is None, "a mistake changes nothing"


def test_a_reload_is_whole_or_not_at_all_and_drops_nothing(running: Any) -> None:
    gateway, file = running.gateway, running.folder / "experts.toml"
    before = gateway.state.current
    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            statuses.append(gateway.chat(EASY, key=running.key)[0])

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for bad in (experts_file(1, "total_s = -1"), experts_file(1).replace("experts.large", "experts.lagre"), "[experts"):
            file.write_text(bad, encoding="utf-8")
            status, _, said = gateway.ask("POST", "/admin/reload", key=ADMIN_KEY)
            assert (status, json.loads(said)["error"]["code"]) == (409, "not_reloaded")
            assert gateway.state.current is before
        file.write_text(experts_file(running.upstream.port, "context_tokens = 7000"), encoding="utf-8")
        assert gateway.ask("POST", "/admin/reload", key=ADMIN_KEY)[0] == 200
        assert gateway.state.current.experts["large"].context_tokens == 7000
        assert list(gateway.state.current.experts) == list(before.experts)
        time.sleep(0.2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        gateway.state.current = replace(before)
        gateway.state.answerers.update(before.experts)
    assert len(statuses) > 5
    assert set(statuses) == {200}


def test_a_reload_that_others_could_not_be_told_of_is_said_to_be_one(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway, before = running.gateway, running.gateway.state.current

    def away(*_: Any, **__: Any) -> Any:
        raise OperationalError("", {}, Exception("database is locked"))

    monkeypatch.setattr(gateway.state.reloads, "announce", away)
    (running.folder / "experts.toml").write_text(experts_file(running.upstream.port, "context_tokens = 7000"), encoding="utf-8")
    try:
        status, _, said = gateway.ask("POST", "/admin/reload", key=ADMIN_KEY)
        assert (status, json.loads(said)["error"]["code"]) == (503, "others_not_told")
        assert gateway.state.current.experts["large"].context_tokens == 7000
    finally:
        gateway.state.current = replace(before)
        gateway.state.answerers.update(before.experts)
    monkeypatch.setattr(gateway.state.keys, "create", away)
    status, headers, said = gateway.ask("POST", "/admin/keys", {"name": "ann"}, key=ADMIN_KEY)
    assert (status, json.loads(said)["error"]["code"]) == (503, "record_unavailable")
    assert headers["retry-after"] == "1"
