"""What a key has spent, reserved and requested lately, and the refusals when a limit is reached."""

import math
import threading
from array import array
from collections.abc import Callable
from types import TracebackType

from deferral.gateway.keys import Key
from deferral.gateway.windows import Span

__all__ = ["MINUTE", "Account", "Hold", "LastMinute", "Refused", "too_often", "unreadable"]

MINUTE = 60.0


class Refused(Exception):
    """A request that is turned away: HTTP status, code of the error body, message, seconds until it makes sense to come back."""

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after


class Hold:
    """Dollars set aside for a request in flight; `settle` exactly once.

    As a context manager it is settled with what is `spent` already, at first 0, where nobody has settled it.  Where there was no
    account to set them aside in, what is spent goes to the one that there is `later`, if the key has a budget by then.
    """

    def __init__(
        self,
        account: "Account | None",
        dollars: float,
        lock: threading.Lock,
        later: "Callable[[], Account | None]" = lambda: None,
    ) -> None:
        self._account, self._dollars, self._lock, self._later = account, dollars, lock, later
        self.settled, self.spent = False, 0.0

    def settle(self, actual: float) -> None:
        """What the request cost in the end."""
        if self.settled:
            raise RuntimeError("a hold is settled once; this one is")
        if not 0 <= actual < math.inf:
            raise ValueError(f"actual: expected dollars, not negative, got {actual}")
        self.settled = True
        if self._account is not None:
            with self._lock:
                account = self._account
                account.flying -= 1
                # Sums of floats leave dust: with nothing in flight nothing is held.
                account.held = account.held - self._dollars if account.flying else 0.0
                account.spent += actual
        elif (opened := self._later()) is not None:
            with self._lock:
                opened.spent += actual

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.settled:
            self.settle(self.spent)


class Account:
    """What a key has spent and set aside in one window, and may: a request belongs to the window that it was held in.

    `granted`: dollars that this process may spend, `free`: dollars not yet granted to any worker.
    """

    __slots__ = ("flying", "free", "granted", "held", "span", "spent")

    def __init__(self, span: Span, spent: float, granted: float) -> None:
        self.span, self.spent, self.granted = span, spent, granted
        self.held, self.free, self.flying = 0.0, 0.0, 0

    @property
    def unspent(self) -> float:
        """Dollars that are granted, and neither spent nor set aside."""
        return self.granted - self.spent - self.held

    @property
    def left(self) -> float:
        """Dollars that anybody may still spend, as far as this process knows."""
        return self.unspent + self.free


class LastMinute:
    """When requests of the last 60 seconds came, rising.  Plain numbers: a float each takes four times the memory."""

    def __init__(self) -> None:
        self._times, self._gone = array("d"), 0

    def __len__(self) -> int:
        return len(self._times) - self._gone

    def append(self, now: float) -> None:
        self._times.append(max(now, self._times[-1]) if self._times else now)

    def nth_last(self, count: int) -> float:
        return self._times[-count]

    def move_to(self, now: float) -> None:
        """Forget what is a minute old; everything where the clock was set back by more: that would hold for as long."""
        times = self._times
        if times and now < times[-1] - MINUTE:
            self._gone = len(times)
        while self._gone < len(times) and now - times[self._gone] >= MINUTE:
            self._gone += 1
        # With half of them gone, moving the rest to the front costs no more than the steps that led here.
        if 2 * self._gone >= len(times):
            del times[: self._gone]
            self._gone = 0


def too_often(key: Key, wait: float) -> Refused:
    """The refusal of a key that has asked as often as it may, for `wait` seconds."""
    message = f"this key may ask {key.requests_per_minute} times a minute; try again in {math.ceil(wait)} s"
    return Refused(429, "rate_limit_exceeded", message, wait)


def unreadable() -> Refused:
    """The refusal of a key with a limit while nobody can say what is left of it."""
    return Refused(503, "record_unavailable", "what this key has spent cannot be read: the database fails", 1.0)
