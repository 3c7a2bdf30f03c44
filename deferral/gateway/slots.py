"""How many requests an expert answers at a time, and how many wait for it."""

import asyncio
import math
from collections import Counter, deque
from collections.abc import Collection
from typing import NamedTuple

__all__ = ["Full", "Slots"]


class Full(Exception):
    """Nobody more may wait.  `retry_after` in seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class _Place(NamedTuple):
    """A place in the queue; smaller numbers came before.  A slot of one of the others will do as well."""

    number: int
    turn: "asyncio.Future[Slots]"
    others: "Collection[Slots]"


class Slots:
    """At most `limit` at a time; beyond that at most `waiting` in a queue.

    No key keeps the others out, however much it asks: a slot that comes free is for the key that holds the fewest, of keys that
    hold none for the one whose last turn is longest ago, and among equals for who came first.  Where the queue is full, the last
    of the key with the most places in it makes room for a key that would still have fewer.
    """

    def __init__(self, limit: int, waiting: int) -> None:
        self.limit, self.waiting = limit, waiting
        self.taken = self.queued = 0
        self._held: Counter[str] = Counter()
        self._queues: dict[str, deque[_Place]] = {}
        self._came = 0
        # Of each key, while anybody waits: who gives back its only slot holds as few as who has had none for long.
        self._turns: dict[str, int] = {}
        self._mean_s = 1.0

    async def take(self, patience: float, key: str = "", others: "Collection[Slots]" = ()) -> "Slots":
        """A slot for a request of a key, after at most `patience` seconds; Full otherwise.

        -> where it is: here, or at one of the others, whichever has one first for who waits here
        """
        if self.taken < self.limit and not self.queued:
            self._enter(key)
            return self
        if self.queued >= self.waiting:
            self._make_room(key)
        self._came += 1
        place = _Place(self._came, asyncio.get_running_loop().create_future(), others)
        self._queues.setdefault(key, deque()).append(place)
        self.queued += 1
        try:
            async with asyncio.timeout(patience):
                return await place.turn
        except BaseException as error:
            if place in self._queues.get(key, ()):
                self._drop(key, place)
            elif not place.turn.cancelled() and place.turn.exception() is None:
                # A turn that came in the same moment is passed on.
                place.turn.result().leave(key)
            if isinstance(error, TimeoutError):
                raise Full(self._wait()) from None
            raise

    def give_back(self, seconds: float, key: str = "") -> None:
        """A slot that was held for so long by a request of this key."""
        self._mean_s += 0.05 * (seconds - self._mean_s)
        self.leave(key)

    def leave(self, key: str) -> None:
        """A slot of a request of this key that was not used."""
        self.taken -= 1
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]
        self._pass_on()

    def let_in(self, others: "Collection[Slots]") -> bool:
        """Whether who waits at one of the others, in the longest queue that will do, has been given a slot that is free here."""
        if self.queued or self.taken >= self.limit:
            return False
        return any(each._next(self) for each in sorted(others, key=lambda each: each.queued, reverse=True))

    def resize(self, limit: int, waiting: int) -> None:
        """Other limits, from the next request on."""
        self.limit, self.waiting = limit, waiting
        self._pass_on()

    def _enter(self, key: str) -> None:
        self.taken += 1
        self._held[key] += 1

    def _pass_on(self) -> None:
        while self.queued and self.taken < self.limit:
            self._next(self)

    def _next(self, at: "Slots") -> bool:
        """Whether there was somebody here to be given a slot there: whoever comes next of those for whom it will do."""
        firsts = []
        for key, queue in self._queues.items():
            for place in queue:
                if at is self or at in place.others:
                    held = self._held[key]
                    firsts.append((held, 0 if held else self._turns.get(key, 0), place.number, key, place))
                    break
        if not firsts:
            return False
        *_, key, place = min(firsts)
        self._drop(key, place)
        if not place.turn.done():
            self._came += 1
            self._turns[key] = self._came
            at._enter(key)
            place.turn.set_result(at)
        return True

    def _make_room(self, key: str) -> None:
        most = max(self._queues, key=lambda each: len(self._queues[each]), default=key)
        if len(self._queues.get(most, ())) <= len(self._queues.get(key, ())) + 1:
            raise Full(self._wait())
        last = self._queues[most][-1]
        self._drop(most, last)
        if not last.turn.done():
            last.turn.set_exception(Full(self._wait()))

    def _drop(self, key: str, place: _Place) -> None:
        self._queues[key].remove(place)
        self.queued -= 1
        if not self._queues[key]:
            del self._queues[key]
        if not self._queues:
            self._turns.clear()

    def _wait(self) -> float:
        return float(max(1, math.ceil((self.queued + 1) / self.limit * self._mean_s)))
