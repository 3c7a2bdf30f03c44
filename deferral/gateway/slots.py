"""How many requests an expert answers at a time, and how many wait for it."""

import asyncio
import math
from collections import deque

__all__ = ["Full", "Slots"]


class Full(Exception):
    """Nobody more may wait.  `retry_after` in seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class Slots:
    """At most `limit` at a time; beyond that at most `waiting` in a queue, first come, first served."""

    def __init__(self, limit: int, waiting: int) -> None:
        self.limit, self.waiting = limit, waiting
        self.taken = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._mean_s = 1.0

    @property
    def queued(self) -> int:
        """How many wait."""
        return len(self._queue)

    async def take(self, patience: float) -> None:
        """A slot, after at most `patience` seconds; Full otherwise."""
        if self.taken < self.limit and not self._queue:
            self.taken += 1
            return
        if len(self._queue) >= self.waiting:
            raise Full(self._wait())
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            async with asyncio.timeout(patience):
                await turn
        except BaseException as error:
            # A turn that came in the same moment is passed on.
            if turn.done() and not turn.cancelled():
                self._pass_on()
            elif turn in self._queue:
                self._queue.remove(turn)
            if isinstance(error, TimeoutError):
                raise Full(self._wait()) from None
            raise

    def give_back(self, seconds: float) -> None:
        """A slot that was held for so long."""
        self._mean_s += 0.05 * (seconds - self._mean_s)
        self._pass_on()

    def resize(self, limit: int, waiting: int) -> None:
        """Other limits, from the next request on."""
        self.limit, self.waiting = limit, waiting
        while self.taken < self.limit and self._queue:
            self.taken += 1
            self._pass_on()

    def _pass_on(self) -> None:
        while self._queue and self.taken <= self.limit:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.taken -= 1

    def _wait(self) -> float:
        return float(max(1, math.ceil((len(self._queue) + 1) / self.limit * self._mean_s)))
