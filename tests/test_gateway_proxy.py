"""The whole gateway with real servers on loopback: the official client, what passes through, who may do what, reloads."""

import asyncio
import contextlib
import http.client
import io
import json
import logging
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from deferral.gateway.app import gateway as build
from deferral.gateway.experts_file import Expert, read_experts
from deferral.gateway.keys import Key
from deferral.gateway.limits import Hold, Refused
from deferral.gateway.logs import JsonLines
from deferral.gateway.settings import Settings
from deferral.gateway.state import stamps
from tests.faulty_upstream import CHUNKS, Upstream
from tests.running_gateway import EASY, HARD, RunningGateway, small_router

pytestmark = pytest.mark.ci_slow

UPSTREAM_KEY, ADMIN_KEY = "sk-upstream-0123456789abcdef", "admin-key-of-the-tests"
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A gateway with keys, and its upstream; `log` holds all that was logged."""
    folder = tmp_path_factory.mktemp("gateway")
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(JsonLines())
    logging.getLogger().addHandler(handler)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.DEBUG)
    with Upstream(forever_s=2) as upstream:
        file = folder / "experts.toml"
        file.write_text(experts_file(upstream.port), encoding="utf-8")
        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setenv("UPSTREAM_KEY", UPSTREAM_KEY)
        router = small_router()
        router.save(folder / "router")
        experts = read_experts(file)
        options = Settings(
            database=str(folder / "gateway.db"), admin_key=ADMIN_KEY, router_folder=folder / "router", experts_file=file
        )
        with RunningGateway(router, experts, options) as gateway:
            token, _ = gateway.state.keys.create("tests")
            yield SimpleNamespace(gateway=gateway, upstream=upstream, key=token, folder=folder, log=log, experts=experts)
    monkeypatch.undo()
    logging.getLogger().removeHandler(handler)
    logging.getLogger().setLevel(level)


def experts_file(port: int, extra: str = "") -> str:
    common = f"""base_url = "http://127.0.0.1:{port}/v1"
key_env = "UPSTREAM_KEY"
connect_s = 1
first_byte_s = 1"""
    return f"""
