"""What each kind of failure means: asked again, blamed, left alone, and what the client is told."""

import asyncio
import gzip
import logging
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, formatdate
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import aiohttp
import pytest

from deferral.gateway.answering import Answerers, Call, Outgoing, Unanswered, _nobody
from deferral.gateway.breaker import Breaker
from deferral.gateway.experts_file import Expert
from deferral.gateway.failures import Failure, refused_with, retry_after_of, unanswered
from deferral.gateway.metrics import Metrics
from deferral.gateway.requests import parse
from deferral.gateway.standing import Standing
from deferral.gateway.upstream import Reply, Upstream
from deferral.gateway.usage import Usage
from tests.scripted_expert import CHAT, CHUNK, asked, streamed, whole


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
    failure = refused_with(status, path, retry_after)
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
            failure = unanswered(error, reused=reused)
            assert (failure.status, failure.again, failure.blame) == (status, again, True), error
            disconnected = isinstance(error, aiohttp.ServerDisconnectedError) or type(error) is aiohttp.ClientOSError
            assert failure.stale is (disconnected and reused)
            assert ("compressed" in failure.message) is ("content-encoding" in str(error))


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after_of({"Retry-After": "7"}) == 7
    assert retry_after_of({"Retry-After": "0.5"}) == 0.5
    assert retry_after_of({"Retry-After": "1", "retry-after-ms": "250"}) == 0.25
    assert retry_after_of({"Retry-After": "7", "retry-after-ms": "soon"}) == 7
    assert retry_after_of({"Retry-After": "9" * 400}) == 86_400
    assert retry_after_of({"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}) == 86_400
    soon = datetime.now(UTC) + timedelta(seconds=30)
    assert retry_after_of({"Retry-After": format_datetime(soon, usegmt=True)}) == pytest.approx(30, abs=2)
    assert retry_after_of({"Retry-After": formatdate(0, usegmt=True)}) == 0
    for text in (None, "", "soon", "-1", "²", "nan", "Wed, 99 Foo 2026 00:00:00 GMT"):
        assert retry_after_of({"Retry-After": text} if text is not None else {}) is None


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
    unreachable = unanswered(aiohttp.ConnectionTimeoutError(), reused=False)
    assert (unreachable.code, unreachable.of_server) == ("upstream_timeout", True)
    for failure, opens in ((unreachable, True), (refused_with(401, CHAT, None), True), (refused_with(403, CHAT, None), False)):
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
    standing.blame(refused_with(404, path, None), ticket, "small")
    assert standing.breaker.state == "half-open"
    assert not standing.breaker.down
    assert standing.breaker.enter() is not None


def test_the_chosen_one_says_what_kind_of_problem_it_is_and_all_are_named() -> None:
    small, large = (Expert(name, "http://127.0.0.1:1") for name in ("small", "large"))
    slow, broken = Failure(504, "upstream_timeout", "did not answer in time"), Failure(502, "upstream_error", "failed", rest=3.0)
    at_small, at_large = Standing(small), Standing(large)
    problem = _nobody([(small, at_small, broken), (small, at_small, slow), (large, at_large, broken)], 3)
    assert (problem.status, problem.code, problem.attempts) == (504, "upstream_timeout", 3)
    assert problem.message == "small failed; small did not answer in time; large failed"
    assert _nobody([(small, at_small, broken)], 1).headers == {"retry-after": "3"}


def test_a_connection_that_ended_while_it_was_idle_is_replaced_and_no_other_is() -> None:
    answers, requests = asked([[whole(), b""], [whole()]], times=2)
    assert [call.attempts for call in answers if isinstance(call, Call)] == [1, 2]
    assert requests == 3
    # Nothing was idle here: that is a failure like others, for the retry budget to decide on, and there is none.
    [nobody], requests = asked([[b""], [whole()]])
    assert isinstance(nobody, Unanswered)
    assert (nobody.status, nobody.attempts, requests) == (502, 1, 1)


def test_a_connection_that_is_old_ends_with_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leads to another address by now is looked up again, though requests come all the time."""
    monkeypatch.setattr("deferral.gateway.connecting._LONGEST_KEPT_S", 0.0)
    answers, requests = asked([[whole(), b""], [whole()]], times=2)
    assert [call.attempts for call in answers if isinstance(call, Call)] == [1, 1]
    assert requests == 2, "of a connection that is kept the second request is the third"


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


def test_a_stream_that_unpacks_to_much_leaves_others_their_turn() -> None:
    size = 64 << 20
    packed = gzip.compress(b"data: {}\n\n" + bytes(size) + b"\n\n")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n"
        writer.write(head % len(packed) + packed)
        writer.close()

    async def run() -> list[int]:
        read, seen = 0, []

        async def another() -> None:
            while True:
                seen.append(read)
                await asyncio.sleep(0)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        expert = Expert("small", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        upstream = Upstream(max_reply_bytes=1 << 20)
        body = b'{"model": "small", "messages": [], "stream": true}'
        reply = await upstream.ask(expert, CHAT, body, {}, parse("chat", body))
        task = asyncio.create_task(another())
        try:
            async for part in reply.rest():
                read += len(part)
        finally:
            task.cancel()
            reply.close()
            await upstream.close()
            server.close()
        assert read + len(reply.body) > size
        return [0, *seen, read]

    seen = asyncio.run(run())
    assert max(after - before for before, after in pairwise(seen)) <= 8 << 20


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
                [closed, there],
                Outgoing(CHAT, {}, parse("chat", body)),
                lambda _: body,
                lambda who: told.append(who and who.name),
            )
        await upstream.close()
        server.close()
        return told

    assert asyncio.run(run()) == [None, "there", "asked", None]


def test_an_expert_that_was_left_out_for_a_while_is_still_as_busy_as_it_was() -> None:
    async def run() -> None:
        expert = Expert("small", "http://127.0.0.1:1", max_concurrent=2)
        answerers = Answerers(SimpleNamespace(forget_all_but=set), Metrics(), retry_share=0.0)  # type: ignore[arg-type]
        answerers.update({"small": expert})
        (standing,) = answerers.servers["small"].each
        await standing.slots.take(1.0)
        answerers.update({})
        assert not answerers.servers
        answerers.update({"small": expert})
        assert answerers.servers["small"].each == [standing]
        standing.slots.give_back(0.1)
        answerers.update({})
        answerers.update({"small": expert})
        assert answerers.servers["small"].each != [standing], "of whom nothing is under way, nothing is kept"

    asyncio.run(run())


def test_a_stream_that_has_begun_lets_others_ask_whoever_was_left_alone() -> None:
    async def run() -> None:
        begun = Reply(200, [], b"data: {}", Usage(0, 0, True, ""), SimpleNamespace(close=lambda: None))  # type: ignore[arg-type]
        upstream: Any = SimpleNamespace(forget_all_but=set, ask=AsyncMock(return_value=begun))
        expert, body = Expert("small", "http://127.0.0.1:1"), b'{"model": "small", "messages": []}'
        answerers = Answerers(upstream, Metrics(), retry_share=0.0)
        answerers.update({"small": expert})
        breaker = answerers.servers["small"].each[0].breaker
        for _ in range(5):
            breaker.failure(breaker.enter() or 0)
        breaker._until = 0.0
        assert breaker.state == "half-open"
        call = await answerers.answer([expert], Outgoing(CHAT, {}, parse("chat", body)), lambda _: body)
        assert (breaker.state, breaker.down) == ("closed", False)
        call.end(False)
        assert [good for good, _, _ in breaker._calls] == [False], "and how it ended is told all the same"

    asyncio.run(run())


def test_failures_that_no_breaker_ends_are_told_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("deferral.gateway.standing.monotonic", lambda: now)
    standing = Standing(Expert("small", "http://127.0.0.1:1/v1"))
    limited, unknown, broken = (refused_with(*of) for of in ((429, CHAT, 0.0), (404, "/embeddings", None), (500, CHAT, None)))
    assert limited.rest == 1.0, "right away, for ever, is no rest"
    told = [standing.level_of(failure) for failure in (limited, limited, unknown, broken, broken)]
    now += 31
    told += [standing.level_of(failure) for failure in (limited, unknown, unknown)]
    quiet, loud = logging.DEBUG, logging.WARNING
    assert told == [loud, quiet, loud, loud, loud, loud, loud, quiet]
