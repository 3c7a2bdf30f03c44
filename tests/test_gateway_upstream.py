"""What each kind of failure means: asked again, blamed, left alone, and what the client is told."""

import asyncio
import gzip
import json
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, formatdate
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import aiohttp
import pytest

from deferral.gateway.answering import Answerers, Call, Standing, Unanswered, _nobody
from deferral.gateway.breaker import Breaker
from deferral.gateway.experts_file import Expert
from deferral.gateway.metrics import Metrics
from deferral.gateway.requests import parse
from deferral.gateway.streams import StreamMeter
from deferral.gateway.upstream import Failure, Reply, Upstream, _refused, _retry_after, _unanswered
from deferral.gateway.usage import Usage, error_of, id_in

CHAT = "/chat/completions"


@pytest.mark.parametrize(
    ("status", "path", "retry_after", "expected"),
    [
        (401, CHAT, None, (502, "upstream_misconfigured", False, True, None)),
        (404, CHAT, None, (502, "upstream_misconfigured", False, True, None)),
        (404, "/embeddings", None, (502, "upstream_misconfigured", False, False, None)),
        (405, "/completions", None, (502, "upstream_misconfigured", False, False, None)),
        (404, "/responses", None, (404, "not_found", False, False, None)),
        (429, CHAT, 7.0, (429, "upstream_rate_limited", False, False, 7.0)),
        (429, CHAT, None, (429, "upstream_rate_limited", False, False, 1.0)),
        (500, CHAT, None, (502, "upstream_error", True, True, None)),
        (503, CHAT, 0.0, (502, "upstream_error", True, True, 0.0)),
        (503, CHAT, 30.0, (502, "upstream_error", False, True, 30.0)),
        (302, CHAT, None, (502, "upstream_bad_reply", False, True, None)),
    ],
)
def test_what_a_status_means(status: int, path: str, retry_after: float | None, expected: tuple) -> None:
    failure = _refused(status, path, retry_after)
    assert (failure.status, failure.code, failure.again, failure.blame, failure.rest) == expected


def test_what_an_exception_means() -> None:
    key = aiohttp.client_reqrep.ConnectionKey("host", 1, True, True, None, None, None)
    for error, status, again in (
        (aiohttp.ConnectionTimeoutError(), 504, False),
        (aiohttp.SocketTimeoutError(), 504, False),
        (TimeoutError(), 504, False),
        (aiohttp.ClientConnectorCertificateError(key, ssl.SSLCertVerificationError()), 502, False),
        (aiohttp.ClientConnectorSSLError(key, OSError()), 502, False),
        (aiohttp.ClientConnectorError(key, OSError()), 502, True),
        (aiohttp.ServerDisconnectedError(), 502, True),
        (aiohttp.ClientOSError(), 502, True),
        (aiohttp.ClientPayloadError(), 502, False),
        (aiohttp.ClientPayloadError("400, message='Can not decode content-encoding: br'"), 502, False),
    ):
        for reused in (False, True):
            failure = _unanswered(error, reused=reused)
            assert (failure.status, failure.again, failure.blame) == (status, again, True), error
            disconnected = isinstance(error, aiohttp.ServerDisconnectedError) or type(error) is aiohttp.ClientOSError
            assert failure.stale is (disconnected and reused)
            assert ("compressed" in failure.message) is ("content-encoding" in str(error))


def test_retry_after_is_a_number_or_a_date() -> None:
    assert _retry_after("7") == 7
    assert _retry_after("0.5") == 0.5
    assert _retry_after("9" * 400) == 86_400
    soon = datetime.now(UTC) + timedelta(seconds=30)
    assert _retry_after(format_datetime(soon, usegmt=True)) == pytest.approx(30, abs=2)
    assert _retry_after(formatdate(0, usegmt=True)) == 0
    for text in (None, "", "soon", "-1", "²", "nan", "Wed, 99 Foo 2026 00:00:00 GMT"):
        assert _retry_after(text) is None


