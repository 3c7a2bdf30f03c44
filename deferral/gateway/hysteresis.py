"""When a conversation changes its expert: fast up, slow down, and not for less than the change costs.

A conversation begins with the expert that the router would ask for its first request.  A later request is read with all that
came before it: by the expert whom the conversation is with at its price of cached input, by any other at its full price of
input, since a change loses the prompt cache.  Over the price of an error these dollars are errors, as all prices are.  The gain
of another expert is what it saves of the expected cost, reading included.  Where the largest gain exceeds `down`, the
conversation changes to that expert: at once if the quality of its answers alone, less the lost cache, gains more than `up`; else,
since it is mainly cheaper, after `patience` such requests in a row.  A request that is unlike the log changes nothing, since
nothing is known of it.

The router's expected price is taken to be that of a request by itself, as it is where the router was fitted on single requests.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deferral.routing.static import drawn_from

__all__ = ["RULES", "Place", "Rules", "Scored", "begun", "gain", "moved"]


@dataclass(frozen=True)
class Rules:
    """When a conversation changes its expert: margins in errors, patience in requests of the user.

    `follow_up` is the length in characters under which a request follows up the one before; None takes it from the router's
    log, 0 turns it off.
    """

    up: float = 0.01
    down: float = 0.0
    patience: int = 2
    follow_up: int | None = None

    def __post_init__(self) -> None:
        for name in ("up", "down"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name}: expected a margin in errors, 0 or more, got {getattr(self, name)}")
        if self.patience < 1:
            raise ValueError(f"patience: expected 1 or more requests, got {self.patience}")
        if self.follow_up is not None and self.follow_up < 0:
            raise ValueError(f"follow_up: expected a number of characters, 0 or more, got {self.follow_up}")


RULES = Rules()


class Scored(NamedTuple):
    """A request of the user, for E experts: what is expected of them, and what it costs to read what came before, in errors.

    `kept` is the cost of that where the prompt cache holds it, `lost` what is added where the cache does not.
    """

    query: str
    quality: np.ndarray  # (E,)
    cost: np.ndarray  # (E,) inf where it may not be asked
    kept: np.ndarray  # (E,)
    lost: np.ndarray  # (E,)
    known: bool  # not unlike the log


class Place(NamedTuple):
    """Where a conversation is: with whom, and for how many requests in a row a cheaper expert was preferred.

    Where the static mix drew the first expert, there is a place for every draw; `chance` is the draw's probability, and the
    first of the places is the one that was drawn.
    """

    expert: int
    waited: int
    chance: float


def begun(first: Scored, mix: np.ndarray, cheapest_first: np.ndarray, salt: str) -> tuple[Place, ...]:
    """Where a conversation begins.  `mix` (E,) draws where the request is unlike the log."""
    if first.known:
        return (Place(_cheapest(first.cost, cheapest_first), 0, 1.0),)
    drawn = int(drawn_from(mix, [first.query], salt)[0])
    order = [drawn, *(int(member) for member in np.flatnonzero(mix) if member != drawn)]
    return tuple(Place(member, 0, float(mix[member])) for member in order)


def moved(place: Place, turn: Scored, rules: Rules) -> Place:
    """Where a conversation is after one more request."""
    now = place.expert
    if not np.isfinite(turn.cost[now]):
        return place._replace(expert=int(turn.cost.argmin()), waited=0)
    if not turn.known:
        return place
    saved = gain(turn, now)
    best = int(saved.argmax())
    if best == now or saved[best] <= rules.down:
        return place._replace(waited=0)
    better = turn.quality[best] - turn.quality[now] - turn.lost[best]
    if min(better, saved[best]) > rules.up or place.waited + 1 >= rules.patience:
        return place._replace(expert=best, waited=0)
    return place._replace(waited=place.waited + 1)


def gain(turn: Scored, now: int) -> np.ndarray:
    """What is saved by a change to each expert, 0 for staying.  -> (E,)"""
    saved = turn.cost[now] + turn.kept[now] - turn.cost - turn.kept - turn.lost
    saved[now] = 0.0
    return saved


def _cheapest(cost: np.ndarray, cheapest_first: np.ndarray) -> int:
    return int(cheapest_first[cost[cheapest_first].argmin()])
