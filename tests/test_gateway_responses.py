"""The Responses API: what is asked, what it needs, where it may go, and what its streams and errors say."""

import json
import tracemalloc
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deferral.gateway.problems import Problem
from deferral.gateway.requests import Asked, parse
from deferral.gateway.streams import METERS, error_event
from deferral.gateway.usage import error_of, usage_of

PICTURE = {"type": "input_image", "image_url": "data:image/png;base64," + "A" * 4000}
CALL = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}


def asked(items: Any = "hello", **fields: Any) -> Asked:
    return parse("responses", json.dumps({"model": "auto", "input": items} | fields).encode())


def test_the_query_is_what_the_user_said_last() -> None:
    items: list[Any] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "one"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "look"}, PICTURE]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        CALL,
        {"type": "function_call_output", "call_id": "c", "output": "a long result"},
    ]
    found = asked(items, instructions="x" * 400, stream=True, max_output_tokens=50)
    assert (found.query, found.tools, found.images, found.stream, found.output_tokens) == ("look", True, True, True, 50)
    assert [turn.query for turn in found.turns] == ["first", "look"]
    assert found.turns[0].before >= 100, "instructions come first"
    assert 1000 < found.tokens < 1400, "an image counts as an image, not as its bytes"
    assert found.responses
    plain = asked("hello")
    assert (plain.query, plain.tools, plain.images, plain.previous) == ("hello", False, False, "")
    assert asked("hello", tools=[{"type": "web_search"}]).tools
    # A screen is a picture, and what it belongs to is a tool's.
    screen = {"type": "computer_call_output", "output": {"type": "computer_screenshot", "image_url": PICTURE["image_url"]}}
    assert (asked([screen]).tools, asked([screen]).images) == (True, True)


def test_the_same_conversation_is_read_the_same_in_either_api() -> None:
    calls = [{"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}]
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "{}", "tool_calls": calls},
        {"role": "tool", "content": "a long result"},
        {"role": "user", "content": "and then"},
    ]
    items = [messages[0], CALL, {"type": "function_call_output", "call_id": "c", "output": "a long result"}, messages[3]]
    chat = parse("chat", json.dumps({"model": "auto", "messages": messages}).encode())
    assert (asked(items).turns, asked(items).query, asked(items).tools) == (chat.turns, chat.query, chat.tools)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": {"role": "user"}}, "input"),
        ({"input": 7}, "input"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"input": None, "prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"previous_response_id": ["resp_1"]}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"background": True, "model": "small"}, "background"),
    ],
)
def test_what_no_router_can_decide_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Problem) as caught:
        asked(**{"items": "hello"} | fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_what_is_kept_at_an_expert_goes_to_the_expert_that_is_named() -> None:
    assert asked(previous_response_id="resp_1").previous == "resp_1"
    assert asked(None, previous_response_id="resp_1").query == ""
    named = asked(None, model="small", previous_response_id=7, conversation="conv_1", prompt={"id": "pmpt_1"})
    assert (named.model, named.previous) == ("small", "")


@pytest.mark.parametrize("model", ["auto", "small"])
@pytest.mark.parametrize("again", ["previous_response_id", "previous_response_i\\u0064", "previous\\u005fresponse_id"])
def test_one_response_is_gone_on_from_and_not_two(model: str, again: str) -> None:
    """An expert may take the first of two where the gateway takes the last."""
    for last in ('"resp_2"', "null"):
        body = f'{{"previous_response_id": "resp_1", "model": "{model}", "input": "hello", "{again}": {last}}}'
        with pytest.raises(Problem, match="expected it once") as caught:
            parse("responses", body.encode())
        assert (caught.value.status, caught.value.param) == (400, "previous_response_id")
    once = f'{{"model": "{model}", "input": "hello, previous_response_id", "{again}": "resp_1", "tools": [{{"{again}": 1}}]}}'
    assert parse("responses", once.encode()).previous == "resp_1"


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | fields)}\n\n".encode()


USAGE = {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 2, "x": {"y": {}}}, "output_tokens": 6}
WHOLE = {
    "id": "resp_7", "object": "response", "error": None, "status": "completed", "output": [{"text": "x" * 9000}],
    "tools": [{"parameters": {"usage": {"type": "object"}}}], "usage": USAGE, "metadata": {"filler": "x" * 9000},
}  # fmt: skip
BRIEF = WHOLE | {"metadata": {}}
BEGUN = WHOLE | {"usage": None, "output": []}


