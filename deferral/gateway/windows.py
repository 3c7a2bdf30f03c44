"""Calendar windows of a budget: the hour, day, week or month that an instant lies in, in a named time zone."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Literal, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

__all__ = ["QUARTER", "WINDOWS", "Span", "WindowName", "minute_of", "span", "time_zone", "with_article"]

WindowName = Literal["hour", "day", "week", "month"]
WINDOWS: tuple[WindowName, ...] = get_args(WindowName)


@dataclass(frozen=True, slots=True)
class Span:
    """start <= time < end, in seconds since 1970."""

    start: float
    end: float

    def __contains__(self, time: float) -> bool:
        return self.start <= time < self.end


def span(window: WindowName, time: float, zone: tzinfo) -> Span:
    """The calendar window that holds `time`.  Weeks begin on Monday; a day lasts 23 or 25 hours where the clock is changed.

    An hour lasts an hour, also where the clock is changed.
    """
    local = datetime.fromtimestamp(time, zone)
    if window == "hour":
        start = time - local.minute * 60 - local.second - local.microsecond / 1e6
        return Span(round(start), round(start) + 3600)
    midnight = datetime(local.year, local.month, local.day)
    if window == "day":
        first, after = midnight, midnight + timedelta(days=1)
    elif window == "week":
        first = midnight - timedelta(days=midnight.weekday())
        after = first + timedelta(days=7)
    elif window == "month":
        first = midnight.replace(day=1)
        after = (first + timedelta(days=31)).replace(day=1)
    else:
        raise ValueError(f"window: expected one of {', '.join(WINDOWS)}, got {window!r}")
    # Of a midnight that comes twice the first is meant; one that is left out is the instant of the change.
    return Span(first.replace(tzinfo=zone).timestamp(), after.replace(tzinfo=zone).timestamp())


# Windows of budgets, days and months begin on a quarter of an hour in every time zone.
QUARTER = 900


def time_zone(name: str) -> tzinfo:
    """The time zone of a name of the IANA database, "Europe/Berlin"; "UTC" needs no database."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(
            f"time zone: expected a name such as UTC or Europe/Berlin, got {name!r}; a system without time zones needs "
            "`pip install tzdata`"
        ) from error


def with_article(window: str) -> str:
    """As a budget is named: so much an hour, or a day."""
    return f"{'an' if window == 'hour' else 'a'} {window}"


def minute_of(time: float) -> str:
    """An instant, in seconds since 1970, as it is shown."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")
