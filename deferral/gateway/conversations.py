"""Who answers the next turn of a conversation: whoever it is with, unless a change pays.

Nothing is stored by default.  The messages of a request hold the user's earlier requests; each is scored as if it were new, and
the rule below is replayed over them, so that every worker and replica decides alike, before and after a restart.  It is replayed
under the settings and abilities that hold now; whoever is down for the moment keeps its place in the past and is passed over at
the end.  Of long conversations the last 5 to 8 requests are replayed, beginning at every fourth, so that the beginning moves
seldom.

A request of fewer characters than nearly all of the log, "and in French?" say, follows up the one before: that one is scored
again, as it is for the results of tools.

Where a client sends its last request alone, the header x-deferral-conversation says to which conversation it belongs.  Where each
one is stays in the memory of the worker, under a hash of the key and the name, no text: at most 4,096 conversations, for an hour
after the last request, and until a restart or a reload.  What is not there is replayed from the messages.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b
from time import monotonic
from typing import NamedTuple

import numpy as np

from deferral.gateway.experts_file import Expert
from deferral.gateway.hysteresis import Place, Rules, Scored, begun, gain, moved
from deferral.gateway.requests import Asked
from deferral.routing.decisions import AT_RANDOM, Decisions
from deferral.routing.fitted import Estimates
from deferral.routing.planning import Plan
from deferral.routing.router import Router
from deferral.routing.static import EXPLORE, chances, draw_of

__all__ = ["Conversations"]

_MOST_TURNS, _STEP = 8, 4
_MOST_SCORES = 4096
_MOST_NAMES = 4096
_KEPT_S = 3600.0
# A follow-up is shorter than all but one in a hundred of the log's queries, and than a line.
_RARE, _LINE = 0.01, 40


class _Held(NamedTuple):
    """A named conversation after its last request: its places before and after that, the hash of it, and who was drawn, how."""

    before: tuple[Place, ...] | None
    after: tuple[Place, ...]
    turn: bytes
    last: int
    propensity: float
    mask: bytes
    draw: float
    until: float


class Conversations:
    """Conversations with the experts of one router."""

    def __init__(self, router: Router, experts: Mapping[str, Expert], rules: Rules) -> None:
        self.router, self.rules = router, rules
        self.follow_up = _short(router) if rules.follow_up is None else rules.follow_up
        served = [experts.get(name) for name in router.experts]
        # Dollars for every token that was read before: out of the prompt cache, and what is added without it.
        self._kept = np.array([0.0 if expert is None else expert.price(1, 0, 1) for expert in served])
        self._lost = np.array([0.0 if expert is None else expert.price(1, 0) for expert in served]) - self._kept
        self._scores: OrderedDict[bytes, tuple[Estimates, str]] = OrderedDict()
        self._held: OrderedDict[bytes, _Held] = OrderedDict()

    def read(self, asked: Asked) -> Asked:
        """The request without what only follows up, and without what is long ago; its query is that of the last turn left."""
        turns = asked.turns
        if len(turns) <= 1:
            return asked
        own = [turn for place, turn in enumerate(turns) if place == 0 or len(turn.query.strip()) >= self.follow_up]
        begin = -(-max(len(own) - _MOST_TURNS, 0) // _STEP) * _STEP
        return asked._replace(query=own[-1].query, turns=tuple(own[begin:]), follows=own[-1] is not turns[-1])

    def decided(self, asked: Asked, plan: Plan, standing: Plan, name: bytes) -> tuple[Decisions, str, float]:
        """Whom to ask, as `Router.decide` says it, why, and the number that exploration drew by.

        `plan` allows whoever may be asked now, `standing` also those who are down for the moment; `name` stands for the
        conversation, b"" where the messages hold it.
        """
        held = self._recalled(name)
        if held is not None:
            return self._recalling(held, asked, plan, standing, name)
        turns = self._scored(asked, standing)
        before, after = None, begun(turns[0], standing.mix, self.router.fitted.cheapest_first, self.router.salt)
        for turn in turns[1:]:
            before, after = after, tuple(moved(place, turn, self.rules) for place in after)
        return self._finished(asked, plan, standing, name, before, after, turns[-1])

    def _recalling(self, held: _Held, asked: Asked, plan: Plan, standing: Plan, name: bytes) -> tuple[Decisions, str, float]:
        """The decision where it is remembered where the conversation is."""
        last = asked.turns[-1]
        [turn] = self._scored(asked._replace(turns=(last,)), standing)
        if _digest(last.query) == held.turn:
            # Asked again, after the results of a tool say: it is where it was.
            return self._finished(asked, plan, standing, name, held.before, held.after, turn)
        if len(last.query.strip()) >= self.follow_up:
            after = tuple(moved(place, turn, self.rules) for place in held.after)
            return self._finished(asked, plan, standing, name, held.after, after, turn)
        if not plan.mask[held.last]:
            follows = asked._replace(follows=True)
            return self._finished(follows, plan, standing, name, held.after, held.after, turn, by_chance=False)
        # Among others than could be asked then, how likely it was to be here now is not known.
        propensity = held.propensity if held.mask == plan.mask.tobytes() else np.nan
        self._remember(name, held._replace(until=monotonic() + _KEPT_S))
        decisions = replace(self._row(plan, turn), actions=np.array([held.last]), propensity=np.array([propensity]))
        return decisions, f"stays with {self.router.experts[held.last]}: the follow-up is short", held.draw

    def _finished(
        self,
        asked: Asked,
        plan: Plan,
        standing: Plan,
        name: bytes,
        before: tuple[Place, ...] | None,
        after: tuple[Place, ...],
        turn: Scored,
        *,
        by_chance: bool = True,
    ) -> tuple[Decisions, str, float]:
        """The decision where the places of the conversation are known.

        Not `by_chance` where it is made because of whom an earlier draw has chosen: how likely it was is not known.
        """
        router = self.router
        decisions = self._row(plan, turn)
        now = turn if plan is standing else turn._replace(cost=np.where(plan.mask, turn.cost, np.inf))
        places: list[Place] = []
        for number, place in enumerate(after):
            previous = place if before is None else before[number]
            if plan.mask[place.expert]:
                places.append(place)
            elif plan.mask[previous.expert]:
                places.append(previous)
            else:
                own = begun(now, plan.mix, router.fitted.cheapest_first, router.salt)
                places += [one._replace(chance=one.chance * place.chance) for one in own]
        usual = np.bincount([place.expert for place in places], [place.chance for place in places], len(router.experts))
        chance = chances(usual, plan.mask, router.explore) if by_chance else np.full(len(router.experts), np.nan)
        chosen = places[0].expert
        draw = draw_of(turn.query, router.salt + EXPLORE)
        said = self._why(asked, turn, plan, chosen, after[0], None if before is None else before[0])
        if draw < router.explore and int(decisions.actions[0]) != chosen:
            said = "" if before is None else f"{AT_RANDOM}, to learn; the conversation stays with {router.experts[chosen]}"
            chosen = int(decisions.actions[0])
        if name:
            digest, until = _digest(turn.query), monotonic() + _KEPT_S
            self._remember(name, _Held(before, after, digest, chosen, float(chance[chosen]), plan.mask.tobytes(), draw, until))
        return replace(decisions, actions=np.array([chosen]), propensity=chance[[chosen]]), said, draw

    def _why(self, asked: Asked, turn: Scored, plan: Plan, chosen: int, after: Place, before: Place | None) -> str:
        """Why the conversation is where it is; "" where the request by itself would have gone there too."""
        names = self.router.experts
        with_whom = (after if before is None else before).expert
        if not plan.mask[with_whom] and (before is not None or asked.follows):
            return f"leaves {names[with_whom]}, which may not be asked now, for {names[chosen]}"
        if asked.follows:
            return f"stays with {names[chosen]}: the follow-up is short"
        if before is None:
            return ""
        saved = gain(turn, with_whom)
        if chosen != with_whom:
            return f"leaves {names[with_whom]} for {names[chosen]}: it saves {saved[chosen]:.3f} errors"
        if not turn.known:
            return f"stays with {names[chosen]}: the request is unlike the log"
        if after.waited:
            best, waited = int(saved.argmax()), f"for {after.waited} of {self.rules.patience} requests"
            return f"stays with {names[chosen]}: {names[best]} would save {saved[best]:.3f} errors, {waited}"
        best = int(turn.cost.argmin())
        saves = turn.cost[chosen] - turn.cost[best]
        if saves <= 0:
            return ""
        return (
            f"stays with {names[chosen]}: {names[best]} would save {saves:.3f} errors, a change costs {saves - saved[best]:.3f}"
        )

    def _scored(self, asked: Asked, plan: Plan) -> list[Scored]:
        """The turns, each scored as if it were a request by itself."""
        queries = [turn.query for turn in asked.turns]
        estimated, _ = self._estimated(queries)
        decisions = self.router.decide_estimated(plan, estimated, queries)
        tokens = np.array([turn.before for turn in asked.turns], float)[:, None]
        kept, lost = (tokens * dollars / plan.price_of_error for dollars in (self._kept, self._lost))
        # What is estimated beyond 1 is no better than 1.
        shown = np.clip(estimated.quality, 0, 1)
        return [
            Scored(query, shown[row], decisions.cost[row], kept[row], lost[row], not decisions.fallback[row])
            for row, query in enumerate(queries)
        ]

    def _estimated(self, queries: list[str]) -> tuple[Estimates, list[str]]:
        """What `Fitted` says of turns, and their kinds; from memory where one was scored before: figures, by a hash."""
        found, fitted = [], self.router.fitted
        for query in queries:
            key = _digest(query)
            one = self._scores.get(key)
            if one is None:
                # One at a time: in a batch sums are rounded otherwise, and others would not decide alike to the last digit.
                vectors = self.router.encoder([query])
                one = (fitted.estimate(vectors), fitted.kinds_of(vectors)[0])
            self._scores[key] = one
            self._scores.move_to_end(key)
            found.append(one)
        while len(self._scores) > _MOST_SCORES:
            self._scores.popitem(last=False)
        estimates, kinds = zip(*found, strict=True)
        return Estimates(*(np.concatenate(parts) for parts in zip(*estimates, strict=True))), list(kinds)

    def _row(self, plan: Plan, turn: Scored) -> Decisions:
        estimated, kinds = self._estimated([turn.query])
        return replace(self.router.decide_estimated(plan, estimated, [turn.query]), kinds=kinds)

    def _recalled(self, name: bytes) -> _Held | None:
        held = self._held.get(name) if name else None
        return held if held is not None and held.until > monotonic() else None

    def _remember(self, name: bytes, held: _Held) -> None:
        self._held[name] = held
        self._held.move_to_end(name)
        while len(self._held) > _MOST_NAMES:
            self._held.popitem(last=False)


def _short(router: Router) -> int:
    """The length in characters below which a request is shorter than nearly all of the log."""
    lengths = [len(text) for text in router.fitted.texts]
    return min(int(np.quantile(lengths, _RARE)), _LINE) if lengths else _LINE


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
