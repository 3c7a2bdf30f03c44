"""Asking one expert first: whether to, what its answer is worth by its log-probabilities, and whom to ask after it.

For chats that are routed, not streamed, want one answer, and bring neither tools nor pictures; for an expert whose entry in the
experts file says `logprobs = true`, and a router whose cascade pays at the request's price of an error.
"""

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic, perf_counter
from typing import Any

import numpy as np

from deferral.gateway.accounts import Hold
from deferral.gateway.answering import Call, Unanswered
from deferral.gateway.choice import Choice, set_aside
from deferral.gateway.experts_file import Expert
from deferral.gateway.generation import Generation
from deferral.gateway.problems import Problem
from deferral.gateway.requests import Asked, Hints
from deferral.gateway.rows import CascadeRow, Ending
from deferral.gateway.shaping import shaped
from deferral.routing.cascade import Cascade, features
from deferral.routing.confidence import Confidence, confidence_of_reply
from deferral.routing.decisions import AT_RANDOM
from deferral.routing.router import Router
from deferral.routing.static import chances, explored

__all__ = ["ALTERNATIVES", "Ask", "AskingFirst", "Silence", "asking_first"]

_log = logging.getLogger("deferral.gateway")

# How many of the likeliest tokens are reported beside each token of a first answer (top_logprobs).
ALTERNATIVES = 5
_MISSES = 3
_QUIET_S = 300.0

# Experts in the order in which they are asked, and the body for each.
Ask = Callable[[Sequence[Expert], Callable[[Expert], bytes]], Awaitable[Call]]


class Silence:
    """Experts that say they report log-probabilities and do not: after three misses in a row nobody waits for them a while."""

    def __init__(self) -> None:
        self._misses: dict[str, int] = {}
        self._until: dict[str, float] = {}

    def of(self, name: str) -> bool:
        """Whether this expert is not to be asked first now."""
        return monotonic() < self._until.get(name, -math.inf)

    def heard(self, name: str) -> None:
        self._misses.pop(name, None)

    def missed(self, name: str, why: str) -> None:
        self._misses[name] = self._misses.get(name, 0) + 1
        if self._misses[name] >= _MISSES:
            _log.warning("%s is not asked first for %.0f s: it was to answer first %d times, %s", name, _QUIET_S, _MISSES, why)
            self._until[name] = monotonic() + _QUIET_S
            del self._misses[name]


def asking_first(
    now: Generation, silence: Silence, asked: Asked, wanted: Hints, choice: Choice, body: bytes, left: float | None
) -> "AskingFirst | None":
    """How to ask an expert first; None where that is not to be done, by the router's choice alone then.

    It does not depend on whom the router has drawn, so that the draw stays what its propensity says.  `left` are the dollars
    that the key may spend: both answers have to be covered.
    """
    cascade = now.router.cascade
    if cascade is None or asked.stream or asked.tools or asked.images or choice.fast_path or len(choice.ranking) < 2:
        return None
    # A conversation stays where its prompt cache is.
    if len(asked.turns) > 1 or asked.follows or wanted.conversation:
        return None
    # A budget or a floor for many queries, or a cap on the time, was met without a second call.
    if wanted.budget is not None or wanted.min_quality is not None or wanted.max_latency is not None:
        return None
    first, error = now.experts.get(cascade.first), choice.price_of_error
    if first is None or not first.logprobs or first.name not in choice.cost or silence.of(first.name) or cascade.why_not(error):
        return None
    kept = {name: set_aside(now.experts[name], choice, asked) for name in choice.price}
    dollars = kept.pop(first.name) + max(kept.values())
    if left is not None and dollars > left:
        return None
    estimate, price, closed = _columns(cascade, choice, now.router.fitted.means)
    asking, going = cascade.before(estimate, price, error, closed)
    if asking[0] >= going[0]:
        return None
    try:
        request = json.loads(body)
        if request.get("n") not in (None, 1):
            return None
        wanted_by_client = request.get("logprobs") is True
        first_body = shaped(body if wanted_by_client else _with_logprobs(request), first)
    except RecursionError:
        # It could just be read, and lies too deep to be written.
        return None
    return AskingFirst(cascade, now, choice, body, first_body, wanted_by_client, dollars, silence)


