"""What clients of a gateway may not do, what they cannot pay for, and what none of them brings about."""

import contextlib
import json
import socket
import time
from datetime import UTC
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deferral.gateway import state
from deferral.gateway.accounts import Hold, Refused
from deferral.gateway.keys import Key
from deferral.gateway.state import descriptor_left
from deferral.gateway.windows import span
from tests.running_gateway import EASY, HARD
from tests.whole_gateway import ADMIN_KEY, rows

pytestmark = [pytest.mark.ci_slow, pytest.mark.usefixtures("nobody_is_down")]


def test_who_may_do_what(running: Any) -> None:
    gateway = running.gateway
    request = {"model": "auto", "messages": [{"role": "user", "content": EASY}]}
    narrow, _ = gateway.state.keys.create("narrow", experts=["large"], requests_per_minute=2)
    admin, _ = gateway.state.keys.create("operator", admin=True)
    for key, expected in ((None, 401), ("dk-aaaaaaaa-guess", 401), (ADMIN_KEY, 401), (admin, 403), (running.key, 200)):
        assert gateway.ask("POST", "/v1/chat/completions", request, key=key)[0] == expected
        assert gateway.ask("GET", "/v1/models", key=key)[0] == expected
    for path, method in (("/admin/keys", "GET"), ("/admin/status", "GET"), ("/admin/reload", "POST"), ("/metrics", "GET")):
        for key, expected in ((None, 401), (running.key, 403), (admin, 200), (ADMIN_KEY, 200)):
            assert gateway.ask(method, path, key=key)[0] == expected, (path, key)
    assert gateway.chat(EASY, key=narrow)[1]["x-deferral-expert"] == "large"
    assert gateway.chat(EASY, key=narrow, model="small")[0] == 404
    assert [model["id"] for model in json.loads(gateway.ask("GET", "/v1/models", key=narrow)[2])["data"]] == ["auto", "large"]
    status, headers, said = gateway.chat(EASY, key=narrow)
    assert (status, said["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(headers["retry-after"]) <= 60


def test_a_budget_first_routes_cheaper_then_refuses(running: Any) -> None:
    gateway = running.gateway
    token, key = gateway.state.keys.create("poor", budget=0.012, window="month")
    told = json.loads(gateway.ask("GET", "/v1/key", key=token)[2])
    assert (told["id"], told["name"], told["budget"], told["left"], told["experts"]) == (key.id, "poor", 0.012, 0.012, None)
    assert told["window_ends"] == span("month", time.time(), UTC).end
    experts = []
    for number in range(100):
        status, headers, said = gateway.chat(f"{HARD} {number}", key=token)
        if status != 200:
            break
        experts.append(headers["x-deferral-expert"])
    assert status == 429, experts
    assert (status, said["error"]["code"], said["error"]["type"]) == (429, "insufficient_quota", "insufficient_quota")
    assert experts[0] == "large"
    assert experts[-1] == "small"
    spent = sum(row["price"] for row in rows(running, f"key = '{key.id}'"))
    assert spent <= 0.012 + 1e-9
    assert json.loads(gateway.ask("GET", "/v1/key", key=token)[2])["left"] == pytest.approx(0.012 - spent, abs=1e-12)
    assert json.loads(gateway.ask("GET", "/v1/key", key=running.key)[2])["left"] is None
    assert gateway.ask("GET", "/v1/key", key="dk-nobody-x")[0] == 401


def test_what_a_long_conversation_sends_is_set_aside(running: Any) -> None:
    gateway = running.gateway
    token, _ = gateway.state.keys.create("short of money", budget=0.012, window="month")
    # 15,000 tokens, too many for the small one.  The router expects $0.01 of the question.
    messages = [{"role": "system", "content": "x" * 60_000}, {"role": "user", "content": HARD}]
    status, _, said = gateway.chat(HARD, key=token, messages=messages)
    assert (status, said["error"]["code"]) == (429, "insufficient_quota")


def test_requests_of_any_size_are_read_no_further_than_allowed(running: Any) -> None:
    gateway = running.gateway
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {running.key}\r\n".encode()
    most = gateway.state.settings.max_request_bytes
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as client:
        client.sendall(head + b"content-length: %d\r\n\r\n{" % (most + 1))
        assert b" 413 " in client.recv(1000).split(b"\r\n")[0]
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as client:
        client.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        block = b"%x\r\n%b\r\n" % (1 << 20, b"x" * (1 << 20))
        with contextlib.suppress(ConnectionError):
            for _ in range(most // (1 << 20) + 2):
                client.sendall(block)
        assert b" 413 " in client.recv(1000).split(b"\r\n")[0]
    assert gateway.ask("POST", "/v1/chat/completions", b"x", key=running.key, content_encoding="gzip")[0] == 415


def test_the_record_says_why_a_request_was_refused(running: Any) -> None:
    for sent, why in (
        ({"x_deferral_regoins": "eu"}, "x-deferral-regoins: there is no such hint"),
        ({"model": "nobody"}, "model: 'nobody' is no expert that this key may ask"),
    ):
        status, headers, said = running.gateway.chat(EASY, key=running.key, **sent)
        [row] = rows(running, f"id = '{headers['x-deferral-id']}'")
        assert (row["outcome"], row["status"]) == ("refused", status)
        assert why in row["reason"]
        assert row["reason"] == said["error"]["message"]


def test_what_a_cheap_one_cannot_take_is_paid_for_before_a_dearer_one_is_asked(
    running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, set_aside = running.gateway.state.limits, []
    held = limits.held

    async def watched(key: Key, dollars: float) -> Hold:
        set_aside.append(dollars)
        if spent and len(set_aside) > 1:
            raise Refused(429, "insufficient_quota", "it is spent", 1.0)
        return await held(key, dollars)

    monkeypatch.setattr(limits, "held", watched)
    running.upstream.behave("small", "not-able")
    try:
        for expert, status in (("large", 200), ("small", 400)):
            spent = status == 400
            set_aside.clear()
            found, headers, _ = running.gateway.chat(EASY, key=running.key)
            assert (found, headers["x-deferral-expert"]) == (status, expert)
            assert len(set_aside) == 2
            assert set_aside[1] > set_aside[0]
    finally:
        running.upstream.behave("small", "good")


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/chat/completions/"), ("GET", "/dashboard/"), ("GET", "/admin/status/"), ("GET", "/health/")],
)
def test_a_slash_too_many_leads_nowhere_else(running: Any, method: str, path: str) -> None:
    status, headers, said = running.gateway.ask(method, path, key=ADMIN_KEY, host="localhost", x_forwarded_proto="https")
    assert (status, json.loads(said)["error"]["code"]) == (404, "not_found")
    assert "location" not in headers


JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


FIELDS = st.dictionaries(
    st.sampled_from(
        [
            "model",
            "messages",
            "stream",
            "tools",
            "max_tokens",
            "prompt",
            "input",
            "id",
            "quality",
            "stream_options",
            "instructions",
            "previous_response_id",
            "background",
        ]
    ),
    JSON | st.sampled_from(["auto", "small", "nobody"]) | st.lists(st.dictionaries(st.sampled_from(["role", "content"]), JSON)),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    body=FIELDS.map(lambda fields: json.dumps({"model": "auto"} | fields).encode()) | st.binary(max_size=60),
    path=st.sampled_from(["chat/completions", "completions", "embeddings", "responses", "feedback"]),
    hint=st.sampled_from(["", "0.01", "1e308", "-0", "1e-300"])
    | st.text(st.characters(codec="latin-1", exclude_categories=["C"]), max_size=5),
    name=st.sampled_from(["price_of_error", "budget", "max_latency", "min_quality"]),
)
def test_no_request_whatever_makes_a_500(running: Any, body: bytes, path: str, hint: str, name: str) -> None:
    headers = {f"x_deferral_{name}": hint} if hint.strip() else {}
    status, said, reply = running.gateway.ask("POST", f"/v1/{path}", body, key=running.key, **headers)
    # The upstream of the tests gives up on some requests: that is its failure, and said to be.
    assert status < 500 or json.loads(reply)["error"]["code"] in ("upstream_bad_reply", "experts_down"), reply
    if status >= 400 and said.get("x-upstream") is None:
        assert set(json.loads(reply)["error"]) == {"message", "type", "param", "code"}


def test_bytes_that_are_no_http_and_paths_that_are_none(running: Any) -> None:
    for data in (
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", running.gateway.port), timeout=10) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            assert b" 500 " not in client.recv(1000)
    for method, path in (("GET", "/v1/chat/completions"), ("POST", "/v1/nothing"), ("GET", "/v1/models/%2e%2e/%00")):
        status, _, said = running.gateway.ask(method, path, key=running.key)
        assert status in (404, 405)
        assert set(json.loads(said)["error"]) == {"message", "type", "param", "code"}
        assert b"base URL" not in said
    status, _, said = running.gateway.ask("POST", "/chat/completions", {}, key=running.key)
    assert status == 404
    assert json.loads(said)["error"]["message"].endswith("begin with /v1, and so ends the base URL that a client is given")


def test_what_says_two_things_is_refused(running: Any) -> None:
    body = json.dumps({"model": "small", "messages": [{"role": "user", "content": EASY}]}).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\nconnection: close\r\n"
        % running.key.encode()
    )
    length = b"content-length: %d\r\n" % len(body)
    chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    for more, sent, status in (
        (length + b"accept: a\r\naccept: b\r\n", body, b" 200 "),
        (length + b"x-deferral-budget: 1\r\nx-deferral-budget: 2\r\n", body, b" 400 "),
        (length + b"authorization: Bearer another\r\n", body, b" 400 "),
        (b"transfer-encoding: chunked\r\n", chunk, b" 200 "),
        (b"transfer-encoding: gzip, chunked\r\n", chunk, b" 501 "),
        (b"transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n", chunk, b" 400 "),
    ):
        with socket.create_connection(("127.0.0.1", running.gateway.port), timeout=10) as client:
            client.sendall(head + more + b"\r\n" + sent)
            assert status in client.recv(1000).partition(b"\r\n")[0] + b" ", more


def test_without_a_file_descriptor_it_says_so(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert descriptor_left()
    monkeypatch.setattr(state, "descriptor_left", lambda: False)
    end = time.monotonic() + 10
    while (found := running.gateway.ask("GET", "/ready"))[0] == 200:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert (found[0], b"no file descriptor is left" in found[2]) == (503, True)
    monkeypatch.undo()
    while running.gateway.ask("GET", "/ready")[0] == 503:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert running.log.getvalue().count("no file descriptor is left: new connections are dropped") == 1
