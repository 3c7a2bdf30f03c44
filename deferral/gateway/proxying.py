"""The paths that are passed through: decide, ask, hand on, put on record."""

import asyncio
import logging
import math
import os
import random
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from time import perf_counter, time
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError
from starlette.types import Receive, Scope, Send

from deferral.gateway.access import problem_of
from deferral.gateway.aliases import applied
from deferral.gateway.answering import ONCE, Call, Unanswered
from deferral.gateway.cascading import AskingFirst, asking_first
from deferral.gateway.deciding import Choice, Limited, refusal, set_aside
from deferral.gateway.experts_file import AUTO, Expert
from deferral.gateway.generation import Generation
from deferral.gateway.keys import ANYONE, Key
from deferral.gateway.limits import Hold, Refused
from deferral.gateway.problems import Problem, error_body
from deferral.gateway.requests import Asked, Hints, Kind, hints, parse, with_stream_usage
from deferral.gateway.rows import DecisionRow
from deferral.gateway.shaping import shaped
from deferral.gateway.state import Gateway
from deferral.gateway.streams import METERS, StreamMeter, WithoutUsage, error_event
from deferral.gateway.upstream import FORWARDED, Failure
from deferral.gateway.usage import Usage
from deferral.gateway.wire import Left, header_map, read_body, send_problem, send_whole

if TYPE_CHECKING:
    from deferral.gateway.tracing import Exchanged

__all__ = ["KINDS", "LONGER", "Proxy"]

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
# Without a word from the client, an answer is expected to be this long.
_OUTPUT_TOKENS = 256
# Of what a client calls a model; more has no place on record, and would fill the memory while rows wait to be written.
_LONGEST_NAME = 200
_LONGEST_REASON = 1000
_CLOSED_BY_CLIENT = 499
# Beyond the time that an expert has for a reply: what its client may take to read the end of it.
LONGER = 60.0
# Ids need no two alike, and are no secret: a key may judge its own responses only.
_ids = random.Random(os.urandom(32))
if hasattr(os, "register_at_fork"):
    # Workers are copies of one process, and must not draw the same ids.
    os.register_at_fork(after_in_child=lambda: _ids.seed(os.urandom(32)))
# A header that the upstream connection would not take must not look like a fault of the upstream.
_PLAIN = re.compile(rb"[ -~]*")
# Of a refusal with status 400: another expert may have a longer window, or know the field.
_UNABLE = re.compile(
    rb"context_length_exceeded|exceed_context_size|maximum context length|unsupported_parameter|unsupported_value", re.IGNORECASE
)
_PREVIOUS = "previous_response_id"
_PRINTABLE = bytes(byte if 32 <= byte < 127 else 32 for byte in range(256))


class Proxy:
    """One of the paths, as an ASGI app."""

    def __init__(self, gateway: Gateway, kind: Kind) -> None:
        self.gateway, self.kind, self.path = gateway, kind, _PATHS[kind]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """From the first byte of a request to the last of its reply; no error leaves it."""
        await Exchange(self, receive, send).run(scope, header_map(scope))


