"""What a reply says, whole or in a stream: an answer or an error, packed, cut by packets, or with what no client may be sent."""

import json
from collections.abc import Sequence

import pytest

from deferral.gateway.answering import Call, Unanswered
from deferral.gateway.failures import Failure
from deferral.gateway.streams import StreamMeter
from deferral.gateway.usage import error_of, id_in
from tests.scripted_expert import ANSWER, CHUNK, asked, begun, streamed, whole


def test_a_compressed_reply_is_understood_though_nobody_asked_for_it() -> None:
    [call], _ = asked([[whole(head=b"content-encoding: gzip\r\n", packed=True)]])
    assert isinstance(call, Call)
    assert json.loads(call.reply.body) == ANSWER
    assert (call.reply.usage.output_tokens, call.reply.usage.estimated) == (3, False)
    assert b"content-encoding" not in dict(call.reply.headers)


def test_headers_that_no_client_could_be_sent_are_left_out() -> None:
    [call], _ = asked([[whole(head=b"x-odd: a\x01b\r\nx-even: caf\xe9\r\n")]])
    assert isinstance(call, Call)
    assert (b"x-even", b"caf\xe9") in call.reply.headers
    assert b"x-odd" not in dict(call.reply.headers)


def test_what_a_reply_names_as_of_its_connection_stays_there() -> None:
    head = b"connection: keep-alive, X-Hop\r\nconnection: x-other\r\nx-hop: 1\r\nx-other: 2\r\nx-far: 3\r\n"
    [call], _ = asked([[whole(head=head)]])
    assert isinstance(call, Call)
    assert [name for name, _ in call.reply.headers if name.startswith(b"x-")] == [b"x-far"]


@pytest.mark.parametrize("head", [b"connection: caf\xe9, x-hop\r\n", b"content-encoding: caf\xe9\r\n"])
def test_headers_in_no_encoding_at_all_are_read(head: bytes) -> None:
    [call], _ = asked([[whole(head=head + b"x-hop: 1\r\n")]])
    assert isinstance(call, Call)
    assert json.loads(call.reply.body) == ANSWER
    assert (b"x-hop" in dict(call.reply.headers)) is head.startswith(b"content")


def test_a_reply_that_repeats_the_key_keeps_it_secret() -> None:
    key = "sk-0123456789"
    echo = {"error": {"message": f"your headers: Bearer {key}"}}
    answer = ANSWER | {"headers": f"Bearer {key}"}
    for body, status in ((echo, 422), (answer, 200)):
        [call], _ = asked([[whole(body, head=f"x-echo: Bearer {key}\r\n".encode(), status=status)]], key=key)
        assert isinstance(call, Call)
        assert call.reply.body == json.dumps(body).encode().replace(key.encode(), b"***")
        assert (b"x-echo", b"Bearer ***") in call.reply.headers
    no_answer = b"HTTP/1.1 200 OK\r\ncontent-type: text/%b\xe9\r\ncontent-length: 0\r\n\r\n"
    [nobody], _ = asked([[no_answer % key.encode()]], key=key)
    assert "asked for: 'text/***" in str(nobody)
    [call], _ = asked([[streamed(b'{"choices": [], "echo": "%b"}' % key.encode())]], key=key)
    assert isinstance(call, Call)
    assert call.reply.body == b'data: {"choices": [], "echo": "***"}\n\n'


@pytest.mark.parametrize("reply", [whole({"error": {"message": "busy", "code": 503}}), streamed(b'{"error": "busy"}', b"[DONE]")])
def test_an_error_in_place_of_an_answer_is_a_failure_whatever_its_status_says(reply: bytes) -> None:
    [nobody], _ = asked([[reply]])
    assert isinstance(nobody, Unanswered)
    assert (nobody.status, nobody.code) == (502, "upstream_error")
    [call], _ = asked([[whole({"error": {"message": "no such tool", "code": 400}})]])
    assert isinstance(call, Call), "the client's own fault is told to the client"


def test_who_comes_after_a_429_gets_one_too_and_nobody_is_asked() -> None:
    [first, second], requests = asked([[whole({}, head=b"retry-after: 7\r\n", status=429)]], times=2)
    assert isinstance(first, Unanswered)
    assert isinstance(second, Unanswered)
    assert (first.status, first.code, first.headers["retry-after"]) == (429, "upstream_rate_limited", "7")
    assert (second.status, second.code, second.headers["retry-after"]) == (429, "experts_busy", "7")
    assert (requests, second.attempts) == (1, 0)


