"""Whom to ask: hard constraints first, then the router; never on the time of others."""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import numpy as np

from deferral.gateway.choice import Choice, set_aside
from deferral.gateway.conversations import Conversations
from deferral.gateway.drift import Expected
from deferral.gateway.eligible import Limited, eligible, experts_down, merged, served, those_up
from deferral.gateway.experts_file import Expert
from deferral.gateway.hysteresis import RULES, Rules
from deferral.gateway.plans import UNMET, Plans
from deferral.gateway.problems import Problem
from deferral.gateway.requests import Asked, Hints, Setting
from deferral.routing.constraints import Needs
from deferral.routing.decisions import Decision, Decisions
from deferral.routing.encoders import NgramEncoder
from deferral.routing.planning import Plan
from deferral.routing.router import Router
from deferral.routing.static import EXPLORE, draw_of, drawn_from

__all__ = ["Decider"]

# Queries that wait for the worker; the next one is decided by the static mix at once.
_MOST_WAITING = 32
# Queries that are decided in one turn of the event loop.  If a thousand that come in the same moment were, replies that have come
# meanwhile would be read so late that they seem to have timed out.
_TOGETHER = 16
# Conversations that are replayed in one turn.
_CONVERSATIONS = 4
# Seconds from one turn to the next, at least, for each other request under way, and at most: a query decided alone costs a busy
# loop several times what it costs among others.
_APART, _FURTHEST = 0.00075, 0.003