class Exchange:
    """One request and its reply."""

    __slots__ = (
        "arrived", "asked", "asking", "began", "best", "choice", "first", "gateway", "gone", "id", "kept", "key", "kind", "named",
        "over", "path", "receive", "send", "started", "status", "traced", "tries", "watcher",
    )  # fmt: skip

    def __init__(self, proxy: Proxy, receive: Receive, send: Send) -> None:
        self.gateway, self.kind, self.path = proxy.gateway, proxy.kind, proxy.path
        self.receive, self.send = receive, send
        self.arrived, self.began = time(), perf_counter()
        # Rising with time, so that the record's index is appended to and not scattered.
        self.id = f"dfr-{int(1000 * self.arrived):012x}{_ids.getrandbits(48):012x}"
        self.key: Key = ANYONE
        self.asked: Asked | None = None
        self.named = ""
        self.choice: Choice | None = None
        self.first: AskingFirst | None = None
        self.best: Expert | None = None
        self.asking: Expert | None = None
        self.tries = 0
        # started: the client has the first bytes; over: it needs no watching any more; gone: it left.
        self.started = self.over = self.gone = self.kept = False
        self.status = 500
        self.watcher: asyncio.Task | None = None
        self.traced: Exchanged | None = None

    async def run(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        """No error leaves it."""
        gateway = self.gateway
        gateway.metrics.began()
        if gateway.traces is not None:
            self.traced = gateway.traces.request(self.kind, self.path, headers)
        task = asyncio.current_task()
        assert task is not None
        timer: asyncio.TimerHandle | None = None
        try:
            try:
                self.key = gateway.access.client(scope, headers)
                await gateway.limits.admitted(self.key)
                body = await read_body(self.receive, headers, gateway.settings.max_request_bytes)
                timer = asyncio.get_running_loop().call_later(_WATCH_AFTER, self._watch, task)
                await self._serve(body, headers)
            except Refused as refused:
                raise problem_of(refused) from None
        except Problem as problem:
            await self._refuse(problem)
        except Left:
            self.status = _CLOSED_BY_CLIENT
        except asyncio.CancelledError:
            self.status = _CLOSED_BY_CLIENT
            read = Usage(self.asked.tokens if self.asking and self.asked else 0, 0, True, "")
            self._keep(self.asking.name if self.asking else "", read, "cancelled", price=self._sent, attempts=self.tries)
            if not self.gone:
                raise
        except Exception:
            _log.exception("a request failed in the gateway itself (%s)", self.id)
            await self._refuse(Problem(500, "internal_error", f"the gateway failed; its log has the reason, under {self.id}"))
        finally:
            self.over = True
            if timer is not None:
                timer.cancel()
            if self.watcher is not None:
                self.watcher.cancel()
            gateway.metrics.ended(self.kind, self.status)
            if self.traced is not None:
                self.traced.end(self.status)
            # The client has its reply.
            if gateway.shadow is not None and self.choice is not None and self.choice.cost and self.asked is not None:
                gateway.shadow.offer(self.id, self.arrived, self.asked.query, self.choice)

    async def _serve(self, body: bytes, headers: Mapping[bytes, bytes]) -> None:
        gateway, now = self.gateway, self.gateway.current
        asked = self.asked = parse(self.kind, body, now.routed)
        wanted = hints(headers)
        if (alias := now.aliases.get(asked.model)) is not None:
            self.named = alias.name
            asked, wanted = applied(alias, asked, wanted)
            self.asked = asked
        if asked.previous and asked.model in now.routed:
            asked = self.asked = asked._replace(model=await self._previous(asked.previous))
        elif asked.previous:
            await self._check_previous(asked.previous)
            asked = self.asked = asked._replace(previous="")
        if asked.model in AUTO:
            asked = self.asked = now.decider.read(asked)
        began = perf_counter()
        choice = self.choice = await self._decided(now, asked, wanted)
        self.best = now.experts.get(choice.best)
        if asked.model in AUTO:
            gateway.metrics.decided(choice.ranking[0], perf_counter() - began, fast=choice.fast_path)
        ranking = [now.experts[name] for name in choice.ranking]
        forwarded = self._forwarded(headers)
        # An idempotency key promises one request, and not two that differ.
        alone = ONCE in forwarded
        if now.router.cascade is not None and self.kind == "chat" and asked.model in AUTO and not alone:
            left = gateway.limits.left(self.key)
            self.first = asking_first(now, gateway.silence, asked, wanted, choice, body, left)
        with ExitStack() as holds:
            hold = holds.enter_context(await self._held(set_aside(ranking[0], choice, asked)))
            first = self.first

            def ask(experts: Sequence[Expert], body_for: Callable[[Expert], bytes]) -> Awaitable[Call]:
                return gateway.answerers.answer(experts, self.path, body_for, forwarded, asked, self._asks, self.key.id)

            try:
                if first is None:
                    call = await ask(ranking, lambda expert: self._sent_to(expert, asked, body))
                    if call.reply.status == 400 and asked.model in AUTO and _UNABLE.search(call.reply.body):
                        # It is whole, and its expert is free, whatever becomes of this request.
                        call.end(True)
                        others = ranking[ranking.index(call.expert) + 1 :]
                        # For a dearer expert more is set aside, or nobody else is asked: clients can bring this about.
                        if others and await self._set_aside_too(set_aside(others[0], choice, asked), holds):
                            call = await self._instead(call, others, ask, lambda expert: self._sent_to(expert, asked, body))
                else:
                    try:
                        call = await first.answer(ask, asked.query, hold, self.began)
                    finally:
                        choice = self.choice = first.choice
            except asyncio.CancelledError:
                hold.spent += self._sent
                raise
            await self._hand_on(call, asked, choice, hold)

    async def _set_aside_too(self, dollars: float, holds: ExitStack) -> bool:
        """Whether the key has so much more; it is held as long as the rest."""
        try:
            holds.enter_context(await self.gateway.limits.held(self.key, dollars))
        except Refused:
            return False
        return True

    async def _instead(
        self,
        call: Call,
        others: Sequence[Expert],
        ask: Callable[[Sequence[Expert], Callable[[Expert], bytes]], Awaitable[Call]],
        body_for: Callable[[Expert], bytes],
    ) -> Call:
        """The answer of others to what this expert is not able to take; its refusal where they do not answer either."""
        try:
            found = await ask(others, body_for)
        except Unanswered as nobody:
            call.attempts += nobody.attempts
            return call
        if found.reply.status < 300:
            found.attempts += call.attempts
            return found
        found.end(True)
        call.attempts += found.attempts
        return call

    def _asks_for_usage(self, expert: Expert, asked: Asked) -> bool:
        """Whether a stream is to report what its client does not want to know."""
        return expert.stream_usage and asked.stream and not asked.wants_usage and self.kind in ("chat", "completions")

    def _sent_to(self, expert: Expert, asked: Asked, body: bytes) -> bytes:
        sent = shaped(body, expert, self.kind)
        return with_stream_usage(sent, options_there=asked.stream_options) if self._asks_for_usage(expert, asked) else sent

    def _forwarded(self, headers: Mapping[bytes, bytes]) -> dict[str, str]:
        """The client's headers that go on to the expert."""
        found = {name.decode(): value.decode() for name in FORWARDED & headers.keys() if _PLAIN.fullmatch(value := headers[name])}
        if self.key.id and (once := found.get(ONCE)):
            # To the expert all clients are one: what two of them name alike must not be one request.
            found[ONCE] = blake2b(once.encode(), digest_size=16, key=self.key.id.encode()[:64]).hexdigest()
        return found

    def _asks(self, expert: Expert | None) -> None:
        """Who has the request now, and has not begun to answer it."""
        self.asking = expert
        self.tries += expert is not None

    @property
    def _sent(self) -> float:
        """Dollars for what an expert has read of a request that its client did not wait for."""
        return self.asking.price(self.asked.tokens, 0) if self.asking and self.asked else 0.0

    async def _previous(self, response: str) -> str:
        """The expert that a conversation is with, which it alone remembers."""
        try:
            expert = await self.gateway.record.answered_by(response, key=self.key.id)
        except (SQLAlchemyError, TimeoutError):
            raise _record_unavailable() from None
        if not expert:
            raise _no_such_response(response, "; name the expert that gave it as the model")
        return expert

    async def _check_previous(self, response: str) -> None:
        """Problem 400 where an expert is asked by name to go on from what it answered to somebody else."""
        try:
            others = bool(self.key.id) and await self.gateway.record.answered_others(response, key=self.key.id)
        except (SQLAlchemyError, TimeoutError):
            raise _record_unavailable() from None
        if others:
            raise _no_such_response(response)

    async def _held(self, dollars: float) -> Hold:
        """Dollars for one answer, or for two; where they do not do for two, nobody is asked first."""
        limits = self.gateway.limits
        if self.first:
            try:
                return await limits.held(self.key, self.first.dollars)
            except Refused:
                self.first = None
        return await limits.held(self.key, dollars)

    async def _decided(self, now: Generation, asked: Asked, wanted: Hints) -> Choice:
        if self.traced is None:
            return await self._choose(now, asked, wanted)
        with self.traced.deciding() as decided:
            choice = await self._choose(now, asked, wanted)
            decided(choice)
            return choice

    async def _choose(self, now: Generation, asked: Asked, wanted: Hints) -> Choice:
        key = self.key
        if asked.model in AUTO:
            if self.kind == "embeddings":
                message = "model: embeddings of different models do not compare; name an expert"
                raise Problem(400, "auto_not_possible", message, param="model")
            limits, budgeted = self.gateway.limits, key.budget is not None
            left, thrift = (limits.left(key), limits.thrift(key)) if budgeted else (None, 1.0)
            down = self.gateway.answerers.down()
            limited = Limited(key.experts, left, thrift, down, key.id)
            return await now.decider.choose(asked, wanted, limited, under_way=self.gateway.metrics.under_way)
        expert = now.experts.get(asked.model)
        if expert is None or (key.experts is not None and expert.name not in key.experts):
            # An alias does not tell what it stands for.
            named = self.named or asked.model
            message = f"model: {named[:100]!r} is no expert that this key may ask; GET /v1/models lists them"
            if asked.previous:
                message = "previous_response_id: the expert that gave that response may not be asked by this key, or is no more"
            raise Problem(404, "model_not_found", message, param="model")
        if reason := refusal(now.decider.experts.get(expert.name, expert), asked, wanted, key.experts):
            raise Problem(400, "expert_not_able", f"{expert.name} may not answer this request: {reason}")
        written = 0 if self.kind == "embeddings" else asked.answers * (asked.output_tokens or _OUTPUT_TOKENS)
        price = expert.price(asked.tokens, written)
        reason = "gave the previous response" if asked.previous else "asked for by name"
        return Choice((expert.name,), reason, 1.0, {}, {expert.name: price}, {}, math.nan, "", False)

    async def _hand_on(self, call: Call, asked: Asked, choice: Choice, hold: Hold) -> None:
        """The reply of an expert, to the client and on record."""
        reply, expert = call.reply, call.expert
        first_byte_s = perf_counter() - self.began
        if self.traced is not None:
            self.traced.answered(call.traced)
        headers = [*reply.headers, *self._headers(call, choice)]
        self.status = reply.status
        usage, outcome, good = reply.usage, "cancelled", None
        meter = METERS[self.kind]() if reply.streamed else None
        try:
            if meter is not None:
                part = WithoutUsage() if self._asks_for_usage(expert, asked) else None
                outcome = await self._stream(call, headers, meter, part)
                good = True if outcome == "ok" else None if meter.blameless else False
            else:
                outcome, good = "ok" if reply.status < 300 else "error", True
        finally:
            call.end(good)
            if meter is not None:
                usage = meter.usage(asked.tokens)
            tokens = (usage.input_tokens, usage.output_tokens, usage.cached_tokens)
            price = expert.price(*tokens) if reply.status < 300 else 0.0
            hold.settle(price + self._extra)
            self._keep(expert.name, usage, outcome, price=price, first_byte_s=first_byte_s, attempts=self._attempts(call))
        self.over = True
        if reply.streamed:
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            self.started = True
            await send_whole(self.send, reply.status, headers, reply.body)

    async def _stream(
        self, call: Call, headers: list[tuple[bytes, bytes]], meter: StreamMeter, without: WithoutUsage | None
    ) -> str:
        """Bytes as they come, or without a usage that the client did not ask for.  -> the outcome"""
        send, chunk = self.send, call.reply.body
        self.started = True
        # A client that does not read would hold its expert for ever.
        task = asyncio.current_task()
        assert task is not None
        limit = asyncio.get_running_loop().call_later(call.expert.total_s + LONGER, self._give_up, task)
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
            self.gateway.metrics.failed(name, failure.code)
            _log.warning("%s %s (%s, %s)", name, failure.message, failure.code, self.id)
            error = error_body(failure.status, failure.code, f"{name} {failure.message}")
            # The blank line ends an event that was cut in half.
            event = (without.held if without else b"") + b"\n\n" + error_event(self.kind, error)
            await send({"type": "http.response.body", "body": event, "more_body": True})
            return "truncated"
        finally:
            limit.cancel()
        return "ok" if meter.finished else "truncated"

    def _headers(self, call: Call, choice: Choice) -> list[tuple[bytes, bytes]]:
        name = call.expert.name
        reason = choice.reason
        if name != choice.ranking[0]:
            reason = f"{name} in place of {choice.ranking[0]}, which failed; {reason}"
        headers = [
            (b"x-deferral-id", self.id.encode()),
            (b"x-deferral-expert", name.encode()),
            (b"x-deferral-expected-price", b"%.6g" % choice.price.get(name, math.nan)),
            (b"x-deferral-propensity", b"%.6g" % choice.propensity),
            (b"x-deferral-attempts", b"%d" % self._attempts(call)),
            # Headers are ASCII, and a line of them ends where the line ends.
            (b"x-deferral-reason", reason.replace("±", "+-").encode("ascii", "replace").translate(_PRINTABLE)),
        ]
        if name in choice.cost:
            headers.append((b"x-deferral-expected-cost", b"%.6g" % choice.cost[name]))
        if self.first and (row := self.first.row):
            headers += [(b"x-deferral-first", row.first.encode()), (b"x-deferral-cascade", row.ending.encode())]
        return headers

    def _attempts(self, call: Call) -> int:
        """With those at a first answer that is not given."""
        return call.attempts + (self.first.attempts if self.first else 0)

    @property
    def _extra(self) -> float:
        """Dollars for a first answer that is not given."""
        return self.first.row.extra if self.first and self.first.row else 0.0

    async def _refuse(self, problem: Problem) -> None:
        self.status, self.over = problem.status, True
        attempts = problem.attempts if isinstance(problem, Unanswered) else 0
        if self.first:
            attempts += self.first.attempts
        outcome = "error" if attempts or problem.status == 500 else "refused"
        if outcome == "refused":
            self.gateway.metrics.refused(problem.code)
        self._keep("", Usage(0, 0, True, ""), outcome, attempts=attempts, refused=problem.message)
        if not self.started:
            self.started = True
            own = [(b"x-deferral-id", self.id.encode()), (b"x-deferral-attempts", b"%d" % attempts)]
            await send_problem(self.send, problem, own)

    def _keep(
        self,
        expert: str,
        usage: Usage,
        outcome: str,
        *,
        price: float = 0.0,
        first_byte_s: float = math.nan,
        attempts: int = 0,
        refused: str = "",
    ) -> None:
        """Put it on record, once; a request that was refused before it was understood has nothing to keep."""
        asked, choice, gateway, cascade = self.asked, self.choice, self.gateway, self.first.row if self.first else None
        if asked is None or self.kept:
            return
        self.kept = True
        latency = perf_counter() - self.began
        # The same tokens at the best expert's price: what it would have written instead, nobody knows.
        best = self.best if expert and outcome == "ok" and self.status < 300 else None
        best_price = math.nan if best is None else best.price(usage.input_tokens, usage.output_tokens, usage.cached_tokens)
        row = DecisionRow(
            id=self.id,
            time=self.arrived,
            key=self.key.id,
            requested="auto" if asked.model in AUTO else asked.model[:_LONGEST_NAME],
            expert=expert,
            chosen=choice.ranking[0] if choice else "",
            reason="; ".join(filter(None, (choice.reason if choice else "", refused)))[:_LONGEST_REASON],
            propensity=choice.propensity if choice else math.nan,
            expected_quality=choice.quality if choice else {},
            expected_price=choice.price if choice else {},
            expected_cost=choice.cost if choice else {},
            price_of_error=choice.price_of_error if choice else math.nan,
            price=price + self._extra,
            estimated=usage.estimated,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            first_byte_s=first_byte_s,
            latency_s=latency,
            status=self.status,
            outcome=outcome,
            attempts=attempts,
            streamed=asked.stream,
            fast_path=choice.fast_path if choice else False,
            query=asked.query if gateway.settings.store_text else None,
            reply_id=usage.reply_id,
            best_price=best_price,
            cascade=cascade,
            kind=choice.kind if choice else "",
            draw=choice.draw if choice else math.nan,
        )
        if self.traced is None:
            gateway.record.add(row)
        else:
            self.traced.record(row, gateway.record.add)
        if cascade:
            compared = bool(expert) and not math.isnan(best_price)
            gateway.metrics.asked_first(cascade.first, cascade.ending, cascade.extra, compared=compared)
        if expert:
            gateway.metrics.answered(
                expert,
                outcome,
                price=price,
                best_price=best_price,
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
                first_byte_s=first_byte_s,
                latency_s=latency,
            )

    def _watch(self, task: asyncio.Task) -> None:
        self.watcher = asyncio.get_running_loop().create_task(self._left(task))

    async def _left(self, task: asyncio.Task) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        if not self.over:
            self._give_up(task)

    def _give_up(self, task: asyncio.Task) -> None:
        self.gone = True
        task.cancel()


def _no_such_response(response: str, advice: str = "") -> Problem:
    message = f"{_PREVIOUS}: no response {response[:100]!r} of this key is known{advice}"
    return Problem(400, "previous_response_not_found", message, param=_PREVIOUS)


def _record_unavailable() -> Problem:
    message = f"{_PREVIOUS}: who gave that response cannot be read, the database fails"
    return Problem(503, "record_unavailable", message, retry_after=1)
