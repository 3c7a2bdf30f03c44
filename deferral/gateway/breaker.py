"""A circuit breaker: an expert that fails again and again is left alone for a while, then tried with one request."""

import time
from collections import deque
from collections.abc import Callable

__all__ = ["Breaker"]

_CALLS = 20
_FAILURES = 5
_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 300.0
# A call of another key shows that the expert is well only if it is this recent: failures that are not counted push no call out
# of the last twenty, so that one of them may be of long ago.
_LATELY = 60.0
# An upstream may ask for more rest than anybody wants to give it.
_LONGEST_REST = 300.0
# Many ask for a second's rest again and again: shorter rests than this are not shown as a state.
_WORTH_SAYING = 5.0


class Breaker:
    """closed: calls go through.  open: none does, for `pause` seconds.  half-open: one does, and its outcome decides.

    It opens when at least 5 of the last 20 calls, and half of them, failed; each time the one call fails, the pause doubles.
    Of a key whose calls fail while another's go well, no more than 4 failures count: they are its own doing.  `rest` leaves the
    expert alone without blaming it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Whether each went well, of which key (None where no request brought its failure about), and when it ended.
        self._calls: deque[tuple[bool, str | None, float]] = deque(maxlen=_CALLS)
        self._until = 0.0  # of an open breaker, or of a rest
        self._pause = _FIRST_PAUSE
        self._open = False
        self._probing = False
        self._resting = self._limited = False
        self._epoch = self._anew = 0

    @property
    def state(self) -> str:
        """ "closed", "resting" for more than some seconds, as it was asked to, "open" or "half-open"."""
        if not self._open:
            return "resting" if self._resting and self.down else "closed"
        return "half-open" if self._clock() >= self._until else "open"

    @property
    def down(self) -> bool:
        """Whether a call would be refused now."""
        return self._probing or (self._until > 0 and self._clock() < self._until)

    @property
    def busy(self) -> bool:
        """Whether a call would be refused now only because the expert asked for fewer."""
        return self._limited and not self._open and self.down

    @property
    def wait(self) -> float:
        """Seconds until a call may be tried again."""
        return max(self._until - self._clock(), 1.0 if self._probing else 0.0)

    def enter(self) -> int | None:
        """A ticket for one call, to be given back to `success`, `failure` or `leave`; None where the call is refused."""
        if self.down:
            return None
        self._probing = self._open
        return self._epoch

    def success(self, ticket: int, key: str = "") -> None:
        """A call of a key was answered.  A call that began before the breaker opened decides nothing."""
        if ticket != self._epoch:
            return
        if self._open:
            self._change(opened=False)
        self._count(True, key)

    def begun(self, ticket: int) -> int:
        """A reply has begun that may take long: enough to close the breaker.  -> the ticket that its end is told with"""
        if not self._probing or ticket != self._epoch:
            return ticket
        self._change(opened=False)
        return self._epoch

    def failure(self, ticket: int, key: str | None = None) -> None:
        """The expert failed a call of a key; None where no request could have brought that about."""
        if ticket != self._epoch:
            return
        if self._open:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._change(opened=True)
            return
        if key is not None and self._own_doing(key):
            return
        self._count(False, key)
        failures = sum(not good for good, _, _ in self._calls)
        if failures >= _FAILURES and 2 * failures >= len(self._calls):
            self._pause = _FIRST_PAUSE
            self._change(opened=True)

    def leave(self, ticket: int) -> None:
        """The call ended without telling anything about the expert: the client left, say."""
        if ticket == self._epoch:
            self._probing = False

    def rest(self, seconds: float, ticket: int, *, limited: bool = False) -> None:
        """The expert asked to be left alone for a while (Retry-After), by a 429 if `limited`."""
        if ticket < self._anew:
            return
        self.leave(ticket)
        self._limited = limited and (self._limited or not self.down)
        self._resting = (self._resting and self.down) or seconds >= _WORTH_SAYING
        self._until = max(self._until, self._clock() + min(seconds, _LONGEST_REST))

    def begin_anew(self) -> None:
        """What was seen so far is of another key, say, and calls under way decide nothing."""
        self._change(opened=False)
        self._anew = self._epoch
        self._until, self._pause, self._resting, self._limited = 0.0, _FIRST_PAUSE, False, False

    def _count(self, good: bool, key: str | None) -> None:
        self._calls.append((good, key, self._clock()))

    def _own_doing(self, key: str) -> bool:
        """Whether enough of a key's failures have been counted, and another's call has gone well since the first, and lately."""
        calls = list(self._calls)
        failed = [place for place, (good, whose, _) in enumerate(calls) if whose == key and not good]
        since = self._clock() - _LATELY
        return len(failed) >= _FAILURES - 1 and any(
            good and whose != key and when >= since for good, whose, when in calls[failed[0] :]
        )

    def _change(self, *, opened: bool) -> None:
        self._open, self._probing = opened, False
        self._epoch += 1
        self._calls.clear()
        if opened:
            # It may have asked for a longer rest.
            self._until = max(self._until, self._clock() + self._pause)
