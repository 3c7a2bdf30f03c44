"""The paths that are passed through: decide, ask, hand on, put on record."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from time import perf_counter

from starlette.types import Receive, Scope, Send

from deferral.gateway.access import problem_of
from deferral.gateway.accounts import Hold, Refused
from deferral.gateway.addressing import decided, understood
from deferral.gateway.answering import ONCE, Call, Outgoing
from deferral.gateway.cascading import Ask, asking_first
from deferral.gateway.choice import Choice, set_aside
from deferral.gateway.exchange import Exchange
from deferral.gateway.experts_file import AUTO, Expert
from deferral.gateway.problems import Problem
from deferral.gateway.relaying import hand_on, refuse
from deferral.gateway.requests import Asked, Hints, Kind
from deferral.gateway.shaping import forwarded, sent_to
from deferral.gateway.standing import Talk
from deferral.gateway.state import Gateway
from deferral.gateway.usage import Usage
from deferral.gateway.wire import Left, header_map, read_body

__all__ = ["KINDS", "Proxy"]

_log = logging.getLogger("deferral.gateway")

_PATHS: dict[Kind, str] = {
    "chat": "/chat/completions",
    "completions": "/completions",
    "embeddings": "/embeddings",
    "responses": "/responses",
}
KINDS = tuple(_PATHS)
# A request is watched for its client's leaving once it has taken this long: most are over by then.
_WATCH_AFTER = 0.05
_CLOSED_BY_CLIENT = 499
# So many characters of its first request tell a conversation from others.
_BEGINNING = 1000
# Of a refusal with status 400: another expert may have a longer window, or know the field.
_UNABLE = re.compile(
    rb"context_length_exceeded|exceed_context_size|maximum context length|unsupported_parameter|unsupported_value", re.IGNORECASE
)


class Proxy:
    """One of the paths, as an ASGI app."""

    def __init__(self, gateway: Gateway, kind: Kind) -> None:
        self.gateway, self.kind, self.path = gateway, kind, _PATHS[kind]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """From the first byte of a request to the last of its reply; no error leaves it."""
        gateway, exchange, headers = self.gateway, Exchange(self.gateway, self.kind, receive, send), header_map(scope)
        gateway.metrics.began()
        if gateway.traces is not None:
            exchange.traced = gateway.traces.request(self.kind, self.path, headers)
        task = asyncio.current_task()
        assert task is not None
        timer: asyncio.TimerHandle | None = None
        try:
            try:
                exchange.key = gateway.access.client(scope, headers)
                await gateway.limits.admitted(exchange.key)
                body = await read_body(exchange.receive, headers, gateway.settings.max_request_bytes)
                timer = asyncio.get_running_loop().call_later(_WATCH_AFTER, exchange.watch, task)
                await self._serve(exchange, body, headers)
            except Refused as refused:
                raise problem_of(refused) from None
        except Problem as problem:
            await refuse(exchange, problem)
        except Left:
            exchange.status = _CLOSED_BY_CLIENT
        except asyncio.CancelledError:
            exchange.status = _CLOSED_BY_CLIENT
            read = Usage(exchange.asked.tokens if exchange.asking and exchange.asked else 0, 0, True, "")
            exchange.keep(
                exchange.asking.name if exchange.asking else "", read, "cancelled", price=exchange.sent, attempts=exchange.tries
            )
            if not exchange.gone:
                raise
        except Exception:
            _log.exception("a request failed in the gateway itself (%s)", exchange.id)
            await refuse(
                exchange, Problem(500, "internal_error", f"the gateway failed; its log has the reason, under {exchange.id}")
            )
        finally:
            exchange.over = True
            if timer is not None:
                timer.cancel()
            if exchange.watcher is not None:
                exchange.watcher.cancel()
            gateway.metrics.ended(self.kind, exchange.status)
            if exchange.traced is not None:
                exchange.traced.end(exchange.status)
            # The client has its reply.
            if gateway.shadow is not None and exchange.choice is not None and exchange.choice.cost and exchange.asked is not None:
                gateway.shadow.offer(exchange.id, exchange.arrived, exchange.asked.query, exchange.choice)

    async def _serve(self, exchange: Exchange, body: bytes, headers: Mapping[bytes, bytes]) -> None:
        gateway, now = self.gateway, self.gateway.current
        asked, wanted = await understood(exchange, now, body, headers)
        talk = _talk(asked, wanted)
        if asked.model in AUTO:
            asked = exchange.asked = now.decider.read(asked)
        began = perf_counter()
        choice = exchange.choice = await decided(exchange, now, asked, wanted)
        exchange.best = now.experts.get(choice.best)
        if asked.model in AUTO:
            gateway.metrics.decided(choice.ranking[0], perf_counter() - began, fast=choice.fast_path)
        ranking = [now.experts[name] for name in choice.ranking]
        outgoing = Outgoing(self.path, forwarded(headers, exchange.key.id), asked, exchange.key.id, talk)
        # An idempotency key promises one request, and not two that differ.
        alone = ONCE in outgoing.headers
        if now.router.cascade is not None and self.kind == "chat" and asked.model in AUTO and not alone:
            left = gateway.limits.left(exchange.key)
            exchange.first = asking_first(now, gateway.silence, asked, wanted, choice, body, left)
        with ExitStack() as holds:
            hold = holds.enter_context(await _held(exchange, set_aside(ranking[0], choice, asked)))
            first = exchange.first

            def ask(experts: Sequence[Expert], body_for: Callable[[Expert], bytes]) -> Awaitable[Call]:
                return gateway.answerers.answer(experts, outgoing, body_for, exchange.asks)

            try:
                if first is None:
                    call = await _by_whoever_can(exchange, ranking, choice, asked, body, ask, holds)
                else:
                    try:
                        call = await first.answer(ask, asked.query, hold, exchange.began)
                    finally:
                        choice = exchange.choice = first.choice
            except asyncio.CancelledError:
                hold.spent += exchange.sent
                raise
            await hand_on(exchange, call, asked, choice, hold)


def _talk(asked: Asked, wanted: Hints) -> Talk | None:
    name = wanted.conversation.decode("latin-1") or (asked.turns[0].query[:_BEGINNING] if asked.turns else "")
    return Talk(name, len(asked.turns) > 1 or bool(wanted.conversation)) if name else None


async def _by_whoever_can(
    exchange: Exchange, ranking: Sequence[Expert], choice: Choice, asked: Asked, body: bytes, ask: Ask, holds: ExitStack
) -> Call:
    """The answer of the chosen expert; where the router chose it and it cannot take the request, that of whoever can."""

    def body_for(expert: Expert) -> bytes:
        return sent_to(expert, asked, exchange.kind, body)

    call = await ask(ranking, body_for)
    if call.reply.status != 400 or asked.model not in AUTO or not _UNABLE.search(call.reply.body):
        return call
    # It is whole, and its expert is free, whatever becomes of this request.
    call.end(True)
    others = ranking[ranking.index(call.expert) + 1 :]
    # For a dearer expert more is set aside, or nobody else is asked: clients can bring this about.
    if not others or not await _set_aside_too(exchange, set_aside(others[0], choice, asked), holds):
        return call
    return await _instead(call, others, ask, body_for)


async def _set_aside_too(exchange: Exchange, dollars: float, holds: ExitStack) -> bool:
    """Whether the key has so much more; it is held as long as the rest."""
    try:
        holds.enter_context(await exchange.gateway.limits.held(exchange.key, dollars))
    except Refused:
        return False
    return True


async def _instead(call: Call, others: Sequence[Expert], ask: Ask, body_for: Callable[[Expert], bytes]) -> Call:
    """The answer of others to what this expert is not able to take; its refusal where they do not answer either."""
    try:
        found = await ask(others, body_for)
    except Problem as nobody:
        # Also where the request cannot be sent to them.
        call.attempts += nobody.attempts
        return call
    if found.reply.status < 300:
        found.attempts += call.attempts
        return found
    found.end(True)
    call.attempts += found.attempts
    return call


async def _held(exchange: Exchange, dollars: float) -> Hold:
    """Dollars for one answer, or for two; where they do not do for two, nobody is asked first."""
    limits = exchange.gateway.limits
    if exchange.first:
        try:
            return await limits.held(exchange.key, exchange.first.dollars)
        except Refused:
            exchange.first = None
    return await limits.held(exchange.key, dollars)
