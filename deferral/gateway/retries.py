"""When a failed call may be tried again: seldom, and not at once."""

import random

__all__ = ["RetryBudget", "backoff"]

_BURST = 10.0
_FIRST, _LONGEST = 0.1, 2.0


class RetryBudget:
    """A bucket of tokens: each request puts `share` of one in, each retry takes one out; it holds at most 10.

    So an outage multiplies the requests by at most 1 + share, and not by the number of attempts.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._tokens = _BURST if share > 0 else 0.0

    def request(self) -> None:
        """A request came in."""
        if self._tokens < _BURST:
            self._tokens = min(self._tokens + self.share, _BURST)

    def take(self) -> bool:
        """Whether one may be tried again."""
        # Sums of shares fall short of 1 by rounding.
        if self._tokens < 1 - 1e-9:
            return False
        self._tokens -= 1
        return True


def backoff(attempt: int, random_number: float | None = None) -> float:
    """Seconds to wait before the retry number `attempt` (from 1): anything up to 0.1, 0.2, 0.4 ... 2 (full jitter)."""
    drawn = random.random() if random_number is None else random_number
    return drawn * min(_FIRST * 2 ** (attempt - 1), _LONGEST)