class Decider:
    """One router with the experts of one experts file.  `close` ends its threads.

    With the n-gram encoder, whose work is bounded by its 2,000 characters, queries are decided where they are: a thread would
    compete for the same interpreter lock.  Those of one turn of the event loop are decided together, and with others under way
    a turn waits for company, three milliseconds after the last one at most.
    Any other encoder runs in one worker thread, and after `deadline_s` the static mix decides instead.  With `rules=None` every
    request of a conversation is decided by itself.  `settings` are the operator's own, which no client's keep waiting.
    """

    def __init__(
        self,
        router: Router,
        experts: Mapping[str, Expert],
        *,
        deadline_s: float,
        rules: Rules | None = RULES,
        settings: Iterable[Setting] = (),
    ) -> None:
        self.router, self.deadline_s = router, deadline_s
        names = served(router, experts)
        self.experts = {name: merged(experts[name], router.abilities.get(name)) for name in names}
        self.expected = Expected(names, router.fitted.kind_names, router.fitted.kinds[1])
        self.conversations = None if rules is None else Conversations(router, self.experts, rules)
        self._place = {name: place for place, name in enumerate(router.experts)}
        self._best = max(names, key=lambda name: router.fitted.means[self._place[name]])
        self._at_once = isinstance(router.encoder, NgramEncoder)
        self._plans = Plans(router, settings)
        self._together: deque[tuple[Plan, str, asyncio.Future[Choice]]] = deque()
        self._last_turn = -math.inf
        self._one_of_few = asyncio.Semaphore(_CONVERSATIONS)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="decide")
        self._waiting = 0
        # The first decision loads what later ones find loaded.
        self._decided(router.plan(needs=Needs(allow=frozenset(names))), ["a first query", "and a second"])

    def read(self, asked: Asked) -> Asked:
        """The request as it is scored and kept on record: where it only follows up, with the query that it follows."""
        return asked if self.conversations is None else self.conversations.read(asked)

    async def choose(self, asked: Asked, hints: Hints, limited: Limited, *, under_way: int = 1) -> Choice:
        """Problem 4xx where a constraint leaves nobody or a hint cannot be met, 503 or 429 where those who could answer are down.

        Where what is left of a budget does not do, the choice is of one whom it does not cover.
        `under_way` counts the requests that the gateway has not done with, this one among them.
        """
        able = eligible(self.experts, asked, hints, limited)
        now = those_up(self.experts, able, limited)
        apart = min(_APART * (under_way - 1), _FURTHEST)
        try:
            choice = await self._chosen(able, now, asked, hints, limited, apart)
        except Problem as problem:
            if problem.code != UNMET or now == able:
                raise
            # What cannot be met by anybody is the client's to change; an outage only has to be waited for.
            await self._plans.of(able, hints, limited.thrift)
            why = f"without them the setting cannot be met ({problem.message})"
            raise experts_down(self.experts, able - now, limited, why) from None
        if limited.left is None:
            return choice
        # A cap on the time may have left out some of those who are up.
        dollars = {name: set_aside(self.experts[name], choice, asked) for name in choice.price}
        dear = {name: price for name, price in dollars.items() if price > limited.left}
        if not dear:
            return choice
        if affordable := frozenset(dollars.keys() - dear.keys()):
            # Also where one of these was drawn: the others could not have been, and the propensity has to say so.
            try:
                return await self._chosen(able, affordable, asked, hints, limited, apart)
            except Problem as problem:
                if problem.code != UNMET:
                    raise
        # The budget refuses it, and says when it begins anew.
        return choice._replace(ranking=(min(dear, key=dear.__getitem__),))

    async def _chosen(
        self, able: frozenset[str], now: frozenset[str], asked: Asked, hints: Hints, limited: Limited, apart: float
    ) -> Choice:
        """The choice among those that may be asked now; `able` are those that may be asked at other times."""
        plan = await self._plans.of(now, hints, limited.thrift)
        if self.conversations is not None and (len(asked.turns) > 1 or asked.follows or hints.conversation):
            standing = plan if now == able else await self._plans.of(able, hints, limited.thrift)
            return await self._in_conversation(self.conversations, asked, plan, standing, _named(hints.conversation, limited.key))
        query = asked.query
        if self._at_once:
            return await self._in_turn(plan, query, apart)
        decided = await self._in_worker(lambda: self._decided(plan, [query]))
        decision = decided[0] if decided else self._by_mix(plan, query)[0]
        return self._choice(decision, plan, self._draw(query), fast=decided is None)

    async def _in_conversation(
        self, conversations: Conversations, asked: Asked, plan: Plan, standing: Plan, name: bytes
    ) -> Choice:
        def decided() -> tuple[Decisions, str, float]:
            return conversations.decided(asked, plan, standing, name)

        if self._at_once:
            await self._one_of_few.acquire()
            asyncio.get_running_loop().call_soon(self._one_of_few.release)
            found = decided()
        else:
            found = await self._in_worker(decided)
            if found is None:
                return self._choice(self._by_mix(plan, asked.query)[0], plan, self._draw(asked.query), fast=True)
        decisions, said, draw = found
        choice = self._choice(decisions[0], plan, draw, fast=False)
        if not said:
            return choice
        # The static mix is not what kept the conversation where it is.
        return choice._replace(reason=said if decisions.fallback[0] else f"{said}; {choice.reason}")

    def close(self) -> None:
        """Whoever waits is still decided."""
        self._worker.shutdown(wait=False)
        self._plans.close()

    def _in_turn(self, plan: Plan, query: str, apart: float) -> "asyncio.Future[Choice]":
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Choice] = loop.create_future()
        if not self._together:
            wait = self._last_turn + apart - loop.time()
            if wait > 0:
                loop.call_later(wait, self._turn, loop)
            else:
                loop.call_soon(self._turn, loop)
        self._together.append((plan, query, future))
        return future

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """Decide some of those who wait; the others have the next turn."""
        self._last_turn = loop.time()
        turn = [self._together.popleft() for _ in range(min(_TOGETHER, len(self._together)))]
        if self._together:
            loop.call_soon(self._turn, loop)
        waiting = [(plan, query, future) for plan, query, future in turn if not future.done()]
        for plan in {id(plan): plan for plan, _, _ in waiting}.values():
            same = [(query, future) for of, query, future in waiting if of is plan]
            try:
                decided = self._decided(plan, [query for query, _ in same])
                for decision, (query, future) in zip(decided, same, strict=True):
                    future.set_result(self._choice(decision, plan, self._draw(query), fast=False))
            except Exception as error:
                for _, future in same:
                    if not future.done():
                        future.set_exception(error)

    async def _in_worker(self, work: Callable[[], Any]) -> Any:
        """The result; None where the worker is too busy or the deadline passed."""
        if self._waiting >= _MOST_WAITING:
            return None
        self._waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self._worker, work)
        future.add_done_callback(self._done)
        done, _ = await asyncio.wait([future], timeout=self.deadline_s)
        if not done:
            # If it has not begun, it is dropped.
            future.cancel()
            return None
        return future.result()

    def _done(self, future: asyncio.Future) -> None:
        self._waiting -= 1
        if not future.cancelled():
            # A result that nobody waited for may be an error; it would be reported as never retrieved.
            future.exception()

    def _decided(self, plan: Plan, queries: list[str]) -> list[Decision]:
        router, vectors = self.router, self.router.encoder(queries)
        if len(queries) == 1:
            return [router.decide_one(plan, vectors, queries[0])]
        return list(router.decide(plan, vectors, queries))

    def _by_mix(self, plan: Plan, query: str) -> Decisions:
        """Without looking at more of the query than its length."""
        state = self.router.fitted
        price = state.by_length(np.array([len(query)], float))
        cost = np.where(plan.mask, 1 - state.means + price / plan.price_of_error, np.inf)
        action = drawn_from(plan.mix, [query], self.router.salt)
        why = f"the encoder took longer than {1000 * self.deadline_s:.0f} ms"
        return Decisions(
            self.router.experts, action, state.means[None], price, cost, plan.mix[action], np.array([True]), np.zeros(1),
            plan.price_of_error, why,
        )  # fmt: skip

    def _draw(self, query: str) -> float:
        return draw_of(query, self.router.salt + EXPLORE)

    def _choice(self, decision: Decision, plan: Plan, draw: float, *, fast: bool) -> Choice:
        quality, price, cost = decision.quality, decision.price, decision.cost
        if plan.closed is not None:
            allowed = [name for name, place in self._place.items() if plan.mask[place]]
            quality, price, cost = ({name: of[name] for name in allowed} for of in (quality, price, cost))
        others = sorted((name for name in cost if name != decision.expert), key=cost.__getitem__)
        return Choice(
            (decision.expert, *others), decision.why, decision.propensity, quality, price, cost, plan.price_of_error, self._best,
            fast,
            decision.kind, draw,
        )  # fmt: skip


def _named(name: bytes, key: str) -> bytes:
    """What stands for a conversation of a key; b"" where it has no name."""
    return blake2b(name, digest_size=16, key=key.encode()[:64]).digest() if name else b""