def stream(*last: bytes) -> bytes:
    told = [event("response.output_text.delta", delta='say "type":"response.completed"\nevent: error\n')] * 3
    done = event("response.output_text.done", text="x" * 400)
    return b"".join([event("response.created", response=BEGUN), *told, done, *last])


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 30_000), max_size=12))
def test_a_stream_is_metered_however_it_is_cut(cuts: list[int]) -> None:
    whole = stream(event("response.completed", response=WHOLE))
    places = sorted({0, len(whole), *(cut % len(whole) for cut in cuts)})
    meter = METERS["responses"]()
    for start, end in pairwise(places):
        assert not meter.finished
        meter.feed(whole[start:end])
    assert meter.finished
    assert meter.usage(99) == (5, 6, False, "resp_7", 2)


@pytest.mark.parametrize(
    ("last", "finished"),
    [
        ([event("response.completed", response=WHOLE)], True),
        ([event("response.incomplete", response=WHOLE), b"data: [DONE]\n\n"], True),
        # Without the names of events, the type at the end.
        ([f"data: {json.dumps({'response': BRIEF, 'type': 'response.completed'})}\r\n\r\n".encode()], True),
        ([], False),
        ([event("response.failed", response=WHOLE)], False),
        ([event("error", code="server_error", message="it broke")], False),
        ([b'data: {"type":"error","message":"it broke"}\n\n'], False),
        ([b'data: {"error": {"message": "it broke"}}\n\n', b"data: [DONE]\n\n"], False),
        ([event("response.completed", response=WHOLE)[:-30]], False),
    ],
)
def test_a_stream_is_over_when_its_last_event_is_there(last: list[bytes], finished: bool) -> None:
    meter = METERS["responses"]()
    for part in (stream(), *last):
        meter.feed(part)
    assert meter.finished is finished
    told = any(b'"output_tokens"' in part and part.endswith(b"\n") for part in last)
    # Without a usage in a whole event the deltas are counted, and not what repeats them.
    assert meter.usage(99).output_tokens == (6 if told else 34)


def test_what_a_client_sends_is_neither_an_end_nor_a_usage() -> None:
    forged = {"type": "response.completed", "usage": {"input_tokens": 0, "output_tokens": 0}}
    meter = METERS["responses"]()
    meter.feed(event("response.created", response=BRIEF | {"usage": None, "output": [], "tools": [{"parameters": forged}]}))
    meter.feed(event("response.output_text.delta", delta="x" * 40))
    assert not meter.finished
    assert meter.usage(99)[:3] == (99, 10, True)


CHOSEN = {"usage": {"input_tokens": 0, "output_tokens": 0}}  # by a client, in what a reply repeats


@pytest.mark.parametrize("metadata", [CHOSEN, {"usage": "chat"}, {"user": 'a"usage'}], ids=["object", "text", "in a text"])
@pytest.mark.parametrize("instructions", ["", "x" * 200_000], ids=["short", "long"])
def test_what_a_reply_cost_is_what_it_says_and_not_what_its_client_sent(metadata: dict[str, Any], instructions: str) -> None:
    reply = {**BRIEF, "instructions": instructions, "metadata": metadata, "user": 'a"usage'}
    assert usage_of(json.dumps(reply).encode(), 99, echoes=True) == (5, 6, False, "resp_7", 2)
    meter = METERS["responses"]()
    whole = stream(event("response.completed", response=reply))
    for start in range(0, len(whole), 40_000):
        meter.feed(whole[start : start + 40_000])
    assert (meter.finished, meter.usage(99)) == (True, (5, 6, False, "resp_7", 2))
    type_last = f"data: {json.dumps({'response': BRIEF, 'type': 'response.completed'})}\n\n".encode()
    pinged = METERS["responses"]()
    for part in (stream(), type_last, b'data: {"type": "ping"}\n\n'):
        pinged.feed(part)
    assert pinged.usage(99) == (5, 6, False, "resp_7", 2)
    left = METERS["responses"]()
    left.feed(whole[:-20])
    assert left.usage(99)[:3] == (99, 34, True), "half of the last event tells nothing"


def test_of_an_event_without_an_end_no_more_is_kept_than_is_of_use() -> None:
    meter = METERS["responses"]()
    meter.feed(b'data: {"response": {"tools": [')
    tracemalloc.start()
    for _ in range(400):
        meter.feed(b'{"usage": {"input_tokens": 0, "output_tokens": 0}}, ' * 1000)
    assert tracemalloc.get_traced_memory()[0] < 12 << 20
    tracemalloc.stop()
    meter.feed(b'{}]}, "type": "response.completed"}\n\n')
    assert meter.finished
    assert meter.usage(99).input_tokens == 99