@dataclass(slots=True)
class AskingFirst:
    """A request that somebody answers first.  `dollars` are what both answers are expected to cost at most.

    `wanted`: the client itself asks for log-probabilities, so its request goes out, and the reply comes back, untouched.

    After `answer`, also where that fails: `choice` is what was decided in the end, `row` what is to be recorded, `attempts` those
    of calls whose answer is not given.
    """

    cascade: Cascade
    now: Generation
    choice: Choice
    body: bytes
    first_body: bytes
    wanted: bool
    dollars: float
    silence: Silence
    row: CascadeRow | None = None
    attempts: int = 0

    @property
    def first(self) -> Expert:
        """Who is asked first."""
        return self.now.experts[self.cascade.first]

    async def answer(self, ask: Ask, query: str, hold: Hold, began: float) -> Call:
        """The call whose answer is given, of a request that `began` then (`perf_counter`); Unanswered where there is none."""
        first = self.first
        try:
            call = await ask([first], lambda _: self.first_body)
        except Unanswered as nobody:
            self._says("unanswered", "but did not")
            self.attempts += nobody.attempts
            others = [self.now.experts[name] for name in self.choice.ranking if name != first.name]
            return await ask(others, self._plain_body)
        try:
            if call.reply.status >= 300:
                # Perhaps it refuses to report them; perhaps the request is wrong, and then whoever is asked will say so.
                return await self._alone(ask, call, f"but refused, with status {call.reply.status}", 0.0, began)
            usage = call.reply.usage
            hold.spent = first.price(usage.input_tokens, usage.output_tokens, usage.cached_tokens)
            reply = _parsed(call.reply.body)
            sure = confidence_of_reply(reply)
            if not self.wanted:
                call.reply.body = _without_logprobs(reply, call.reply.body)
            if sure is None:
                return await self._alone(ask, call, "and did so without log-probabilities", hold.spent, began)
            self.silence.heard(first.name)
            second = self._judged(sure, query)
            return call if second is None else await self._instead(ask, call, [second], hold.spent, began)
        except BaseException:
            call.end(None)
            raise

    def _judged(self, sure: Confidence, query: str) -> Expert | None:
        """Whom to ask now, None where the answer is kept; `choice` and `row` say so, and why."""
        cascade, choice, router, error = self.cascade, self.choice, self.now.router, self.choice.price_of_error
        estimate, price, closed = _columns(cascade, choice, router.fitted.means)
        actions, quality, cost = cascade.after(features([sure]), estimate, price, error, closed)
        allowed, place, best = np.flatnonzero(~closed), cascade.place, int(actions[0])
        action, propensity = _drawn(router, query, best, ~closed) if router.explore > 0 else (best, 1.0)
        name, kept = cascade.experts[action], action == place
        other = min(float(cost[0, one]) for one in allowed if one != place)
        done = "kept" if kept else f"deferred to {name}"
        reason = (
            f"{cascade.first} answered first, by its log-probabilities with an expected quality of {quality[0, place]:.2f}: "
            f"cost {cost[0, place]:.3f} errors to keep that, {other:.3f} to ask another, at ${error:.3g} an error; "
            f"{done if action == best else f'{done}, {AT_RANDOM}'}"
        )
        others = sorted((one for one in choice.ranking if one != name), key=lambda one: cost[0, cascade.experts.index(one)])
        self.choice = choice._replace(ranking=(name, *others), reason=reason, propensity=propensity)
        self.row = CascadeRow(cascade.first, "kept" if kept else "deferred", 0.0, float(quality[0, place]), tuple(sure))
        return None if kept else self.now.experts[name]

    async def _instead(self, ask: Ask, call: Call, others: list[Expert], spent: float, began: float) -> Call:
        """Another answer; the first where there is none, or none within the time that one expert would have had alone."""
        call.end(True)
        row = self.row
        assert row is not None
        self.row = replace(row, extra=spent)
        patience = max(expert.total_s for expert in (self.first, *others)) - (perf_counter() - began)
        try:
            async with asyncio.timeout(patience):
                found = await ask(others, self._plain_body)
            if found.reply.status < 300:
                self.attempts += call.attempts
                return found
            found.end(True)
            attempts, why = found.attempts, f"refused, with status {found.reply.status}"
        except Problem as nobody:
            # Also where the request cannot be sent to them: an answer is there, and paid for.
            attempts, why = nobody.attempts, "failed"
        except TimeoutError:
            attempts, why = 1, "took too long"
        self.attempts += attempts
        names = " and ".join(expert.name for expert in others)
        self.choice = self.choice._replace(reason=f"{self.choice.reason}; {names} {why}, so the first answer is given")
        self.row = replace(row, ending="failed")
        return call

    async def _alone(self, ask: Ask, call: Call, how: str, spent: float, began: float) -> Call:
        """An answer without log-probabilities says nothing of itself: what the router chose alone holds."""
        first, ranking = self.first.name, self.choice.ranking
        self._says("silent", how)
        if call.reply.status < 300:
            self.silence.missed(first, how)
            better = [self.now.experts[name] for name in ranking[: ranking.index(first)]]
            return await self._instead(ask, call, better, spent, began) if better else call
        call.end(True)
        self.attempts += call.attempts
        found = await ask([self.now.experts[name] for name in ranking], self._plain_body)
        # What is refused by all says nothing of log-probabilities, and one client must not end the asking for the others.
        if found.reply.status < 300:
            self.silence.missed(first, how)
        return found

    def _says(self, ending: Ending, how: str) -> None:
        self.choice = self.choice._replace(reason=f"{self.first.name} was to answer first, {how}; {self.choice.reason}")
        self.row = CascadeRow(self.first.name, ending)

    def _plain_body(self, expert: Expert) -> bytes:
        return shaped(self.body, expert)


def _drawn(router: Router, query: str, best: int, allowed: np.ndarray) -> tuple[int, float]:
    """As the router explores: anyone who may be asked, for a share of the queries, and the probability of what was drawn."""
    drawn = int(explored(allowed, router.explore, [query], router.salt)[0])
    action = best if drawn < 0 else drawn
    return action, float(chances(np.eye(len(allowed))[best], allowed, router.explore)[action])


def _columns(cascade: Cascade, choice: Choice, means: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimates, prices and who may not be asked, in the order of the cascade's experts.  -> (1, E), (1, E), (E,) bool"""
    names = cascade.experts
    estimate = [choice.quality.get(name, float(mean)) for name, mean in zip(names, means, strict=True)]
    price = [choice.price.get(name, 0.0) for name in names]
    return np.array([estimate]), np.array([price]), np.array([name not in choice.cost for name in names])


def _with_logprobs(request: dict[str, Any]) -> bytes:
    return json.dumps({**request, "logprobs": True, "top_logprobs": ALTERNATIVES}).encode()


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _without_logprobs(reply: Any, body: bytes) -> bytes:
    """The reply as it is where nobody asks for log-probabilities; as it came where there are none."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    told = [one for one in choices if isinstance(one, dict) and one.get("logprobs")] if isinstance(choices, list) else []
    if not told:
        return body
    for one in told:
        one["logprobs"] = None
    try:
        return json.dumps(reply, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, RecursionError):
        # Numbers that JSON does not have would be spoiled; the log-probabilities do no harm.
        return body
