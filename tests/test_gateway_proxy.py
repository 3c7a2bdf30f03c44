"""The whole gateway with real servers on loopback: the official client, what passes through, and who answers."""

import asyncio
import contextlib
import http.client
import json
import socket
import sqlite3
import threading
import time
from dataclasses import replace
from typing import Any

import openai
import pytest

from deferral.gateway.experts_file import Expert
from tests.faulty_upstream import CHUNKS
from tests.running_gateway import EASY, HARD
from tests.whole_gateway import ADMIN_KEY, UPSTREAM_KEY, calm, rows

pytestmark = [pytest.mark.ci_slow, pytest.mark.usefixtures("nobody_is_down")]

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}


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
        assert float(raw.headers["x-deferral-price"]) == pytest.approx(row["price"], rel=1e-5)
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
        assert running.gateway.state.answerers.servers["narrow"].each[0].slots.taken == 0


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
    breaker = gateway.state.answerers.servers["quick"].each[0].breaker
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
        assert (breaker.state, [good for good, _, _ in breaker._calls]) == ("closed", [True] * 5)
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
    gateway.chat(EASY, key=key, seed=4711)  # its reply has the same id
    status, _, said = gateway.ask("POST", "/v1/feedback", {"id": answer["id"], "thumbs": "up"}, key=key)
    assert (status, "or several have it" in json.loads(said)["error"]["message"]) == (404, True)


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
