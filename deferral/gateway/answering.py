"""An answer from somebody: the chosen expert, once more where that is safe, then the next best."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from time import monotonic
from typing import TYPE_CHECKING

from deferral.gateway.breaker import Breaker
from deferral.gateway.experts_file import Expert
from deferral.gateway.failures import Failure
from deferral.gateway.metrics import Metrics
from deferral.gateway.problems import Problem
from deferral.gateway.requests import Asked
from deferral.gateway.retries import RetryBudget, backoff
from deferral.gateway.slots import Full, Slots
from deferral.gateway.upstream import Reply, Upstream

if TYPE_CHECKING:
    from deferral.gateway.tracing import Attempt, Tracing

__all__ = ["ONCE", "Answerers", "Call", "Unanswered", "once_of"]

ONCE = "idempotency-key"

_log = logging.getLogger("deferral.gateway")

# An expert that asks for more patience than this is not waited for.
_PATIENCE = 2.0
_TOLD_ONCE_IN = 30.0


class Standing:
    """How an expert is doing: its breaker, its slots and its queue."""

    def __init__(self, expert: Expert) -> None:
        self.address = (expert.base_url, expert.model)
        self.access = _access(expert)
        self.breaker = Breaker()
        self.slots = Slots(expert.max_concurrent, expert.max_waiting)
        # Until when failures of each code are told no more.
        self._told: dict[str, float] = {}

    def level_of(self, failure: Failure) -> int:
        """How loudly the log is told: what a breaker ends is told each time, anything else may come with every request."""
        # That an expert is down or full is told once by whoever found it so, and not again for each request.
        if failure.stale or failure.code in ("experts_down", "experts_busy", "queue_full"):
            return logging.DEBUG
        if not failure.blame:
            now = monotonic()
            if now < self._told.get(failure.code, 0.0):
                return logging.DEBUG
            self._told[failure.code] = now + _TOLD_ONCE_IN
        return logging.WARNING

    def blame(self, error: BaseException, ticket: int, name: str, key: str = "") -> None:
        """What an attempt for a key that ended with an error says of the expert."""
        breaker = self.breaker
        if not isinstance(error, Failure) or error.stale:
            breaker.leave(ticket)
            return
        was = breaker.state
        if error.blame:
            breaker.failure(ticket, None if error.of_server else key)
        else:
            breaker.leave(ticket)
        if error.rest is not None:
            breaker.rest(error.rest, ticket, limited=error.status == 429)
        if breaker.state != was:
            _log.warning("%s is left alone for %.0f s", name, breaker.wait)


class Call:
    """A reply under way.  It holds a slot, and the breaker waits for its outcome: `end` it; what ended stays as it ended."""

    __slots__ = ("_began", "_ended", "_key", "_standing", "_ticket", "attempts", "expert", "reply", "traced")

    def __init__(
        self,
        expert: Expert,
        reply: Reply,
        standing: Standing,
        ticket: int,
        began: float,
        attempts: int,
        key: str,
        traced: "Attempt | None" = None,
    ) -> None:
        self.expert, self.reply, self.attempts, self._key, self.traced = expert, reply, attempts, key, traced
        self._standing, self._ticket, self._began, self._ended = standing, ticket, began, False

    def end(self, good: bool | None) -> None:
        """The expert did well, did not, or (None) nothing can be said."""
        if self._ended:
            return
        self._ended = True
        breaker = self._standing.breaker
        if self.traced is not None:
            self.traced.end(good)
        if good is None:
            breaker.leave(self._ticket)
        elif good:
            breaker.success(self._ticket, self._key)
        else:
            breaker.failure(self._ticket, self._key)
        self.reply.close()
        self._standing.slots.give_back(monotonic() - self._began)


class Unanswered(Problem):
    """Nobody answered.  `attempts` were made."""

    def __init__(self, attempts: int, status: int, code: str, message: str, retry_after: float | None) -> None:
        super().__init__(status, code, message, retry_after=retry_after)
        self.attempts = attempts


class Answerers:
    """The experts as they are doing, over all reloads."""

    def __init__(self, upstream: Upstream, metrics: Metrics, *, retry_share: float, traces: "Tracing | None" = None) -> None:
        self.upstream, self.metrics, self.traces = upstream, metrics, traces
        self.budget = RetryBudget(retry_share)
        self.standings: dict[str, Standing] = {}
        self._leaving: dict[str, Standing] = {}

    def update(self, experts: Mapping[str, Expert]) -> None:
        """Experts of another file.  One that is where it was goes on as it was, also if it was left out for a while."""
        before, self.standings = {**self._leaving, **self.standings}, {}
        for name, expert in experts.items():
            standing = before.get(name)
            if standing is None or standing.address != (expert.base_url, expert.model):
                standing = Standing(expert)
            elif standing.access != _access(expert):
                # What its server refused was the key of before.
                standing.breaker.begin_anew()
                standing.access = _access(expert)
            standing.slots.resize(expert.max_concurrent, expert.max_waiting)
            self.standings[name] = standing
        self._leaving = {name: each for name, each in before.items() if name not in experts and each.slots.taken}
        self.upstream.forget_all_but(experts)

    def down(self) -> dict[str, float]:
        """The experts that may not be asked now, and for how many seconds."""
        return {name: each.breaker.wait for name, each in self.standings.items() if each.breaker.down}

    def busy(self) -> frozenset[str]:
        """Those of them that only asked for fewer requests."""
        return frozenset(name for name, each in self.standings.items() if each.breaker.busy)

    async def answer(
        self,
        ranking: Sequence[Expert],
        path: str,
        body_for: Callable[[Expert], bytes],
        headers: Mapping[str, str],
        asked: Asked,
        asks: Callable[[Expert | None], None] = lambda expert: None,
        key: str = "",
    ) -> Call:
        """The first reply that can be used, to a request of a key; Unanswered where there is none.

        `asks` is told who has a connection for the request, and None once that expert has answered or failed.
        """
        self.budget.request()
        failures: list[tuple[Expert, Failure]] = []
        attempts = 0
        for expert in ranking:
            # Taken out of the experts file since the decision: what is under way goes on.
            standing = self.standings.get(expert.name) or self._leaving.get(expert.name) or Standing(expert)
            body, addressed = body_for(expert), _addressed(headers, expert)
            for again in (True, False):
                try:
                    ticket = await _entered(standing, expert)
                    attempts += 1
                    call = await self._call(
                        expert,
                        standing,
                        ticket,
                        path,
                        body,
                        addressed,
                        asked,
                        attempts,
                        key=key,
                        fresh=not again,
                        on_connected=partial(asks, expert),
                    )
                    asks(None)
                    return call
                except Failure as failure:
                    asks(None)
                    failures.append((expert, failure))
                    if not failure.stale:
                        self.metrics.failed(expert.name, failure.code)
                    _log.log(standing.level_of(failure), "%s %s (%s)", expert.name, failure.message, failure.code)
                    if not again or not self._worth_again(failure):
                        break
                    if not failure.stale:
                        self.metrics.retried(expert.name)
                        await asyncio.sleep(max(backoff(1), failure.rest or 0.0))
        raise _nobody(failures, attempts)

    def _worth_again(self, failure: Failure) -> bool:
        if failure.stale:
            # Nobody is to blame, and nothing was begun: that is no retry to be counted.
            return True
        return failure.again and (failure.rest or 0.0) <= _PATIENCE and self.budget.take()

    async def _call(
        self,
        expert: Expert,
        standing: Standing,
        ticket: int,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        asked: Asked,
        attempts: int,
        *,
        key: str,
        fresh: bool,
        on_connected: Callable[[], None],
    ) -> Call:
        began = monotonic()
        traced = None if self.traces is None else self.traces.attempt(expert, path, attempts)
        try:
            sent = headers if traced is None else traced.headers(headers)
            reply = await self.upstream.ask(expert, path, body, sent, asked, fresh=fresh, on_connected=on_connected)
            if traced is not None:
                traced.began(reply)
        except BaseException as error:
            if traced is not None:
                traced.failed(error)
            standing.blame(error, ticket, expert.name, key)
            standing.slots.give_back(monotonic() - began)
            raise
        if reply.streamed:
            ticket = standing.breaker.begun(ticket)
        return Call(expert, reply, standing, ticket, began, attempts, key, traced)


def _access(expert: Expert) -> tuple[str | None, str, str]:
    return expert.key, expert.key_header, expert.query


def once_of(name: str, once: str) -> str:
    """What stands for a client's idempotency key, another one under each name: of the client's key, or of an expert."""
    return blake2b(once.encode(), digest_size=16, key=name.encode()[:64]).hexdigest()


def _addressed(headers: Mapping[str, str], expert: Expert) -> Mapping[str, str]:
    """The headers for an expert: another one, at the same provider perhaps, must not be told that this is the same request."""
    if (once := headers.get(ONCE)) is None:
        return headers
    return {**headers, ONCE: once_of(expert.name, once)}


async def _entered(standing: Standing, expert: Expert) -> int:
    """A slot, and a ticket of the breaker."""
    try:
        await standing.slots.take(expert.first_byte_s)
    except Full as full:
        raise Failure(429, "queue_full", "has more requests waiting than it takes", blame=False, rest=full.retry_after) from None
    ticket = standing.breaker.enter()
    if ticket is None:
        standing.slots.give_back(0.0)
        wait = standing.breaker.wait
        if standing.breaker.busy:
            raise Failure(429, "experts_busy", "asks for fewer requests", blame=False, rest=wait)
        raise Failure(503, "experts_down", "is down", blame=False, rest=wait)
    return ticket


def _nobody(failures: Sequence[tuple[Expert, Failure]], attempts: int) -> Unanswered:
    """One problem out of the failures of all who were asked: the last of the chosen one says what kind it is."""
    chosen = failures[0][0]
    last = [failure for expert, failure in failures if expert is chosen][-1]
    message = "; ".join(dict.fromkeys(f"{expert.name} {failure.message}" for expert, failure in failures))
    return Unanswered(attempts, last.status, last.code, message, last.rest)
