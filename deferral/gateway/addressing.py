"""Whom a request is for: nobody in particular, so that the router decides, an expert by name, or whoever answered before."""

import math
from collections.abc import Mapping

from sqlalchemy.exc import SQLAlchemyError

from deferral.gateway.aliases import applied
from deferral.gateway.choice import Choice
from deferral.gateway.eligible import Limited, refusal
from deferral.gateway.exchange import Exchange
from deferral.gateway.experts_file import AUTO
from deferral.gateway.generation import Generation
from deferral.gateway.problems import Problem
from deferral.gateway.requests import PREVIOUS, Asked, Hints, hints, parse

__all__ = ["decided", "understood"]

# Without a word from the client, an answer is expected to be this long.
_OUTPUT_TOKENS = 256


async def understood(exchange: Exchange, now: Generation, body: bytes, headers: Mapping[bytes, bytes]) -> tuple[Asked, Hints]:
    """The request that is meant, as the exchange knows it from now on; Problem 4xx where it is none, 503 where nobody can say.

    The name of an alias is what that stands for, and "auto" is whoever gave the response that the request goes on from.
    """
    asked = exchange.asked = parse(exchange.kind, body, now.routed)
    wanted = hints(headers)
    if (alias := now.aliases.get(asked.model)) is not None:
        exchange.named = alias.name
        asked, wanted = applied(alias, asked, wanted)
        exchange.asked = asked
    if asked.previous and asked.model in now.routed:
        asked = exchange.asked = asked._replace(model=await _answered_before(exchange, asked.previous))
    elif asked.previous:
        await _check_previous(exchange, asked.previous)
        asked = exchange.asked = asked._replace(previous="")
    return asked, wanted


async def decided(exchange: Exchange, now: Generation, asked: Asked, wanted: Hints) -> Choice:
    """Who is asked; Problem 4xx where nobody may be, 503 or 429 where those who may are down."""
    if exchange.traced is None:
        return await _choose(exchange, now, asked, wanted)
    with exchange.traced.deciding() as tell:
        choice = await _choose(exchange, now, asked, wanted)
        tell(choice)
        return choice


async def _choose(exchange: Exchange, now: Generation, asked: Asked, wanted: Hints) -> Choice:
    key = exchange.key
    if asked.model in AUTO:
        if exchange.kind == "embeddings":
            message = "model: embeddings of different models do not compare; name an expert"
            raise Problem(400, "auto_not_possible", message, param="model")
        limits, budgeted = exchange.gateway.limits, key.budget is not None
        left, thrift = (limits.left(key), limits.thrift(key)) if budgeted else (None, 1.0)
        answerers = exchange.gateway.answerers
        down = answerers.down()
        limited = Limited(key.experts, left, thrift, down, key.id, answerers.busy() if down else frozenset())
        return await now.decider.choose(asked, wanted, limited, under_way=exchange.gateway.metrics.under_way)
    expert = now.experts.get(asked.model)
    if expert is None or (key.experts is not None and expert.name not in key.experts):
        # An alias does not tell what it stands for.
        named = exchange.named or asked.model
        message = f"model: {named[:100]!r} is no expert that this key may ask; GET /v1/models lists them"
        if asked.previous:
            message = "previous_response_id: the expert that gave that response may not be asked by this key, or is no more"
        raise Problem(404, "model_not_found", message, param="model")
    if reason := refusal(now.decider.experts.get(expert.name, expert), asked, wanted, key.experts):
        raise Problem(400, "expert_not_able", f"{expert.name} may not answer this request: {reason}")
    written = 0 if exchange.kind == "embeddings" else asked.answers * (asked.output_tokens or _OUTPUT_TOKENS)
    price = expert.price(asked.tokens, written)
    reason = "gave the previous response" if asked.previous else "asked for by name"
    return Choice((expert.name,), reason, 1.0, {}, {expert.name: price}, {}, math.nan, "", False)


async def _answered_before(exchange: Exchange, response: str) -> str:
    """The expert that a conversation is with, which it alone remembers."""
    try:
        expert = await exchange.gateway.replies.answered_by(response, key=exchange.key.id)
    except (SQLAlchemyError, TimeoutError):
        raise _record_unavailable() from None
    if not expert:
        raise _no_such_response(response, "; name the expert that gave it as the model")
    return expert


async def _check_previous(exchange: Exchange, response: str) -> None:
    """Problem 400 where an expert is asked by name to go on from what it answered to somebody else."""
    try:
        others = bool(exchange.key.id) and await exchange.gateway.replies.answered_others(response, key=exchange.key.id)
    except (SQLAlchemyError, TimeoutError):
        raise _record_unavailable() from None
    if others:
        raise _no_such_response(response)


def _no_such_response(response: str, advice: str = "") -> Problem:
    message = f"{PREVIOUS}: no response {response[:100]!r} of this key is known{advice}"
    return Problem(400, "previous_response_not_found", message, param=PREVIOUS)


def _record_unavailable() -> Problem:
    message = f"{PREVIOUS}: who gave that response cannot be read, the database fails"
    return Problem(503, "record_unavailable", message, retry_after=1)