def test_an_expert_that_asks_for_rest_is_left_alone_whether_blamed_or_not() -> None:
    for blame in (True, False):
        standing = Standing(Expert("small", "http://127.0.0.1:1"))
        ticket = standing.breaker.enter()
        assert ticket is not None
        standing.blame(Failure(502, "upstream_error", "failed", blame=blame, rest=20.0), ticket, "small")
        assert standing.breaker.state == "resting"
        assert 19 < standing.breaker.wait <= 20
    standing = Standing(Expert("small", "http://127.0.0.1:1"))
    ticket = standing.breaker.enter()
    assert ticket is not None
    standing.blame(asyncio.CancelledError(), ticket, "small")
    assert not standing.breaker.down


def test_what_no_request_can_bring_about_is_no_keys_doing() -> None:
    unreachable = _unanswered(aiohttp.ConnectionTimeoutError(), reused=False)
    assert (unreachable.code, unreachable.of_server) == ("upstream_timeout", True)
    for failure, opens in ((unreachable, True), (_refused(401, CHAT, None), True), (_refused(403, CHAT, None), False)):
        standing = Standing(Expert("small", "http://127.0.0.1:1"))
        for number in range(12):
            ticket = standing.breaker.enter()
            assert ticket is not None
            if number == 1:
                standing.breaker.success(ticket, "other")
            else:
                standing.blame(failure, ticket, "small", "one")
            if standing.breaker.down:
                break
        assert standing.breaker.down is opens, failure.message


@pytest.mark.parametrize("path", ["/responses", "/embeddings", "/completions"])
def test_who_is_tried_again_with_a_path_that_it_does_not_know_is_tried_once_more(path: str) -> None:
    now = 0.0
    standing = Standing(Expert("small", "http://127.0.0.1:1"))
    standing.breaker = Breaker(clock=lambda: now)
    for _ in range(5):
        ticket = standing.breaker.enter()
        assert ticket is not None
        standing.blame(Failure(502, "upstream_error", "failed"), ticket, "small")
    assert standing.breaker.state == "open"
    now = 11.0
    ticket = standing.breaker.enter()
    assert ticket is not None
    assert standing.breaker.down, "one request tries it"
    standing.blame(_refused(404, path, None), ticket, "small")
    assert standing.breaker.state == "half-open"
    assert not standing.breaker.down
    assert standing.breaker.enter() is not None


def test_the_chosen_one_says_what_kind_of_problem_it_is_and_all_are_named() -> None:
    small, large = (Expert(name, "http://127.0.0.1:1") for name in ("small", "large"))
    slow, broken = Failure(504, "upstream_timeout", "did not answer in time"), Failure(502, "upstream_error", "failed", rest=3.0)
    problem = _nobody([(small, broken), (small, slow), (large, broken)], 3)
    assert (problem.status, problem.code, problem.attempts) == (504, "upstream_timeout", 3)
    assert problem.message == "small failed; small did not answer in time; large failed"
    assert _nobody([(small, broken)], 1).headers == {"retry-after": "3"}


