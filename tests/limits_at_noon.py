"""Limits by a clock that a test sets, and records that say what was spent."""

from collections.abc import Sequence
from datetime import UTC, datetime

from deferral.gateway.limits import Limits
from deferral.gateway.windows import time_zone

__all__ = ["NOON", "Clock", "NothingSpent", "Spent", "at", "limits"]

NOON = datetime(2026, 6, 17, 12, tzinfo=UTC).timestamp()


class Clock:
    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class NothingSpent:
    full = False

    def spent(self, key: str, since: float) -> float:
        return 0.0

    def spent_by_key(self, keys: Sequence[str], since: float) -> dict[str, float]:
        return dict.fromkeys(keys, 0.0)


def limits(clock: Clock) -> Limits:
    return Limits(NothingSpent(), clock)  # type: ignore[arg-type]


def at(text: str, zone: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=time_zone(zone)).timestamp()


class Spent:
    """A record that is told what it holds: (time, dollars)."""

    full, trouble = False, ""

    def __init__(self, *rows: tuple[float, float]) -> None:
        self.rows = list(rows)

    def spent(self, key: str, since: float) -> float:
        return sum(dollars for time, dollars in self.rows if time >= since)

    def spent_by_key(self, keys: Sequence[str], since: float) -> dict[str, float]:
        return dict.fromkeys(keys, self.spent("", since))
