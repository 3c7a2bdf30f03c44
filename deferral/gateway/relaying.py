"""What a client gets: the reply of an expert, every byte of it as it comes, or why there is none."""

import asyncio
import logging
from time import perf_counter

from deferral.gateway.accounts import Hold
from deferral.gateway.answering import Call
from deferral.gateway.choice import Choice
from deferral.gateway.exchange import Exchange
from deferral.gateway.failures import Failure
from deferral.gateway.problems import Problem, error_body
from deferral.gateway.requests import Asked
from deferral.gateway.shaping import asks_for_usage
from deferral.gateway.streams import METERS, StreamMeter, WithoutUsage, error_event
from deferral.gateway.usage import Usage
from deferral.gateway.wire import send_problem, send_whole

__all__ = ["LONGER", "hand_on", "refuse"]

_log = logging.getLogger("deferral.gateway")

# Beyond the time that an expert has for a reply: what its client may take to read the end of it.
LONGER = 60.0


async def hand_on(exchange: Exchange, call: Call, asked: Asked, choice: Choice, hold: Hold) -> None:
    """The reply of an expert, to the client and on record."""
    reply, expert = call.reply, call.expert
    first_byte_s = perf_counter() - exchange.began
    if exchange.traced is not None:
        exchange.traced.answered(call.traced)
    headers = [*reply.headers, *exchange.headers(call, choice)]
    exchange.status = reply.status
    usage, outcome, good = reply.usage, "cancelled", None
    meter = METERS[exchange.kind]() if reply.streamed else None
    try:
        if meter is not None:
            part = WithoutUsage() if asks_for_usage(expert, asked, exchange.kind) else None
            outcome = await _stream(exchange, call, headers, meter, part)
            good = True if outcome == "ok" else None if meter.blameless else False
        else:
            outcome, good = "ok" if reply.status < 300 else "error", True
    finally:
        call.end(good)
        if meter is not None:
            usage = meter.usage(asked.tokens)
        tokens = (usage.input_tokens, usage.output_tokens, usage.cached_tokens)
        price = expert.price(*tokens) if reply.status < 300 else 0.0
        hold.settle(price + exchange.extra)
        exchange.keep(expert.name, usage, outcome, price=price, first_byte_s=first_byte_s, attempts=exchange.attempts(call))
    exchange.over = True
    if reply.streamed:
        await exchange.send({"type": "http.response.body", "body": b"", "more_body": False})
    else:
        exchange.started = True
        headers.append((b"x-deferral-price", b"%.6g" % (price + exchange.extra)))
        await send_whole(exchange.send, reply.status, headers, reply.body)


async def _stream(
    exchange: Exchange, call: Call, headers: list[tuple[bytes, bytes]], meter: StreamMeter, without: WithoutUsage | None
) -> str:
    """Bytes as they come, or without a usage that the client did not ask for.  -> the outcome"""
    send, chunk = exchange.send, call.reply.body
    exchange.started = True
    # A client that does not read would hold its expert for ever.
    task = asyncio.current_task()
    assert task is not None
    limit = asyncio.get_running_loop().call_later(call.expert.total_s + LONGER, exchange.give_up, task)
    try:
        await send({"type": "http.response.start", "status": call.reply.status, "headers": headers})
        meter.feed(chunk)
        await send({"type": "http.response.body", "body": without.part(chunk) if without else chunk, "more_body": True})
        async for chunk in call.reply.rest():
            meter.feed(chunk)
            if without is not None and not (chunk := without.part(chunk)):
                continue
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        if without is not None and without.held:
            await send({"type": "http.response.body", "body": without.held, "more_body": True})
    except Failure as failure:
        name = call.expert.name
        exchange.gateway.metrics.failed(name, failure.code)
        _log.warning("%s %s (%s, %s)", name, failure.message, failure.code, exchange.id)
        error = error_body(failure.status, failure.code, f"{name} {failure.message}")
        # The blank line ends an event that was cut in half.
        event = (without.held if without else b"") + b"\n\n" + error_event(exchange.kind, error)
        await send({"type": "http.response.body", "body": event, "more_body": True})
        return "truncated"
    finally:
        limit.cancel()
    return "ok" if meter.finished else "truncated"


async def refuse(exchange: Exchange, problem: Problem) -> None:
    """Why there is no reply, to the client and on record."""
    exchange.status, exchange.over = problem.status, True
    attempts = problem.attempts
    if exchange.first:
        attempts += exchange.first.attempts
    if not attempts and problem.status != 500:
        exchange.gateway.metrics.refused(problem.code)
    # That nobody is there to be asked is no fault of the client's.
    outcome = "error" if attempts or problem.status >= 500 else "refused"
    exchange.keep("", Usage(0, 0, True, ""), outcome, attempts=attempts, refused=problem.message)
    if not exchange.started:
        exchange.started = True
        own = [(b"x-deferral-id", exchange.id.encode()), (b"x-deferral-attempts", b"%d" % attempts)]
        await send_problem(exchange.send, problem, own)
