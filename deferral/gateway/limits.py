"""How often and for how much a key may ask: rate limits and budgets."""

import time
from collections.abc import Callable

from deferral.gateway.keys import Key
from deferral.gateway.record import Record

__all__ = ["Hold", "Limits", "Refused"]


class Refused(Exception):
    """A request that is turned away."""

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after


class Hold:
    """Dollars set aside for a request in flight; `settle` exactly once."""

    def settle(self, actual: float) -> None: ...


class Limits:
    """Rate limits and budgets."""

    def __init__(self, record: Record, clock: Callable[[], float] = time.time) -> None: ...

    def admit(self, key: Key) -> None: ...

    def left(self, key: Key) -> float | None: ...

    def thrift(self, key: Key) -> float: ...

    def hold(self, key: Key, dollars: float) -> Hold: ...