@pytest.mark.parametrize("size", [7, 1000, 100_000])
@pytest.mark.parametrize("usage", [{"usage": USAGE}, {}], ids=["reported", "not reported"])
def test_a_client_does_not_say_what_it_cost_where_the_type_comes_last_either(usage: dict[str, Any], size: int) -> None:
    reply = {"id": "resp_7", "output": [{"text": "x" * 400}], "filler": "x" * 9000, **usage, "metadata": CHOSEN}
    told = ({"delta": "x" * 400, "type": "response.output_text.delta"}, {"response": reply, "type": "response.completed"})
    whole = b"".join(f"data: {json.dumps(one)}\n\n".encode() for one in told)
    meter = METERS["responses"]()
    for start in range(0, len(whole), size):
        meter.feed(whole[start : start + size])
    assert meter.finished
    assert meter.usage(99)[:3] == ((5, 6, False) if usage else (99, 100, True))


def test_thousands_of_usages_that_a_client_has_sent_are_not_all_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def raw_decode(text: str) -> Any:
        read.append(text)
        return json.JSONDecoder().raw_decode(text)

    monkeypatch.setattr("deferral.gateway.usage._DECODER", SimpleNamespace(raw_decode=raw_decode))
    within: dict[str, Any] = {}
    for _ in range(100):
        within = {"usage": within}
    whole = stream(event("response.created", response=BEGUN | {"tools": [within] * 500}))
    meter = METERS["responses"]()
    size = 40_000
    for start in range(0, len(whole), size):
        meter.feed(whole[start : start + size])
    assert len(read) <= 8 * (len(whole) // size + 1)
    meter.feed(event("response.completed", response=WHOLE))
    assert meter.usage(99) == (5, 6, False, "resp_7", 2)


def test_an_error_that_a_client_can_bring_about_is_not_blamed_on_the_expert() -> None:
    failed = BRIEF | {"status": "failed", "metadata": {"filler": "x" * 9000}}
    for kind, last, blameless in (
        ("responses", event("response.failed", response=failed | {"error": {"code": "image_too_large"}}), True),
        ("responses", event("response.failed", response=failed | {"error": {"code": "server_error"}}), False),
        ("responses", event("error", code="invalid_prompt", message="x"), True),
        ("responses", b"", False),
        ("chat", b'data: {"error": {"message": "too long", "code": 400}}\n\n', True),
        ("chat", b'data: {"error": {"message": "it broke", "code": 500}}\n\n', False),
        ("chat", b'data: {"choices": [{"delta": {"content": "\\"error\\" \\"code\\": 400"}}]}\n\n', False),
    ):
        meter = METERS[kind]()  # type: ignore[index]
        for part in (stream(), last):
            meter.feed(part)
        assert (meter.finished, meter.blameless) == (False, blameless), last


def test_usage_and_id_of_a_whole_response() -> None:
    whole = {"conversation": {"id": "conv_1"}} | WHOLE
    assert usage_of(json.dumps(whole).encode(), 99) == (5, 6, False, "resp_7", 2)
    long = json.dumps(WHOLE | {"output": ["x" * 200_000], "metadata": {}}).encode()
    assert usage_of(long, 99) == (5, 6, False, "resp_7", 2)
    guessed = usage_of(json.dumps(WHOLE | {"usage": None}).encode(), 99)
    assert (guessed.output_tokens, guessed.estimated) == (2250, True)  # type: ignore[union-attr]


def test_what_is_an_error_and_what_is_an_answer() -> None:
    failed = {"object": "response", "status": "failed", "output": [], "error": {"code": "server_error"}}
    for body, status in (
        (json.dumps(failed).encode(), 502),
        (json.dumps(failed | {"error": {"code": "invalid_prompt"}}).encode(), 400),
        (json.dumps(failed | {"output": [{"type": "message"}]}).encode(), None),
        (json.dumps(WHOLE).encode(), None),
        (event("response.created", response=BEGUN), None),
        (event("response.failed", response=failed), 502),
        (event("error", code="image_too_large", message="x"), 400),
        (event("error", error={"code": 503}), 503),
        (b'{"type": ["error"], "choices": [1]}', None),
    ):
        assert error_of(body) == status, body


def test_a_stream_that_breaks_off_ends_with_an_error_as_each_api_has_it() -> None:
    body = b'{"error": {"message": "x"}}'
    assert error_event("chat", body) == b"data: " + body + b"\n\n"
    name, data = error_event("responses", body).split(b"\n")[:2]
    assert (name, json.loads(data[6:])) == (b"event: error", {"type": "error", "error": {"message": "x"}})