def test_what_is_an_error_and_what_is_an_answer() -> None:
    assert error_of(b'{"error": {"code": 429}}') == 429
    assert error_of(b'{"error": {"code": "overloaded"}}') == error_of(b'{"error": "no"}') == 502
    assert error_of(b': a comment\n\ndata: {"error": {"code": 503}}\n\n') == 503
    for answer in (
        b'{"error": null}',
        b'{"choices": [{}], "error": {}}',
        b'{"data": [1], "error": "x"}',
        b'["error"]',
        b'{"error": {',
    ):
        assert error_of(answer) is None


@pytest.mark.parametrize(
    ("events", "finished"),
    [
        ([CHUNK, b"[DONE]"], True),
        ([CHUNK, b'{"choices": [{"finish_reason": "stop"}]}'], True),
        ([CHUNK], False),
        ([CHUNK, b'{"error": {"message": "overloaded"}}', b"[DONE]"], False),
        ([CHUNK, b'{"choices": [{"finish_reason": "error"}]}', b"[DONE]"], False),
    ],
)
def test_a_stream_is_over_when_it_says_so_and_not_when_the_answer_does(events: list[bytes], finished: bool) -> None:
    for end in (b"\n\n", b"\r\n\r\n"):
        meter = StreamMeter()
        for event in events:
            meter.feed(b"data: " + event + end)
        assert meter.finished is finished


def test_the_id_of_a_stream_is_that_of_the_reply_wherever_its_keys_stand() -> None:
    first = b'data: {"choices":[],"created":0,"id":"","model":"","object":""}\n\n'
    call = b'{"delta":{"tool_calls":[{"function":{"arguments":"","name":"f"},"id":"call_abc","index":0,"type":"function"}]}}'
    second = b'data: {"choices":[' + call + b'],"id":"chatcmpl-XYZ","object":"chat.completion.chunk"}\n\n'
    meter = StreamMeter()
    for byte in first + second:
        meter.feed(bytes([byte]))
    assert meter.usage(1).reply_id == "chatcmpl-XYZ"
    assert id_in(b'data: {"type":"response.created","response":{"id":"resp_1","output":[]}}\n\n') == "resp_1"
    assert id_in(b'{"id":"chatcmpl-1","choices":[{"message":') == "chatcmpl-1"
    assert id_in(b'{"choices":[{"message":{"tool_calls":[{"id":"call_abc"') == ""


@pytest.mark.parametrize("name", ["content", "reasoning_content", "reasoning", "refusal", "thinking"])
def test_what_a_model_thinks_is_paid_for_as_what_it_says(name: str) -> None:
    meter = StreamMeter()
    for _ in range(100):
        meter.feed(b'data: {"id":"x","choices":[{"delta":{"%b":"four, or more"}}]}\n\n' % name.encode())
    assert meter.usage(1).output_tokens == 100 * 13 // 4


@pytest.mark.parametrize(
    "parts",
    [
        (b": PROCESSING\n\n", b'data: {"error": {"code": 503}}\n\n'),
        (b'data: {"error": {"co', b'de": 503}}\n\n'),
        (b"event: error\n", b'data: {"error": {"code": 503}}\n\n'),
        (b"\xef\xbb\xbf", b": a\r\n\r\n", b": b\r\n\r\n", b'data: {"error": "no"}\r\n\r\n'),
    ],
)
def test_an_error_is_one_though_comments_come_first_and_packets_cut_it(parts: Sequence[bytes]) -> None:
    with pytest.raises(Failure, match=r"failed with status 50[23]"):
        begun(parts)


def test_comments_are_held_back_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert begun((b": a\n\n", b"data: " + CHUNK + b"\n\n")) == b": a\n\ndata: " + CHUNK + b"\n\n"
    monkeypatch.setattr("deferral.gateway.upstream._HELD_BACK_S", 0.1)
    assert begun((b": a\n\n",)) == b": a\n\n"


def test_a_head_as_long_as_clients_may_send_is_read() -> None:
    [call], _ = asked([[whole(head=b"x-long: " + b"a" * 30_000 + b"\r\n")]])
    assert isinstance(call, Call)
    assert dict(call.reply.headers)[b"x-long"] == b"a" * 30_000


def test_comments_alone_are_no_answer() -> None:
    data = b": a\n\n"
    reply = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(data) + data
    [nobody], _ = asked([[reply]])
    assert isinstance(nobody, Unanswered)
    assert "ended its stream before the first byte" in nobody.message