ANSWER = {"id": "c1", "choices": [{"message": {"content": "yes"}}], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
CHUNK = b'{"choices": [{"delta": {"content": "the end is [DONE]"}}]}'


def whole(body: object = ANSWER, head: bytes = b"", status: int = 200, *, packed: bool = False) -> bytes:
    data = json.dumps(body).encode()
    data = gzip.compress(data) if packed else data
    begin = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n"
    return begin % (status, head, len(data)) + data


def streamed(*events: bytes) -> bytes:
    data = b"".join(b"data: " + event + b"\n\n" for event in events)
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(data) + data


def asked(connections: Sequence[Sequence[bytes]], times: int = 1, key: str | None = None) -> tuple[list[Call | Exception], int]:
    """Calls of an expert, one after another, that may never be retried; one list of replies for each connection, b"" ends it.

    -> what came of each, and how many requests the expert got
    """
    served: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for reply in waiting.pop(0):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            served.append(head)
            if not reply:
                break
            writer.write(reply)
        writer.close()

    async def run() -> list[Call | Exception]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        expert = Expert("small", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", key=key)
        upstream = Upstream(max_reply_bytes=1 << 20)
        answerers = Answerers(upstream, Metrics(), retry_share=0.0)
        answerers.update({"small": expert})
        body = b'{"model": "small", "messages": [], "stream": true}'
        found: list[Call | Exception] = []
        for _ in range(times):
            try:
                call = await answerers.answer([expert], CHAT, lambda _: body, {}, parse("chat", body))
                call.end(True)
                found.append(call)
            except Unanswered as nobody:
                found.append(nobody)
        assert answerers.standings["small"].slots.taken == 0
        await upstream.close()
        server.close()
        return found

    waiting = list(connections)
    return asyncio.run(run()), len(served)


def test_a_connection_that_ended_while_it_was_idle_is_replaced_and_no_other_is() -> None:
    answers, requests = asked([[whole(), b""], [whole()]], times=2)
    assert [call.attempts for call in answers if isinstance(call, Call)] == [1, 2]
    assert requests == 3
    # Nothing was idle here: that is a failure like others, for the retry budget to decide on, and there is none.
    [nobody], requests = asked([[b""], [whole()]])
    assert isinstance(nobody, Unanswered)
    assert (nobody.status, nobody.attempts, requests) == (502, 1, 1)


async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A stream without an end, an event every 20 ms."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"data: " + CHUNK + b"\n\n")
        await asyncio.sleep(0.02)


async def pours(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A long stream, at once."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(streamed(*[bytes(1 << 16)] * 100, b"[DONE]"))


@pytest.mark.parametrize(("serve", "pause", "cut"), [(drips, 0.0, True), (pours, 0.0, False), (pours, 0.5, False)])
def test_an_expert_has_its_time_for_a_stream_and_not_what_the_client_takes_to_read_it(
    serve: Any, pause: float, cut: bool
) -> None:
    async def run() -> bytes:
        served = asyncio.Event()

        async def serving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await serve(reader, writer)
            finally:
                writer.close()
                served.set()

        server = await asyncio.start_server(serving, "127.0.0.1", 0)
        expert = Expert("small", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", total_s=0.3)
        upstream = Upstream(max_reply_bytes=1 << 20)
        body = b'{"model": "small", "messages": [], "stream": true}'
        reply = await upstream.ask(expert, CHAT, body, {}, parse("chat", body))
        read = reply.body
        try:
            async with asyncio.timeout(10):
                await asyncio.sleep(pause)
                async for part in reply.rest():
                    read += part
                    if len(read) < 1 << 17:
                        await asyncio.sleep(pause)
        finally:
            reply.close()
            await upstream.close()
            server.close()
            await served.wait()
        return read

    if cut:
        with pytest.raises(Failure, match="stopped in the middle of the stream"):
            asyncio.run(run())
    else:
        assert asyncio.run(run()).endswith(b"data: [DONE]\n\n")


def test_a_whole_reply_has_its_time_and_no_more() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(whole()[:-9])
            await reader.read()
        finally:
            writer.close()
            served.set()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        expert = Expert("small", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", total_s=0.1)
        upstream = Upstream(max_reply_bytes=1 << 20)
        body = b'{"model": "small", "messages": []}'
        try:
            await upstream.ask(expert, CHAT, body, {}, parse("chat", body))
        finally:
            await upstream.close()
            server.close()
            await served.wait()

    served = asyncio.Event()
    with pytest.raises(Failure, match="did not answer in time") as failed:
        asyncio.run(run())
    assert (failed.value.status, failed.value.code, failed.value.blame) == (504, "upstream_timeout", True)


def test_who_is_asked_is_told_once_there_is_a_connection_and_no_more_when_that_is_over() -> None:
    async def run() -> list[str | None]:
        told: list[str | None] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            told.append("asked")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        closed, there = (
            Expert(name, f"http://127.0.0.1:{port}/v1")
            for name, port in (("closed", 1), ("there", server.sockets[0].getsockname()[1]))
        )
        upstream = Upstream(max_reply_bytes=1 << 20)
        answerers = Answerers(upstream, Metrics(), retry_share=0.0)
        body = b'{"model": "small", "messages": []}'
        with pytest.raises(Unanswered):
            await answerers.answer(
                [closed, there], CHAT, lambda _: body, {}, parse("chat", body), lambda who: told.append(who and who.name)
            )
        await upstream.close()
        server.close()
        return told

    assert asyncio.run(run()) == [None, "there", "asked", None]


def test_an_expert_that_was_left_out_for_a_while_is_still_as_busy_as_it_was() -> None:
    async def run() -> None:
        expert = Expert("small", "http://127.0.0.1:1", max_concurrent=2)
        answerers = Answerers(SimpleNamespace(), Metrics(), retry_share=0.0)  # type: ignore[arg-type]
        answerers.update({"small": expert})
        standing = answerers.standings["small"]
        await standing.slots.take(1.0)
        answerers.update({})
        assert not answerers.standings
        answerers.update({"small": expert})
        assert answerers.standings["small"] is standing
        standing.slots.give_back(0.1)
        answerers.update({})
        answerers.update({"small": expert})
        assert answerers.standings["small"] is not standing, "of whom nothing is under way, nothing is kept"

    asyncio.run(run())


def test_a_stream_that_has_begun_lets_others_ask_whoever_was_left_alone() -> None:
    async def run() -> None:
        begun = Reply(200, [], b"data: {}", Usage(0, 0, True, ""), SimpleNamespace(close=lambda: None))  # type: ignore[arg-type]
        upstream: Any = SimpleNamespace(ask=AsyncMock(return_value=begun))
        expert, body = Expert("small", "http://127.0.0.1:1"), b'{"model": "small", "messages": []}'
        answerers = Answerers(upstream, Metrics(), retry_share=0.0)
        answerers.update({"small": expert})
        breaker = answerers.standings["small"].breaker
        for _ in range(5):
            breaker.failure(breaker.enter() or 0)
        breaker._until = 0.0
        assert breaker.state == "half-open"
        call = await answerers.answer([expert], CHAT, lambda _: body, {}, parse("chat", body))
        assert (breaker.state, breaker.down) == ("closed", False)
        call.end(False)
        assert list(breaker._calls) == [False], "and how it ended is told all the same"

    asyncio.run(run())


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


def test_a_reply_that_repeats_the_key_keeps_it_secret() -> None:
    key = "sk-0123456789"
    echo = {"error": {"message": f"your headers: Bearer {key}"}}
    answer = ANSWER | {"headers": f"Bearer {key}"}
    for body, status in ((echo, 422), (answer, 200)):
        [call], _ = asked([[whole(body, head=f"x-echo: Bearer {key}\r\n".encode(), status=status)]], key=key)
        assert isinstance(call, Call)
        assert call.reply.body == json.dumps(body).encode().replace(key.encode(), b"***")
        assert (b"x-echo", b"Bearer ***") in call.reply.headers
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


def begun(parts: Sequence[bytes]) -> bytes:
    """How the reply begins of an expert that streams these parts, one after the other, and then says nothing; or the Failure."""

    async def run() -> bytes:
        over, served = asyncio.Event(), asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0.03)
            await over.wait()
            writer.close()
            served.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        expert = Expert("small", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        upstream = Upstream(max_reply_bytes=1 << 20)
        body = b'{"model": "small", "messages": [], "stream": true}'
        try:
            reply = await upstream.ask(expert, CHAT, body, {}, parse("chat", body))
            reply.close()
            return reply.body
        finally:
            over.set()
            await served.wait()
            await upstream.close()
            server.close()

    return asyncio.run(run())


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
