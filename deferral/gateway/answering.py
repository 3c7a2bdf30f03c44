"""An answer from somebody: the chosen expert, once more where that is safe, then the next best."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from deferral.gateway.experts_file import Expert
from deferral.gateway.failures import Failure
from deferral.gateway.metrics import Metrics
from deferral.gateway.problems import Problem
from deferral.gateway.requests import Asked
from deferral.gateway.retries import RetryBudget, backoff
from deferral.gateway.standing import UNASKED, Servers, Standing, Talk
from deferral.gateway.upstream import Reply, Upstream

if TYPE_CHECKING:
    from deferral.gateway.tracing import Attempt, Tracing

__all__ = ["ONCE", "Answerers", "Call", "Outgoing", "Unanswered", "once_of"]

ONCE = "idempotency-key"

_log = logging.getLogger("deferral.gateway")


class Outgoing(NamedTuple):
    """What of a request is the same for every expert that it may go to; its body is made for each.  `key` is a key's id."""

    path: str
    headers: Mapping[str, str]
    asked: Asked
    key: str = ""
    talk: Talk | None = None


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
        self._standing.give_back(monotonic() - self._began, self._key)


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
        self.servers: dict[str, Servers] = {}
        self._leaving: dict[str, Servers] = {}

    def update(self, experts: Mapping[str, Expert]) -> None:
        """Experts of another file.  One that is where it was goes on as it was, also if it was left out for a while."""
        before = {**self._leaving, **self.servers}
        self.servers = {name: Servers(expert, before.get(name)) for name, expert in experts.items()}
        for servers in self.servers.values():
            servers.update()
        self._leaving = {name: each for name, each in before.items() if name not in experts and each.under_way}
        self.upstream.forget_all_but([standing.server for each in self.servers.values() for standing in each.each])

    def down(self) -> dict[str, float]:
        """The experts that may not be asked now, and for how many seconds."""
        return {name: each.wait for name, each in self.servers.items() if each.down}

    def busy(self) -> frozenset[str]:
        """Those of them that only asked for fewer requests."""
        return frozenset(name for name, each in self.servers.items() if each.busy)

    async def answer(
        self,
        ranking: Sequence[Expert],
        request: Outgoing,
        body_for: Callable[[Expert], bytes],
        asks: Callable[[Expert | None], None] = lambda expert: None,
    ) -> Call:
        """The first reply that can be used.

        Unanswered where there is none, Problem as `body_for` has it.  `asks` is told who has a connection for the request, and
        None once that expert has answered or failed.
        """
        self.budget.request()
        failures: list[tuple[Expert, Standing, Failure]] = []
        attempts = 0
        for expert in ranking:
            servers = self._servers_of(expert)
            try:
                body = body_for(expert)
            except Problem:
                # Whoever cannot be sent this stands in for nobody.
                if failures:
                    continue
                raise
            standing, fresh = servers.next(talk=request.talk), False
            # At some of them it has only waited.
            tried: list[Standing] = []
            begun: list[Standing] = []
            while standing is not None:
                tried.append(standing)
                try:
                    standing = tried[-1] = await servers.slot(standing, request.key, tried)
                    ticket = standing.enter(request.key)
                    begun.append(standing)
                    attempts += 1
                    call = await self._call(
                        request, body, servers, standing, ticket, attempts, fresh=fresh, on_connected=partial(asks, expert)
                    )
                    asks(None)
                    return call
                except Failure as failure:
                    asks(None)
                    failures.append((expert, standing, failure))
                    if not failure.stale:
                        self.metrics.failed(expert.name, failure.code)
                    shown = servers.shown(standing)
                    _log.log(standing.level_of(failure), "%s %s (%s)", shown, failure.message, failure.code)
                    standing = await self._again(failure, servers, tried, begun, fresh=fresh)
                    fresh = standing is tried[-1]
        raise _nobody(failures, attempts)

    def _servers_of(self, expert: Expert) -> Servers:
        """Where it was when it was chosen, also if another file has it elsewhere by now, or no more."""
        known = self.servers.get(expert.name) or self._leaving.get(expert.name)
        return known if known is not None and known.expert is expert else Servers(expert, known)

    async def _again(
        self, failure: Failure, servers: Servers, tried: Sequence[Standing], begun: Sequence[Standing], *, fresh: bool
    ) -> Standing | None:
        """Which server of the expert is asked after a failure: another one, or where it has no other the same one, once."""
        last, other = tried[-1], servers.next(but=tried)
        if failure.stale and not fresh:
            # Nobody is to blame, and nothing was begun: that is no retry to be counted.
            return other if other and other.free and not last.free else last
        if failure.code in UNASKED:
            # Nothing was begun here either.  Whoever has a full queue had the shortest one: only a free slot is better.
            return None if other is None or (failure.code == "queue_full" and not other.free) else other
        same = len(begun) == 1 and failure.again
        # One address may stand in for another as one expert does for another; breakers end what that multiplies.
        stands_in = other is not None and len({*begun}) == 1
        if not (other or same) or not (stands_in or self.budget.take()):
            return None
        self.metrics.retried(last.server.name)
        if other is None:
            await asyncio.sleep(backoff(1))
        return other or last

    async def _call(
        self,
        request: Outgoing,
        body: bytes,
        servers: Servers,
        standing: Standing,
        ticket: int,
        attempts: int,
        *,
        fresh: bool,
        on_connected: Callable[[], None],
    ) -> Call:
        began = monotonic()
        expert, server, key = servers.expert, standing.server, request.key
        headers = _addressed(request.headers, expert)
        traced = None if self.traces is None else self.traces.attempt(server, request.path, attempts)
        try:
            sent = headers if traced is None else traced.headers(headers)
            reply = await self.upstream.ask(
                server, request.path, body, sent, request.asked, fresh=fresh, on_connected=on_connected
            )
            if traced is not None:
                traced.began(reply)
        except BaseException as error:
            if traced is not None:
                traced.failed(error)
            standing.blame(error, ticket, servers.shown(standing), key)
            standing.give_back(monotonic() - began, key)
            raise
        if reply.streamed:
            ticket = standing.begun(ticket)
        return Call(expert, reply, standing, ticket, began, attempts, key, traced)


def once_of(name: str, once: str) -> str:
    """What stands for a client's idempotency key, another one under each name: of the client's key, or of an expert."""
    return blake2b(once.encode(), digest_size=16, key=name.encode()[:64]).hexdigest()


def _addressed(headers: Mapping[str, str], expert: Expert) -> Mapping[str, str]:
    """The headers for an expert: another one, at the same provider perhaps, must not be told that this is the same request."""
    if (once := headers.get(ONCE)) is None:
        return headers
    return {**headers, ONCE: once_of(expert.name, once)}


def _nobody(failures: Sequence[tuple[Expert, Standing, Failure]], attempts: int) -> Unanswered:
    """One problem out of the failures of all who were asked: the last of the chosen one says what kind it is."""
    chosen = failures[0][0]
    # The last of each of its servers: whichever may be asked first says when that is.
    of_each = {standing: failure for expert, standing, failure in failures if expert is chosen}
    last = [*of_each.values()][-1]
    rest = None if last.rest is None else min(failure.rest for failure in of_each.values() if failure.rest is not None)
    message = "; ".join(dict.fromkeys(f"{expert.name} {failure.message}" for expert, _, failure in failures))
    return Unanswered(attempts, last.status, last.code, message, rest)