[experts.small]
{common}
images = false
context_tokens = 5000
output_price = 2.5
[experts.large]
{common}
model = "big/one"
input_price = 1.0
output_price = 250.0
{extra}
[experts.narrow]
{common}
model = "stall"
route = false
input_price = 3.0
max_concurrent = 1
max_waiting = 0
[experts.misled]
{common}
model = "status-401"
route = false
"""


@pytest.fixture(autouse=True)
def nobody_is_down(running: Any) -> None:
    """Whatever came before: tests are handed out to processes in any order."""
    calm(running.gateway)


@pytest.fixture
def client(running: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=running.gateway.url, api_key=running.key, max_retries=0, timeout=20) as found:
        yield found


def rows(running: Any, where: str = "1") -> list[dict[str, Any]]:
    """Of the record, when all that waits is written."""
    until = time.monotonic() + 5
    while running.gateway.state.record._waiting and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    with contextlib.closing(sqlite3.connect(running.folder / "gateway.db")) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"select * from decisions where {where} order by time")]


def test_the_official_client_is_routed(running: Any, client: openai.OpenAI) -> None:
    for text, expert, model in ((EASY, "small", "small"), (HARD, "large", "big/one")):
        raw = client.chat.completions.with_raw_response.create(model="auto", messages=[{"role": "user", "content": text}])
        answer = raw.parse()
        assert answer.choices[0].message.content == f"{model}: {text}"
        assert raw.headers["x-deferral-expert"] == expert
        assert float(raw.headers["x-deferral-expected-cost"]) < 1
        assert float(raw.headers["x-deferral-expected-price"]) > 0
        assert raw.headers["x-deferral-propensity"] == "1"
        assert raw.headers["x-deferral-reason"].startswith(f"{expert}: expected quality")
        assert raw.headers["x-upstream"] == "kept"
        [row] = rows(running, f"id = '{raw.headers['x-deferral-id']}'")
        assert (row["expert"], row["chosen"], row["outcome"], row["status"]) == (expert, expert, "ok", 200)
        assert (row["input_tokens"], row["output_tokens"], row["estimated"]) == (7, CHUNKS, 0)
        assert row["price"] == pytest.approx(running.experts[expert].price(7, CHUNKS))
        assert row["best_price"] == pytest.approx(running.experts["large"].price(7, CHUNKS)), "the same tokens, asked of the best"
        assert row["reply_id"] == answer.id


def test_streams_tools_and_the_other_paths(running: Any, client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": HARD}]
    stream = client.chat.completions.create(model="auto", messages=messages, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices).split() == [
        f"word{number}" for number in range(CHUNKS)
    ]
    assert chunks[-1].usage is not None
    answer = client.chat.completions.create(model="auto", messages=messages, tools=[TOOL])  # type: ignore[list-item]
    [call] = answer.choices[0].message.tool_calls or []
    assert (call.function.name, json.loads(call.function.arguments)) == ("look_up", {"text": HARD})  # type: ignore[union-attr]
    arguments = ""
    for chunk in client.chat.completions.create(model="auto", messages=messages, tools=[TOOL], stream=True):  # type: ignore[call-overload]
        for delta in chunk.choices[0].delta.tool_calls or []:
            arguments += delta.function.arguments
    assert json.loads(arguments) == {"text": HARD}
    assert client.completions.create(model="auto", prompt=EASY).choices[0].text == f"small: {EASY}"
    assert len(client.embeddings.create(model="large", input=["a", "b"]).data) == 2
    assert [model.id for model in client.models.list()] == ["auto", "small", "large", "narrow", "misled"]
    assert client.models.retrieve("large").id == "large"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    with pytest.raises(openai.BadRequestError, match="name an expert"):
        client.embeddings.create(model="auto", input="a")


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_stream_reports_its_usage_to_the_gateway_alone(running: Any, path: str) -> None:
    gateway, before = running.gateway, running.gateway.state.current
    body = {"model": "large", "stream": True, "messages": [{"role": "user", "content": EASY}], "prompt": EASY}

    def ask(**more: Any) -> tuple[bytes, dict[str, Any]]:
        status, headers, said = gateway.ask("POST", f"/v1/{path}", body | more, key=running.key)
        assert status == 200
        [row] = rows(running, f"id = '{headers['x-deferral-id']}'")
        return said, row

    plain, estimated = ask()
    wanted, _ = ask(stream_options={"include_usage": True})
    gateway.state.current = replace(before, experts={n: replace(one, stream_usage=True) for n, one in before.experts.items()})
    try:
        said, counted = ask()
        sent = running.upstream.seen[-1]
        assert ask(stream_options={"include_usage": True})[0] == wanted != plain
        for options in (None, {}, {"include_usage": False}, {"include_usage": None, "include_obfuscation": False}):
            unseen, row = ask(stream_options=options)
            assert (unseen, row["estimated"], row["output_tokens"]) == (plain, 0, CHUNKS), "nobody has it counted by estimate"
            asked = json.loads(running.upstream.seen[-1].body)["stream_options"]
            assert asked == {**(options or {}), "include_usage": True}
    finally:
        gateway.state.current = before
    assert said == plain
    assert json.loads(sent.body) == body | {"model": "big/one", "stream_options": {"include_usage": True}}
    assert (estimated["estimated"], counted["estimated"], counted["outcome"]) == (1, 0, "ok")
    assert (counted["input_tokens"], counted["output_tokens"]) == (7, CHUNKS)


PICTURE = "data:image/png;base64,AAAA"


def test_the_responses_api_is_routed_like_chat(running: Any, client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "name": "look_up", "parameters": {"type": "object", "properties": {"usage": {"type": "x"}}}}
    create = client.responses.with_raw_response.create
    for text, expert, model in ((EASY, "small", "small"), (HARD, "large", "big/one")):
        said: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": text}]}]
        for items in (text, said):
            raw = create(model="auto", input=items, instructions="be brief", metadata={"seed": text})
            answer = raw.parse()
            assert answer.output_text == f"{model}: {text}"
            assert raw.headers["x-deferral-expert"] == expert
            assert raw.headers["x-deferral-reason"].startswith(f"{expert}: expected quality")
        [row] = rows(running, f"id = '{raw.headers['x-deferral-id']}'")
        assert (row["expert"], row["outcome"], row["estimated"], row["reply_id"]) == (expert, "ok", 0, f"resp_{text}")
        assert (row["input_tokens"], row["output_tokens"]) == (7, CHUNKS)
        assert row["price"] == pytest.approx(running.experts[expert].price(7, CHUNKS, 3))
    raw = create(model="auto", input=EASY, tools=[tool])
    [call] = raw.parse().output
    assert (call.type, json.loads(call.arguments)) == ("function_call", {"text": EASY})  # type: ignore[union-attr]
    picture: Any = [{"role": "user", "content": [{"type": "input_image", "image_url": PICTURE, "detail": "auto"}]}]
    assert create(model="auto", input=picture).headers["x-deferral-expert"] == "large", "the small one takes none"
    assert create(model="small", input=HARD).headers["x-deferral-reason"] == "asked for by name"
    cheap = create(model="auto", input=HARD, extra_headers={"x-deferral-price-of-error": "0.001"})
    assert cheap.headers["x-deferral-expert"] == "small"
    body = b'{"input": [{"role": "user", "content": "add"}] , "x_unknown": {"model": 1.0} ,"model":"auto"}'
    status, _, _ = running.gateway.ask("POST", "/v1/responses", body, key=running.key)
    seen = running.upstream.seen[-1]
    assert (status, seen.path, seen.body) == (200, "/v1/responses", body.replace(b'"auto"', json.dumps(seen.model).encode()))


def test_streams_of_responses_say_what_they_cost_and_whether_they_are_whole(running: Any, client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="auto", input=HARD, stream=True))
    assert [event.type for event in (events[0], events[1], events[-1])] == [
        "response.created",
        "response.output_text.delta",
        "response.completed",
    ]
    assert len(events) == CHUNKS + 3
    row = rows(running, "streamed")[-1]
    assert (row["expert"], row["outcome"], row["reply_id"]) == ("large", "ok", "resp_1")
    assert (row["input_tokens"], row["output_tokens"], row["estimated"]) == (7, CHUNKS, 0)
    # Until the first byte others may answer, after it nobody.
    gateway, upstream = running.gateway, running.upstream
    upstream.behave("small", "status-500")
    raw = client.responses.with_raw_response.create(model="auto", input=EASY, stream=True)
    assert (raw.headers["x-deferral-expert"], len(list(raw.parse()))) == ("large", CHUNKS + 3)
    upstream.behave("small", "reset")
    with pytest.raises(openai.APIError, match="small broke off in the middle of the stream"):
        list(client.responses.create(model="auto", input=EASY, stream=True))
    upstream.behave("small", "truncated-sse")
    assert len(list(client.responses.create(model="auto", input=EASY, stream=True))) == 3
    upstream.behave("small", "good")
    calm(gateway)
    for code in ("image_too_large", "server_error"):
        list(client.responses.create(model="small", input=EASY, stream=True, metadata={"fails": code}))
    assert [row["outcome"] for row in rows(running, "streamed")[-4:]] == ["truncated"] * 4
    assert list(gateway.state.answerers.standings["small"].breaker._calls) == [False], "one of them is not its fault"
    calm(gateway)


def test_what_a_long_response_cost_and_whose_it_was(running: Any, client: openai.OpenAI) -> None:
    token, key = running.gateway.state.keys.create("writes much")
    body = {"model": "large", "input": "x" * 150_000, "metadata": {"usage": "mine"}}
    status, headers, _ = running.gateway.ask("POST", "/v1/responses", body, key=token)
    assert status == 200
    [row] = rows(running, f"id = '{headers['x-deferral-id']}'")
    assert (row["input_tokens"], row["output_tokens"], row["estimated"]) == (7, CHUNKS, 0)
    assert running.gateway.state.answerers.standings["large"].breaker._keys[-1] == key.id


def test_a_response_goes_on_with_whoever_gave_the_one_before(running: Any, client: openai.OpenAI) -> None:
    create = client.responses.with_raw_response.create
    first = create(model="auto", input=HARD, metadata={"seed": "first"}).parse()
    rows(running)
    # Though the small one would do.
    raw = create(model="auto", input=EASY, previous_response_id=first.id)
    assert (raw.headers["x-deferral-expert"], raw.headers["x-deferral-reason"]) == ("large", "gave the previous response")
    assert running.upstream.seen[-1].json["previous_response_id"] == first.id
    [row] = rows(running, f"id = '{raw.headers['x-deferral-id']}'")
    assert (row["requested"], row["expert"]) == ("large", "large")
    status, _, _ = running.gateway.ask("POST", "/v1/feedback", {"id": first.id, "thumbs": "up"}, key=running.key)
    assert status == 200
    other, _ = running.gateway.state.keys.create("other")
    for key, model, previous in ((running.key, "auto", "resp_unknown"), (other, "auto", first.id), (other, "large", first.id)):
        body = {"model": model, "input": EASY, "previous_response_id": previous}
        status, _, said = running.gateway.ask("POST", "/v1/responses", body, key=key)
        assert (status, json.loads(said)["error"]["code"]) == (400, "previous_response_not_found")
    # Who is named is asked, and says itself what it knows.
    named = create(model="small", input=EASY, previous_response_id="resp_unknown")
    assert (named.headers["x-deferral-expert"], named.headers["x-deferral-reason"]) == ("small", "asked for by name")


def test_what_a_gateway_cannot_do_with_responses_it_says(running: Any, client: openai.OpenAI) -> None:
    for fields, param in (
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True}, "background"),
        ({"previous_response_id": 7}, "previous_response_id"),
    ):
        status, _, said = running.gateway.ask("POST", "/v1/responses", {"model": "auto", "input": EASY} | fields, key=running.key)
        assert (status, json.loads(said)["error"]["param"]) == (400, param)
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="kept by the expert that gave them"):
            ask("resp_1")


def test_the_asynchronous_client_with_many_streams_at_once(running: Any) -> None:
    async def run() -> list[int]:
        async with openai.AsyncOpenAI(base_url=running.gateway.url, api_key=running.key, max_retries=0) as found:

            async def one(number: int) -> int:
                messages: Any = [{"role": "user", "content": f"{EASY} {number}"}]
                stream = await found.chat.completions.create(model="auto", messages=messages, stream=True)
                return len([chunk async for chunk in stream])

            answer = await found.responses.create(model="auto", input=EASY)
            assert answer.output_text == f"small: {EASY}"
            events = await found.responses.create(model="auto", input=EASY, stream=True)
            assert [event.type async for event in events][-1] == "response.completed"
            return await asyncio.gather(*(one(number) for number in range(20)))

    assert asyncio.run(run()) == [CHUNKS + 1] * 20
    streamed = rows(running, "streamed")[-20:]
    assert {(row["outcome"], row["estimated"]) for row in streamed} == {("ok", 1)}
    assert all(row["output_tokens"] > CHUNKS for row in streamed), "five characters or more a word"


def test_every_byte_but_the_model_and_every_byte_of_the_reply_pass(running: Any) -> None:
    body = b'{ "x_unknown": {"model":"mine", "n": 1.50e0}, '
    body += b'"messages":[{"role":"user","content":"add \\u00e9 \xc3\xa9"}] ,\n"model" : "auto"}'
    for stream in (b"", b', "stream": true'):
        sent = body[:-1] + stream + b"}"
        status, headers, reply = running.gateway.ask(
            "POST",
            "/v1/chat/completions",
            sent,
            key=running.key,
            cookie="session=secret",
            x_api_key="another",
            traceparent="00-1",
        )
        seen = running.upstream.seen[-1]
        assert status == 200
        assert seen.body == sent.replace(b'"auto"', json.dumps(seen.model).encode())
        assert seen.headers["authorization"] == f"Bearer {UPSTREAM_KEY}"
        assert seen.headers["traceparent"] == "00-1"
        assert not {"cookie", "x-api-key", "x-deferral-budget"} & set(seen.headers)
        direct = http.client.HTTPConnection("127.0.0.1", running.upstream.port, timeout=10)
        direct.request("POST", "/v1/chat/completions", seen.body)
        expected = direct.getresponse()
        assert reply == expected.read()
        assert headers["content-type"] == expected.headers["content-type"]
        direct.close()


def test_a_named_expert_is_asked_and_nobody_else(running: Any) -> None:
    gateway = running.gateway
    assert gateway.chat(HARD, key=running.key, model="small")[1]["x-deferral-expert"] == "small"
    assert gateway.chat(HARD, key=running.key, model="nobody")[0] == 404
    status, headers, said = gateway.chat(HARD, key=running.key, model="misled")
    assert (status, said["error"]["code"]) == (502, "upstream_misconfigured")
    [row] = rows(running, f"id = '{headers['x-deferral-id']}'")
    assert (row["outcome"], row["expert"], row["attempts"]) == ("error", "", 1)


def test_constraints_and_hints(running: Any) -> None:
    picture = [{"type": "text", "text": EASY}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    gateway, key = running.gateway, running.key
    assert gateway.chat(picture, key=key)[1]["x-deferral-expert"] == "large"  # type: ignore[arg-type]
    status, _, said = gateway.chat(picture, key=key, model="small")  # type: ignore[arg-type]
    assert (status, said["error"]["code"]) == (400, "expert_not_able")
    assert gateway.chat(EASY + " x" * 10_000, key=key)[1]["x-deferral-expert"] == "large"
    assert gateway.chat(HARD, key=key, x_deferral_price_of_error="0.001")[1]["x-deferral-expert"] == "small"
    assert gateway.chat(HARD, key=key, x_deferral_price_of_error="many")[0] == 400
    assert gateway.chat(HARD, key=key, x_deferral_price_of_error="1e-320")[0] == 400, "a price over it would be infinite"
    assert gateway.chat(HARD, key=key, x_deferral_max_latency="0.001")[0] == 400


def test_when_the_chosen_one_fails_the_next_best_answers_also_a_stream(running: Any) -> None:
    gateway, upstream = running.gateway, running.upstream
    for stream in (False, True):
        upstream.behave("small", "status-500")
        status, headers, said = gateway.chat(f"{EASY} again {stream}", key=running.key, stream=stream)
        assert (status, headers["x-deferral-expert"], headers["x-deferral-attempts"]) == (200, "large", "3")
        assert headers["x-deferral-reason"].startswith("large in place of small, which failed")
        assert b"[DONE]" in said if stream else said["model"] == "big/one"
        [row] = rows(running, f"id = '{headers['x-deferral-id']}'")
        assert (row["chosen"], row["expert"], row["outcome"], row["attempts"]) == ("small", "large", "ok", 3)
        upstream.behave("small", "good")
    calm(gateway)


def calm(gateway: RunningGateway) -> None:
    """As if no expert had ever failed."""
    answerers = gateway.state.answerers
    answerers.standings.clear()
    answerers.update(gateway.state.current.experts)


def test_a_full_queue_is_a_429_that_says_when_to_come_back(running: Any) -> None:
    results: list[tuple[int, dict, Any]] = []
    threads = [
        threading.Thread(target=lambda: results.append(running.gateway.chat(EASY, key=running.key, model="narrow")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    calm(running.gateway)
    refused = [headers for status, headers, said in results if status == 429]
    assert len(refused) == 2
    assert all(int(headers["retry-after"]) >= 1 for headers in refused)


def test_when_the_client_leaves_the_upstream_is_told(running: Any) -> None:
    for body in (b'"stream": true', b'"n": 1'):
        request = b'{"model": "narrow", "messages": [{"role": "user", "content": "x"}], ' + body + b"}"
        with socket.create_connection(("127.0.0.1", running.gateway.port), timeout=10) as client:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {running.key}\r\n"
            client.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(request) + request)
            time.sleep(0.3)
        time.sleep(0.3)
        assert running.upstream.asked("stall")[-1].gone
        row = rows(running, "requested = 'narrow'")[-1]
        assert (row["outcome"], row["status"]) == ("cancelled", 200 if b"stream" in body else 499)
        # What it has read is paid for, whether its client waits or not.
        assert (row["expert"], row["estimated"]) == ("narrow", 1)
        assert row["price"] == pytest.approx(row["input_tokens"] * 3.0 / 1e6)
        assert row["input_tokens"] > 10
        assert running.gateway.state.answerers.standings["narrow"].slots.taken == 0


def test_a_client_that_reads_late_gets_all_of_a_stream_and_the_expert_is_not_blamed(running: Any) -> None:
    gateway = running.gateway
    before, size, patience = gateway.state.current, 12 << 20, 2.0
    events = (b"data: " + bytes(1 << 16) + b"\n\n") * (size >> 16) + b"data: [DONE]\n\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(events))
        writer.write(events)
        writer.close()

    server = gateway.call(asyncio.start_server(serve, "127.0.0.1", 0))
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    gateway.state.current = replace(before, experts={**before.experts, "quick": Expert("quick", address, total_s=patience)})
    gateway.state.answerers.update(gateway.state.current.experts)
    breaker = gateway.state.answerers.standings["quick"].breaker
    request = b'{"model": "quick", "messages": [{"role": "user", "content": "x"}], "stream": true}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer %b\r\n"
    try:
        with contextlib.ExitStack() as opened:
            clients = [opened.enter_context(socket.socket()) for _ in range(5)]
            for client in clients:
                client.settimeout(10)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", gateway.port))
                client.sendall(head % running.key.encode() + b"content-length: %d\r\n\r\n" % len(request) + request)
            time.sleep(1.25 * patience)
            for client in clients:
                read, end = 0, b""
                while part := client.recv(1 << 20):
                    read, end = read + len(part), (end + part)[-100:]
                assert read > size
                assert b"data: [DONE]" in end
        assert {row["outcome"] for row in rows(running, "expert = 'quick'")} == {"ok"}
        assert (breaker.state, list(breaker._calls)) == ("closed", [True] * 5)
    finally:
        gateway.state.current = before
        gateway.state.answerers.update(before.experts)
        server.close()


def test_feedback_is_kept_by_either_id(running: Any) -> None:
    gateway, key = running.gateway, running.key
    _, headers, answer = gateway.chat(EASY, key=key, seed=4711)
    for body in ({"id": headers["x-deferral-id"], "quality": 0.75}, {"id": answer["id"], "thumbs": "down"}):
        status, _, said = gateway.ask("POST", "/v1/feedback", body, key=key)
        assert status == 200
    with contextlib.closing(sqlite3.connect(running.folder / "gateway.db")) as connection:
        found = connection.execute("select quality from feedback where decision = ?", [headers["x-deferral-id"]]).fetchall()
    assert found == [(0.0,)], "the later one replaces the first"
    for body, expected in (
        ({"id": "dfr-unknown", "quality": 1}, 404),
        ({"id": headers["x-deferral-id"]}, 400),
        ({"id": headers["x-deferral-id"], "quality": 2}, 400),
        ({"id": headers["x-deferral-id"], "thumbs": ["up"]}, 400),
        ([], 400),
    ):
        status, _, said = gateway.ask("POST", "/v1/feedback", body, key=key)
        assert (status, set(json.loads(said)["error"])) == (expected, {"message", "type", "param", "code"})


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
    assert sum(row["price"] for row in rows(running, f"key = '{key.id}'")) <= 0.012 + 1e-9


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


def test_neither_keys_nor_prompts_leave_a_trace(running: Any) -> None:
    gateway = running.gateway
    secret = "a-prompt-that-nobody-should-keep"
    replies = [gateway.chat(secret, key=running.key, model=model) for model in ("auto", "misled", "nobody")]
    replies += [gateway.ask("GET", path, key=ADMIN_KEY) for path in ("/metrics", "/admin/keys", "/admin/status")]
    rows(running)
    for path in running.folder.glob("gateway.db*"):
        held = path.read_bytes()
        assert secret.encode() not in held
        assert running.key.encode() not in held
        assert UPSTREAM_KEY.encode() not in held
    logged = running.log.getvalue()
    for text in (UPSTREAM_KEY, running.key, ADMIN_KEY, secret):
        assert text not in logged
    for key in (UPSTREAM_KEY, running.key, ADMIN_KEY):
        assert key not in str([(headers, body) for _, headers, body in replies])
    assert all(set(json.loads(line)) >= {"time", "level", "logger", "message"} for line in logged.splitlines())


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
    for standing in gateway.state.answerers.standings.values():
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


def test_what_two_keys_name_alike_is_not_one_request_to_the_expert(running: Any) -> None:
    gateway = running.gateway
    other, _ = gateway.state.keys.create("another")
    sent = []
    for key in (running.key, running.key, other):
        body = {"model": "small", "messages": [{"role": "user", "content": EASY}]}
        assert gateway.ask("POST", "/v1/chat/completions", body, key=key, idempotency_key="1")[0] == 200
        sent.append(running.upstream.seen[-1].headers["idempotency-key"])
    assert sent[0] == sent[1] != sent[2]
    assert "1" not in sent
    body = {"model": "large", "messages": [{"role": "user", "content": EASY}]}
    assert gateway.ask("POST", "/v1/chat/completions", body, key=running.key, idempotency_key="1")[0] == 200
    assert running.upstream.seen[-1].headers["idempotency-key"] not in sent, "at the same provider it is another request"


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
