"""What each kind of failure means: asked again, blamed, left alone, and what the client is told."""

import asyncio
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, formatdate

import aiohttp
import pytest

from deferral.gateway.answering import Standing, _nobody
from deferral.gateway.experts_file import Expert
from deferral.gateway.upstream import Failure, _refused, _retry_after, _unanswered

CHAT = "/chat/completions"


@pytest.mark.parametrize(
    ("status", "path", "retry_after", "expected"),
    [
        (401, CHAT, None, (502, "upstream_misconfigured", False, True, None)),
        (404, CHAT, None, (502, "upstream_misconfigured", False, True, None)),
        (404, "/embeddings", None, (502, "upstream_misconfigured", False, False, None)),
        (405, "/completions", None, (502, "upstream_misconfigured", False, False, None)),
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
    ):
        for fresh in (False, True):
            failure = _unanswered(error, fresh=fresh)
            assert (failure.status, failure.again, failure.blame) == (status, again, True), error
            disconnected = isinstance(error, aiohttp.ServerDisconnectedError) or type(error) is aiohttp.ClientOSError
            assert failure.stale is (disconnected and not fresh)


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
        assert standing.breaker.state == "closed"
        assert 19 < standing.breaker.wait <= 20
    standing = Standing(Expert("small", "http://127.0.0.1:1"))
    ticket = standing.breaker.enter()
    assert ticket is not None
    standing.blame(asyncio.CancelledError(), ticket, "small")
    assert not standing.breaker.down


def test_the_chosen_one_says_what_kind_of_problem_it_is_and_all_are_named() -> None:
    small, large = (Expert(name, "http://127.0.0.1:1") for name in ("small", "large"))
    slow, broken = Failure(504, "upstream_timeout", "did not answer in time"), Failure(502, "upstream_error", "failed", rest=3.0)
    problem = _nobody([(small, broken), (small, slow), (large, broken)], 3)
    assert (problem.status, problem.code, problem.attempts) == (504, "upstream_timeout", 3)
    assert problem.message == "small failed; small did not answer in time; large failed"
    assert _nobody([(small, broken)], 1).headers == {"retry-after": "3"}
